"""The command line: what each command promises, and one sentence with exit status 2 for what a person can mend."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile

from vit3d.arguments import launched, root_of
from vit3d.cli import main
from vit3d.results import refuse_foreign, write_review
from vit3d.tree import NeuronTree, read_swc, write_swc
from vit3d.volume import Volume, read_volume, write_volume

SPACING = (1.0, 0.5, 0.5)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    """A tiny network that has learned nothing, and is unsure everywhere: so there are trees."""
    from vit3d import ViT3DConfig, ViT3DForNeuronSegmentation

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViT3DConfig(**sizes, fused_layers=(1, 2), volume_size=(8, 32, 32), patch_size=(4, 8, 8))
    folder = tmp_path_factory.mktemp("checkpoint")
    network = ViT3DForNeuronSegmentation(config)
    network.head.classifier.bias.data.zero_()
    network.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def vit3d(capsys):
    """Run a command here: (exit status, what it prints, what it complains)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return stopped.value.code or 0, *capsys.readouterr()

    return run


def process(*arguments, code="from vit3d.cli import main; main()", **variables):
    """Run a command as a person does."""
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, **variables}, timeout=120)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_refused(result, sentence: str):
    """Exit status 2, one sentence on stderr that says this, and no traceback."""
    status, _, complaint = result
    said = [line for line in complaint.splitlines() if line.startswith("vit3d: ")]
    assert status == 2
    assert len(said) == 1, complaint
    assert re.search(sentence, said[0]), said[0]
    assert "Traceback" not in complaint


def stack(shape=(12, 40, 96)) -> np.ndarray:
    """A straight neurite along x, 3 x 3 voxels thick, from 8 to 88, in a dark stack."""
    voxels = np.zeros(shape, np.uint8)
    voxels[5:8, 19:22, 8:89] = 200
    return voxels


def written(path: Path, voxels=None, spacing=SPACING) -> Path:
    write_volume(Volume(stack() if voxels is None else voxels, spacing), path)
    return path


def line_swc(path: Path) -> Path:
    """A neurite of 30 um along x."""
    points = np.array([[4, 5, x] for x in range(2, 33)], float)
    write_swc(NeuronTree(points, np.full(31, 0.5), np.arange(31) - 1, spacing_um=SPACING), path)
    return path


# ------------------------------------------------------------ stacks that are none


