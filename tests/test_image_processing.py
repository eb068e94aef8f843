"""Stack -> normalised tensor with its token mask; logits -> mask."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from vit3d import ViT3DConfig, ViT3DForNeuronSegmentation, ViT3DImageProcessor


@pytest.fixture
def processor() -> ViT3DImageProcessor:
    return ViT3DImageProcessor(volume_size=(8, 32, 32), patch_size=(4, 8, 8), image_mean=0.4, image_std=0.2)


def fibre(*shape: int) -> np.ndarray:
    """uint8, a bright fibre along x in the first slices and rows, on an empty ground."""
    voxels = np.zeros(shape, dtype=np.uint8)
    voxels[1:3, 3:5] = 200
    return voxels


def test_a_stack_arrives_as_the_photographs_did(processor):
    voxels = fibre(8, 32, 40)
    values = processor.pixel_values(voxels, processor.measure(voxels))
    assert values.dtype == np.float32
    assert_allclose([values.min(), values.max()], [(0 - 0.4) / 0.2, (1 - 0.4) / 0.2], rtol=1e-5)


def test_a_batch_has_the_axes_of_the_network(processor):
    batch = processor([fibre(8, 32, 40), fibre(8, 32, 40)], return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 1, 8, 32, 40)
    assert batch["token_mask"].shape == (2, 2, 4, 5)
    assert batch["token_mask"].dtype == torch.bool
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])


def test_one_stack_or_an_array_of_stacks_is_a_batch(processor):
    one = processor(fibre(8, 32, 40))["pixel_values"]
    assert_array_equal(processor(np.stack([fibre(8, 32, 40)] * 2))["pixel_values"], np.concatenate([one, one]))


def test_only_patches_with_a_neurite_are_kept(processor):
    kept = processor(fibre(8, 32, 40))["token_mask"][0]
    assert kept[0, 0].all()
    assert not kept[:, 2:].any()


def test_a_stack_is_padded_to_whole_patches_by_its_border_and_its_labels_are_ignored_there(processor):
    voxels = fibre(7, 30, 37)
    batch = processor(voxels, segmentation_maps=voxels > 0)
    values, labels = batch["pixel_values"][0, 0], batch["labels"][0]
    assert values.shape == labels.shape == (8, 32, 40)
    assert_array_equal(values[7], values[6])
    assert_array_equal(values[:, :, 37:], np.repeat(values[:, :, 36:37], 3, axis=2))
    assert_array_equal(labels[:7, :30, :37], voxels > 0)
    assert labels.dtype == np.int64
    labels[:7, :30, :37] = -100
    assert (labels == -100).all()


@pytest.mark.parametrize("dtype, neurite", [(bool, 1), (np.uint8, 1), (np.uint8, 255), (np.int8, 1), (np.float32, 255)])
def test_a_mask_is_labels_however_it_is_stored(processor, dtype, neurite):
    voxels = fibre(8, 32, 40)
    labels = processor(voxels, segmentation_maps=((voxels > 0) * neurite).astype(dtype))["labels"]
    assert labels.dtype == np.int64
    assert_array_equal(labels[0], voxels > 0)


def test_ignored_labels_stay_ignored(processor):
    labels = np.where(fibre(8, 32, 40) > 0, -100, 0)
    labels[4] = 1
    assert_array_equal(processor(fibre(8, 32, 40), segmentation_maps=labels)["labels"][0], labels)


@pytest.mark.parametrize("values", [(0, 2), (0, 1, 255), (0, 0.5), (0, np.nan), (0, 156)])
def test_labels_of_other_values_are_refused(processor, values):
    labels = np.resize(np.array(values), (8, 32, 40))
    with pytest.raises(ValueError, match=r"A label map holds 1 .* got the values \[0"):
        processor(fibre(8, 32, 40), segmentation_maps=labels)


def test_labels_of_another_shape_than_the_stack_are_refused(processor):
    for shape in ((8, 32, 32), (1, 32, 40), (2, 8, 32, 40)):
        with pytest.raises(ValueError, match=r"a label map of its own shape: 1 of \(8, 32, 40\), got [12] of \("):
            processor(fibre(8, 32, 40), segmentation_maps=np.zeros(shape, bool))


def test_the_labels_of_a_centre_slice_are_those_that_its_network_takes(tmp_path):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, fused_layers=(1, 2))
    window = dict(volume_size=(5, 32, 40), patch_size=(5, 8, 8), prediction="center_slice")
    model = ViT3DForNeuronSegmentation(ViT3DConfig(**sizes, **window))
    ViT3DImageProcessor.from_config(model.config).save_pretrained(tmp_path)
    processor = ViT3DImageProcessor.from_pretrained(tmp_path)
    labels = np.arange(5)[:, None, None] == np.full((5, 32, 40), 2)
    batch = processor([fibre(5, 32, 40)] * 2, segmentation_maps=[labels] * 2, return_tensors="pt")
    assert batch["labels"].shape == (2, 1, 32, 40)
    assert batch["labels"].all()
    assert model(**batch).loss.isfinite()
    with pytest.raises(ValueError, match="A centre slice is predicted from 5 slices, got labels of 10"):
        processor(fibre(7, 32, 40), segmentation_maps=np.zeros((7, 32, 40)))


def test_a_crop_is_prepared_with_the_statistics_of_its_volume(processor):
    voxels = fibre(8, 32, 40)
    voxels[1:3, 20:22] = 40  # a faint fibre, which alone would count as bright
    whole = processor(voxels)
    crop = processor(voxels[:, 16:], statistics=processor.measure(voxels))
    assert_array_equal(crop["pixel_values"], whole["pixel_values"][:, :, :, 16:])


def test_an_unsure_polarity_keeps_every_patch(processor):
    voxels = np.full((8, 32, 40), 100, dtype=np.uint8)
    voxels[4, :, 10], voxels[4, :, 30] = 200, 0
    assert processor(voxels)["token_mask"].all()


def test_a_dark_neurite_looks_like_a_bright_one(processor):
    dark, bright = (processor(voxels)["pixel_values"] for voxels in (255 - fibre(8, 32, 40), fibre(8, 32, 40)))
    assert_allclose(dark, bright, atol=0.02)


def test_stacks_of_different_shapes_are_no_batch(processor):
    with pytest.raises(ValueError, match=r"stacks of one shape .* got \[\(8, 32, 32\), \(8, 32, 40\)\]"):
        processor([fibre(8, 32, 40), fibre(8, 32, 32)])
    with pytest.raises(ValueError, match="stacks of one shape"):
        processor(fibre(32, 40))


def test_logits_become_masks_cut_back_to_the_stack(processor):
    logits = torch.zeros(2, 1, 8, 32, 40)
    logits[0, 0, 2, 3, 5], logits[1] = 5, 0.5
    outputs = SimpleNamespace(logits=logits)
    first, second = processor.post_process_semantic_segmentation(outputs, target_sizes=[(7, 30, 37), (8, 32, 40)])
    assert first.nonzero().tolist() == [[2, 3, 5]]
    assert first.shape == (7, 30, 37)
    assert second.all()
    assert not processor.post_process_semantic_segmentation(outputs, threshold=0.9)[1].any()
    with pytest.raises(ValueError, match="one size per stack: 2, got 1"):
        processor.post_process_semantic_segmentation(outputs, target_sizes=[(7, 30, 37)])


@pytest.mark.parametrize("absurd", [{"image_std": 0}, {"image_mean": np.nan}, {"volume_size": (16, 100, 112)}])
def test_what_no_network_could_have_is_refused(absurd):
    with pytest.raises(ValueError, match=f"`{next(iter(absurd))}`"):
        ViT3DImageProcessor(**absurd)


def test_the_processor_of_a_network_has_its_sizes_and_survives_saving(tmp_path):
    config = ViT3DConfig(volume_size=(8, 32, 48), patch_size=(2, 8, 16), image_mean=0.3, image_std=0.1)
    ViT3DImageProcessor.from_config(config, polarity="dark").save_pretrained(tmp_path)
    loaded = ViT3DImageProcessor.from_pretrained(tmp_path)
    for name in ("volume_size", "patch_size", "image_mean", "image_std"):
        assert getattr(loaded, name) == getattr(config, name), name
    assert loaded.polarity == "dark"
