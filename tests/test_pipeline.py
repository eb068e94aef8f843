"""The pipeline: any stack in, what `segment` gives out, with a tree where vit3d is installed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from numpy.testing import assert_array_equal
from transformers import AutoConfig, AutoModelForSemanticSegmentation, pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from unlike_stacks import unlike_stack
from vit3d import (
    ViT3DConfig,
    ViT3DForNeuronSegmentation,
    ViT3DImageProcessor,
    Volume,
    load_checkpoint,
    read_swc,
    reconstruct,
    score_trees,
    segment,
    trace,
    write_volume,
)
from vit3d.model.auto_vit3d import register
from vit3d.model.pipeline_vit3d import NeuronSegmentationPipeline

TASK = "neuron-segmentation"


def tiny_model(prediction: str = "volume") -> ViT3DForNeuronSegmentation:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, head_channels=4)
    patch = (4, 8, 8) if prediction == "volume" else (8, 8, 8)
    window = dict(volume_size=(8, 16, 24), patch_size=patch, prediction=prediction, fused_layers=(1, 2))
    model = ViT3DForNeuronSegmentation(ViT3DConfig(**sizes, **window)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def fibre(*shape: int) -> np.ndarray:
    voxels = np.zeros(shape, dtype=np.uint8)
    z, y, x = np.indices(shape)
    voxels[np.hypot(z - shape[0] / 2, y - 20 - x / 3) < 2] = 180
    return voxels


@pytest.fixture(params=["volume", "center_slice"])
def saved(request, tmp_path) -> Path:
    tiny_model(request.param).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def segmenter() -> NeuronSegmentationPipeline:
    return pipeline(TASK, model=tiny_model())


# --- with the package ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 50, 60), (8, 30, 24), (3, 30, 30)])
def test_a_stack_of_any_size_gives_what_segment_gives(saved, shape):
    voxels = fibre(*shape)
    segmenter = pipeline(TASK, model=str(saved))
    found = segmenter(voxels, trace=False)
    expected = segment(ViT3DForNeuronSegmentation.from_pretrained(saved), Volume(voxels)).voxels
    assert type(segmenter) is NeuronSegmentationPipeline
    assert set(found) == {"probability", "mask"}
    assert_array_equal(found["probability"], expected)
    assert_array_equal(found["mask"], expected > 0.5)
    assert expected.any()


def test_the_tree_is_the_one_that_reconstruct_gives_and_its_text_is_an_swc(segmenter, tmp_path):
    volume = Volume(fibre(20, 50, 60), (1.0, 0.5, 0.5))
    found = segmenter(volume)
    expected = reconstruct(segmenter.model, volume).tree
    assert len(expected) > 1
    assert_array_equal(found["tree"].points, expected.points)
    (tmp_path / "found.swc").write_text(found["swc"])
    tree = read_swc(tmp_path / "found.swc")
    assert (tree.unit, tree.spacing_um) == ("um", (1.0, 0.5, 0.5))
    np.testing.assert_allclose(tree.points, expected.points, atol=0.01)


@pytest.mark.slow
def test_the_tree_is_the_one_that_reconstruct_gives_where_other_cells_lie_out_of_focus():
    volume, truth = unlike_stack("crowd", 762)
    model, processor = load_checkpoint("vit3d-tiny")
    found = pipeline(TASK, model=model, image_processor=processor)(volume)
    assert_array_equal(found["tree"].points, reconstruct(model, volume, processor=processor).tree.points)
    assert score_trees(found["tree"], truth)["f1"] > 0.8
    assert score_trees(trace(Volume(found["probability"], volume.spacing_um)), truth)["f1"] < 0.2


def test_an_array_a_volume_and_a_file_give_the_same(segmenter, tmp_path):
    volume = Volume(fibre(12, 40, 40), (1.0, 0.5, 0.5))
    write_volume(volume, tmp_path / "stack.tif")
    inputs = [
        volume.voxels,
        volume,
        tmp_path / "stack.tif",
        str(tmp_path / "stack.tif"),
        torch.from_numpy(volume.voxels),
    ]
    results = [segmenter(each) for each in inputs]
    together = segmenter(inputs, batch_size=2)
    for result, again in zip(results, together, strict=True):
        assert_array_equal(result["probability"], results[0]["probability"])
        np.testing.assert_allclose(again["probability"], result["probability"], atol=1e-5)
    units = [result["tree"].unit for result in results]
    assert units == ["voxel", "um", "um", "um", "voxel"]
    assert segmenter(volume.voxels, spacing_um=(2, 1, 1))["tree"].spacing_um == (2, 1, 1)


def test_a_lazy_stack_is_sliced_and_never_asked_for_as_a_whole(segmenter, tmp_path):
    np.save(tmp_path / "stack.npy", fibre(20, 50, 60))

    class Lazy:
        stored = np.load(tmp_path / "stack.npy", mmap_mode="r")
        shape, dtype = stored.shape, stored.dtype

        def __getitem__(self, box):
            return np.asarray(self.stored[box])

        def __array__(self, *_, **__):
            pytest.fail("the stack was asked for as an array")

    class LazyVolume:
        voxels, spacing_um = Lazy(), (1.0, 0.5, 0.5)

    expected = segmenter(np.load(tmp_path / "stack.npy"), trace=False)["probability"]
    for lazy in (Lazy(), LazyVolume()):
        assert_array_equal(segmenter(lazy, trace=False)["probability"], expected)


def test_threshold_selection_and_batch_size_are_obeyed(segmenter):
    voxels = np.random.default_rng(0).integers(0, 255, (12, 40, 40)).astype(np.uint8)
    found = segmenter(voxels, threshold=0.7, trace=False)
    assert_array_equal(found["mask"], found["probability"] > 0.7)
    dense = segmenter(fibre(20, 50, 60), select=False, trace=False)["probability"]
    assert_array_equal(dense, segment(segmenter.model, Volume(fibre(20, 50, 60)), select=False).voxels)
    counted = []
    hook = segmenter.model.register_forward_pre_hook(lambda _, inputs: counted.append(len(inputs[1])))
    segmenter(fibre(20, 50, 60), trace=False, batch_size=3)
    pipeline(TASK, model=segmenter.model, batch_size=2)(fibre(20, 50, 60), trace=False)
    hook.remove()
    assert sorted(set(counted))[-1] == 3
    assert counted.count(2) > 1


def test_the_processors_polarity_is_obeyed(saved):
    ViT3DImageProcessor.from_config(AutoConfig.from_pretrained(saved), polarity="dark").save_pretrained(saved)
    assert pipeline(TASK, model=str(saved)).image_processor.polarity == "dark"


def test_half_precision_is_computed_in_full_where_the_processor_is_slow_in_it(saved):
    model = ViT3DForNeuronSegmentation.from_pretrained(saved, dtype=torch.float16)
    model.save_pretrained(saved)
    segmenter = pipeline(TASK, model=str(saved), device="cpu")
    assert segmenter.model.dtype == torch.float32
    assert not segmenter.model.training


@pytest.mark.parametrize(
    "stack, sentence",
    [
        (np.zeros((4, 4)), r"A stack is \(depth, height, width\) and not empty, got shape \(4, 4\)"),
        (np.zeros((2, 3, 4, 4)), r"got shape \(2, 3, 4, 4\)"),
        (np.zeros((0, 4, 4)), r"got shape \(0, 4, 4\)"),
        (np.full((4, 8, 8), np.nan), "holds NaN or infinite voxels"),
        (np.zeros((4, 8, 8), dtype=complex), "holds integers or floats, got complex128"),
        ("nowhere.tif", "nowhere.tif does not exist"),
    ],
    ids=str,
)
def test_what_is_no_stack_is_refused_in_one_sentence(segmenter, stack, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        segmenter(stack)


def test_an_option_that_does_not_exist_is_refused(segmenter):
    with pytest.raises(TypeError, match="treshold"):
        segmenter(fibre(8, 16, 24), treshold=0.3)


def test_registering_twice_says_nothing(caplog):
    register()
    register()
    assert not caplog.records


def test_no_flag_is_needed_once_the_network_is_imported_from_the_package(saved):
    ViT3DImageProcessor.from_config(AutoConfig.from_pretrained(saved)).save_pretrained(saved)
    for flag in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        assert type(AutoModelForSemanticSegmentation.from_pretrained(saved, **flag)) is ViT3DForNeuronSegmentation
        assert type(pipeline(TASK, model=str(saved), **flag)) is NeuronSegmentationPipeline


# --- without it ------------------------------------------------------------------------------------------------

STRANGER = """
import sys
sys.modules.update(dict.fromkeys(ABSENT))  # not installed here
import numpy as np
from transformers import pipeline

