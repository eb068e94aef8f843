"""The main job, composed of the verbs: stack -> probability -> tree, and the files a person wants of it."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .centerlines.prominence import light_of_its_own
from .centerlines.threshold import LIKELY, find_threshold
from .formats.lazy_voxels import ChangedVoxels, LazyVoxels, VoxelsWithin, pieces
from .model.intensity_vit3d import fill_level
from .regridding import as_trained, on_grid_of
from .results import WRITTEN_BESIDE, all_or_none, refuse_foreign, swc_files, tell_of_earlier, write_review
from .tracing import MIN_VOXELS, Review, check_lengths, trace_with_review
from .tree import NeuronTree, write_swc
from .volume import SUFFIXES, Volume, box_in, is_stack, is_url, named_stacks, open_volume, stack_name, write_volume

Box = tuple[slice, slice, slice]

_BYTES_BESIDE = 12  # per voxel, for the probability and what it takes to make, trace and draw it
_BYTES_ANYWAY = 2**30  # for the network and Python
_POLL_S = 1.0


@dataclass(frozen=True)
class Reconstruction:
    """What came of one stack or of a box of it. The tree is in full-stack coordinates, volumes are the box."""

    volume: Volume
    probability: Volume
    tree: NeuronTree
    reviews: list[Review]
    polarity: str
    box: Box

    def write(self, out: Path, name: str, swc_unit: str | None = None, *, forest: bool = False) -> None:
        """`NAME.swc`, `NAME_probability.tif`, `NAME_review.csv` and `NAME.png` into the folder `out`: all or none.

        `swc_unit`, "um" or "voxel", is that of the SWC and of the review; default is the tree's own. `forest`: every
        tree has an SWC of its own, `NAME_1.swc` the one with most cable. A probability on disk stays where it is.
        """
        from .plot import plot_reconstruction

        swc, on_disk = out / f"{name}.swc", isinstance(self.probability.voxels, LazyVoxels)
        refuse_foreign(swc, forest, WRITTEN_BESIDE[: 1 if on_disk else None])
        unit = swc_unit or self.tree.unit
        with all_or_none(out, name) as whole:
            for path, tree in swc_files(self.tree, whole / swc.name, forest):
                write_swc(tree, path, unit=unit)
            write_review(reviews_in(unit, self.reviews, self.tree), whole / f"{name}_review.csv", unit)
            if not on_disk:
                write_volume(self.probability, whole / f"{name}_probability.tif")
            shown = {"probability": self.probability, "polarity": self.polarity}
            shown["start"] = [axis.start or 0 for axis in self.box]
            plot_reconstruction(self.volume, self.tree, whole / f"{name}.png", **shown)
            written = {path.name for path in whole.iterdir()}
        tell_of_earlier(swc, written, ("_probability.tif" if on_disk else "_probability.zarr",))


def reconstruct(
    model,
    volume: Volume,
    *,
    processor=None,
    box: Box | None = None,
    mask: np.ndarray | None = None,
    select: bool = True,
    regrid: bool = True,
    **tracing,
) -> Reconstruction:
    """Segment and trace a stack, or the part of it inside `box`; `tracing` goes to `trace`.

    Of trees that cannot be joined, the one with most cable and light of its own is the neuron
    (`centerlines.prominence`), and of one that is mostly far dimmer neurites of other cells, the part that is not.
    `mask` (Z, Y, X), as large as the stack: nothing is traced where it is 0. Intensities are measured on the
    whole stack, so a box is segmented as it would be in the full run. With `regrid` a stack whose voxels are coarser
    than those that the network was trained on is segmented and traced on finer ones (`regridding.as_trained`); the tree
    says where its nodes lie in the stack, and the probability is given at the stack's voxels.
    """
    from .model.image_processing_vit3d import ViT3DImageProcessor
    from .segmentation import segment  # torch is loaded only here: tracing a mask needs none

    _check_tracing(tracing)  # before the long part
    box = box_in(box, volume.shape)
    if mask is not None:
        check_mask(mask, volume)
    processor = processor or ViT3DImageProcessor.from_config(model.config)
    known = model.config if regrid else None
    statistics = processor.measure(as_trained(volume, known).voxels)
    part = volume.crop(box)
    seen = _in_memory(as_trained(part, known))
    probability = segment(model, seen, processor=processor, statistics=statistics, select=select)
    allowed = None if mask is None else Volume(np.asarray(mask[box]) != 0, part.spacing_um)
    tree, reviews = traced(probability, part, statistics, tracing, allowed)
    probability = _allowed(_in_memory(on_grid_of(probability, part)), allowed)
    return Reconstruction(
        part, probability, place(tree, box), placed_reviews(reviews, tree, box), statistics.polarity, box
    )


def reconstruct_on_disk(  # noqa: PLR0913 (those of `reconstruct`, and three)
    model,
    volume: Volume,
    store: Path,
    *,
    processor=None,
    box: Box | None = None,
    mask: np.ndarray | LazyVoxels | None = None,
    select: bool = True,
    regrid: bool = True,
    run: dict | None = None,
    write: Callable[[Reconstruction], None] | None = None,
    **tracing,
) -> Reconstruction | None:
    """`reconstruct`, for a volume larger than memory: the probability grows as the OME-Zarr `store`.

    Any number of processes may do this at once and be killed: all segment into one store, one of them adds its coarser
    levels, traces it and calls `write` with the result. The others get None when that is done, or do it where that
    process ended before; the ranks of one job on one machine leave it to one another at once. Started again, it goes
    on. `run`: fields of `vit3d.blockwise.out_of_core.RunOptions`. The tree is that of memory, up to rounding; memory
    follows the neuron.
    The store holds the probability also where `mask` is 0, on the grid that the network saw (its scale says which).
    """
    from .blockwise.block_store import BlockStore
    from .blockwise.leases import Leases
    from .blockwise.out_of_core import RunOptions, segment_store
    from .formats.pyramid import build_pyramid, has_pyramid
    from .model.image_processing_vit3d import ViT3DImageProcessor

    _check_tracing(tracing)
    box = box_in(box, volume.shape)
    if mask is not None:
        check_mask(mask, volume)
    processor = processor or ViT3DImageProcessor.from_config(model.config)
    known = model.config if regrid else None
    statistics = processor.measure(as_trained(volume, known).voxels)
    part = within(volume, box)
    store.parent.mkdir(parents=True, exist_ok=True)
    before = BlockStore(store).trace_mark() if store.exists() else None
    options, how = RunOptions(**(run or {})), {"processor": processor, "statistics": statistics, "select": select}
    segment_store(model, as_trained(part, known), store, options=options, **how)
    with Leases(store.parent, options.expiry_s) as leases:
        if not _is_turn_to_trace(leases, BlockStore(store), before, options):
            return None
        if not has_pyramid(store):
            build_pyramid(store)
        probability = open_volume(store)
        allowed = None if mask is None else Volume(_ones(VoxelsWithin(mask, box)), part.spacing_um)
        tree, reviews = traced(probability, part, statistics, tracing, allowed)
        probability = on_grid_of(probability, part)
        reviews = placed_reviews(reviews, tree, box)
        result = Reconstruction(part, probability, place(tree, box), reviews, statistics.polarity, box)
        if write is not None:
            write(result)
        BlockStore(store).mark_traced()
    return result


def _is_turn_to_trace(leases, store, before: str | None, options) -> bool:
    """Whether the tree is left to this process: the store's mark is still that from `before` it was segmented. What
    another one is making of it is waited for, as that one may die."""
    lease = f".{store.folder.name}.tracing"
    if not leases.claim(lease):
        if options.ranks > 1 and leases.is_held_by_sibling(lease):
            return False  # who launched both tells of a death, and another stack of the folder need not wait
        if options.rank == 0:  # one of a job's processes says it
            warnings.warn(
                f"Another process is tracing {store.folder.name}; should it end without a tree, this one will trace.",
                stacklevel=3,
            )
        leases.wait_for(lease, _POLL_S)
    return store.trace_mark() == before


def trace_part(
    volume: Volume, box: Box | None = None, mask=None, *, dark: bool = False, threshold: float | str = "auto", **tracing
) -> tuple[NeuronTree, list[Review]]:
    """`trace`, and what deserves a look, of the part of a volume inside `box`, in the coordinates of the whole.

    The volume may lie on disk, and so may `mask`, as `reconstruct` takes it. dark: neurites on a bright ground.
    `tracing` goes to `trace`; its `root` counts from the box.
    """
    box = box_in(box, volume.shape)
    if mask is not None:
        check_mask(mask, volume)  # before the long part
    volume = inverted(volume) if dark else volume
    part, threshold = find_threshold(within(volume, box), threshold)
    if mask is not None:
        mask = within(Volume(mask), box).voxels
        part = masked(part, mask, threshold.dark)
    tree, reviews = trace_with_review(part, threshold=threshold, mask=mask, **tracing)
    return place(tree, box), placed_reviews(reviews, tree, box)


def fits_in_memory(volume: Volume, memory_bytes: float, box: Box | None = None, config=None) -> bool:
    """Whether a volume, or a box of it, can be reconstructed, or traced, as a whole with so much memory; `config` of
    the network for whose sake it may get another grid."""
    part = volume if box is None else within(volume, box)
    seen = as_trained(part, config)
    num_voxels = math.prod(seen.shape) + (0 if seen is part else math.prod(part.shape))
    return num_voxels * (volume.voxels.dtype.itemsize + _BYTES_BESIDE) + _BYTES_ANYWAY <= memory_bytes


def _check_tracing(tracing: dict) -> None:
    check_lengths(**{name: length for name, length in tracing.items() if name.endswith("_um")})


def within(volume: Volume, box: Box) -> Volume:
    """`volume.crop(box)`, but of voxels on disk nothing is read."""
    if not isinstance(volume.voxels, LazyVoxels):
        return volume.crop(box)
    return Volume(VoxelsWithin(volume.voxels, box_in(box, volume.shape)), volume.spacing_um)


def masked(volume: Volume, mask, dark: float = 0.0) -> Volume:
    """The volume with `dark` where `mask`, of the same shape, is 0; of voxels on disk nothing is read."""
    check_mask(mask, volume)
    zero = volume.voxels.dtype.type(dark)
    if isinstance(volume.voxels, LazyVoxels):
        voxels = ChangedVoxels(volume.voxels, lambda part, box: np.where(np.asarray(mask[box]) != 0, part, zero))
    else:
        voxels = np.where(np.asarray(mask) != 0, volume.voxels, zero)
    return Volume(voxels, volume.spacing_um)


def inverted(volume: Volume) -> Volume:
    """Dark neurites on a bright ground made bright ones on a dark ground.

    The brightest voxel becomes 0, and so does what was never imaged.
    """
    voxels = volume.voxels
    fill = fill_level(voxels)
    if isinstance(voxels, LazyVoxels):
        highest = max(np.asarray(voxels[box]).max() for box in pieces(voxels))
        dtype = _unsigned(voxels.dtype)
        return Volume(ChangedVoxels(voxels, lambda part, _: _turned(part, highest, fill), dtype), volume.spacing_um)
    voxels = np.asarray(voxels)
    return Volume(_turned(voxels, voxels.max(), fill), volume.spacing_um)


def _turned(voxels: np.ndarray, highest, fill: float | None) -> np.ndarray:
    dtype = _unsigned(voxels.dtype)
    # of signed integers the difference may not fit their type; modulo its size it is right in the unsigned one
    turned = ~voxels if dtype.kind == "b" else highest.astype(dtype) - voxels.astype(dtype, copy=False)
    return turned if fill is None else np.where(voxels == fill, dtype.type(0), turned)


def _unsigned(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}") if dtype.kind == "i" else dtype


def traced(
    probability: Volume, part: Volume, statistics, tracing: dict, allowed: Volume | None = None
) -> tuple[NeuronTree, list[Review]]:
    """The tree of the probability, whose voxels may be finer than those of the stack that it lies in, the `part`;
    `statistics` are the stack's grey levels, and nothing is traced where `allowed`, on the grid of the part, is 0.

    Of several, the one with most cable and light of its own is the neuron. Pieces that stay trees of their own are
    noise up to as many of the stack's voxels. One tree alone would lose by that: what can be joined to it is no noise.
    """
    if tracing.get("forest") and probability.spacing_um != part.spacing_um:
        finer = math.prod(np.divide(part.spacing_um, probability.spacing_um))
        tracing = {"min_voxels": MIN_VOXELS * finer, **tracing}
    if tracing.get("threshold", "auto") == "auto":
        tracing = {**tracing, "threshold": LIKELY}  # it is a probability, whatever it looks like

    def light(tree: NeuronTree) -> np.ndarray:
        return light_of_its_own(tree, part, statistics)

    mask = None if allowed is None else on_grid_of(allowed, probability).voxels
    probability = probability if mask is None else masked(probability, mask)
    tree, reviews = trace_with_review(probability, light=light, mask=mask, **tracing)
    return replace(tree, spacing_um=part.spacing_um), reviews


def _in_memory(volume: Volume) -> Volume:
    return Volume(np.asarray(volume.voxels), volume.spacing_um)


def _ones(mask: LazyVoxels) -> LazyVoxels:
    """1 where the mask is not 0, read box by box."""
    return ChangedVoxels(mask, lambda part, _: part != 0)


def _allowed(probability: Volume, mask: Volume | None) -> Volume:
    """The probability with zeros where the mask of zeros and ones, which may have another grid, is below a half."""
    return probability if mask is None else masked(probability, on_grid_of(mask, probability).voxels)


def place(tree: NeuronTree, box: Box) -> NeuronTree:
    """A tree of a box in the coordinates of the full stack."""
    return tree.shifted(_offset(tree, box))


def placed_reviews(reviews: list[Review], tree: NeuronTree, box: Box) -> list[Review]:
    """The same for the places to review."""
    offset = _offset(tree, box)
    return [Review(r.kind, tuple(np.add(r.point, offset).tolist()), r.length, r.confidence) for r in reviews]


def reviews_in(unit: str | None, reviews: list[Review], tree: NeuronTree) -> list[Review]:
    """Places to review of `tree`, in another unit. Lengths, whose direction nobody knows, scale as radii do, by x."""
    if unit in (tree.unit, None):
        return reviews
    step = np.array(tree.spacing_um) if unit == "um" else 1 / np.array(tree.spacing_um)
    return [replace(r, point=tuple((np.array(r.point) * step).tolist()), length=r.length * step[2]) for r in reviews]


def find_stacks(path: Path) -> dict[str, Path]:
    """The stack itself (a file, a store, a URL, a folder of slices), or a folder's, by the name of what comes of them.

    Hidden files and the tool's own probabilities are passed over. Stacks that differ only in their suffix keep
    it in the name. FileNotFoundError: nothing there, or no stack in the folder.
    """
    if not is_url(path) and not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if is_stack(path):
        stores = [place for place in (path, *path.parents) if place.suffix == ".zarr"]  # a level is named by its store
        named = stores[-1] if stores else path
        return {stack_name(named if named.name not in ("", "..") else named.resolve()): path}  # `.` has none of its own
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    stacks = [p for p in files if not stack_name(p).endswith("_probability")]
    if not stacks:
        raise FileNotFoundError(f"{path} holds no stack; {', '.join(SUFFIXES)} are read.")
    return named_stacks(stacks)


def check_mask(mask, volume: Volume) -> None:
    if tuple(mask.shape) != volume.shape:
        raise ValueError(f"The mask has shape {mask.shape}, the stack {volume.shape}; they must be equal (Z, Y, X).")


def _offset(tree: NeuronTree, box: Box) -> np.ndarray:
    start = np.array([axis.start or 0 for axis in box], dtype=float)
    return start * np.array(tree.spacing_um) if tree.unit == "um" else start
