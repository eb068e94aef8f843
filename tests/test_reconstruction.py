"""The main job: stack -> probability -> tree -> files, by command and by function."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vit3d import ViT3DConfig, ViT3DForNeuronSegmentation, ViT3DImageProcessor, checkpoint
from vit3d.cli import main
from vit3d.reconstruction import find_stacks, inverted, reconstruct
from vit3d.scoring import score_trees
from vit3d.tree import read_swc
from vit3d.volume import Volume, read_volume, write_volume

SPACING = (1.0, 0.5, 0.5)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CONFIG = ViT3DConfig(**SIZES, fused_layers=(1, 2), volume_size=(8, 32, 32), patch_size=(4, 8, 8))
NAMES = ["a.png", "a.swc", "a_probability.tif", "a_review.csv"]


class Photograph(torch.nn.Module):
    """A network with one voxel of context: what is bright is neurite."""

    config, device = CONFIG, torch.device("cpu")

    def forward(self, pixel_values, token_mask=None):
        display = pixel_values * CONFIG.image_std + CONFIG.image_mean
        return SimpleNamespace(logits=20 * (display - 0.6))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A tiny network that has learned nothing."""
    folder = tmp_path_factory.mktemp("checkpoint")
    ViT3DForNeuronSegmentation(CONFIG).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def vit3d(capsys, monkeypatch):
    """Run a command with the photograph for a network: (exit status, what it prints, what it complains)."""

    def load(source="vit3d-tiny", device="auto", polarity="auto"):
        return Photograph(), ViT3DImageProcessor.from_config(CONFIG, polarity=polarity)

    def run(*arguments):
        if "--model" not in arguments:
            monkeypatch.setattr(checkpoint, "load_checkpoint", load)
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return stopped.value.code or 0, *capsys.readouterr()

    return run