def truncated_tiff(path: Path, compression) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (12, 40, 48)).astype(np.uint8)
    tifffile.imwrite(path, noise, compression=compression, metadata={"axes": "ZYX"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    return path


def absurd_tiff(path: Path) -> Path:
    """Two pages of 16 x 16 that say they are 2^20 x 2^20."""
    tifffile.imwrite(path, np.ones((2, 16, 16), np.uint8), metadata=None, compression="zlib")
    data = path.read_bytes()
    for tag in (256, 257, 278):  # width, length, rows per strip
        for told in (struct.pack("<HHIHxx", tag, 3, 1, 16), struct.pack("<HHII", tag, 4, 1, 16)):
            data = data.replace(told, struct.pack("<HHII", tag, 4, 1, 1 << 20))
    path.write_bytes(data)
    return path


def vaa3d(path: Path, key: bytes, sizes: tuple[int, ...], body: bytes) -> Path:
    path.write_bytes(key + b"L" + struct.pack("<h4i", 1, *sizes) + body)
    return path


def damaged(voxels: np.ndarray, value: float) -> np.ndarray:
    voxels = voxels.astype(np.float32)
    voxels[3, 4, 5] = value
    return voxels


def raw_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


RAW, PBD = b"raw_image_stack_by_hpeng", b"v3d_volume_pkbitdf_encod"
RGB = np.zeros((4, 16, 16, 3), np.uint8)
BAD_STACKS = {
    "missing": (lambda folder: folder / "none.tif", "does not exist"),
    "empty": (lambda folder: raw_bytes(folder / "a.tif", b""), "is empty"),
    "no image": (lambda folder: raw_bytes(folder / "a.tif", b"hello, this is no image at all"), "is not a TIFF"),
    "unknown type": (lambda folder: raw_bytes(folder / "a.jpg", b"jpg"), "unknown type .jpg"),
    "vendor's": (lambda folder: raw_bytes(folder / "a.czi", b"czi"), "bfconvert"),
    "truncated raw": (lambda folder: truncated_tiff(folder / "a.tif", None), "cut short|incomplete|damaged"),
    "truncated deflate": (lambda folder: truncated_tiff(folder / "a.tif", "zlib"), "cut short|incomplete|damaged"),
    "truncated zstd": (lambda folder: truncated_tiff(folder / "a.tif", "zstd"), "cut short|incomplete|damaged"),
    "absurd header": (lambda folder: absurd_tiff(folder / "a.tif"), "GiB of memory are free"),
    "short v3draw": (
        lambda folder: vaa3d(folder / "a.v3draw", RAW, (9, 9, 9, 1), bytes(700)),
        "has 743",
    ),
    "long v3draw": (lambda folder: vaa3d(folder / "a.v3draw", RAW, (9, 9, 9, 1), bytes(800)), "has 843"),
    "short v3dpbd": (lambda folder: vaa3d(folder / "a.v3dpbd", PBD, (9, 9, 9, 1), bytes([137, 9])), "ends before"),
    "long v3dpbd": (lambda folder: vaa3d(folder / "a.v3dpbd", PBD, (3, 1, 2, 1), bytes([255, 9])), "holds more"),
    "absurd v3dpbd": (
        lambda folder: vaa3d(folder / "a.v3dpbd", PBD, (60000, 60000, 600, 1), bytes([255, 9])),
        "GiB of memory are free",
    ),
    "2D": (lambda folder: _imwrite(folder / "a.tif", np.zeros((40, 48), np.uint8)), "2D image"),
    "RGB": (lambda folder: _imwrite(folder / "a.tif", RGB, photometric="rgb"), "channels .RGB.*--channel 0"),
    "NaN": (lambda folder: _imwrite(folder / "a.tif", damaged(stack(), np.nan)), "NaN or infinite"),
    "infinite": (lambda folder: _imwrite(folder / "a.tif", damaged(stack(), np.inf)), "NaN or infinite"),
}


def _imwrite(path: Path, voxels, **options) -> Path:
    tifffile.imwrite(path, voxels, **options)
    return path


@pytest.mark.parametrize("what", BAD_STACKS)
def test_a_bad_stack_is_refused_in_one_sentence_by_every_command_that_reads_one(vit3d, tmp_path, checkpoint, what):
    make, sentence = BAD_STACKS[what]
    (tmp_path / "in").mkdir()
    path, out = make(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    before = files(tmp_path)
    assert_refused(vit3d("trace", path, out / "a.swc"), sentence)
    assert_refused(vit3d("segment", path, out / "a.tif", "--model", checkpoint), sentence)
    assert_refused(vit3d("reconstruct", path, "--out", out, "--model", checkpoint), sentence)
    assert files(tmp_path) == before


def test_a_channel_is_chosen_by_its_number(vit3d, tmp_path):
    rgb = np.stack([np.zeros_like(stack()), stack(), np.zeros_like(stack())], axis=-1)
    path = _imwrite(tmp_path / "a.tif", rgb, photometric="rgb")
    status, _, _ = vit3d("trace", path, tmp_path / "a.swc", "--channel", 1)
    assert status == 0
    assert len(read_swc(tmp_path / "a.swc")) > 5


@pytest.mark.slow
@pytest.mark.parametrize("what", ["missing", "truncated zstd", "absurd header", "NaN"])
def test_a_real_process_refuses_a_bad_stack_too(tmp_path, what):
    make, sentence = BAD_STACKS[what]
    path = make(tmp_path)
    before = files(tmp_path)
    done = process("trace", path, tmp_path / "a.swc")
    assert_refused((done.returncode, done.stdout, done.stderr), sentence)
    assert len(done.stderr.splitlines()) == 1
    assert files(tmp_path) == before


def test_one_damaged_chunk_among_many_is_told_in_one_line(tmp_path):
    path = written(tmp_path / "a.zarr", np.random.default_rng(0).integers(0, 255, (128, 256, 256), np.uint8))
    shard = path / "0/c/0/0/0"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    run = process("trace", path, tmp_path / "a.swc")  # what is still being read complains as the process ends
    assert (run.returncode, len(run.stderr.splitlines())) == (2, 1), run.stderr
    assert re.search(r"a\.zarr/0 cannot be read .*checksum", run.stderr)


# ------------------------------------------------------------ flags that do not fit


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--spacing", "1,2"), "--spacing takes three positive numbers"),
        (("--spacing", "1,0,1"), "--spacing takes three positive numbers"),
        (("--spacing", "1,nan,1"), "--spacing takes three positive numbers"),
        (("--crop", "0:5,0:5"), "--crop takes z0:z1"),
        (("--crop", "5:2,0:9,0:9"), "is empty"),
        (("--crop", "50:60,0:9,0:9"), "is empty"),
        (("--threshold", "high"), "--threshold takes a number"),
        (("--threshold", "nan"), "--threshold takes a number"),
        (("--swc-unit", "mm"), "--swc-unit takes um or voxel"),
        (("--memory-budget", "inf"), "--memory-budget takes GiB"),
        (("--memory-budget", "0"), "--memory-budget takes GiB"),
    ],
)
def test_a_flag_that_does_not_fit_is_refused_before_the_work(vit3d, tmp_path, checkpoint, flags, sentence):
    path = written(tmp_path / "a.tif")
    before = files(tmp_path)
    assert_refused(vit3d("trace", path, tmp_path / "a.swc", *flags), sentence)
    assert_refused(vit3d("reconstruct", path, "--out", tmp_path / "o", "--model", checkpoint, *flags), sentence)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--root", "1,2"), "--root takes X,Y,Z"),
        (("--root", "1,2,300"), "outside"),
        (("--root", "nan,2,3"), "outside"),
        (("--root", "none.marker"), "none.marker: No such file"),
        (("--polarity", "grey"), "--polarity takes bright or dark"),
        (("--step-um", "-1"), "step_um"),
    ],
)
def test_a_flag_of_trace_that_does_not_fit_is_refused(vit3d, tmp_path, flags, sentence):
    path = written(tmp_path / "a.tif")
    assert_refused(vit3d("trace", path, tmp_path / "a.swc", *flags), sentence)
    assert files(tmp_path) == {"a.tif"}


def test_a_stack_scaled_to_1_is_traced_as_grey_levels_where_that_is_said(vit3d, tmp_path, checkpoint):
    grey, scaled = written(tmp_path / "grey.tif"), tmp_path / "scaled.tif"
    stated = read_volume(grey)
    write_volume(Volume(stated.voxels.astype(np.float32) / 255, stated.spacing_um), scaled)
    assert vit3d("trace", grey, tmp_path / "grey.swc")[0] == 0
    assert vit3d("trace", scaled, tmp_path / "scaled.swc", "--threshold", "intensity")[0] == 0
    points = [read_swc(tmp_path / f"{name}.swc").points for name in ("grey", "scaled")]
    np.testing.assert_allclose(*points, atol=1e-3)
    refused = vit3d("reconstruct", grey, "--out", tmp_path / "o", "--model", checkpoint, "--threshold", "intensity")
    assert_refused(refused, "--threshold takes a number")


