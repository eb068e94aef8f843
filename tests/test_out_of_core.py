"""A volume on disk is segmented as it would be in memory, whoever computes what and however often they are killed."""

import hashlib
import math
import multiprocessing
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from numpy.testing import assert_allclose, assert_array_equal

from test_segmentation import OneVoxelNetwork, tiny_model
from vit3d import ViT3DConfig, ViT3DImageProcessor, Volume, segment
from vit3d.blockwise import selection
from vit3d.blockwise.block_store import BlockStore, Layout, partial_path
from vit3d.blockwise.memory_budget import BOXES, check_memory, choose_layout, working_bytes
from vit3d.blockwise.out_of_core import RunOptions, segment_store
from vit3d.blockwise.provenance import machine_of, model_digest
from vit3d.blockwise.segmentation_job import damage_report, segment_path
from vit3d.model.blocks_vit3d import BlockPlan
from vit3d.model.foreground_vit3d import foreground, foreground_reach
from vit3d.model.ground_vit3d import cell_means, ground_of_cells
from vit3d.model.inference_vit3d import (
    FAINT,
    TOKENS_PER_BATCH,
    batches,
    occupied_windows,
    predict_box,
    window_plan,
    windows_of,
)
from vit3d.model.intensity_vit3d import measure
from vit3d.model.packing_vit3d import PackedWindows
from vit3d.volume import open_volume

SHAPE, BOX, SPACING_UM = (70, 150, 130), (64, 64, 64), (1.0, 0.3, 0.3)
SMALL = RunOptions(box=BOX)


def neuron(shape=SHAPE, polarity: str = "bright") -> np.ndarray:
    """Two fibres and a soma in uneven, noisy ground; the last third along y holds nothing."""
    z, y, x = np.indices(shape)
    rng = np.random.default_rng(0)
    stack = rng.normal(60 + 20 * x / shape[2], 2, shape)
    inside = (np.hypot(z - 9 - y / 8, x - 40 - y / 3) < 2) | (np.hypot(z - 55, y - 30 - x / 4) < 2.5)
    inside |= (z - 40) ** 2 * 4 + (y - 60) ** 2 + (x - 60) ** 2 < 24**2
    stack[inside & (y < shape[1] * 0.6)] += 90
    return (stack if polarity == "bright" else 255 - stack).clip(0, 255).astype(np.uint8)


def store_stack(folder: Path, voxels: np.ndarray, **options) -> Volume:
    array = zarr.create_array(folder, shape=voxels.shape, chunks=(32, 32, 32), dtype=voxels.dtype, **options)
    array[...] = voxels
    return open_volume(folder, spacing_um=SPACING_UM)


def stored(out: Path) -> np.ndarray:
    return zarr.open_array(out / "0", mode="r")[...]


def files(out: Path) -> dict[str, str]:
    """SHA-256 of every shard."""
    shards = sorted(path for path in (out / "0/c").rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}


@pytest.fixture(scope="module")
def network() -> OneVoxelNetwork:
    return OneVoxelNetwork()


@pytest.fixture(scope="module")
def volume(tmp_path_factory) -> Volume:
    return store_stack(tmp_path_factory.mktemp("in") / "in.zarr", neuron())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, network, volume) -> Path:
    out = tmp_path_factory.mktemp("out") / "out.zarr"
    segment_store(network, volume, out, options=SMALL)
    return out


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out.zarr"))


# ---------------------------------------------------------------- the same as in memory


@pytest.mark.parametrize("prediction, polarity", [("volume", "bright"), ("center_slice", "dark")])
def test_the_store_holds_what_segment_gives_in_memory(prediction, polarity, tmp_path):
    model, volume = tiny_model(prediction), store_stack(tmp_path / "in.zarr", neuron((70, 100, 90), polarity))
    expected = segment(model, Volume(volume.voxels[...])).voxels
    segment_store(model, volume, tmp_path / "out.zarr", options=SMALL)
    found = stored(tmp_path / "out.zarr")
    assert 0.001 < (expected > 0).mean() < 0.7
    assert found.dtype == np.float32
    assert_allclose(found, expected, atol=2**-12 + 1e-5)  # half a 2048th
    assert ((found > 0) != (expected > 0)).mean() < 1e-4  # at the threshold of what is faint alone


def test_without_selection_too_and_every_voxel_of_every_window_counts(network, volume, tmp_path):
    segment_store(network, volume, tmp_path / "out.zarr", select=False, options=SMALL)
    whole = network.whole(volume.voxels[...])
    found = stored(tmp_path / "out.zarr")
    assert_allclose(found, np.where(whole < FAINT, 0, whole), atol=2**-12 + 1e-5)


