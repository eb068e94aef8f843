"""The main job: stack -> probability -> tree -> files, by command and by function."""

import csv
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
import zarr
from scipy import ndimage

from vit3d import ViT3DConfig, ViT3DForNeuronSegmentation, ViT3DImageProcessor, checkpoint
from vit3d.blockwise.leases import Leases
from vit3d.centerlines.prominence import light_of_its_own, most_prominent_part
from vit3d.cli import main
from vit3d.formats.lazy_voxels import ChangedVoxels, LazyVoxels
from vit3d.model.head_vit3d import HALO
from vit3d.model.intensity_vit3d import IntensityStatistics
from vit3d.reconstruction import (
    find_stacks,
    fits_in_memory,
    inverted,
    masked,
    reconstruct,
    reconstruct_on_disk,
    within,
)
from vit3d.scoring import score_trees
from vit3d.tracing import trace
from vit3d.tree import NeuronTree, read_swc
from vit3d.volume import Volume, open_volume, read_volume, write_volume

SPACING = (1.0, 0.5, 0.5)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CONFIG = ViT3DConfig(**SIZES, fused_layers=(1, 2), volume_size=(8, 32, 32), patch_size=(4, 8, 8))
NAMES = ["a.png", "a.swc", "a_probability.tif", "a_review.csv"]