@pytest.mark.parametrize("offset", [0, 1000, -300])
def test_a_mask_leaves_the_threshold_of_a_raw_stack_alone(vit3d, tmp_path, offset):
    """What a mask blanks is no background: a threshold found there would take the noise inside for neurites."""
    grey = stack().astype(np.int16) + np.random.default_rng(0).normal(20, 3, stack().shape).astype(np.int16) + offset
    path, inside = written(tmp_path / "a.tif", grey), np.zeros(grey.shape, np.uint8)
    inside[2:-2, 8:32, 24:72] = 255
    mask = written(tmp_path / "mask.tif", inside)
    for name, flags in (
        ("whole", ()),
        ("part", ("--mask", mask)),
        ("crop", ("--mask", mask, "--crop", "0:99,0:99,0:60")),
    ):
        assert vit3d("trace", path, tmp_path / f"{name}.swc", "--swc-unit", "voxel", *flags)[0] == 0
    whole, *parts = (read_swc(tmp_path / f"{name}.swc") for name in ("whole", "part", "crop"))
    for part in parts:
        away = np.linalg.norm(part.points[:, None] - whole.points, axis=2).min(1)
        assert len(part) > 20
        assert away.max() < 1.5
        rows = np.rint(part.points).astype(int)
        assert inside[tuple(rows.T)].all()


def test_a_mask_of_another_shape_is_refused(vit3d, tmp_path, checkpoint):
    path, mask = written(tmp_path / "a.tif"), written(tmp_path / "mask.tif", stack((12, 40, 95)))
    sentence = r"mask has shape \(12, 40, 95\), the stack \(12, 40, 96\)"
    before = files(tmp_path)
    assert_refused(vit3d("trace", path, tmp_path / "a.swc", "--mask", mask), sentence)
    refused = vit3d("reconstruct", path, "--out", tmp_path / "o", "--model", checkpoint, "--mask", mask)
    assert_refused(refused, sentence)
    assert files(tmp_path) == before


def test_um_without_a_voxel_size_is_refused_and_voxels_are_warned_of(vit3d, tmp_path):
    path = written(tmp_path / "a.tif", spacing=None)
    status, _, said = vit3d("trace", path, tmp_path / "a.swc")
    assert status == 0
    assert "a.tif states no voxel size" in said
    assert read_swc(tmp_path / "a.swc").unit == "voxel"
    result = vit3d("trace", path, tmp_path / "b.swc", "--swc-unit", "um")
    assert result[0] == 2
    assert "--swc-unit um needs the voxel size: add --spacing" in result[2]
    assert not (tmp_path / "b.swc").exists()


@pytest.mark.parametrize("model", ["nosuch", "./nosuch", "not a name"])
def test_an_unknown_model_is_refused_without_asking_the_hub(vit3d, tmp_path, model):
    path = written(tmp_path / "a.tif")
    refused = vit3d("reconstruct", path, "--out", tmp_path / "o", "--model", model)
    assert_refused(refused, "no folder and no shipped checkpoint")
    assert not (tmp_path / "o").exists()


def test_a_folder_that_is_no_vit3d_checkpoint_is_refused(vit3d, tmp_path, checkpoint):
    path = written(tmp_path / "a.tif")
    assert_refused(vit3d("segment", path, tmp_path / "p.tif", "--model", tmp_path), "not a vit3d checkpoint")
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    assert_refused(vit3d("segment", path, tmp_path / "p.tif", "--model", tmp_path / "vit"), "'vit' checkpoint")
    config, weights = (Path(checkpoint) / name for name in ("config.json", "model.safetensors"))
    (tmp_path / "vit" / "config.json").write_text(config.read_text())
    assert_refused(vit3d("segment", path, tmp_path / "p.tif", "--model", tmp_path / "vit"), "not a vit3d checkpoint")
    (tmp_path / "vit" / "model.safetensors").write_bytes(weights.read_bytes()[:2000])
    assert_refused(vit3d("segment", path, tmp_path / "p.tif", "--model", tmp_path / "vit"), "not a vit3d checkpoint")
    assert not (tmp_path / "p.tif").exists()


def test_weights_are_never_unpickled(vit3d, tmp_path, checkpoint):
    import torch
    from safetensors.torch import load_file

    path, folder = written(tmp_path / "a.tif"), tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((Path(checkpoint) / "config.json").read_text())
    torch.save(load_file(Path(checkpoint) / "model.safetensors"), folder / "pytorch_model.bin")
    assert_refused(vit3d("segment", path, tmp_path / "p.tif", "--model", folder), "not a vit3d checkpoint")


@pytest.mark.parametrize(
    "device, sentence",
    [("cuda:64", "CUDA devices"), ("toaster", "--device takes auto"), ("mps", "--device takes auto")],
)
def test_a_device_that_is_not_there_is_refused(vit3d, tmp_path, checkpoint, device, sentence):
    path = written(tmp_path / "a.tif")
    refused = vit3d("segment", path, tmp_path / "p.tif", "--model", checkpoint, "--device", device)
    assert_refused(refused, sentence)


def test_what_cannot_be_written_is_refused_before_the_work(vit3d, tmp_path, checkpoint):
    path = written(tmp_path / "a.tif")
    swc, taken = line_swc(tmp_path / "a.swc"), tmp_path / "a.tif"
    before, content = files(tmp_path), path.read_bytes()
    model = ("--model", checkpoint)
    assert_refused(vit3d("reconstruct", path, "--out", taken, *model), "a.tif is a file")
    assert_refused(vit3d("reconstruct", path, "--out", taken / "deeper", *model), "a.tif is a file")
    assert_refused(vit3d("demo", "--out", taken), "a.tif is a file")
    assert_refused(vit3d("trace", path, taken), "must end in .swc")
    assert_refused(vit3d("trace", path, taken / "deeper" / "a.swc"), "a.tif is a file")
    assert_refused(vit3d("segment", path, tmp_path / "p.swc", *model), "must end in .tif")
    assert_refused(vit3d("simulate", taken / "s.tif"), "a.tif is a file")
    assert_refused(vit3d("simulate", tmp_path / "s.png"), "must end in .tif")
    assert_refused(vit3d("convert", swc, tmp_path), "must end in .swc")
    assert_refused(vit3d("score", swc, swc, "--plot", tmp_path / "d.jpg"), "must end in .png")
    assert files(tmp_path) == before
    assert path.read_bytes() == content


