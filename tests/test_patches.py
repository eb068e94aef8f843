"""Crops are reproducible, bounded in cost, and never teach what was not computed."""

import os
import pickle
import re
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from vit3d import ViT3DConfig, ViT3DImageProcessor
from vit3d.annotations.annotation import read_labels, read_stack
from vit3d.annotations.pairs import find_pairs
from vit3d.learning.augmentation import Augmentation
from vit3d.learning.patches import MAX_TOKENS, CropDataset, TrainingVolume, choose_tokens, prepared
from vit3d.targets import IGNORED

CONFIG = ViT3DConfig(volume_size=(8, 32, 32), patch_size=(4, 8, 8))
SLICES = ViT3DConfig(volume_size=(8, 32, 32), patch_size=(8, 8, 8), prediction="center_slice")
SINGLE = ViT3DConfig(volume_size=(1, 32, 32), patch_size=(1, 8, 8), prediction="center_slice")
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


NOTHING = Augmentation.none()
NO_RESAMPLING = Augmentation(rotate=0, stretch=0)


def crops(config=CONFIG, volumes=None, length: int = 12, seed: int = 0, **varied) -> CropDataset:
    volumes = volumes or [training_volume(config)]
    processor = ViT3DImageProcessor.from_config(config)
    return CropDataset(volumes, [1.0] * len(volumes), processor, length, seed, config, **varied)


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


@pytest.mark.parametrize("config", [CONFIG, SLICES], ids=["volume", "slices"])
def test_the_two_windows_of_a_pair_are_cut_from_one_crop(config):
    """What both hold is the same: voxels, tokens, and in volume mode labels."""
    dataset, apart = crops(config, length=12, paired=True), set()
    for item in (dataset[i] for i in range(12)):
        first, second = item["places"].tolist()
        low = [max(a, b) for a, b in zip(first, second, strict=True)]
        high = [min(a, b) + n for a, b, n in zip(first, second, config.grid_size, strict=True)]
        assert all(a < b for a, b in zip(low, high, strict=True))
        assert first != second
        apart.add(tuple(b - a for a, b in zip(first, second, strict=True)))

        def shared(name: str, window: int, size, low=low, high=high, item=item) -> torch.Tensor:
            place = item["places"][window].tolist()
            spans = zip(low, high, place, size, strict=True)
            values = item[name][window]
            return values[(..., *(slice((a - at) * n, (b - at) * n) for a, b, at, n in spans))]

        assert torch.equal(*(shared("token_mask", window, (1, 1, 1)) for window in (0, 1)))
        assert torch.equal(*(shared("pixel_values", window, config.patch_size) for window in (0, 1)))
        assert torch.equal(*(shared("labels", window, config.painted_size) for window in (0, 1)))
    assert len(apart) > 4
    dimensions = {name: tuple(values.shape) for name, values in item.items()}
    alone = {name: (2, *values.shape) for name, values in crops(config)[0].items()}
    assert dimensions == {**alone, "places": (2, 3)}


def test_a_window_of_a_pair_keeps_as_much_as_one_alone():
    """Of a stack where all is bright a window is bounded, and a pair's crop by as many windows as it is large."""
    volume = replace(training_volume(WIDE, shape=(40, 140, 140)), mask=np.ones((40, 140, 140), dtype=bool))
    alone, pairs = (crops(WIDE, [volume], augmentation=NOTHING, paired=paired) for paired in (False, True))
    kept = [
        np.mean([item["token_mask"].sum() for item in map(dataset.__getitem__, range(12))])
        for dataset in (alone, pairs)
    ]
    assert kept[0] == MAX_TOKENS
    assert kept[1] / 2 == pytest.approx(MAX_TOKENS, rel=0.1)


def test_a_window_of_one_patch_is_not_cut_twice():
    with pytest.raises(ValueError, match="window is a single patch"):
        crops(ViT3DConfig(volume_size=(4, 8, 8), patch_size=(4, 8, 8)), paired=True)


def test_crops_come_to_an_end_and_are_counted_from_it_too():
    dataset = crops(length=3)
    first, second, last = islice(dataset, 5)
    assert equal(first, dataset[0])
    assert equal(second, dataset[-2])
    assert equal(last, dataset[-1])
    for index in (3, -4):
        for ask in (dataset.__getitem__, dataset.name_of):
            with pytest.raises(IndexError, match=f"There are 3 crops, and none has the number {index}"):
                ask(index)