class Photograph(torch.nn.Module):
    """A network with one voxel of context: what is bright is neurite."""

    config, device = CONFIG, torch.device("cpu")

    @property
    def head(self):
        return self

    def forward(self, patches, token_mask):
        return SimpleNamespace(tokens=torch.zeros(len(patches), 1))

    def features(self, tokens):
        return torch.zeros(len(tokens) + 1, 1, 1)

    def paint(self, features, table, kept, raw):
        display = raw[:, :, HALO:-HALO, HALO:-HALO, HALO:-HALO] * CONFIG.image_std + CONFIG.image_mean
        return 20 * (display - 0.6)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A tiny network that has learned nothing, and is unsure everywhere."""
    folder = tmp_path_factory.mktemp("checkpoint")
    network = ViT3DForNeuronSegmentation(CONFIG)
    network.head.classifier.bias.data.zero_()
    network.save_pretrained(folder)
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


def two_fibres(dark: bool = False) -> Volume:
    """A sharp fibre along x at y = 20, and a longer one at y = 70 that lies far out of focus."""
    light = np.zeros((24, 120, 160))
    light[12, 19:22, 40:110] = 1.0
    blurred = np.zeros_like(light)
    blurred[12, 69:72, 35:125] = 1.0
    light, blurred = (ndimage.gaussian_filter(each, width) for each, width in ((light, 1), (blurred, (4, 9, 9))))
    light = light / light.max() + 0.2 * blurred / blurred.max()
    voxels = np.random.default_rng(0).normal(10 + 240 * light / light.max(), 0.3)
    return Volume(np.clip(250 - voxels if dark else voxels, 0, 255).astype(np.uint8), SPACING)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
def test_of_two_neurites_the_one_in_focus_is_kept_though_it_is_shorter(dark, lazy, tmp_path):
    volume = two_fibres(dark)
    forest = reconstruct(Photograph(), volume, forest=True).tree.split()
    sharp, blurred = sorted(forest, key=lambda tree: tree.points[:, 1].mean())[:2]
    assert blurred.cable_length > 1.1 * sharp.cable_length
    if lazy:
        zarr.create_array(tmp_path / "in.zarr", data=volume.voxels)
        stack = open_volume(tmp_path / "in.zarr", spacing_um=SPACING)
        found = reconstruct_on_disk(Photograph(), stack, tmp_path / "out.zarr")
    else:
        found = reconstruct(Photograph(), volume)
    assert abs(found.tree.points[:, 1] / SPACING[1] - 20).max() < 4
    assert found.reviews[0].kind == "left out"
    assert found.reviews[0].length == pytest.approx(blurred.cable_length, rel=0.05)
    chosen = reconstruct(Photograph(), volume, root=(12.0, 35.0, 40.0)).tree
    assert chosen.cable_length == pytest.approx(blurred.cable_length, rel=0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_what_lies_out_of_focus_or_is_dim_has_little_light_of_its_own_in_whatever_units(dark):
    volume = two_fibres(dark)
    statistics = ViT3DImageProcessor.from_config(CONFIG).measure(volume.voxels)
    trees = reconstruct(Photograph(), volume, forest=True).tree.split()
    sharp, blurred = sorted(trees, key=lambda tree: tree.points[:, 1].mean())[:2]
    light = np.nanmean(light_of_its_own(sharp, volume, statistics))
    assert np.nanmean(light_of_its_own(blurred, volume, statistics)) < 0.25 * light  # and it counts cubed
    other = Volume(7 + volume.voxels / 4.0, SPACING)
    grey = replace(statistics, background=statistics.background / 4 + 7, bright=statistics.bright / 4 + 7)
    assert np.nanmean(light_of_its_own(sharp, other, grey)) == pytest.approx(light)
    ground = np.float64(statistics.background)
    dim = Volume(ground + (volume.voxels - ground) / 4, SPACING)
    assert np.nanmean(light_of_its_own(sharp, dim, statistics)) == pytest.approx(light / 4, rel=0.1)


@pytest.mark.parametrize("radius", [2, 6, 12, 20])
def test_a_neurite_has_light_of_its_own_however_thick_it_is(radius):
    """Most of a circle close around a thick one lies on the neurite itself."""
    y, z = np.ogrid[:160, :60]
    inside = (np.hypot(y - 80, z - 30) <= radius).T
    voxels = np.repeat(np.where(inside, 200, 10).astype(np.uint8)[..., None], 300, axis=2)
    points = np.stack([np.full(100, 30.0), np.full(100, 80.0), np.arange(100, 200)], axis=1)
    tree = NeuronTree(points, np.full(100, float(radius)), np.arange(100) - 1, unit="voxel")
    light = light_of_its_own(tree, Volume(voxels), IntensityStatistics(10, 1, 200))
    assert np.nanmean(light) == pytest.approx(1, abs=0.02)


def test_in_a_stack_too_narrow_to_tell_every_tree_counts():
    """No circle fits in: the longest tree is kept, and nothing is warned of."""
    voxels = np.zeros((60, 6, 6), np.uint8)
    voxels[2:40, 2:4, 2:4] = voxels[52:58, 2:4, 2:4] = 200
    volume = Volume(voxels)
    statistics = ViT3DImageProcessor.from_config(CONFIG).measure(voxels)
    trees = trace(volume, forest=True, max_gap_um=0).split()
    assert len(trees) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tree in trees:
            inside, prominence = most_prominent_part(tree, light_of_its_own(tree, volume, statistics))
            assert inside.all()
            assert prominence == tree.edge_lengths.sum()


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
    assert header.split() == ["name", "nodes", "trees", "cable_um", "tips", "branch_points", "neurites", "review"]
    assert (row.split()[:3], row.split()[-2]) == (["a", str(len(tree)), "1"], "bright")
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
    _, printed, _ = vit3d("reconstruct", dark, "--out", tmp_path / "found")
    assert printed.split()[-2] == "dark"
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


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_box_may_be_written_as_python_writes_slices(tmp_path, on_disk):
    volume, model = Volume(y_stack(), SPACING), Photograph()
    depth, height, width = volume.shape
    usual = (slice(3, depth), slice(0, height), slice(30, width - 4))
    short = (slice(3 - depth, None), slice(None), slice(30, -4))
    if on_disk:
        write_volume(volume, tmp_path / "a.zarr")
        volume = open_volume(tmp_path / "a.zarr")
        trees = [
            reconstruct_on_disk(model, volume, tmp_path / f"{n}.zarr", box=box).tree
            for n, box in enumerate((usual, short))
        ]
    else:
        trees = [reconstruct(model, volume, box=box).tree for box in (usual, short)]
    assert trees[0].points[:, 0].min() >= 3
    assert np.array_equal(trees[1].points, trees[0].points)


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


# ------------------------------------------------------------ larger than memory


ON_DISK = ["a.png", "a.swc", "a_probability.zarr", "a_review.csv"]


def on_disk(*words):
    return ("reconstruct", *words, "--out-of-core", "--memory-budget", 64)  # other tests may have taken much


def test_out_of_core_gives_the_tree_of_the_run_in_memory_and_a_store_for_viewers(vit3d, tmp_path):
    path = written(tmp_path / "a.zarr")
    assert vit3d("reconstruct", path, "--out", tmp_path / "whole", "--in-memory")[0] == 0
    status, printed, said = vit3d(*on_disk(path, "--out", tmp_path / "disk"))
    assert status == 0, said
    assert names(tmp_path / "disk") == ON_DISK
    whole, disk = (read_swc(tmp_path / place / "a.swc") for place in ("whole", "disk"))
    assert_equal_trees(whole, disk, threshold=0.5)
    first = read_volume(tmp_path / "whole" / "a_probability.tif")
    second = read_volume(tmp_path / "disk" / "a_probability.zarr")
    np.testing.assert_allclose(first.voxels, second.voxels, atol=5e-4)  # the store holds 2048ths
    assert second.spacing_um == SPACING
    assert [row.split()[0] for row in printed.splitlines()] == ["name", "a"]


def test_out_of_core_again_goes_on_and_gives_the_same(vit3d, tmp_path):
    path = written(tmp_path / "a.tif")
    for _ in range(2):
        assert vit3d(*on_disk(path, "--out", tmp_path / "o"))[0] == 0
    first = (tmp_path / "o" / "a.swc").read_bytes()
    assert vit3d(*on_disk(path, "--out", tmp_path / "o"))[0] == 0
    assert (tmp_path / "o" / "a.swc").read_bytes() == first
    assert names(tmp_path / "o") == ON_DISK


def test_a_damaged_coarser_level_is_named_by_verify_and_written_anew_by_the_next_run(vit3d, tmp_path):
    path = written(tmp_path / "a.tif", np.pad(y_stack(), ((0, 0), (0, 0), (0, 60))))
    store = tmp_path / "o" / "a_probability.zarr"
    assert vit3d(*on_disk(path, "--out", tmp_path / "o"))[0] == 0
    assert vit3d("segment", "--verify", store) == (0, f"{store} is whole.\n", "")
    shard = store / "1/c/0/0/0"
    whole = shard.read_bytes()
    for damaged, said in ((None, "is missing"), (bytes([whole[0] ^ 1]) + whole[1:], "cannot be read")):
        shard.unlink() if damaged is None else shard.write_bytes(damaged)
        status, printed, _ = vit3d("segment", "--verify", store)
        assert (status, printed.startswith(f"{shard} {said}")) == (1, True), printed
        assert vit3d(*on_disk(path, "--out", tmp_path / "o"))[0] == 0
        assert shard.read_bytes() == whole


def test_out_of_core_keeps_to_the_mask_and_the_crop(vit3d, tmp_path):
    inside = np.zeros(y_stack().shape, np.uint8)
    inside[:, :, :40] = 7
    flags = ("--mask", written(tmp_path / "mask.zarr", inside), "--swc-unit", "voxel", "--crop", "3:,1:63,2:99")
    path = written(tmp_path / "a.tif")
    assert vit3d(*on_disk(path, "--out", tmp_path / "o", *flags))[0] == 0
    assert vit3d("reconstruct", path, "--out", tmp_path / "whole", *flags)[0] == 0
    whole, disk = (read_swc(tmp_path / place / "a.swc") for place in ("whole", "o"))
    assert_equal_trees(whole, disk, threshold=0.5)
    assert 34 < disk.points[:, 2].max() < 40
    assert read_volume(tmp_path / "o" / "a_probability.zarr").shape == (17, 62, 97)


def test_a_stack_beyond_the_budget_is_worked_on_on_disk_but_a_small_crop_of_it_in_memory(vit3d, tmp_path):
    stack = Volume(np.zeros((20, 64, 100), np.uint8))
    enough = 20 * 64 * 100 * (1 + 12) + 2**30
    assert fits_in_memory(stack, enough)
    assert not fits_in_memory(stack, enough - 1)
    assert fits_in_memory(stack, enough - 1, (slice(0, 19), slice(0, 64), slice(0, 100)))
    path = written(tmp_path / "a.zarr")
    crop = ("--crop", "3:,1:63,2:99")
    budget = (enough - 1) / 2**30
    status, _, said = vit3d("reconstruct", path, "--out", tmp_path / "o", *crop, "--memory-budget", budget)
    assert status == 0, said
    assert names(tmp_path / "o") == NAMES  # the crop fits


def test_nan_in_a_crop_of_a_stack_on_disk_is_refused(tmp_path):
    voxels = y_stack().astype(np.float32)
    voxels[4, 5, 6] = np.nan
    volume = open_volume(written(tmp_path / "a.zarr", voxels))
    box = (slice(0, 9), slice(0, 30), slice(0, 30))
    with pytest.raises(ValueError, match="NaN"):
        reconstruct(Photograph(), Volume(volume.voxels, SPACING), box=box, processor=Measured())


class Measured:
    """A processor that has measured elsewhere."""

    def measure(self, voxels):
        return None


@pytest.fixture
def other(tmp_path):
    """Another process that is tracing, as its lease says."""
    (tmp_path / "o").mkdir()
    with Leases(tmp_path / "o") as leases:
        assert leases.claim(TRACING)
        yield leases


TRACING = ".a_probability.zarr.tracing"
WAITS = "vit3d: Another process is tracing a_probability.zarr; should it end without a tree, this one will trace.\n"


@pytest.mark.slow
def test_who_waits_for_a_process_that_gives_up_tracing_traces(vit3d, other, tmp_path):
    def give_up():
        while not (tmp_path / "o" / "a_probability.zarr").exists():
            time.sleep(0.05)
        time.sleep(2)
        other.release(TRACING)

    threading.Thread(target=give_up, daemon=True).start()
    status, printed, said = vit3d(*on_disk(written(tmp_path / "a.tif"), "--out", tmp_path / "o"))
    assert (status, said.count(WAITS)) == (0, 1)
    assert "cable_um" in printed
    assert names(tmp_path / "o") == ON_DISK


@pytest.mark.slow
def test_a_process_killed_elsewhere_while_it_traced_is_waited_for_and_then_replaced(vit3d, other, tmp_path):
    lease = tmp_path / "o" / TRACING
    owner = json.loads(lease.read_text())
    other.release(TRACING)
    lease.write_text(json.dumps({**owner, "machine": "another PID namespace"}))
    os.utime(lease, (time.time() - 50,) * 2)  # so it counts as held for ten seconds yet
    status, _, said = vit3d(*on_disk(written(tmp_path / "a.tif"), "--out", tmp_path / "o"))
    assert (status, said.count(WAITS)) == (0, 1)
    assert names(tmp_path / "o") == ON_DISK


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_tracing_is_done_once_and_waited_for_unless_a_launcher_looks_after_all(tmp_path, ranks):
    volume, store = open_volume(written(tmp_path / "a.zarr")), tmp_path / "o" / "a_probability.zarr"
    ended, writing = [], threading.Event()

    def write(_):
        writing.set()
        time.sleep(3)  # the others have found the store whole by now
        ended.append("written")

    def process(rank):
        run = {"memory_bytes": 2**36, "rank": rank % ranks, "ranks": ranks}
        if reconstruct_on_disk(Photograph(), volume, store, run=run, write=write) is None:
            assert writing.wait(60)
            ended.append("left")

    with warnings.catch_warnings(), ThreadPoolExecutor(3) as processes:
        warnings.simplefilter("ignore")  # who has to wait says so
        list(processes.map(process, range(3)))
    assert ended == (["written", "left", "left"] if ranks == 1 else ["left", "left", "written"])


def two_neurites() -> np.ndarray:
    voxels = np.zeros((12, 60, 100), np.uint8)
    voxels[5:8, 9:12, 8:60] = voxels[5:8, 45:48, 8:90] = 200
    return voxels


@pytest.mark.parametrize("suffix", [".tif", ".zarr"])
def test_several_neurons_give_an_swc_each_the_longest_first(vit3d, tmp_path, suffix):
    path = written(tmp_path / f"a{suffix}", two_neurites())
    assert vit3d("reconstruct", path, "--out", tmp_path / "o", "--forest")[0] == 0
    assert names(tmp_path / "o") == ["a.png", "a_1.swc", "a_2.swc", "a_probability.tif", "a_review.csv"]
    assert vit3d("trace", path, tmp_path / "t" / "b.swc", "--forest")[0] == 0
    assert names(tmp_path / "t") == ["b_1.swc", "b_2.swc", "b_review.csv"]
    for prefix in ("o/a", "t/b"):
        first, second = (read_swc(tmp_path / f"{prefix}_{number}.swc") for number in (1, 2))
        assert (first.num_roots, second.num_roots) == (1, 1)
        assert first.cable_length == pytest.approx(81 * 0.5, rel=0.1)
        assert second.cable_length == pytest.approx(51 * 0.5, rel=0.1)


def test_the_review_is_in_the_unit_of_the_swc(vit3d, tmp_path):
    path = written(tmp_path / "a.tif", two_neurites())
    for unit, folder in ((None, "um"), ("voxel", "voxel")):
        flags = ("--swc-unit", unit) if unit else ()
        assert vit3d("reconstruct", path, "--out", tmp_path / folder, *flags)[0] == 0
        assert vit3d("trace", path, tmp_path / folder / "b.swc", *flags)[0] == 0
    for name in ("a", "b"):
        um, voxel = (list(csv.DictReader((tmp_path / u / f"{name}_review.csv").open())) for u in ("um", "voxel"))
        assert [row["kind"] for row in um] == [row["kind"] for row in voxel]
        assert any(row["kind"] == "left out" for row in um)
        for first, second in zip(um, voxel, strict=True):
            for axis, step in zip("zyx", SPACING, strict=True):
                assert float(second[f"{axis}_vox"]) * step == pytest.approx(float(first[f"{axis}_um"]), abs=0.02)
            assert float(second["length_vox"]) * SPACING[2] == pytest.approx(float(first["length_um"]), abs=0.02)


def as_array(path: Path, voxels) -> Path:
    """A plain Zarr array without an image around it."""
    zarr.create_array(path, data=voxels, chunks=(8, 32, 32))
    return path


@pytest.mark.parametrize("kind", ["ome", "plain", "slices", "url", "file"])
def test_a_stack_in_any_format_gives_the_same_tree(vit3d, tmp_path, kind):
    written(tmp_path / "a.tif")
    if kind == "slices":
        (tmp_path / "s").mkdir()
        for z, plane in enumerate(y_stack()):
            tifffile.imwrite(tmp_path / "s" / f"slice{z}.tif", plane)
    elif kind == "url":
        as_array("memory://reconstruction/s.zarr", y_stack())
    path = {
        "ome": lambda: written(tmp_path / "s.zarr"),
        "plain": lambda: as_array(tmp_path / "s.zarr", y_stack()),
        "slices": lambda: tmp_path / "s",
        "url": lambda: "memory://reconstruction/s.zarr",
        "file": lambda: tmp_path / "a.tif",
    }[kind]()
    size = ("--spacing", "1,0.5,0.5")
    for number, (stack, flags) in enumerate(((tmp_path / "a.tif", ()), (path, size))):
        status, _, said = vit3d("reconstruct", stack, "--out", tmp_path / str(number), *flags)
        assert status == 0, said
        assert vit3d("trace", stack, tmp_path / f"{number}.swc", *flags)[0] == 0
    assert sorted(path.name for path in (tmp_path / "1").glob("*.swc")) == ["a.swc" if kind == "file" else "s.swc"]
    swc = next((tmp_path / "1").glob("*.swc"))
    np.testing.assert_allclose(read_swc(tmp_path / "0" / "a.swc").points, read_swc(swc).points)
    np.testing.assert_allclose(read_swc(tmp_path / "0.swc").points, read_swc(tmp_path / "1.swc").points)


def test_masks_in_stores_and_slices_are_scored_as_masks_in_files(vit3d, tmp_path):
    mask = (y_stack() > 100).astype(np.uint8) * 255
    moved = np.roll(mask, 1, axis=2)
    pairs = [(written(tmp_path / "a.tif", mask), written(tmp_path / "b.tif", moved))]
    pairs += [(written(tmp_path / "a.zarr", mask), written(tmp_path / "b.zarr", moved))]
    for name, voxels in (("a", mask), ("b", moved)):
        (tmp_path / name).mkdir()
        for z, plane in enumerate(voxels):
            tifffile.imwrite(tmp_path / name / f"s{z}.tif", plane)
    pairs += [(tmp_path / "a", tmp_path / "b")]
    size = ("--spacing", "1,0.5,0.5", "--json")
    told = [json.loads(vit3d("score", *pair, *size)[1])[0] for pair in pairs]
    assert told[0]["dice"] < 1
    for other in told[1:]:
        assert {**other, "name": "a"} == told[0]


def test_a_folder_of_stores_is_one_table(vit3d, tmp_path):
    (tmp_path / "in").mkdir()
    written(tmp_path / "in" / "a.zarr")
    written(tmp_path / "in" / "b.tif")
    status, printed, said = vit3d("reconstruct", tmp_path / "in", "--out", tmp_path / "in")
    assert status == 0, said
    assert [row.split()[0] for row in printed.splitlines()] == ["name", "a", "b"]
    status, printed, _ = vit3d("reconstruct", tmp_path / "in", "--out", tmp_path / "in")  # beside its own pictures
    assert [row.split()[0] for row in printed.splitlines()] == ["name", "a", "b"]


TRACE = r"""
import re, sys
import numpy as np
from vit3d.tracing import trace
from vit3d.tree import write_swc
from vit3d.volume import Volume, open_volume, read_volume