def test_a_gold_beside_its_stack_is_never_replaced_and_an_earlier_result_is(vit3d, tmp_path, checkpoint):
    path, gold, out = written(tmp_path / "a.tif"), line_swc(tmp_path / "a.swc"), tmp_path / "o"
    model, before, content = ("--model", checkpoint), files(tmp_path), gold.read_bytes()
    assert_refused(vit3d("reconstruct", path, "--out", tmp_path, *model), "a.swc is no result of an earlier run")
    assert_refused(vit3d("reconstruct", tmp_path, "--out", tmp_path, *model), "a.swc is no result of an earlier run")
    assert (files(tmp_path), gold.read_bytes()) == (before, content)
    assert vit3d("reconstruct", path, "--out", out, *model)[0] == 0
    assert vit3d("reconstruct", path, "--out", out, *model)[0] == 0
    foreign = tmp_path / "k.swc"
    foreign.write_text("1 2 0 0 0 1 -1\n")
    (out / "a_2.swc").write_text(foreign.read_text())
    assert_refused(vit3d("reconstruct", path, "--out", out, "--forest", *model), "a_2.swc is no result")
    assert_refused(vit3d("simulate", tmp_path / "k.tif", "--shape", "8,32,32"), "k.swc, where the truth goes")
    assert foreign.read_text() == "1 2 0 0 0 1 -1\n"
    assert not (tmp_path / "k.tif").exists()


def test_a_gold_is_not_replaced_whatever_signs_are_in_its_name(tmp_path):
    gold = line_swc(tmp_path / "cell (1) + [2].swc")
    with pytest.raises(ValueError, match="is no result of an earlier run"):
        refuse_foreign(gold, forest=False)


def test_a_result_that_may_be_one_of_the_several_of_another_stack_is_not_replaced(tmp_path):
    tree = line_swc(tmp_path / "a_1.swc")
    write_review([], tmp_path / "a_1_review.csv", "um")
    refuse_foreign(tree, forest=False)
    write_review([], tmp_path / "a_review.csv", "um")
    with pytest.raises(ValueError, match=r"a_1\.swc is no result of an earlier run"):
        refuse_foreign(tree, forest=False)


def test_no_file_of_other_people_is_replaced_under_a_name_that_they_did_not_give(vit3d, tmp_path, checkpoint):
    path, model = written(tmp_path / "a.tif"), ("--model", checkpoint)
    for name in ("a.png", "a_review.csv", "a_probability.tif"):
        (tmp_path / name).write_text("mine")
        assert_refused(vit3d("reconstruct", path, "--out", tmp_path, *model), f"{name} is no result of an earlier run")
        (tmp_path / name).unlink()
    (tmp_path / "b_review.csv").write_text("mine")
    assert_refused(vit3d("trace", path, tmp_path / "b.swc"), r"b_review\.csv is no result")
    (tmp_path / "b_review.csv").unlink()
    (tmp_path / "b_1.swc").write_text("1 2 0 0 0 1 -1\n")
    assert_refused(vit3d("trace", path, tmp_path / "b.swc", "--forest"), r"b_1\.swc is no result")
    demo = tmp_path / "demo"
    demo.mkdir()
    for name in ("neuron.tif", "truth.swc", "neuron.png"):
        (demo / name).write_text("mine")
        assert_refused(vit3d("demo", "--out", demo), f"{name} is no result of an earlier")
        assert (demo / name).read_text() == "mine"
        (demo / name).unlink()
    assert files(tmp_path) == {"a.tif", "b_1.swc", "demo"}
    assert vit3d("trace", path, tmp_path / "a.swc")[0] == 0
    (tmp_path / "a.png").write_text("mine")  # beside a tree of ours, but none of it
    assert_refused(vit3d("reconstruct", path, "--out", tmp_path, *model), "a.png is no result")


def test_what_this_tool_wrote_is_replaced_whichever_command_did(vit3d, tmp_path, checkpoint):
    path, model = written(tmp_path / "a.tif"), ("--model", checkpoint)
    assert vit3d("segment", path, tmp_path / "a_probability.tif", *model)[0] == 0
    command = ("reconstruct", path, "--out", tmp_path, *model)
    assert vit3d(*command)[0] == 0
    said = vit3d(*command, "--out-of-core")[2]
    assert "not of this one: a_probability.tif" in said
    (tmp_path / "a_probability.tif").unlink()
    assert "not of this one: a_probability.zarr" in vit3d(*command)[2]
    review = tmp_path / "a_review.csv"
    review.write_text(review.read_text(), encoding="utf-8-sig")  # as Excel saves it
    assert vit3d(*command)[0] == 0


def test_of_two_stacks_one_called_as_a_tree_of_the_other_none_loses_its_tree(vit3d, tmp_path, checkpoint):
    voxels = np.zeros((8, 40, 100), np.uint8)
    voxels[3:5, 8:11, 5:95] = 200
    for name in ("o", "o_1"):
        written(tmp_path / f"{name}.tif", voxels)
        assert vit3d("trace", tmp_path / f"{name}.tif", tmp_path / f"{name}.swc")[0] == 0
    assert_refused(vit3d("trace", tmp_path / "o.tif", tmp_path / "o.swc", "--forest"), "o_1.swc is no result")