@pytest.mark.parametrize("config", [CONFIG, SLICES, SINGLE, WIDE])
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
    for item in (crops(augmentation=NO_RESAMPLING)[i] for i in range(12)):
        outside = ~dense_mask(item, CONFIG)
        left_out += outside.sum()
        assert (item["labels"][outside] == IGNORED).all()
        assert set(item["labels"][~outside].unique().tolist()) <= {0, 1}
    assert left_out > 0


def test_a_centre_slice_crop_has_the_label_of_its_centre_slice():
    volume = training_volume(SLICES)
    for item in (crops(SLICES, [volume], augmentation=Augmentation.none(flip=0.5))[i] for i in range(12)):
        known = item["labels"][0] != IGNORED
        assert torch.equal(known, dense_mask(item, SLICES)[4])
        bright = item["pixel_values"][0, 4] > 0
        assert torch.equal(bright[known], item["labels"][0][known] == 1)


def test_image_and_labels_stay_on_each_other():
    """Resampled too, but for the half voxel that the fibre's edge is blurred by then."""
    real = replace(Augmentation(), crowd=0, stripes=0, texture=0, speckle=0, sharpen=0)  # else more than fibres shine
    for augmentation, share in ((Augmentation.none(flip=0.5, transpose=0.5), 0), (real, 0.1)):
        seen, wrong = 0, []
        for item in (crops(length=20, augmentation=augmentation)[i] for i in range(20)):
            values, neurite = item["pixel_values"][0], item["labels"] == 1
            seen += int(neurite.any())
            if neurite.any():
                level = (values[neurite].median() + values[item["labels"] == 0].median()) / 2
                wrong.append(float((values[neurite] < level).float().mean()))
                assert (values[item["labels"] == 0] > level).float().mean() < 0.1
        assert seen > 12
        assert np.mean(wrong) <= share


def test_the_token_mask_stays_on_the_image(monkeypatch):
    monkeypatch.setattr("vit3d.learning.patches.choose_tokens", lambda selected, rng: selected)
    for item in (crops(augmentation=Augmentation.none(flip=0.5, transpose=0.5))[i] for i in range(12)):
        bright = item["pixel_values"][0] > 0
        assert dense_mask(item, CONFIG)[bright].all()
        assert not item["token_mask"].all()


def test_a_network_is_shown_the_light_that_a_variation_adds_as_background(monkeypatch):
    """As `segment` would show it: cells out of focus are bright enough to be selected."""
    monkeypatch.setattr("vit3d.learning.patches.choose_tokens", lambda selected, rng: selected)
    plain, crowded = (crops(augmentation=Augmentation.none(**varied)) for varied in ({}, {"crowd": 1}))
    for before, after in ((plain[i], crowded[i]) for i in range(12)):
        kept, added = after["token_mask"], after["token_mask"] & ~before["token_mask"]
        assert (before["token_mask"] <= kept).all()
        bright = after["pixel_values"][0].unfold(0, 4, 4).unfold(1, 8, 8).unfold(2, 8, 8).mean((3, 4, 5)) > 0.2
        assert kept[bright].all()
        assert set(after["labels"][dense_mask({"token_mask": added}, CONFIG)].tolist()) <= {0}
    assert added.any()


def test_an_unvaried_crop_adds_nothing_to_the_selection_of_its_volume(monkeypatch):
    monkeypatch.setattr("vit3d.learning.patches.choose_tokens", lambda selected, rng: selected)
    volume = training_volume()
    dataset = crops(volumes=[replace(volume, mask=np.zeros_like(volume.mask))], augmentation=NOTHING)
    assert not any(item["token_mask"].any() for item in dataset)


@pytest.mark.parametrize("paired", [False, True])
def test_no_window_costs_more_than_the_bound(paired):
    volume = training_volume(WIDE, (20, 70, 70))
    volume = replace(volume, mask=np.ones_like(volume.mask))
    kept = []
    for item in (crops(WIDE, [volume], paired=paired)[i] for i in range(8)):
        masks = item["token_mask"] if paired else item["token_mask"][None]
        kept += masks.sum((1, 2, 3)).tolist()
    assert max(kept) == MAX_TOKENS
    assert np.mean(kept) > 0.8 * MAX_TOKENS