def y_stack() -> np.ndarray:
    """A neurite along x that forks, 3 x 3 voxels thick, on a faint and noisy ground."""
    voxels = np.random.default_rng(0).normal(12, 2, (20, 64, 100))
    for x in range(6, 95):
        for side in (-1, 1):
            y = 32 + side * max(0, (x - 40) // 2)
            z = 10 + side * max(0, (x - 40) // 12)
            voxels[z - 1 : z + 2, y - 1 : y + 2, x] = 180
    return voxels.clip(0, 255).astype(np.uint8)


def written(path: Path, voxels=None, spacing=SPACING) -> Path:
    write_volume(Volume(y_stack() if voxels is None else voxels, spacing), path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_equal_trees(first, second, threshold=1.5):
    scores = score_trees(first, second, threshold=threshold)
    assert (scores["precision"], scores["recall"]) == (1, 1)
    assert (first.num_tips, first.num_branch_points) == (second.num_tips, second.num_branch_points)


# ------------------------------------------------------------ one stack


def test_a_stack_becomes_a_tree_a_probability_a_review_and_a_picture(vit3d, tmp_path):
    out = tmp_path / "made" / "here"
    status, printed, _ = vit3d("reconstruct", written(tmp_path / "a.tif"), "--out", out)
    assert status == 0
    assert names(out) == NAMES
    tree, probability = read_swc(out / "a.swc"), read_volume(out / "a_probability.tif")
    assert (tree.unit, tree.spacing_um, probability.spacing_um) == ("um", SPACING, SPACING)
    assert (tree.num_roots, tree.num_branch_points, (tree.degree == 1).sum()) == (1, 1, 3)
    assert tree.cable_length == pytest.approx(17 + 2 * np.hypot(27.5, np.hypot(13.5, 4.5)), rel=0.1)
    assert probability.voxels.dtype == np.float32
    assert probability.voxels[10, 32, 20] > 0.9
    assert probability.voxels[2].max() < 0.1
    assert (out / "a.png").read_bytes().startswith(b"\x89PNG")
    header, row = printed.splitlines()
    assert header.split() == ["name", "nodes", "trees", "cable_um", "tips", "branch_points", "review"]
    assert row.split()[:3] == ["a", str(len(tree)), "1"]
    assert len((out / "a_review.csv").read_text().splitlines()) == 1 + int(row.split()[-1])


def test_the_swc_can_be_had_in_voxels(vit3d, tmp_path):
    path = written(tmp_path / "a.tif")
    vit3d("reconstruct", path, "--out", tmp_path / "um")
    vit3d("reconstruct", path, "--out", tmp_path / "voxel", "--swc-unit", "voxel")
    um, voxel = (read_swc(tmp_path / unit / "a.swc") for unit in ("um", "voxel"))
    assert voxel.unit == "voxel"
    np.testing.assert_allclose(voxel.points * SPACING, um.points, atol=1e-4)


def test_a_voxel_size_on_the_command_line_counts_more_than_the_files(vit3d, tmp_path):
    vit3d("reconstruct", written(tmp_path / "a.tif"), "--out", tmp_path / "o", "--spacing", "2,1,1")
    tree, probability = read_swc(tmp_path / "o" / "a.swc"), read_volume(tmp_path / "o" / "a_probability.tif")
    assert tree.spacing_um == probability.spacing_um == (2, 1, 1)
    assert tree.points[:, 2].max() > 85


def test_dark_neurites_give_the_same_tree_told_or_found_out(vit3d, tmp_path):
    vit3d("reconstruct", written(tmp_path / "a.tif"), "--out", tmp_path)
    dark = written(tmp_path / "dark.tif", 255 - y_stack())
    vit3d("reconstruct", dark, "--out", tmp_path / "told", "--polarity", "dark")
    vit3d("reconstruct", dark, "--out", tmp_path / "found")
    bright, told, found = (read_swc(tmp_path / name) for name in ("a.swc", "told/dark.swc", "found/dark.swc"))
    assert_equal_trees(bright, told, threshold=0.5)
    assert_equal_trees(bright, found, threshold=0.5)


def test_a_crop_gives_the_tree_of_the_whole_in_its_coordinates(vit3d, tmp_path):
    path = written(tmp_path / "a.tif")
    vit3d("reconstruct", path, "--out", tmp_path / "whole")
    vit3d("reconstruct", path, "--out", tmp_path / "part", "--crop", "3:,1:63,2:99")
    whole, part = (read_swc(tmp_path / place / "a.swc") for place in ("whole", "part"))
    assert_equal_trees(whole, part)
    assert read_volume(tmp_path / "part" / "a_probability.tif").shape == (17, 62, 97)


def test_the_review_and_the_swc_of_a_crop_lie_in_one_frame():
    volume, box = Volume(y_stack(), SPACING), (slice(3, 20), slice(1, 63), slice(30, 99))
    voxels = volume.voxels.copy()
    voxels[:, :, 60:64] = 12  # both arms are cut
    whole = reconstruct(Photograph(), Volume(voxels, SPACING))
    part = reconstruct(Photograph(), Volume(voxels, SPACING), box=box)
    joins = [[np.array(r.point) for r in result.reviews if r.kind == "join"] for result in (whole, part)]
    assert len(joins[0]) == len(joins[1]) == 2
    for place in joins[1]:
        assert min(np.linalg.norm(place - other) for other in joins[0]) < 1


def test_nothing_is_traced_outside_the_mask(vit3d, tmp_path):
    inside = np.zeros(y_stack().shape, np.uint8)
    inside[:, :, :40] = 7
    mask = written(tmp_path / "mask.tif", inside)
    flags = ("--mask", mask, "--swc-unit", "voxel")
    vit3d("reconstruct", written(tmp_path / "a.tif"), "--out", tmp_path / "o", *flags)
    vit3d("reconstruct", tmp_path / "a.tif", "--out", tmp_path / "p", *flags, "--crop", ":,:,:70")
    for folder in ("o", "p"):
        tree = read_swc(tmp_path / folder / "a.swc")
        assert 34 < tree.points[:, 2].max() < 40
        assert read_volume(tmp_path / folder / "a_probability.tif").voxels[:, :, 40:].max() == 0


@pytest.mark.parametrize("grey", [0, 100])
def test_a_constant_stack_gives_an_empty_tree_in_words(vit3d, tiny, tmp_path, grey):
    path = written(tmp_path / "a.tif", np.full((9, 40, 40), grey, np.uint8))
    status, printed, said = vit3d("reconstruct", path, "--out", tmp_path / "o", "--model", tiny)
    assert status == 0
    assert "the tree is empty" in said
    assert names(tmp_path / "o") == NAMES
    assert len(read_swc(tmp_path / "o" / "a.swc")) == 0
    assert printed.splitlines()[1].split()[:3] == ["a", "0", "0"]


def test_a_real_network_runs_and_its_probability_is_what_segment_writes(vit3d, tiny, tmp_path):
    path = written(tmp_path / "a.tif", y_stack()[:8, 16:48, 20:60])
    flags = ("--model", tiny, "--threshold", "0.9")
    assert vit3d("reconstruct", path, "--out", tmp_path / "o", *flags)[0] == 0
    assert vit3d("segment", path, tmp_path / "p.tif", "--model", tiny)[0] == 0
    first, second = (read_volume(tmp_path / name) for name in ("o/a_probability.tif", "p.tif"))
    np.testing.assert_array_equal(first.voxels, second.voxels)
    assert first.spacing_um == second.spacing_um == SPACING
    assert 0 < first.voxels.max() < 1


def test_a_reconstruction_that_cannot_be_written_leaves_no_file(tmp_path, monkeypatch):
    from vit3d import plot

    def full_disk(*_, **__):
        raise OSError("no space left")

    result = reconstruct(Photograph(), Volume(y_stack(), SPACING))
    monkeypatch.setattr(plot, "plot_reconstruction", full_disk)
    with pytest.raises(OSError, match="no space"):
        result.write(tmp_path, "a")
    assert names(tmp_path) == []


def test_a_mask_of_another_shape_is_refused_before_the_network_runs():
    volume, mask = Volume(y_stack(), SPACING), np.ones((20, 64, 101))
    with pytest.raises(ValueError, match=r"mask has shape \(20, 64, 101\), the stack \(20, 64, 100\)"):
        reconstruct(None, volume, mask=mask)


# ------------------------------------------------------------ a folder


def test_a_folder_gives_one_table_and_lists_what_failed(vit3d, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        written(tmp_path / "in" / f"{name}.tif")
    (tmp_path / "in" / "broken.tif").write_bytes((tmp_path / "in" / "a.tif").read_bytes()[:3000])
    written(tmp_path / "in" / "flat.tif", y_stack()[:2])
    (tmp_path / "in" / "notes.txt").write_text("no stack")
    status, printed, said = vit3d("reconstruct", tmp_path / "in", "--out", tmp_path / "o", "--crop", "3:,:,:")
    assert status == 2
    assert [row.split()[0] for row in printed.splitlines()] == ["name", "a", "b"]
    failed = [line for line in said.splitlines() if line.startswith("vit3d: ")]
    assert [line.split()[1] for line in failed] == ["broken.tif", "flat.tif"]
    assert "is empty in a stack of (2, 64, 100)" in failed[1]
    assert "Traceback" not in said
    assert names(tmp_path / "o") == [n.replace("a", x, 1) for x in "ab" for n in NAMES]


def test_a_second_run_over_the_same_folder_passes_over_what_the_first_wrote(vit3d, tmp_path):
    written(tmp_path / "a.tif")
    for _ in range(2):
        status, printed, _ = vit3d("reconstruct", tmp_path, "--out", tmp_path)
        assert status == 0
        assert [row.split()[0] for row in printed.splitlines()] == ["name", "a"]
    assert names(tmp_path) == sorted([*NAMES, "a.tif"])


def test_stacks_are_found_by_name_and_namesakes_keep_their_suffix(tmp_path):
    for name in ("b.tif", "a.tif", "b.v3draw", ".hidden.tif", "a_probability.tif", "c.csv"):
        (tmp_path / name).touch()
    assert list(find_stacks(tmp_path)) == ["a", "b.tif", "b.v3draw"]
    assert find_stacks(tmp_path / "a_probability.tif") == {"a_probability": tmp_path / "a_probability.tif"}


def test_a_folder_without_stacks_is_refused(vit3d, tmp_path):
    (tmp_path / "notes.txt").write_text("no stack")
    status, _, said = vit3d("reconstruct", tmp_path, "--out", tmp_path / "o")
    assert status == 2
    assert "holds no stack" in said
    assert names(tmp_path) == ["notes.txt"]


# ------------------------------------------------------------ dark on bright


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
def test_inverting_keeps_every_difference_and_makes_the_brightest_0(dtype):
    low = 0 if np.dtype(dtype).kind == "u" else -100
    voxels = np.random.default_rng(0).integers(low, 100, (3, 4, 5)).astype(dtype)
    dark = inverted(Volume(voxels, SPACING))
    assert dark.voxels.min() == 0
    assert dark.spacing_um == SPACING
    np.testing.assert_array_equal(dark.voxels.astype(float), float(voxels.max()) - voxels)


# ------------------------------------------------------------ the demo


@pytest.mark.slow
def test_the_demo_writes_stack_truth_tree_and_picture_and_prints_a_score(vit3d, tmp_path):
    status, printed, _ = vit3d("demo", "--out", tmp_path / "d")
    assert status == 0
    assert {"neuron.tif", "neuron.swc", "neuron.png", "truth.swc"} <= set(names(tmp_path / "d"))
    header, row = printed.splitlines()[:2]
    scores = dict(zip(header.split(), row.split(), strict=True))
    assert 0 < float(scores["f1"]) <= 1
    assert str(tmp_path / "d") in printed