def test_results_are_replaced_by_those_of_the_next_run_and_what_stays_of_an_earlier_one_is_told(vit3d, tmp_path):
    voxels = np.zeros((8, 40, 100), np.uint8)
    voxels[3:5, 8:11, 5:95] = voxels[3:5, 24:27, 5:60] = 200
    two, one = (
        written(tmp_path / "two.tif", voxels),
        written(tmp_path / "one.tif", voxels * (np.arange(40) < 20)[:, None]),
    )
    out = tmp_path / "o.swc"
    assert "earlier" not in vit3d("trace", two, out, "--forest")[2]
    assert "earlier" not in vit3d("trace", two, out, "--forest")[2]
    said = vit3d("trace", one, out, "--forest")[2]
    assert "Left by an earlier run, and not of this one: o_2.swc." in said
    assert read_swc(tmp_path / "o_1.swc").num_roots == 1
    assert "not of this one: o_1.swc, o_2.swc." in vit3d("trace", one, out)[2]
    assert vit3d("trace", one, tmp_path / "o_2.swc")[0] == 0  # of a stack that is called o_2
    assert "not of this one: o_1.swc." in vit3d("trace", one, out)[2]


def test_what_is_wrong_with_the_options_is_said_before_the_network_is_loaded(vit3d, tmp_path):
    path = written(tmp_path / "a.tif")
    command = ("reconstruct", path, "--out", tmp_path / "o", "--model", tmp_path / "no checkpoint")
    assert_refused(vit3d(*command, "--max-gap-um", "-1"), "`max_gap_um` must be a length >= 0, got -1")
    for threshold in ("-1", "1", "nan"):
        assert_refused(vit3d(*command, "--threshold", threshold), "--threshold")
    assert_refused(vit3d("trace", path, tmp_path / "a.swc", "--step-um", "0"), "`step_um` must be a length > 0, got 0")


def test_a_folder_that_is_read_only_is_refused_before_the_work(vit3d, tmp_path, monkeypatch):
    path = written(tmp_path / "a.tif")
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)  # as root everything may be written
    command = ("reconstruct", path, "--out", tmp_path / "o", "--model", tmp_path / "no checkpoint")
    assert_refused(vit3d(*command), "Nothing can be written to .*: it is read-only for you")


@pytest.mark.parametrize("environment, expected", [
    ({}, (0, 1)),
    ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
    ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}, (3, 4)),  # srun
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # a line of a batch script
    ({"WORLD_SIZE": ""}, (0, 1)),
])  # fmt: skip
def test_how_many_processes_there_are_is_told_by_who_started_them(environment, expected):
    found = launched(environment)
    assert (found["rank"], found["ranks"]) == expected


def test_a_store_without_its_empty_chunks_is_read_where_that_is_said(vit3d, tmp_path, checkpoint):
    import zarr

    voxels = np.pad(stack(), ((0, 0), (0, 0), (0, 160)))
    array = zarr.create_array(tmp_path / "a.zarr", shape=voxels.shape, chunks=(8, 40, 40), dtype=voxels.dtype)
    array[:] = voxels
    model, said = ("--model", checkpoint, "--spacing", "1,0.5,0.5"), ("--missing-as-fill",)
    for command in (
        ("trace", tmp_path / "a.zarr", tmp_path / "a.swc", *model[2:]),
        ("reconstruct", tmp_path / "a.zarr", "--out", tmp_path / "o", *model),
    ):
        assert_refused(vit3d(*command), "has lost the chunk .*--missing-as-fill")
        assert vit3d(*command, *said)[0] == 0
        assert vit3d(*command, "--mask", tmp_path / "a.zarr", *said)[0] == 0


def test_voxels_of_a_thousandth_of_a_micrometre_are_questioned(vit3d, tmp_path):
    assert (
        "are they mm?"
        in vit3d("trace", written(tmp_path / "a.tif"), tmp_path / "a.swc", "--spacing", ".001,.0003,.0003")[2]
    )


def test_the_folder_of_a_training_names_its_checkpoints(vit3d, tmp_path):
    (tmp_path / "run" / "last").mkdir(parents=True)
    path = written(tmp_path / "a.tif")
    refused = vit3d("reconstruct", path, "--out", tmp_path / "o", "--model", tmp_path / "run")
    assert_refused(refused, r"run is the folder of a training; its checkpoints are .*run/last\.")


def test_a_flag_that_would_be_passed_over_is_refused(vit3d, tmp_path, checkpoint):
    path = written(tmp_path / "a.tif")
    for flags in (("--memory-budget", "1"), ("--box", "64,64,64"), ("--threads", "2"), ("--force",)):
        refused = vit3d("segment", path, tmp_path / "p.tif", "--model", checkpoint, *flags)
        assert_refused(refused, f"{flags[0]} is for OUT.zarr")
    assert vit3d("score", path, path)[0] == 0
    for flag, value in {"--plot": tmp_path / "p.png", "--image": path, "--threshold": 3, "--gold-unit": "um"}.items():
        assert_refused(vit3d("score", path, path, flag, value), f"{flag} is for trees")
    assert files(tmp_path) == {"a.tif"}


