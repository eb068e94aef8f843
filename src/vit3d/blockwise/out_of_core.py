"""Segmentation of a volume larger than memory, by any number of processes that may come and go.

Write boxes are computed one by one; each is its own world: the windows that meet it, their batches and what is read
for them depend on the box and the whole volume's statistics alone. So the store comes out the same, byte for byte,
whoever computed what and however often somebody was killed. While the network works on a box, the next one is read
and the last one is written; there are never more.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..formats.lazy_voxels import give_back_freed
from ..model.blocks_vit3d import Block
from ..model.canvas_vit3d import Job
from ..model.head_vit3d import HALO
from ..model.image_processing_vit3d import ViT3DImageProcessor
from ..model.inference_vit3d import batches, occupied_windows, predict_box, window_plan, windows_of
from ..model.intensity_vit3d import IntensityStatistics, check_finite
from ..volume import Volume
from .block_store import BlockStore, Box, Index, create, partial_path
from .leases import EXPIRY_S, Leases
from .memory_budget import check_memory, choose_layout, peak_bytes
from .provenance import check_same, check_same_machine, identity_of, machine_of
from .selection import Selection

_POLL_S = 0.2


@dataclass(frozen=True)
class RunOptions:
    """How a store is computed; none of it changes what is computed, except `box`, which a new store records.

    memory_bytes: what this process may use. box: write box (Z, Y, X), a multiple of 64; default the largest that
    fits. threads: of torch; default what the store was begun with. force: go on with a store that was begun on
    another machine type, dtype or number of threads. rank, ranks: where to begin;
    local_rank: which GPU, where the device is "auto". expiry_s: silence after which another machine's process counts
    as dead.
    """

    memory_bytes: int = 4 * 2**30
    box: tuple[int, int, int] | None = None
    threads: int | None = None
    force: bool = False
    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    expiry_s: float = EXPIRY_S


@dataclass(frozen=True)
class Outcome:
    """What this process did: boxes and windows it computed, seconds it was busy per stage, its largest memory.

    `finished_here`: it was this process that verified the store and gave it its name.
    """

    store: Path
    boxes: int
    windows: int
    seconds: dict[str, float]
    peak_bytes: int
    finished_here: bool

    def said(self) -> str:
        if not self.boxes:
            return f"{self.store} is whole; nothing was left to compute."
        busy = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())
        return (
            f"{self.store}: this process computed {self.boxes} boxes, {self.windows} windows ({busy}); at most "
            f"{self.peak_bytes / 2**30:.2f} GiB of memory."
        )


class Part:
    """Voxels of a box, addressed in the coordinates of the volume it was read from."""

    def __init__(self, voxels: np.ndarray, box: Box, shape: tuple[int, int, int]):
        self.voxels, self.shape, self.dtype = voxels, shape, voxels.dtype
        self._start = [b.start for b in box]

    def __getitem__(self, box: Box) -> np.ndarray:
        return self.voxels[tuple(slice(b.start - s, b.stop - s) for b, s in zip(box, self._start, strict=True))]


def segment_store(
    model,
    volume: Volume,
    out: Path,
    *,
    processor: ViT3DImageProcessor | None = None,
    statistics: IntensityStatistics | None = None,
    select: bool = True,
    options: RunOptions | None = None,
) -> Outcome:
    """`segment`, for a volume that stays on disk, into the OME-Zarr `out`; returns when the whole store is there.

    Arguments as for `segment`. The store holds float32, rounded to whole 2048ths. Run it again after any interruption,
    run it from several processes at once: all work on the same store. A finished store is verified, and boxes that
    were damaged since are computed again.

    Raises ValueError before any work for a store begun with another input, model, layout or statistics, or (without
    `force`) on another kind of machine, and for a memory budget that is too small. OSError: the disk is full; what
    is there is kept.
    """
    give_back_freed()
    options = options or RunOptions()
    model = model.eval()
    processor = processor or ViT3DImageProcessor.from_config(model.config)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    identity = identity_of(model, volume, processor, select)
    store, checked = _opened(out, model, volume, processor, identity, statistics, options)
    if store is None:
        return Outcome(out, 0, 0, {}, peak_bytes(), False)
    if not checked:  # not while others wait for their turn: the trial takes as long as a batch
        _check_memory_here(store, model, volume, options)
    return _Run(model, volume, out, processor, store, select, options).finish()


# ---------------------------------------------------------------- before the first box


def _opened(out, model, volume, processor, identity, statistics, options) -> tuple[BlockStore | None, bool]:
    """The store to work on, and whether memory was seen to suffice; None when it has its name and is whole.

    One process at a time makes or renames it.
    """
    with Leases(out.parent, options.expiry_s) as leases:
        leases.wait_for(f".{out.name}.opening", _POLL_S / 4)
        growing = partial_path(out).exists()  # asked first: it may get its name between the two questions
        if out.exists():
            store = BlockStore(out)
            check_same(store, identity, options.box, statistics)
            if not _has_damage(store):
                return None, True
            check_same_machine(store, _adopt_threads(store, model, options), options.force)
            _check_memory_here(store, model, volume, options)
            os.rename(out, partial_path(out))
            return BlockStore(partial_path(out)), True
        elif not growing:
            layout = choose_layout(model, volume, options.memory_bytes, options.box)
            statistics = statistics or processor.measure(volume.voxels)
            check_memory(layout, model, volume, statistics, options.memory_bytes)
            manifest = {"identity": identity, "statistics": statistics.to_dict(), "machine": machine_of(model)}
            return create(out, layout, manifest), True
        try:
            store = BlockStore(partial_path(out))
        except ValueError:
            if out.exists():
                return None, True  # verified and named by another process just now
            raise
    check_same(store, identity, options.box, statistics)
    check_same_machine(store, _adopt_threads(store, model, options), options.force)
    return store, False


def _check_memory_here(store: BlockStore, model, volume: Volume, options: RunOptions) -> None:
    statistics = IntensityStatistics(**store.manifest["statistics"])
    check_memory(store.layout, model, volume, statistics, options.memory_bytes)


def _has_damage(store: BlockStore) -> bool:
    return store.metadata_damage() is not None or any(damage for _, damage in store.verify())


def _adopt_threads(store: BlockStore, model, options: RunOptions) -> dict:
    """Nobody asked for a number of threads: compute with as many as the store was begun with."""
    recorded = store.manifest["machine"]["threads"]
    if options.threads is None and recorded:
        torch.set_num_threads(recorded)
    return machine_of(model)


# ---------------------------------------------------------------- box by box


class _Run:
    """One process's share of a store."""

    def __init__(self, model, volume: Volume, out: Path, processor, store: BlockStore, select: bool, options):
        self.model, self.volume, self.out, self.processor = model, volume, out, processor
        self.store, self.options = store, options
        self.statistics = IntensityStatistics(**store.manifest["statistics"])
        self.plan = window_plan(volume.shape, model.config)
        self.selection = None  # everything is computed
        if select and self.statistics.sure:
            self.selection = Selection(self._voxels, store.layout, processor, self.statistics, model.config)
        self.seconds: Counter = Counter()
        self.done: set[Index] = set()
        self.total = int(np.prod(store.layout.grid))
        self.num_boxes = self.num_windows = 0

    def finish(self) -> Outcome:
        """Compute what nobody else does, wait for the others, verify, and name the store."""
        here = False
        try:
            with Leases(self.store.lease_folder, self.options.expiry_s) as leases, self._bar() as bar:
                while not here and not self._is_named():
                    self._compute_all(leases, bar)
                    self._show(bar)
                    here = self.store.num_done() == self.total and self._verified(leases)
                    if not here:
                        time.sleep(_POLL_S)
        except FileNotFoundError:
            if not self._is_named():  # else another process named it, at any moment of this one
                raise
        return Outcome(self.out, self.num_boxes, self.num_windows, dict(self.seconds), peak_bytes(), here)

    def _bar(self) -> tqdm:
        """One bar, the first rank's, over the boxes of all ranks."""
        off = None if self.options.rank == 0 else True  # None: off where there is no terminal
        return tqdm(total=self.total, initial=self.store.num_done(), desc="segment", unit="box", disable=off)

    def _show(self, bar: tqdm) -> None:
        if not bar.disable:
            bar.update(self.store.num_done() - bar.n)

    def _is_named(self) -> bool:
        return self.out.exists() and not self.store.folder.exists()

    def _verified(self, leases: Leases) -> bool:
        """True when this process has verified every box and named the store; damaged boxes become undone."""
        with leases.holding("finish") as held:
            if not held:
                return False
            damaged = [index for index, damage in self.store.verify() if damage]
            for index in damaged:
                self.store.forget(index)
            self.done.clear()
            if damaged:
                return False
            self.store.repair_metadata()
            self.store.finish(self.out)
            return True

    def _compute_all(self, leases: Leases, bar: tqdm) -> None:
        """All boxes that are neither done nor leased: read, compute and write, each a step behind the other."""
        todo = self._claimed(leases)
        with ThreadPoolExecutor(1, "reader") as reader, ThreadPoolExecutor(1, "writer") as writer:
            coming, going = reader.submit(self._read, todo), None
            while (box := coming.result()) is not None:
                coming = reader.submit(self._read, todo)
                probability = self._probability(*box)
                if going is not None:
                    going.result()
                going = writer.submit(self._write, box[0], probability, len(box[2]), leases)
                del probability, box  # the writer's from here on: freed when it is done, not when the next comes
                self._show(bar)
            if going is not None:
                going.result()

    def _claimed(self, leases: Leases) -> Iterator[Index]:
        """Boxes for this process, from its own part of the volume on; each is leased when it comes."""
        order = list(self.store.layout.indices())
        start = len(order) * self.options.rank // self.options.ranks
        for index in order[start:] + order[:start]:
            if index in self.done:
                continue
            if not self.store.is_done(index) and leases.claim(_lease_name(index)):
                if not self.store.is_done(index):
                    yield index
                    continue
                leases.release(_lease_name(index))  # another process wrote it in between
            if self.store.is_done(index):
                self.done.add(index)

    def _read(self, todo: Iterator[Index]) -> tuple[Index, Part | None, list[Job]] | None:
        """The next box with what its windows see, and its windows; None when no box is left."""
        index = next(todo, None)
        if index is None:
            return None
        blocks = windows_of(self.plan, self.store.layout.box_of(index), self.model.config)
        start, read_before = time.perf_counter(), self.seconds["read"]
        jobs = occupied_windows(blocks, self.selection and self.selection.tokens, self.model.config)
        self.seconds["select"] += time.perf_counter() - start - (self.seconds["read"] - read_before)
        if not jobs:
            return index, None, []
        hull = _hull([job.read for job in jobs], self.volume.shape)
        return index, Part(self._voxels(hull), hull, self.volume.shape), jobs

    def _voxels(self, box: Box) -> np.ndarray:
        with self._timed("read"):
            voxels = np.asarray(self.volume.voxels[box])
        check_finite(voxels, where=f" in {_said(box)}")
        return voxels

    def _probability(self, index: Index, part: Part, jobs: list[Job]) -> np.ndarray | None:
        """The box, float32, as the windows gave it; None where it holds nothing."""
        if not jobs:
            return None
        box, todo = self.store.layout.box_of(index), list(batches(jobs))
        with self._timed("predict"):
            return predict_box(self.model, part, self.plan, todo, self.processor, self.statistics, box)

    def _checked(self, index: Index, probability: np.ndarray | None) -> np.ndarray | None:
        if probability is not None and not np.isfinite(probability.sum()):
            box = _said(self.store.layout.box_of(index))
            raise ValueError(f"The network gave NaN or infinite probabilities in {box}.")
        return probability

    def _write(self, index: Index, probability: np.ndarray | None, windows: int, leases: Leases) -> None:
        try:
            with self._timed("write"):
                probability = self._checked(index, probability)
                self.store.write(index, probability, windows=windows, machine=machine_of(self.model))
        except OSError as error:
            if self._is_named():
                return
            raise OSError(
                f"{self.store.folder} cannot be written ({error.strerror or error}); {self.store.num_done()} boxes are "
                "kept, and the same command goes on from there."
            ) from error
        self.done.add(index)
        self.num_boxes += 1
        self.num_windows += windows
        leases.release(_lease_name(index))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start


def _lease_name(index: Index) -> str:
    return ".".join(map(str, index))


def _hull(windows: list[Block], shape: tuple[int, int, int]) -> Box:
    """The smallest box that holds what these windows, and the head around their patches, see of the volume."""
    starts, sizes = (np.array([getattr(window, name) for window in windows]) for name in ("start", "size"))
    low, high = starts.min(axis=0) - HALO, (starts + sizes).max(axis=0) + HALO
    return tuple(map(slice, np.maximum(low, 0).tolist(), np.minimum(high, shape).tolist()))


def _said(box: Box) -> str:
    return ", ".join(f"{axis} {b.start}:{b.stop}" for axis, b in zip("zyx", box, strict=True))