segmenter = pipeline("neuron-segmentation", model="saved", trust_remote_code=True)
assert type(segmenter).__module__.startswith("transformers_modules"), type(segmenter)
for source, options in SOURCES:
    try:
        found = segmenter(np.load(source) if source.endswith(".npy") else source, **options)
        np.save(f"theirs {source}.npy", found["probability"])
        print(*found)
    except (ValueError, OSError) as error:
        print(error)
"""


def stranger(folder: Path, absent: list[str], sources: list[tuple[str, dict]]) -> list[str]:
    """What is printed where the packages `absent` are not installed: keys of the result, or a sentence."""
    code = STRANGER.replace("ABSENT", repr(absent)).replace("SOURCES", repr(sources))
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = {**clean, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_without_the_package_a_large_stack_gives_what_segment_gives_to_the_last_bit(saved):
    voxels, folder = fibre(20, 50, 60), saved.parent
    np.save(folder / "stack.npy", voxels)
    tifffile.imwrite(folder / "stack.tif", voxels)
    expected = segment(ViT3DForNeuronSegmentation.from_pretrained(saved), Volume(voxels)).voxels
    said = stranger(folder, ["vit3d"], [("stack.npy", {}), ("stack.tif", {}), ("stack.npy", {"trace": True})])
    needed = "A tree needs vit3d itself: pip install vit3d-neuron, or leave `trace` out."
    assert said == ["probability mask", "probability mask", needed]
    for source in ("stack.npy", "stack.tif"):
        assert_array_equal(np.load(folder / f"theirs {source}.npy"), expected)


@pytest.mark.slow
def test_without_readers_a_sentence_says_what_to_install(tmp_path):
    tiny_model().save_pretrained(tmp_path / "saved")
    tifffile.imwrite(tmp_path / "stack.tif", fibre(8, 30, 30))
    np.save(tmp_path / "stack.npy", fibre(8, 30, 30))
    sources = [("stack.tif", {}), ("stack.v3dpbd", {}), ("stack.npy", {})]
    said = stranger(tmp_path, ["vit3d", "tifffile"], sources)
    assert said[0].startswith("stack.tif cannot be read here: pip install vit3d-neuron")
    assert said[1:] == ["stack.v3dpbd is no file.", "probability mask"]


@pytest.mark.slow
def test_remote_code_traces_where_the_package_is_installed(tmp_path):
    tiny_model().save_pretrained(tmp_path / "saved")
    np.save(tmp_path / "stack.npy", fibre(20, 50, 60))
    assert stranger(tmp_path, [], [("stack.npy", {})]) == ["probability mask tree swc"]