def test_nothing_is_written_over_what_is_read_nor_into_it(vit3d, tmp_path, checkpoint, monkeypatch):
    path, swc = written(tmp_path / "a.tif"), line_swc(tmp_path / "a.swc")
    (tmp_path / "linked.tif").symlink_to(path)
    slices = tmp_path / "slices"
    slices.mkdir()
    for number, plane in enumerate(stack()):
        tifffile.imwrite(slices / f"s{number:02}.tif", plane)
    monkeypatch.chdir(tmp_path)
    before = {name: (tmp_path / name).is_dir() or (tmp_path / name).read_bytes() for name in files(tmp_path)}
    model = ("--model", checkpoint)
    assert_refused(vit3d("segment", path, "a.tif", *model), "a.tif would lie over the input")
    assert_refused(vit3d("segment", path, "linked.tif", *model), "linked.tif would lie over the input")
    assert_refused(vit3d("segment", slices, slices / "p.tif", *model), "or in it")
    assert_refused(vit3d("trace", slices, slices / "p.swc"), "or in it")
    assert_refused(vit3d("reconstruct", slices, *model, "--out", slices / "results"), "or in it")
    assert_refused(vit3d("convert", swc, swc, "--scale", "2"), "a.swc would lie over the input")
    assert before == {name: (tmp_path / name).is_dir() or (tmp_path / name).read_bytes() for name in files(tmp_path)}


def test_a_folder_of_slices_has_its_name_from_within_too(vit3d, tmp_path, checkpoint, monkeypatch):
    slices = tmp_path / "neuron"
    slices.mkdir()
    for number, plane in enumerate(stack()):
        tifffile.imwrite(slices / f"s{number:02}.tif", plane)
    monkeypatch.chdir(slices)
    assert_refused(vit3d("reconstruct", ".", "--model", checkpoint), "or in it")
    assert vit3d("reconstruct", ".", "--model", checkpoint, "--out", "../out")[0] == 0
    assert "neuron.swc" in files(tmp_path / "out")


def test_a_folder_that_is_missing_is_made_by_every_command_that_writes(vit3d, tmp_path, checkpoint):
    path, swc = written(tmp_path / "a.tif"), line_swc(tmp_path / "a.swc")
    out = tmp_path / "out"
    model = ("--model", checkpoint)
    for number, words in enumerate(
        [
            ("trace", path, "t.swc"),
            ("segment", path, "p.tif", *model),
            ("convert", swc, "c.swc"),
            ("score", swc, swc, "--plot", "d.png"),
            ("simulate", "s.tif", "--shape", "8,32,32"),
            ("reconstruct", path, *model, "--out", ""),
        ]
    ):
        folder = out / str(number) / "deeper"
        written_by = [
            folder / word if word in ("t.swc", "p.tif", "c.swc", "d.png", "s.tif", "") else word for word in words
        ]
        status, _, said = vit3d(*written_by)
        assert status == 0, said
        assert files(folder), words


def test_a_folder_is_made_after_the_work_and_not_by_a_command_that_fails(vit3d, tmp_path):
    full = written(tmp_path / "a.tif", np.ones((6, 8, 8), np.uint8))
    assert_refused(vit3d("trace", full, tmp_path / "out" / "a.swc"), "fraction")
    assert files(tmp_path) == {"a.tif"}


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("bogus",), "^vit3d: No such command 'bogus'; `vit3d --help` shows what it takes.$"),
        (("score",), "^vit3d: Missing argument .*; `vit3d score --help` shows what it takes.$"),
        (("trace", "--bogus"), "^vit3d: No such option: --bogus; `vit3d trace --help` shows what it takes.$"),
        (("simulate", "s.tif", "--seed", "x"), "^vit3d: Invalid value for '--seed': .*`vit3d simulate --help`"),
        (("simulate", "s.tif", "--seed"), "^vit3d: .*'--seed' requires an argument; `vit3d --help`"),
    ],
)
def test_a_command_spelled_wrongly_is_told_in_one_sentence(vit3d, words, sentence):
    result = vit3d(*words)
    assert_refused(result, sentence)
    assert len(result[2].splitlines()) == 1
    assert result[1] == ""


def test_without_words_the_commands_are_listed(vit3d):
    _, printed, said = vit3d()
    assert "reconstruct" in printed + said
    assert "vit3d: " not in said


def test_the_version_is_said(vit3d):
    from vit3d import __version__

    status, printed, said = vit3d("--version")
    assert (status, printed, said) == (0, f"vit3d {__version__}\n", "")
    assert f'version = "{__version__}"' in (Path(__file__).parents[1] / "pyproject.toml").read_text()


@pytest.mark.parametrize("shape", ["1,2,3", "7,32,32", "8,31,32", "8,32,31", "8.5,32,32", "64,256", "0,32,32"])
def test_a_stack_too_small_to_hold_a_neuron_is_not_simulated(vit3d, tmp_path, shape):
    assert_refused(vit3d("simulate", tmp_path / "s.tif", "--shape", shape), "--shape takes (whole|three)")
    assert files(tmp_path) == set()


def test_the_smallest_stack_holds_a_neuron(vit3d, tmp_path):
    assert vit3d("simulate", tmp_path / "s.tif", "--shape", "8,32,32")[0] == 0
    assert read_swc(tmp_path / "s.swc").cable_length > 5


def test_trees_in_different_units_are_not_measured_in_one_table(vit3d, tmp_path):
    um, other = line_swc(tmp_path / "a.swc"), tmp_path / "b.swc"
    write_swc(NeuronTree(np.eye(3), np.ones(3), np.arange(3) - 1, unit="voxel"), other)
    silent = raw_bytes(tmp_path / "c.swc", b"1 3 0 0 0 1 -1\n2 3 5 0 0 1 1\n")
    both = vit3d("measure", um, other)
    assert_refused(
        both, r"different units \(a.swc um, b.swc voxel\): bring them to one with `vit3d convert --swc-unit`\.$"
    )
    assert both[1] == ""
    assert_refused(vit3d("measure", um, silent), r"c.swc unstated\).*, or state what they do not say with --unit\.$")
    status, printed, _ = vit3d("measure", um, silent, "--unit", "um")
    assert (status, len(printed.splitlines())) == (0, 3)