trace(Volume(np.eye(20, dtype=np.float32) + np.zeros((20, 20, 20), np.float32)))  # all is loaded
# ru_maxrss may be the parent's
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
write_swc(trace((open_volume if sys.argv[1] == "disk" else read_volume)(sys.argv[2])), sys.argv[3])
print(peak() - before)
"""


@pytest.mark.slow
def test_a_probability_on_disk_is_traced_in_the_memory_of_its_neurites(tmp_path):
    """The same tree as in memory, bit for bit, from a small part of the memory of the volume."""
    path, shape = tmp_path / "p.zarr", (192, 768, 768)
    voxels = np.zeros(shape, np.float32)
    for x in range(20, 740):
        for y in (200 + x // 4, 500 - x // 4):
            voxels[90 + x // 20 - 2 : 90 + x // 20 + 3, y - 2 : y + 3, x] = 0.9
    write_volume(Volume(voxels, SPACING), path)
    taken = {}
    for where in ("memory", "disk"):
        words = [sys.executable, "-c", TRACE, where, str(path), str(tmp_path / f"{where}.swc")]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        taken[where] = int(done.stdout)
    assert (tmp_path / "disk.swc").read_bytes() == (tmp_path / "memory.swc").read_bytes()
    assert len(read_swc(tmp_path / "disk.swc")) > 100
    assert taken["memory"] > voxels.nbytes
    assert taken["disk"] < 0.4 * voxels.nbytes


@pytest.mark.slow
def test_several_processes_reconstruct_one_stack_and_one_of_them_traces_it(tiny, tmp_path):
    voxels = np.random.default_rng(0).integers(0, 9, (70, 100, 150), np.uint8)
    voxels[30:33, 50:53, 10:140] = 200
    path, code = written(tmp_path / "a.zarr", voxels), "from vit3d.cli import main; main()"
    words = ["reconstruct", path, "--out", tmp_path / "o", "--model", tiny, "--threshold", "0.9", "--out-of-core"]
    how = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": -1, "stderr": -1, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", code, *map(str, words)], **how) for _ in range(2)]
    said = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert any("cable_um" in printed for printed, _ in said)
    assert names(tmp_path / "o") == ON_DISK


def test_masking_and_inverting_on_disk_are_those_in_memory(tmp_path):
    voxels, mask = y_stack(), y_stack() > 15
    lazy = open_volume(written(tmp_path / "a.zarr", voxels))
    whole = masked(inverted(Volume(voxels)), mask)
    disk = masked(inverted(lazy), open_volume(written(tmp_path / "m.zarr", mask)).voxels)
    assert not isinstance(disk.voxels, np.ndarray)
    np.testing.assert_array_equal(np.asarray(disk.voxels), whole.voxels)
    box = (slice(2, 9), slice(30, 50), slice(10, 70))
    np.testing.assert_array_equal(np.asarray(within(disk, box).voxels), whole.voxels[box])
    np.testing.assert_array_equal(within(disk, box).voxels[1:3, ..., ::2], whole.voxels[box][1:3, ..., ::2])


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
    for name in ("d.zarr", "d_probability.zarr", "e_probability.zarr.partial"):
        (tmp_path / name).mkdir()
    assert list(find_stacks(tmp_path)) == ["a", "b.tif", "b.v3draw", "d"]
    assert find_stacks(tmp_path / "d.zarr") == {"d": tmp_path / "d.zarr"}
    assert find_stacks(Path("s3://bucket/f.zarr/1")) == {"f": Path("s3://bucket/f.zarr/1")}
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
    on_disk = ChangedVoxels(voxels, lambda part, _: part)
    for given in (voxels, on_disk):
        dark = inverted(Volume(given, SPACING))
        assert isinstance(dark.voxels, LazyVoxels) == (given is on_disk)
        turned = np.asarray(dark.voxels)
        assert turned.min() == 0
        assert turned.dtype == dark.voxels.dtype
        assert turned.dtype.itemsize == voxels.dtype.itemsize
        assert dark.spacing_um == SPACING
        np.testing.assert_array_equal(turned.astype(float), float(voxels.max()) - voxels)


def test_inverting_the_whole_range_of_a_signed_type_wraps_nowhere():
    voxels = np.array([-32768, 0, 32767], np.int16).reshape(1, 1, 3)
    for given in (voxels, ChangedVoxels(voxels, lambda part, _: part)):
        dark = inverted(Volume(given)).voxels
        assert dark.dtype == np.uint16
        assert np.asarray(dark).ravel().tolist() == [65535, 32767, 0]


def test_what_was_never_imaged_is_no_neurite_when_a_stack_is_inverted():
    voxels = np.random.default_rng(0).normal(3000, 20, (12, 40, 50)).astype(np.uint16)
    voxels[6, 20, 5:45] = 1500
    voxels[:, :4] = 0
    turned = inverted(Volume(voxels, SPACING)).voxels
    assert not turned[:, :4].any()
    assert (turned[6, 20, 5:45] > 1.2 * np.median(turned[:, 4:]) + 1000).all()


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