def test_where_grey_levels_do_not_tell_neurites_everything_is_computed(network, tmp_path):
    beside = ((0, 0), (0, 0), (0, 120))  # nothing at all, for more than a box
    volume = store_stack(tmp_path / "in.zarr", np.pad(neuron((24, 40, 40)), beside, constant_values=20))
    unsure = replace(measure(volume.voxels[...]), sure=False)
    segment_store(network, volume, tmp_path / "out.zarr", statistics=unsure, options=SMALL)
    whole = network.whole(volume.voxels[...])
    assert_allclose(stored(tmp_path / "out.zarr"), np.where(whole < FAINT, 0, whole), atol=2**-12 + 1e-5)


@pytest.mark.parametrize("polarity", ["bright", "dark"])
def test_the_foreground_of_a_box_is_that_of_the_whole_volume(polarity):
    voxels = neuron(polarity=polarity)
    statistics = measure(voxels, polarity)
    whole = foreground(voxels, statistics)
    rng = np.random.default_rng(1)
    assert 0 < whole.mean() < 0.5
    for _ in range(12):
        starts = [rng.integers(0, n - 20) for n in SHAPE]
        box = tuple(slice(int(s), int(rng.integers(s + 1, n + 1))) for s, n in zip(starts, SHAPE, strict=True))
        reach = foreground_reach(box, SHAPE)
        inside = tuple(slice(b.start - r.start, b.stop - r.start) for b, r in zip(box, reach, strict=True))
        assert_array_equal(foreground(voxels[reach], statistics)[inside], whole[box])