def test_a_tree_in_voxels_of_known_size_is_measured_in_um(vit3d, tmp_path):
    """Voxels of unequal sides have no length."""
    um, voxel = line_swc(tmp_path / "a.swc"), tmp_path / "b.swc"
    assert vit3d("convert", um, voxel, "--swc-unit", "voxel")[0] == 0
    status, printed, _ = vit3d("measure", um, voxel)
    first, second = (line.split(",")[1:] for line in printed.splitlines()[1:])
    assert status == 0
    assert [float(value) for value in first] == pytest.approx([float(value) for value in second])


def test_a_voxel_size_other_than_a_tree_in_um_states_is_refused_or_used(vit3d, tmp_path):
    um, out = line_swc(tmp_path / "a.swc"), tmp_path / "b.swc"
    assert_refused(
        vit3d("convert", um, out, "--spacing", "2,0.66,0.66"), "is in um and states voxels of .*--swc-unit voxel"
    )
    assert not out.exists()
    lengths = []
    for flags in ((), ("--spacing", "2,0.66,0.66")):
        status, printed, _ = vit3d("score", um, um, "--json", *flags)
        assert status == 0
        lengths.append(json.loads(printed)[0]["gold_length_vox"])
    assert lengths[1] == pytest.approx(lengths[0] * SPACING[2] / 0.66)


def test_the_help_tells_every_unit_flag_and_every_default_apart(vit3d, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # one line per flag

    def told(command, flag):
        lines = vit3d(command, "--help")[1].splitlines()
        first = next(number for number, line in enumerate(lines) if re.search(rf"│.* {flag} ", line))
        return " ".join(" ".join(lines[first : first + 3]).split())

    assert "Unit of the SWC that is read" in told("measure", "--unit")
    assert "Unit of the SWC that is written" in told("trace", "--swc-unit")
    assert "Unit of OUT.swc" in told("convert", "--swc-unit")
    assert "Unit of the predicted SWC" in told("score", "--predicted-unit")
    assert "Unit of the gold SWC" in told("score", "--gold-unit")
    assert "to go between um and voxel" in told("convert", "--spacing")
    assert "default 0 um" in told("trace", "--min-branch-um")
    assert "default 10 voxels in plane" in told("trace", "--max-gap-um")
    assert "default about a voxel" in told("trace", "--step-um")


# ------------------------------------------------------------ trace


def test_a_mask_that_is_all_foreground_is_refused_with_the_fraction(vit3d, tmp_path):
    path = written(tmp_path / "a.tif", np.ones((6, 8, 8), np.uint8))
    assert_refused(vit3d("trace", path, tmp_path / "a.swc"), r"fraction 1\.0")
    assert files(tmp_path) == {"a.tif"}


def test_an_empty_stack_gives_an_empty_tree_in_words_that_scores_recall_0(vit3d, tmp_path):
    path = written(tmp_path / "a.tif", np.zeros((6, 8, 8), np.uint8))
    status, _, said = vit3d("trace", path, tmp_path / "a.swc")
    assert status == 0
    assert "the tree is empty" in said
    tree = read_swc(tmp_path / "a.swc")
    assert (len(tree), tree.unit, tree.spacing_um) == (0, "um", SPACING)
    status, printed, _ = vit3d("score", tmp_path / "a.swc", line_swc(tmp_path / "gold.swc"), "--json")
    (scores,) = json.loads(printed, parse_constant=pytest.fail)  # infinity is no JSON
    assert (status, scores["recall"], scores["f1"], scores["esa"]) == (0, 0, 0, None)


def test_a_root_far_from_every_neurite_is_told_of(vit3d, tmp_path):
    path = written(tmp_path / "a.tif")
    assert "from the nearest neurite" in vit3d("trace", path, tmp_path / "a.swc", "--root", "0,0,0")[2]
    assert "nearest neurite" not in vit3d("trace", path, tmp_path / "a.swc", "--root", "40,20,6")[2]


def test_trace_finds_the_line_in_um_and_says_so(vit3d, tmp_path):
    status, printed, _ = vit3d("trace", written(tmp_path / "a.tif"), tmp_path / "a.swc")
    tree = read_swc(tmp_path / "a.swc")
    assert status == 0
    assert (tree.unit, tree.spacing_um, tree.num_roots) == ("um", SPACING, 1)
    assert tree.cable_length == pytest.approx(40, abs=2)
    assert printed.splitlines()[0].split()[:4] == ["name", "nodes", "trees", "cable_um"]
    assert (tmp_path / "a_review.csv").read_text().startswith("kind,x_um,y_um,z_um,length_um,confidence")


def test_dark_neurites_on_a_bright_ground_give_the_same_tree(vit3d, tmp_path):
    vit3d("trace", written(tmp_path / "a.tif"), tmp_path / "a.swc")
    vit3d("trace", written(tmp_path / "b.tif", 255 - stack()), tmp_path / "b.swc", "--polarity", "dark")
    np.testing.assert_allclose(read_swc(tmp_path / "a.swc").points, read_swc(tmp_path / "b.swc").points)


def test_a_crop_gives_a_tree_in_coordinates_of_the_whole_stack(vit3d, tmp_path):
    path = written(tmp_path / "a.tif")
    vit3d("trace", path, tmp_path / "a.swc", "--swc-unit", "voxel")
    vit3d("trace", path, tmp_path / "b.swc", "--crop", "2:11,10:30,4:", "--swc-unit", "voxel")
    whole, part = read_swc(tmp_path / "a.swc"), read_swc(tmp_path / "b.swc")
    assert part.unit == "voxel"
    for low, high in ((whole.points.min(0), part.points.min(0)), (whole.points.max(0), part.points.max(0))):
        np.testing.assert_allclose(low, high, atol=1)
    vit3d("trace", path, tmp_path / "c.swc", "--crop", "2:11,10:30,4:", "--swc-unit", "voxel", "--root", "86,20,6")
    rooted = read_swc(tmp_path / "c.swc")
    assert abs(rooted.points[rooted.parents < 0] - [6, 20, 86]).max() <= 4


def test_a_crop_that_ends_beyond_the_stack_is_said(vit3d, tmp_path):
    path = written(tmp_path / "a.tif")
    assert "beyond" not in vit3d("trace", path, tmp_path / "a.swc", "--crop", "0:12,0:40,0:96")[2]
    assert "beyond the stack of (12, 40, 96)" in vit3d("trace", path, tmp_path / "a.swc", "--crop", "0:12,0:41,0:96")[2]


def test_nothing_is_traced_outside_the_mask(vit3d, tmp_path):
    inside = np.zeros(stack().shape, np.uint8)
    inside[:, :, :44] = 1
    mask = written(tmp_path / "mask.tif", inside, None)
    command = ("trace", written(tmp_path / "a.tif"), tmp_path / "a.swc", "--swc-unit", "voxel", "--mask")
    assert "nowhere" not in vit3d(*command, mask)[2]
    assert 40 <= read_swc(tmp_path / "a.swc").points[:, 2].max() < 44
    from_1 = written(tmp_path / "from_1.tif", inside + 1, None)
    assert "from_1.tif is 0 nowhere: it leaves nothing out" in vit3d(*command, from_1)[2]


def test_a_marker_counts_from_1_and_a_root_from_0(tmp_path):
    (tmp_path / "a.marker").write_text("# x, y, z\n87, 21, 7, 0, 1\n")
    box = (slice(2, 11), slice(10, 30), slice(4, 96))
    assert root_of("86,20,6", box, SPACING) == (4.0, 5.0, 41.0)
    assert root_of(str(tmp_path / "a.marker"), box, SPACING) == (4.0, 5.0, 41.0)
    assert root_of("86,20,6", box, None) == (4.0, 10.0, 82.0)


def test_a_stack_of_dark_neurites_taken_for_bright_ones_is_told_what_to_do(vit3d, tmp_path):
    light = np.random.default_rng(0).normal(200, 3, (12, 40, 96))
    light[5:8, 18:22, 10:86] -= 150
    dark = written(tmp_path / "dark.tif", np.clip(light, 0, 255).astype(np.uint8))
    assert "--polarity dark" in vit3d("trace", dark, tmp_path / "a.swc")[2]
    status, _, complaint = vit3d("trace", dark, tmp_path / "a.swc", "--polarity", "dark")
    assert (status, complaint) == (0, "")
    assert read_swc(tmp_path / "a.swc").cable_length > 30


def test_a_mask_that_encloses_all_it_does_not_hold_is_refused_as_inverted(vit3d, tmp_path):
    inverted = np.full((12, 40, 96), 255, np.uint8)
    inverted[5:8, 18:22, 40:60] = 0
    result = vit3d("trace", written(tmp_path / "inverted.tif", inverted), tmp_path / "a.swc")
    assert_refused(result, "or is enclosed by what does: the mask, or the stack, seems inverted")
    assert not (tmp_path / "a.swc").exists()


@pytest.mark.slow
def test_where_there_is_no_room_that_is_said_and_nothing_is_left(tmp_path, checkpoint):
    stack = written(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 255, (12, 96, 96)).astype(np.uint8))
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    for words in (("segment", stack, tmp_path / "p.tif"), ("reconstruct", stack, "--out", tmp_path / "new")):
        run = process(*words, "--model", checkpoint, code=small + "from vit3d.cli import main; main()")
        assert (run.returncode, "Traceback" in run.stderr) == (2, False)
        assert run.stderr.splitlines()[-1].startswith("vit3d: There is no room left for what is written")
    assert files(tmp_path) == {"a.tif"}