def test_tokens_are_mostly_the_processors_choice():
    selected = np.random.default_rng(0).random((8, 8, 8)) < 0.1
    kept = np.stack([choose_tokens(selected, np.random.default_rng(seed)) for seed in range(50)])
    assert 0.85 < kept[:, selected].mean() < 1
    assert 0 < kept[:, ~selected].mean() < 0.3
    assert any(np.array_equal(mask, selected) for mask in kept)


def test_a_stack_smaller_than_the_window_is_padded_and_its_padding_teaches_nothing():
    volume = training_volume(CONFIG, shape=(5, 20, 70))
    for item in (crops(CONFIG, [volume], augmentation=NO_RESAMPLING)[i] for i in range(6)):
        known = item["labels"] != IGNORED
        assert known.sum() <= 5 * 20 * 32
        assert known.any(dim=(1, 2)).sum() <= 5
        assert item["pixel_values"].shape == (1, 8, 32, 32)


def test_ignored_labels_stay_ignored():
    volume = training_volume()
    volume.labels[:, :, :35] = IGNORED
    ignored = 0
    for item in (crops(CONFIG, [volume], augmentation=NOTHING)[i] for i in range(8)):
        values, labels = item["pixel_values"][0], item["labels"]
        assert (values[labels == 0] < values.max()).all()
        ignored += int((labels[dense_mask(item, CONFIG)] == IGNORED).sum())
    assert ignored > 0


def test_volumes_are_drawn_by_their_weight():
    volumes = [training_volume(), training_volume(shape=(8, 32, 32))]
    processor = ViT3DImageProcessor.from_config(CONFIG)
    only_second = CropDataset(volumes, [0.0, 2.0], processor, 4, 0, CONFIG)
    alone = CropDataset(volumes[1:], [1.0], processor, 4, 0, CONFIG)
    assert all(equal(only_second[i], alone[i]) for i in range(4))
    assert len(only_second) == 4


def test_most_crops_hold_neurite_and_the_others_what_looks_like_one():
    shape = (20, 60, 200)
    true, false = fibre(shape), fibre(shape)
    true[:, :, 70:], false[:, :, :130] = False, False  # a neurite, and as bright a structure that is none
    voxels = np.where(true | false, 200, 20).astype(np.uint8)
    volume = TrainingVolume.prepare("cell", voxels, true.astype(np.int8), ViT3DImageProcessor.from_config(CONFIG))
    items = [crops(CONFIG, [volume], length=200, augmentation=NOTHING)[i] for i in range(200)]
    neurite = [bool((item["labels"] == 1).any()) for item in items]
    bright = [bool((item["pixel_values"] > 0).any()) for item in items]
    assert 0.7 < np.mean(neurite) < 0.95
    assert np.mean(np.array(bright) & ~np.array(neurite)) > 0.04
    assert np.mean(bright) > 0.9


def test_a_gold_that_paints_nothing_is_refused():
    processor = ViT3DImageProcessor.from_config(CONFIG)
    with pytest.raises(ValueError, match="cell_3: the gold paints no voxel of its stack"):
        TrainingVolume.prepare("cell_3", np.zeros((8, 32, 32), np.uint8), np.zeros((8, 32, 32), np.int8), processor)


def test_a_rotated_crop_lies_around_the_voxel_that_it_was_cut_for():
    """No further from its centre than the jitter of a quarter window moves it, in the plane and in depth."""
    volume = training_volume(shape=(20, 90, 90))
    volume.labels[:] = 0
    volume.labels[9:12, 44:47, 44:47] = 1
    single = replace(volume, neurite=np.array([np.ravel_multi_index((10, 45, 45), volume.labels.shape)]))
    turned = crops(
        CONFIG, [replace(single, candidates=single.neurite)], length=40, augmentation=Augmentation.none(rotate=1)
    )
    for item in (turned[i]["labels"] == 1 for i in range(40)):
        if item.any():  # not where its patch was left out
            z, y, x = np.argwhere(item.numpy()).mean(0) - (3.5, 15.5, 15.5)
            assert abs(z) < 2 + 1
            assert np.hypot(y, x) < 8 * 2**0.5 + 1
    assert sum(bool((turned[i]["labels"] == 1).any()) for i in range(40)) > 30


