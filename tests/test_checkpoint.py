"""Which dtype a checkpoint is loaded in, and that it does not matter for the tree."""

import numpy as np
import pytest
import torch

from runs import make_checkpoint
from vit3d import ViT3DConfig, ViT3DImageProcessor
from vit3d.checkpoint import load_checkpoint, preferred_dtype
from vit3d.scoring import score_trees
from vit3d.segmentation import segment
from vit3d.tracing import trace
from vit3d.volume import read_volume

SPACING_UM = (1.0, 0.33, 0.33)


@pytest.mark.parametrize(
    "capabilities, expected",
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"neon": True}, torch.float32),
    ],
)
def test_only_hardware_that_multiplies_bf16_gets_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert preferred_dtype("cpu") is expected


def test_a_torch_that_does_not_tell_computes_in_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert preferred_dtype("cpu") is torch.float32


def test_the_shipped_network_loads_in_the_preferred_dtype_unless_told_otherwise():
    assert load_checkpoint(device="cpu")[0].dtype is preferred_dtype("cpu")
    assert load_checkpoint(device="cpu", dtype=torch.float32)[0].dtype is torch.float32


def test_the_processor_is_the_checkpoints_own_unless_told_otherwise(tmp_path):
    place = make_checkpoint(tmp_path)
    assert load_checkpoint(place, "cpu")[1].polarity == "auto"
    own = ViT3DImageProcessor.from_config(ViT3DConfig.from_pretrained(place), polarity="dark")
    own.image_mean = 0.3
    own.save_pretrained(place)
    found = load_checkpoint(place, "cpu")[1]
    assert (found.polarity, found.image_mean) == ("dark", 0.3)
    assert load_checkpoint(place, "cpu", "bright")[1].polarity == "bright"


def test_sizes_and_prediction_are_the_networks_whatever_the_processors_file_says(tmp_path):
    slices = {"prediction": "center_slice", "patch_size": (5, 8, 8), "volume_size": (5, 32, 32)}
    place = make_checkpoint(tmp_path, **slices)
    ViT3DImageProcessor().save_pretrained(place)
    found = load_checkpoint(place, "cpu")[1]
    assert {name: getattr(found, name) for name in slices} == slices


def test_a_processor_of_another_network_is_refused(tmp_path):
    place = make_checkpoint(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    with pytest.raises(ValueError, match=r"`image_mean` must be one number, that of grey, got \[0.5, 0.5, 0.5\]"):
        load_checkpoint(place, "cpu")


def test_a_polarity_that_there_is_not_is_refused(tmp_path):
    sentence = "`polarity` must be 'auto', 'bright' or 'dark', got 'drak'"
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(polarity="drak")
    with pytest.raises(ValueError, match=sentence):
        ViT3DImageProcessor(polarity="drak")
    place = make_checkpoint(tmp_path)
    ViT3DImageProcessor().save_pretrained(place)
    saved = tmp_path / "preprocessor_config.json"
    saved.write_text(saved.read_text().replace('"auto"', '"drak"'))
    with pytest.raises(ValueError, match=f"{place} is not a vit3d checkpoint .*{sentence}"):
        load_checkpoint(place, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, rows, columns", [("OP_6", slice(200, 340), slice(150, 330)), ("OP_3", slice(150, 330), slice(150, 330))]
)
def test_bf16_gives_the_probability_and_the_tree_that_fp32_gives(shared, name, rows, columns):
    """Of a part with branches, for a CPU that has no bf16 is slow in it; the two are compared with each other.

    Against a gold, one branch more or less is a step that says nothing of the precision. Near neurites bf16 differs by
    0.002 (OP_6) and 0.004 (OP_3) in the mean; weights rounded to float8 by 0.017 and 0.031.
    """
    volume = read_volume(shared / f"data/op/{name}.tif", spacing_um=SPACING_UM)
    part = volume.crop((slice(0, volume.shape[0]), rows, columns))
    found, trees = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model, processor = load_checkpoint(device="cpu", dtype=dtype)
        assert model.dtype is dtype
        probability = segment(model, part, processor=processor, statistics=processor.measure(volume.voxels))
        found[dtype], trees[dtype] = probability.voxels, trace(probability).to("voxel")
    full, half = found.values()
    near = np.maximum(full, half) > 0.05
    assert near.mean() > 0.001
    assert 0 < np.abs(full - half)[near].mean() < 0.008
    scores = score_trees(trees[torch.bfloat16], trees[torch.float32])
    assert scores["f1"] > 0.98
    assert scores["esa"] < 0.3