@pytest.mark.slow
def test_a_trace_whose_tree_finds_no_room_leaves_the_earlier_list_beside_the_earlier_tree(tmp_path):
    broken, swc = stack(), tmp_path / "o" / "a.swc"
    broken[:, :, 40:60] = 10
    first, second = written(tmp_path / "a.tif"), written(tmp_path / "b.tif", broken)
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
    for earlier in (False, True):
        if earlier:
            assert process("trace", first, swc).returncode == 0
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        run = process("trace", second, swc, code=small + "from vit3d.cli import main; main()")
        assert (run.returncode, "There is no room left" in run.stderr) == (2, True), run.stderr
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert swc.parent.exists() == earlier


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_told_to_stop_leaves_nothing_half_written(tmp_path, checkpoint, number):
    stack = written(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 255, (12, 96, 96)).astype(np.uint8))
    words = [sys.executable, "-c", "from vit3d.cli import main; main()", "reconstruct", stack, "--model", checkpoint]
    run = subprocess.Popen([*map(str, words), "--out", str(tmp_path / "out")], stderr=subprocess.DEVNULL)
    while run.poll() is None and not list(tmp_path.glob("out/.*.partial")):
        time.sleep(0.01)
    run.send_signal(number)
    assert run.wait(timeout=60) == 128 + number
    assert files(tmp_path) == {"a.tif"}


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_command_leaves_the_signals_of_who_called_it_as_they_were(vit3d, tmp_path, before):
    write_swc(NeuronTree([[0, 0, 0], [0, 0, 5]], [1, 1], [-1, 0]), tmp_path / "a.swc")
    own = signal.signal(signal.SIGTERM, before)
    try:
        assert vit3d("measure", tmp_path / "a.swc")[0] == 0
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGTERM, own)