# --- what a worker holds ---


def private_bytes() -> int:
    """Memory of this process that belongs to no file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status).group(1))


def test_a_stored_volume_gives_the_same_crops_and_holds_no_memory(tmp_path):
    volume = training_volume(shape=(40, 400, 400))
    stored = volume.stored(tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    one, other = crops(volumes=[volume]), crops(volumes=[stored])
    assert all(equal(one[i], other[i]) for i in range(4))
    packed = pickle.dumps(stored)
    assert len(packed) < 1000
    assert_array_equal(pickle.loads(packed).labels, volume.labels)
    assert len(pickle.dumps(volume)) > volume.voxels.nbytes
    before = private_bytes()
    again = crops(volumes=[TrainingVolume.open(tmp_path / "a")], length=100)
    for i in range(20):
        again[i]
    assert private_bytes() - before < volume.voxels.nbytes / 2


def test_workers_give_the_crops_of_one_process(tmp_path):
    dataset = crops(volumes=[training_volume().stored(tmp_path / "a")], length=6)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    assert all(equal(item, dataset[i]) for i, item in enumerate(loader))


def test_a_volume_is_prepared_once_for_its_key(tmp_path):
    made = []

    def make():
        made.append(1)
        return training_volume()

    first = prepared(tmp_path, "neuron, its files, its labelling", make)
    again = prepared(tmp_path, "neuron, its files, its labelling", make)
    prepared(tmp_path, "another labelling", make)
    assert len(made) == 2
    assert_array_equal(first.voxels, again.voxels)
    assert again.statistics == first.statistics


def test_a_volume_that_could_not_be_stored_leaves_nothing(tmp_path):
    volume = training_volume()
    fields = (volume.name, volume.voxels, volume.labels, volume.mask, volume.statistics, volume.neurite)
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        TrainingVolume(*fields, candidates=np.array([{}])).stored(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    (tmp_path / f".a.{os.getpid()}.partial").mkdir()  # what a killed process of this number left
    assert_array_equal(volume.stored(tmp_path / "a").labels, volume.labels)
    assert_array_equal(volume.stored(tmp_path / "a").labels, volume.labels)  # another process was first
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_no_candidates_are_stored_too(tmp_path):
    volume = training_volume()
    assert len(replace(volume, candidates=np.zeros(0, np.int64)).stored(tmp_path / "n").candidates) == 0


# --- partial annotation ---


def test_trailmaps_labelled_slices_can_be_trained_on(shared):
    row = find_pairs(shared / "data/trailmap")[0]
    stack = read_stack(row)
    labels = read_labels(row, stack.shape)
    config = ViT3DConfig(volume_size=(8, 64, 64), patch_size=(4, 8, 8))
    volume = TrainingVolume.prepare("axons", stack.voxels, labels, ViT3DImageProcessor.from_config(config))
    annotated = np.flatnonzero((labels != IGNORED).any(axis=(1, 2)))
    assert_array_equal(annotated, [17, 48, 77])
    assert set(np.unique(np.unravel_index(volume.candidates, labels.shape)[0])) <= set(annotated)
    found = [crops(config, [volume], length=8, augmentation=NO_RESAMPLING)[i]["labels"] for i in range(8)]
    for item in found:
        assert set(item.unique().tolist()) <= {IGNORED, 0, 1}
        assert 1 <= (item != IGNORED).any(dim=(1, 2)).sum() <= 1
    assert sum(int((item == 1).sum()) for item in found) > 100


def test_a_crop_takes_well_under_a_tenth_of_a_second():
    config = ViT3DConfig()
    volume = training_volume(config, (40, 256, 256), noise=10)
    everything = Augmentation(**dict.fromkeys(("rotate", "stretch", "gamma", "noise", "blur", "polarity"), 1.0))
    dataset = crops(config, [volume], length=100, augmentation=everything)
    seconds = []
    for i in range(12):
        start = time.process_time()
        dataset[i]
        seconds.append(time.process_time() - start)
    assert np.median(seconds) < 0.1
