"""Crops are reproducible, bounded in cost, and never teach what was not computed."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from vit3d import ViT3DConfig, ViT3DImageProcessor
from vit3d.patches import MAX_TOKENS, CropDataset, TrainingVolume, choose_tokens, vary_intensity, vary_orientation
from vit3d.targets import IGNORED

CONFIG = ViT3DConfig(volume_size=(8, 32, 32), patch_size=(4, 8, 8))
SLICES = ViT3DConfig(volume_size=(8, 32, 32), patch_size=(8, 8, 8), prediction="center_slice")
WIDE = ViT3DConfig(volume_size=(16, 64, 64), patch_size=(2, 8, 8))  # 512 patches


def fibre(shape) -> np.ndarray:
    """bool: a fibre through the whole stack, slanted in every axis."""
    z, y, x = np.indices(shape)
    along = x / shape[2]
    return np.hypot(z - shape[0] * (0.3 + 0.4 * along), y - shape[1] * (0.2 + 0.5 * along)) < 2


def training_volume(config=CONFIG, shape=(20, 60, 70), noise: float = 0.0) -> TrainingVolume:
    neurite = fibre(shape)
    voxels = np.where(neurite, 200.0, 20.0) + np.random.default_rng(0).normal(0, noise, shape)
    labels = neurite.astype(np.int8)
    processor = ViT3DImageProcessor.from_config(config)
    return TrainingVolume.prepare("fibre", np.clip(voxels, 0, 255).astype(np.uint8), labels, processor)


def crops(config=CONFIG, volumes=None, length: int = 12, seed: int = 0) -> CropDataset:
    volumes = volumes or [training_volume(config)]
    return CropDataset(volumes, [1.0] * len(volumes), ViT3DImageProcessor.from_config(config), length, seed, config)


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def dense_mask(item: dict, config) -> torch.Tensor:
    """The token mask as voxels of the window."""
    mask = item["token_mask"]
    for axis, size in enumerate(config.patch_size):
        mask = mask.repeat_interleave(size, axis)
    return mask


def test_a_crop_depends_on_seed_and_number_alone():
    forwards = [crops()[i] for i in range(6)]
    dataset = crops(length=100)
    backwards = [dataset[i] for i in reversed(range(6))][::-1]
    assert all(equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert not any(equal(forwards[0], other) for other in forwards[1:])
    assert not equal(forwards[0], crops(seed=1)[0])


@pytest.mark.parametrize("config", [CONFIG, SLICES, WIDE])
def test_a_crop_has_the_networks_window(config):
    for item in (crops(config)[i] for i in range(4)):
        assert item["pixel_values"].shape == (1, *config.volume_size)
        assert item["pixel_values"].dtype == torch.float32
        assert item["pixel_values"].isfinite().all()
        assert item["labels"].shape == config.output_size
        assert item["labels"].dtype == torch.int64
        assert item["token_mask"].shape == config.grid_size
        assert item["token_mask"].dtype == torch.bool


def test_a_patch_left_out_has_no_label():
    left_out = 0
    for item in (crops()[i] for i in range(12)):
        outside = ~dense_mask(item, CONFIG)
        left_out += outside.sum()
        assert (item["labels"][outside] == IGNORED).all()
        assert set(item["labels"][~outside].unique().tolist()) <= {0, 1}
    assert left_out > 0


def test_a_centre_slice_crop_has_the_label_of_its_centre_slice(monkeypatch):
    monkeypatch.setattr("vit3d.patches.vary_intensity", lambda voxels, statistics, rng: (voxels, statistics))
    volume = training_volume(SLICES)
    for item in (crops(SLICES, [volume])[i] for i in range(12)):
        known = item["labels"][0] != IGNORED
        assert torch.equal(known, dense_mask(item, SLICES)[4])
        bright = item["pixel_values"][0, 4] > 0
        assert torch.equal(bright[known], item["labels"][0][known] == 1)


def test_image_and_labels_stay_on_each_other():
    seen = 0
    for item in (crops(length=20)[i] for i in range(20)):
        values, neurite = item["pixel_values"][0], item["labels"] == 1
        seen += int(neurite.any())
        if neurite.any():
            assert values[neurite].min() > values[item["labels"] == 0].max()
    assert seen > 12


def test_the_token_mask_stays_on_the_image(monkeypatch):
    monkeypatch.setattr("vit3d.patches.choose_tokens", lambda selected, rng: selected)
    monkeypatch.setattr("vit3d.patches.vary_intensity", lambda voxels, statistics, rng: (voxels, statistics))
    for item in (crops()[i] for i in range(12)):
        bright = item["pixel_values"][0] > 0
        assert dense_mask(item, CONFIG)[bright].all()
        assert not item["token_mask"].all()


def test_an_orientation_is_the_same_for_all_arrays():
    marker = np.zeros((4, 6, 6))
    marker[0, 1, 4] = 1
    places = set()
    for seed in range(60):
        one, other = vary_orientation((marker, marker * 2), np.random.default_rng(seed))
        assert_array_equal(other, one * 2)
        assert one.sum() == 1
        places.add(tuple(np.argwhere(one)[0].tolist()))
    assert len(places) == 2 * 8 / 2  # two flips in z; in the plane (1, 4) lies on a diagonal: four places


def test_a_window_that_is_not_square_is_not_transposed():
    shapes = {vary_orientation((np.zeros((4, 6, 8)),), np.random.default_rng(seed))[0].shape for seed in range(20)}
    assert shapes == {(4, 6, 8)}


def test_no_crop_costs_more_than_the_bound():
    everything = np.ones((8, 8, 8), dtype=bool)
    kept = [int(choose_tokens(everything, np.random.default_rng(seed)).sum()) for seed in range(20)]
    assert max(kept) == MAX_TOKENS
    item = crops(WIDE, [training_volume(WIDE, (20, 70, 70), noise=60)])[0]
    assert item["token_mask"].sum() <= MAX_TOKENS


def test_tokens_are_mostly_the_processors_choice():
    selected = np.random.default_rng(0).random((8, 8, 8)) < 0.1
    kept = np.stack([choose_tokens(selected, np.random.default_rng(seed)) for seed in range(50)])
    assert kept[:, selected].mean() > 0.85
    assert 0 < kept[:, ~selected].mean() < 0.3
    assert any(np.array_equal(mask, selected) for mask in kept)


def test_a_stack_smaller_than_the_window_is_padded_and_its_padding_teaches_nothing():
    volume = training_volume(CONFIG, shape=(5, 20, 70))
    for item in (crops(CONFIG, [volume])[i] for i in range(6)):
        known = item["labels"] != IGNORED
        assert known.sum() <= 5 * 20 * 32
        assert known.any(dim=(1, 2)).sum() <= 5
        assert item["pixel_values"].shape == (1, 8, 32, 32)


def test_ignored_labels_stay_ignored():
    volume = training_volume()
    volume.labels[:, :, :35] = IGNORED
    ignored = 0
    for item in (crops(CONFIG, [volume])[i] for i in range(8)):
        values, labels = item["pixel_values"][0], item["labels"]
        assert (values[labels == 0] < values.max()).all()
        ignored += int((labels[dense_mask(item, CONFIG)] == IGNORED).sum())
    assert ignored > 0


def test_another_exposure_keeps_dark_apart_from_bright():
    volume = training_volume()
    processor = ViT3DImageProcessor.from_config(CONFIG)
    neurite = volume.labels == 1
    levels = set()
    for seed in range(40):
        values = processor.pixel_values(*vary_intensity(volume.voxels, volume.statistics, np.random.default_rng(seed)))
        assert np.percentile(values[neurite], 5) > np.percentile(values[~neurite], 95)
        levels.add(round(float(np.median(values[neurite])), 3))
    assert len(levels) > 3


def test_volumes_are_drawn_by_their_weight():
    volumes = [training_volume(), training_volume(shape=(8, 32, 32))]
    processor = ViT3DImageProcessor.from_config(CONFIG)
    only_second = CropDataset(volumes, [0.0, 2.0], processor, 4, 0, CONFIG)
    alone = CropDataset(volumes[1:], [1.0], processor, 4, 0, CONFIG)
    assert all(equal(only_second[i], alone[i]) for i in range(4))
    assert len(only_second) == 4


def test_a_gold_that_paints_nothing_is_refused():
    processor = ViT3DImageProcessor.from_config(CONFIG)
    with pytest.raises(ValueError, match="cell_3: the gold paints no voxel of its stack"):
        TrainingVolume.prepare("cell_3", np.zeros((8, 32, 32), np.uint8), np.zeros((8, 32, 32), np.int8), processor)