@pytest.mark.parametrize(
    "shape, prediction, window, patch, kept_bytes",
    [
        (SHAPE, "volume", (16, 48, 48), (4, 8, 8), None),
        (SHAPE, "volume", (20, 42, 42), (5, 14, 14), None),  # patches that boxes cut
        (SHAPE, "center_slice", (5, 48, 48), (5, 8, 8), None),
        ((11, 150, 37), "volume", (16, 48, 48), (4, 8, 8), None),  # smaller than a window: patches begin anywhere
        ((11, 37, 130), "center_slice", (5, 48, 48), (5, 8, 8), 1),
    ],
)
def test_what_is_selected_tile_by_tile_is_what_the_whole_volume_selects(
    shape, prediction, window, patch, kept_bytes, monkeypatch
):
    if kept_bytes:  # one tile alone is remembered
        monkeypatch.setattr(selection, "KEPT_BYTES", kept_bytes)
    config = ViT3DConfig(volume_size=window, patch_size=patch, prediction=prediction)
    processor, layout, read = ViT3DImageProcessor.from_config(config), Layout(shape, BOX), []
    statistics = measure(neuron())
    start = [5 if n < whole else 0 for n, whole in zip(shape, SHAPE, strict=True)]
    voxels = neuron()[tuple(map(slice, start, np.add(start, shape)))]
    mask = foreground(voxels, statistics)

    def scan(box):
        read.append(box)
        return voxels[box]

    tiles = selection.Selection(scan, layout, processor, statistics, config)
    plan = window_plan(shape, config)
    found = occupied_windows(plan, tiles.tokens, config)
    expected = occupied_windows(plan, lambda window: processor.token_mask(window.read(mask)), config)
    assert [(job.read, job.write) for job in found] == [(job.read, job.write) for job in expected]
    assert all(np.array_equal(one.kept, other.kept) for one, other in zip(found, expected, strict=True))
    assert 0 < np.mean([job.kept.mean() for job in expected]) < 0.9
    num_tiles = np.prod([-(-n // (64 // p * p)) for n, p in zip(shape, patch, strict=True)])
    assert (len(read) == num_tiles) != (kept_bytes is not None)


def test_a_tile_that_no_voxel_leaves_by_more_than_rounding_is_scanned():
    statistics = replace(measure(neuron()), background=7.0, noise=1.0, bright=100.0, ceiling=7.0)
    voxels = np.full((20, 40, 40), 7, np.uint8)
    assert selection._is_plain(voxels, statistics)
    voxels[5] = 7 + statistics.threshold
    assert not selection._is_plain(voxels, statistics)
    voxels[:] = 0  # a darker ground than the ceiling
    voxels[5] = statistics.threshold
    assert not selection._is_plain(voxels, statistics)
    dark = replace(statistics, background=248.0, bright=155.0, polarity="dark", ceiling=248.0)
    assert not selection._is_plain(255 - voxels, dark)


def test_measuring_a_whole_volume_finds_the_ceiling_that_it_would_take_from_the_voxels():
    voxels = neuron()
    cells = ground_of_cells(cell_means(voxels), 1.0, np.inf)
    assert measure(voxels).ceiling == pytest.approx(np.percentile(cells, 98), rel=1e-6)


def test_measuring_reads_a_fixed_sample_however_large_the_volume():
    class Endless:
        """A pattern of fibres, made where it is looked at."""

        dtype, num_read = np.dtype(np.uint16), 0

        def __init__(self, shape):
            self.shape = shape

        def __getitem__(self, box):
            z, y, x = np.ogrid[box]
            voxels = 100 + (z * 7 + y * 13 + x * 5) % 11 + 300 * (x % 97 < 5)
            self.num_read += voxels.size
            return voxels.astype(np.uint16)

    volume = Endless((4000, 30000, 30000))
    statistics = measure(volume)
    assert volume.num_read < 16_000_000
    assert 100 <= statistics.background <= 111
    assert 300 < statistics.bright < 420


@pytest.mark.parametrize("prediction", ["volume", "center_slice"])
@pytest.mark.parametrize("shape", [(40, 50, 61), (5, 70, 20)])
def test_any_box_is_what_the_whole_volume_has_there_and_needs_only_the_windows_near_it(shape, prediction):
    model, voxels = tiny_model(prediction), neuron()[: shape[0], : shape[1], : shape[2]]
    processor, plan = ViT3DImageProcessor.from_config(model.config), window_plan(shape, model.config)
    statistics, rng = processor.measure(voxels), np.random.default_rng(0)
    kept = {block: rng.random(model.config.grid_size) < 0.4 for block in plan}
    for block, mask in kept.items():  # as windows share patches, so their masks agree
        start = [s - f for s, f in zip(block.start, plan.first, strict=True)]
        place = [(s // n + np.arange(g)) for s, n, g in zip(start, model.config.painted_size, mask.shape, strict=True)]
        mask[...] = (3 * place[0][:, None, None] + 5 * place[1][:, None] + place[2] ** 2) % 7 < 3

    def predicted(box):
        jobs = occupied_windows(windows_of(plan, box, model.config), None, model.config)
        jobs = [replace(job, kept=kept[job.write]) for job in jobs]
        return len(jobs), predict_box(model, voxels, plan, list(batches(jobs)), processor, statistics, box)

    with torch.no_grad():
        num_windows, whole = predicted(tuple(map(slice, (0, 0, 0), shape)))
        assert 0.2 < (whole > 0).mean() < 0.6
        assert num_windows == len(plan)
        for _ in range(8):
            starts = [int(rng.integers(0, n)) for n in shape]
            box = tuple(slice(s, int(rng.integers(s + 1, n + 1))) for s, n in zip(starts, shape, strict=True))
            near, part = predicted(box)
            assert_allclose(part, whole[box], atol=1e-6)
            assert near <= num_windows


@pytest.mark.parametrize(
    "shape, window, overlap", [((40, 30, 17), (16, 12, 8), (4, 3, 2)), ((9, 70, 20), (16, 12, 8), (0, 6, 2))]
)
def test_the_blocks_that_meet_a_box_are_found_without_looking_at_the_others(shape, window, overlap):
    plan, rng = BlockPlan(shape, window, overlap), np.random.default_rng(0)
    for _ in range(8):
        starts = [int(rng.integers(0, n)) for n in shape]
        box = tuple(slice(s, int(rng.integers(s + 1, n + 1))) for s, n in zip(starts, shape, strict=True))
        hit = [
            all(i.start < b.stop and i.stop > b.start for i, b in zip(k.inside(shape), box, strict=True)) for k in plan
        ]
        assert plan.meeting(box) == [block for block, meets in zip(plan, hit, strict=True) if meets]


# ---------------------------------------------------------------- the same whoever computes


@pytest.mark.parametrize("rank", [1, 2])
def test_the_order_of_the_boxes_changes_no_byte(network, volume, finished, tmp_path, rank):
    options = RunOptions(box=BOX, rank=rank, ranks=3)
    segment_store(network, volume, tmp_path / "out.zarr", options=options)
    assert files(tmp_path / "out.zarr") == files(finished)


def with_one_other(voxels: np.ndarray) -> np.ndarray:
    voxels = voxels.copy()
    voxels[17, 101, 77] ^= 1
    return voxels


def test_what_a_network_gives_that_is_no_number_is_not_stored(tmp_path):
    class Broken(OneVoxelNetwork):
        def paint(self, *args) -> torch.Tensor:
            return super().paint(*args) * math.nan

    volume = store_stack(tmp_path / "in.zarr", neuron((24, 40, 40)))
    with pytest.raises(ValueError, match="gave NaN or infinite probabilities in z 0:24, y 0:40, x 0:40"):
        segment_store(Broken(), volume, tmp_path / "out.zarr", options=SMALL)
    assert BlockStore(tmp_path / "out.zarr.partial").num_done() == 0


def test_a_volume_that_holds_nan_leaves_nothing_that_its_mended_copy_would_go_on_with(network, tmp_path):
    voxels = neuron().astype(np.float32)
    voxels[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite voxels; replace them"):
        segment_store(network, Volume(voxels, None), tmp_path / "out.zarr")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


class BreakError(Exception):
    pass


class Breaking:
    """An input that fails after some reads."""

    def __init__(self, array, reads: int):
        self.array, self.reads = array, reads
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, box):
        self.reads -= 1
        if self.reads < 0:
            raise BreakError
        return self.array[box]


def test_an_interrupted_run_keeps_what_is_done_and_goes_on(network, volume, finished, tmp_path):
    out, setup = tmp_path / "out.zarr", 1 + 1  # reads before the first box: a sample to know the input by, statistics
    with pytest.raises(BreakError):
        segment_store(network, Volume(Breaking(volume.voxels, setup + 25), volume.spacing_um), out, options=SMALL)
    assert not out.exists()
    store = BlockStore(partial_path(out))
    kept = {name: data for name, data in files(store.folder).items()}
    assert 4 <= len(kept) <= 14
    assert not list(store.lease_folder.iterdir())
    outcome = segment_store(network, volume, out)
    assert outcome.boxes == 18 - len(kept)
    assert outcome.finished_here
    assert files(out) == files(finished)


def test_boxes_that_hold_nothing_cost_no_network(volume, tmp_path):
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[5:9, 5:9, 5:60] = 200
    network = OneVoxelNetwork()
    segment_store(
        network,
        store_stack(tmp_path / "in.zarr", voxels, config={"write_empty_chunks": True}),
        tmp_path / "out.zarr",
        options=SMALL,
    )
    store = BlockStore(tmp_path / "out.zarr")
    windows = {index: store.record_of(index)["windows"] for index in store.layout.indices()}
    assert 0 < sum(count > 0 for count in windows.values()) <= 4
    assert sum(network.batches[1:]) == sum(windows.values())  # the first one is the trial of the memory


def test_no_more_is_read_than_windows_and_their_surroundings(tmp_path):
    """A neurite in one corner of a box does not make the rest of the box be read again."""

    class Counted:
        shape, dtype = (64, 192, 192), np.dtype(np.uint8)

        def __getitem__(self, box):
            read.append(voxels[box].size)
            return voxels[box]

    voxels, read = np.zeros((64, 192, 192), np.uint8), []
    voxels[5:9, 5:9, 5:12] = 200
    statistics = replace(measure(voxels), ceiling=0.0)
    options = RunOptions(box=(64, 192, 192))
    segment_store(OneVoxelNetwork(), Volume(Counted()), tmp_path / "out.zarr", statistics=statistics, options=options)
    assert read.count(voxels.size) == 2  # to know the input by, and the scan for what is selected
    assert read[-1] < voxels.size / 10


def test_another_run_on_a_whole_store_computes_nothing(network, volume, finished):
    before = files(finished)
    outcome = segment_store(network, volume, finished)
    assert outcome.boxes == 0
    assert files(finished) == before


def test_a_run_on_a_damaged_store_repairs_the_damage_and_touches_nothing_else(network, volume, finished, copy):
    def times():
        return {path: path.stat().st_mtime_ns for path in (copy / "0/c").rglob("*") if path.is_file()}

    shards = [copy / name for name in files(copy)]
    harmed = {shards[0]: Path.unlink, shards[5]: lambda path: os.truncate(path, 50)}
    harmed[shards[9]] = lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    before = times()
    for path, harm in harmed.items():
        harm(path)
    named = {line.split(" ")[0] for line in damage_report(copy)}
    assert named == {str(path) for path in harmed}
    outcome = segment_store(network, volume, copy)
    assert outcome.boxes == 3
    assert files(copy) == files(finished)
    assert {path for path, when in times().items() if when != before[path]} == set(harmed)
    assert not damage_report(copy)


def test_damaged_metadata_of_a_whole_store_are_named_and_put_right(network, volume, finished, copy):
    metadata = copy / "0/zarr.json"
    metadata.write_text("{")
    assert damage_report(copy) == [f"{metadata} holds other bytes than were written"]
    assert segment_store(network, volume, copy).boxes == 0
    assert metadata.read_bytes() == (finished / "0/zarr.json").read_bytes()


# ---------------------------------------------------------------- bad input


def test_a_lost_chunk_of_the_input_is_an_error_unless_it_is_declared(network, tmp_path):
    voxels = neuron()
    voxels[32:64, 32:64, 64:96] = 0
    store_stack(tmp_path / "in.zarr", voxels)  # Zarr leaves out chunks of zeros, and so loses them
    lost = tmp_path / "in.zarr/c/1/1/2"
    assert not lost.exists()

    def run(out: str, **options):
        return segment_store(network, open_volume(tmp_path / "in.zarr", **options), tmp_path / out, options=SMALL)

    with pytest.raises(ValueError, match=r"lost the chunk c/1/1/2.*missing_chunks"):
        run("out.zarr")
    assert run("flag.zarr", missing_as_fill=True).boxes == 18
    zarr.open_array(tmp_path / "in.zarr").attrs["missing_chunks"] = "fill"
    assert run("declared.zarr").boxes == 18


@pytest.mark.parametrize(
    "change, said",
    [
        ({"spacing": (1.0, 0.3, 0.4)}, r"spacing_um was \[1.0, 0.3, 0.3\] and is now \[1.0, 0.3, 0.4\]"),
        ({"voxels": lambda v: v + 1}, "other settings: the voxels of the input are others"),
        ({"voxels": lambda v: with_one_other(v)}, "other settings: the voxels of the input are others"),
        ({"voxels": lambda v: v[:-1]}, r"input.shape was \[70, 150, 130\] and is now \[69, 150, 130\]"),
        ({"voxels": lambda v: v.astype(np.uint16)}, "input.dtype was uint8 and is now uint16"),
        ({"model": "other"}, "identity.model was"),
        ({"polarity": "dark"}, "polarity was auto and is now dark"),
        ({"select": False}, "select was True and is now False"),
        ({"box": (64, 128, 64)}, r"write box was \[64, 64, 64\] and is now \[64, 128, 64\]"),
        ({"statistics": True}, "statistics.background was"),
    ],
)
def test_another_computation_on_the_same_store_is_refused_and_both_are_named(network, volume, copy, change, said):
    voxels = change.get("voxels", lambda v: v)(volume.voxels[...])
    model = tiny_model("volume") if "model" in change else network
    processor = ViT3DImageProcessor.from_config(model.config, polarity=change.get("polarity", "auto"))
    statistics = measure(voxels // 2) if "statistics" in change else None
    options = RunOptions(box=change.get("box"))
    for name in ("out.zarr", "out.zarr.partial"):  # finished, or still growing
        with pytest.raises(ValueError, match=said):
            segment_store(
                model,
                Volume(voxels, change.get("spacing", volume.spacing_um)),
                copy,
                processor=processor,
                statistics=statistics,
                select=change.get("select", True),
                options=options,
            )
        if name == "out.zarr":
            copy.rename(partial_path(copy))


def test_another_machine_dtype_or_number_of_threads_is_refused_unless_forced(network, volume, copy):
    text = (copy / "0/.vit3d/manifest.json").read_text()
    (copy / "0/.vit3d/manifest.json").write_text(re.sub(r'"processor": "[^"]+"', '"processor": "Abacus"', text))
    (copy / "0/c/0/0/0").unlink()
    with pytest.raises(ValueError, match=r"processor was Abacus and is now .*last bits; --force"):
        segment_store(network, volume, copy)
    assert copy.exists()
    assert segment_store(network, volume, copy, options=RunOptions(force=True)).boxes == 1


def test_the_number_of_threads_is_that_of_the_stores_beginning(network, volume, copy):
    recorded = BlockStore(copy).manifest["machine"]["threads"]
    (copy / "0/c/0/0/0").unlink()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(recorded + 1)
        with pytest.raises(ValueError, match=f"threads was {recorded} and is now {recorded + 1}"):
            segment_store(network, volume, copy, options=RunOptions(threads=recorded + 1))
        assert segment_store(network, volume, copy).boxes == 1
        assert torch.get_num_threads() == recorded
    finally:
        torch.set_num_threads(before)


def test_the_same_model_has_the_same_digest_in_every_precision_and_another_one_another():
    model = tiny_model("volume")
    digest = model_digest(model)
    assert model_digest(tiny_model("volume").to(torch.bfloat16)) == digest
    model.config.training_spacing_um = (1.0, 0.33, 0.33)  # decides what it is shown, and no probability of that
    assert model_digest(model) == digest
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += 1
    assert model_digest(model) != digest
    assert machine_of(model.to(torch.bfloat16))["dtype"] == "torch.bfloat16"


@pytest.mark.parametrize("window", [(8, 16, 24), (16, 112, 112), (16, 184, 184), (40, 184, 184)])
def test_the_trial_of_the_memory_is_a_full_batch_with_padding(window):
    """Or one window, if that holds more."""

    class Spy(OneVoxelNetwork):
        def forward(self, patches, token_mask):
            counts.extend(token_mask.flatten(1).sum(1).tolist())
            return super().forward(patches, token_mask)

    network, counts = Spy(), []
    network.config = ViT3DConfig(volume_size=window)
    volume, size = Volume(np.zeros(window, np.uint8)), int(np.prod(network.config.grid_size))
    check_memory(Layout(window, BOX, SPACING_UM), network, volume, measure(volume.voxels), 2**40)
    tokens = sum(counts) + len(counts)
    assert 0.85 * TOKENS_PER_BATCH < tokens <= max(TOKENS_PER_BATCH, 1 + size)
    assert len(PackedWindows.of(torch.arange(size) < torch.tensor(counts)[:, None]).groups) == 1
    assert len(set(counts)) == min(2, len(counts))


def test_what_does_not_fit_into_memory_is_refused_before_the_first_box(network, volume, tmp_path):
    with pytest.raises(ValueError, match="more than the memory budget"):
        segment_store(network, volume, tmp_path / "out.zarr", options=RunOptions(memory_bytes=2**30 // 10))
    assert not list(tmp_path.iterdir())
    layout = Layout(volume.shape, (64, 64, 64))
    for_boxes = working_bytes(layout, network.config, volume)
    with pytest.raises(ValueError, match="GiB for the network"):
        check_memory(layout, network, volume, measure(volume.voxels), for_boxes + 2**20)


def test_a_larger_budget_gives_a_larger_box_and_a_larger_volume_does_not(network):
    class Described:
        dtype, chunks = np.dtype(np.uint16), (64, 128, 128)

        def __init__(self, *shape):
            self.shape = shape

    def box(gib, *shape):
        return choose_layout(network, Volume(Described(*shape)), int(gib * 2**30)).box

    def working(chunks):
        stack = Described(1024, 2048, 2048)
        stack.chunks = chunks
        return working_bytes(Layout(stack.shape, BOXES[0]), network.config, Volume(stack))

    assert working((256, 512, 512)) > working((64, 128, 128)) + 2 * 256 * 512 * 512  # they are decoded as a whole
    assert box(1.5, 1024, 2048, 2048) == box(1.5, 14000, 20000, 10000)
    sizes = [np.prod(box(gib, 14000, 20000, 10000)) for gib in (1, 1.5, 4, 16)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[0]
    assert box(16, 70, 100, 100) == (128, 128, 128)
    layout = choose_layout(network, Volume(Described(14000, 20000, 10000)), 2**31)
    assert layout.box in BOXES
    assert working_bytes(layout, network.config, Volume(Described(14000, 20000, 10000))) < 2**31


def test_a_folder_that_is_another_store_is_left_alone(network, volume, tmp_path):
    store_stack(tmp_path / "out.zarr", neuron((40, 40, 40)))
    with pytest.raises(ValueError, match="no store that `vit3d segment` wrote"):
        segment_store(network, volume, tmp_path / "out.zarr")
    assert (tmp_path / "out.zarr/c/0/0/0").exists()


@pytest.mark.parametrize(
    "source, out",
    [
        ("in.zarr", "in.zarr"),
        ("in.zarr", "in.zarr/out.zarr"),
        ("in.zarr", "../{here}/in.zarr"),
        ("out.zarr/in.zarr", "out.zarr"),
    ],
)
def test_input_and_output_in_one_place_are_refused(tmp_path, source, out):
    store_stack(tmp_path / source, neuron((40, 40, 40)))
    with pytest.raises(ValueError, match="same store"):
        segment_path(str(tmp_path / source), tmp_path / out.format(here=tmp_path.name))


def test_bad_places_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be a folder"):
        segment_path("in.zarr", tmp_path / "file" / "out.zarr")
    with pytest.raises(ValueError, match=r"named OUT\.zarr"):
        segment_path("in.zarr", tmp_path / "out.n5")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        damage_report(tmp_path / "out.zarr")


def in_a_child(function) -> int:
    """Exit status of a forked process that calls `function`, which never returns into pytest."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = function() or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody without permission")
def test_a_place_without_write_permission_is_refused(tmp_path):
    def child() -> int:
        os.setuid(65534)
        try:
            segment_path("in.zarr", tmp_path / "out.zarr")
        except PermissionError as error:
            return 7 if "read-only for you" in str(error) else 8

    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    assert in_a_child(child) == 7


# ---------------------------------------------------------------- real processes, really killed


class SleepingNetwork(OneVoxelNetwork):
    """Takes its time without a processor, as a GPU would."""

    def __init__(self):
        super().__init__()
        self.config = ViT3DConfig(volume_size=(16, 48, 48))

    def forward(self, patches, token_mask):
        time.sleep(0.02)
        return super().forward(patches, token_mask)


def work(source: Path, out: Path, rank: int = 0, ranks: int = 1, largest_file: int | None = None) -> None:
    """What a process of its own does."""
    torch.set_num_threads(1)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    volume = open_volume(source, spacing_um=SPACING_UM)
    options = RunOptions(box=BOX, rank=rank, ranks=ranks)
    try:
        segment_store(SleepingNetwork(), volume, out, options=options)
    except OSError as error:
        sys.exit(3 if "the same command goes on from there" in str(error) else 4)


@pytest.fixture(scope="module")
def processes():
    """Starts `work` in processes that have imported everything and share nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["vit3d.blockwise.out_of_core", "vit3d.formats.zarr_store", "vit3d.checkpoint", "pytest"]
    )

    def start(*arguments, **options):
        process = context.Process(target=work, args=arguments, kwargs=options)
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def uninterrupted(processes, volume, tmp_path_factory) -> tuple[Path, float]:
    """The store that one process makes, and its seconds, once everything is warm."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    source = Path(volume.voxels.array.store.root)
    for name in ("first.zarr", "out.zarr"):
        start, process = time.monotonic(), processes(source, folder / name)
        process.join()
        assert process.exitcode == 0
    return folder / "out.zarr", time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_runs_are_resumed_without_losing_a_block_and_give_the_same_bytes(
    processes, volume, uninterrupted, tmp_path, ranks
):
    expected, seconds = uninterrupted
    source, luck, kills = Path(volume.voxels.array.store.root), random.Random(ranks), 0
    while kills < 4:
        out = tmp_path / f"{kills}-{luck.random()}" / "out.zarr"
        out.parent.mkdir()
        team = [processes(source, out, rank, ranks) for rank in range(ranks)]
        time.sleep(luck.uniform(0.3, 0.95) * seconds / ranks)
        for process in team:
            process.kill()
        for process in team:
            process.join()
        if out.exists():
            continue  # too late: the work was done
        kills += 1
        left = {} if not partial_path(out).exists() else files(partial_path(out))
        # a file whose name begins with a dot was being written, and is not in place yet
        done = {name: digest for name, digest in left.items() if not Path(name).name.startswith(".")}
        team = [processes(source, out, rank, ranks) for rank in range(ranks)]
        for process in team:
            process.join()
        assert [process.exitcode for process in team] == [0] * ranks
        assert files(out) == files(expected)
        assert done.items() <= files(out).items() or any(".left" in name for name in done)
        assert sorted(path.name for path in out.parent.iterdir()) == ["out.zarr"]


@pytest.mark.slow
def test_the_survivors_do_the_work_of_a_killed_process(processes, volume, uninterrupted, tmp_path):
    expected, _ = uninterrupted
    source, out = Path(volume.voxels.array.store.root), tmp_path / "out.zarr"
    team = [processes(source, out) for _ in range(3)]
    while not partial_path(out).exists() or BlockStore(partial_path(out)).num_done() < 2:
        time.sleep(0.02)
    team[0].kill()
    for process in team:
        process.join()
    assert [process.exitcode for process in team] == [-signal.SIGKILL, 0, 0]
    assert files(out) == files(expected)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_what_is_there_is_kept(processes, volume, uninterrupted, tmp_path):
    expected, _ = uninterrupted
    source, out = Path(volume.voxels.array.store.root), tmp_path / "out.zarr"
    sizes = {name: (expected / name).stat().st_size for name in files(expected)}
    largest = max(sizes, key=sizes.get)
    place = list(sizes).index(largest) + 1  # where to begin, so that the box that does not fit comes late
    process = processes(source, out, place, len(sizes), largest_file=sizes[largest] - 1)
    process.join()
    assert process.exitcode == 3
    assert not out.exists()
    kept = BlockStore(partial_path(out)).num_done()
    assert 0 < kept < len(sizes)
    process = processes(source, out)
    process.join()
    assert process.exitcode == 0
    assert files(out) == files(expected)


@pytest.fixture
def disk(tmp_path):
    """Gives a file system its size, in pages of 4 KiB: a small one is mounted first, then it grows."""
    place = tmp_path / "disk"
    place.mkdir()

    def size(pages: int) -> Path:
        options = f"{'remount,' if place.is_mount() else ''}size={4 * pages}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"only who may mount can fill a disk: {done.stderr}")
        return place

    yield size
    if place.is_mount():
        subprocess.run(["umount", place], check=True)


@pytest.mark.slow
def test_a_device_without_space_left_keeps_what_is_verified_and_goes_on_when_it_has_grown(
    processes, volume, uninterrupted, disk
):
    expected, _ = uninterrupted
    source = Path(volume.voxels.array.store.root)
    pages = sum(-(-path.stat().st_size // 4096) for path in expected.rglob("*") if path.is_file())
    out = disk(pages * 2 // 3) / "out.zarr"
    process = processes(source, out)
    process.join()
    assert process.exitcode == 3
    assert not out.exists()
    kept = BlockStore(partial_path(out)).num_done()
    assert 0 < kept < len(files(expected))
    disk(3 * pages)
    process = processes(source, out)
    process.join()
    assert process.exitcode == 0
    assert files(out) == files(expected)


TORCHRUN = (["torch.distributed.run", "--nproc-per-node", "2"], {})
ACCELERATE = (["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"], {"ACCELERATE_USE_CPU": "true"})


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_the_command_under_a_launcher_gives_one_store_and_names_what_is_damaged(launcher, tmp_path):
    launch, variables = launcher
    store_stack(tmp_path / "in.zarr", neuron())
    tiny_model("volume").save_pretrained(tmp_path / "tiny")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}

    def run(*command) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    job = ("in.zarr", "out.zarr", "--model", "tiny", "--spacing", "1,0.3,0.3", "--box", "64,64,64")
    done = run(*launch, "-m", "vit3d.segmentation", *job)
    assert done.returncode == 0, done.stderr
    boxes = [int(n) for n in re.findall(r"computed (\d+) boxes", done.stdout)]
    assert sum(boxes) == 18
    before = files(tmp_path / "out.zarr")
    assert run("vit3d.cli", "segment", "--verify", "out.zarr").stdout == "out.zarr is whole.\n"
    (tmp_path / "out.zarr/0/c/0/1/0").unlink()
    refused = run("vit3d.cli", "segment", "in.zarr", "out.zarr", "--verify")
    assert (refused.returncode, "--verify takes the one store" in refused.stderr) == (2, True)
    verified = run("vit3d.cli", "segment", "--verify", "out.zarr")
    assert (verified.returncode, verified.stdout) == (1, "out.zarr/0/c/0/1/0 is missing\n")
    assert "computed 1 boxes" in run("vit3d.cli", "segment", *job).stdout
    assert files(tmp_path / "out.zarr") == before
    refused = run("vit3d.cli", "segment", "in.zarr", "out.zarr", "--model", "tiny")
    assert refused.returncode == 2
    assert re.fullmatch(
        r"vit3d: out\.zarr was begun with other settings: [^\n]+\n", refused.stderr.splitlines(True)[-1]
    )
    assert "Traceback" not in refused.stderr


def on_a_terminal(command: list[str], environment: dict, folder: Path) -> tuple[subprocess.Popen, int]:
    """A process whose messages go to a terminal of its own, and the terminal's other end."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=theirs, stdout=subprocess.PIPE, text=True)
    os.close(theirs)
    return process, ours


def shown_on(terminal: int) -> str:
    """All that came, until the process has let go of it."""
    parts = []
    with suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(terminal, 65536):
            parts.append(part)
    os.close(terminal)
    return b"".join(parts).decode()


@pytest.mark.slow
def test_one_bar_counts_the_boxes_of_all_ranks_and_says_how_long_it_will_take(tmp_path):
    store_stack(tmp_path / "in.zarr", neuron())
    tiny_model("volume").save_pretrained(tmp_path / "tiny")
    job = ("in.zarr", "out.zarr", "--model", "tiny", "--spacing", "1,0.3,0.3", "--box", "64,64,64")
    command = [sys.executable, "-m", "vit3d.segmentation", *job]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WORLD_SIZE": "2"}
    first = on_a_terminal(command, {**environment, "RANK": "0"}, tmp_path)
    while not partial_path(tmp_path / "out.zarr").exists() and first[0].poll() is None:
        time.sleep(0.05)  # the other might be done before the first begins, and has no bar
    ranks = [first, on_a_terminal(command, {**environment, "RANK": "1"}, tmp_path)]
    shown = [shown_on(terminal) for _, terminal in ranks]
    said = [process.communicate(timeout=300)[0] for process, _ in ranks]
    computed = [int(number) for text in said for number in re.findall(r"computed (\d+) boxes", text)]
    assert sum(computed) == 18
    assert re.search(r"segment:.* 18/18 \[\d\d:\d\d<", shown[0])
    assert "segment:" not in shown[1]
