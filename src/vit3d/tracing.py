"""VERB trace: probability, mask or intensity Volume -> NeuronTree."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from vit3d.centerlines.foreground import Foreground, find_foreground, voxel_of
from vit3d.centerlines.joining import Ground, join_fragments
from vit3d.centerlines.prominence import most_prominent_part
from vit3d.centerlines.skeleton import skeletonize
from vit3d.centerlines.soma import with_hub, with_soma
from vit3d.centerlines.threshold import Threshold, find_threshold
from vit3d.formats.lazy_voxels import LazyVoxels
from vit3d.morphometry import resample
from vit3d.tree import SOMA, NeuronTree, follow
from vit3d.volume import Volume, refuse_other_than_volume

MIN_VOXELS = 6  # smaller components are noise, by default
_SPECKS, _THINNING, _SPECKS_LEFT = 100, 0.5, 0.05  # see `_salt`
_GAP_VOXELS = 10  # in-plane voxels bridged by default
_RIVAL = 0.05  # a tree with less than this share of the longest one's cable is not the neuron, however sharp
_CLOSE_RIVAL = 0.5  # share of the cable kept from which on what is left out deserves a word
_WEAK = 0.6  # a weak spot has less than this share of the tree's median confidence


@dataclass(frozen=True)
class Review:
    """A place for a proofreader: `kind` "left out", "join" or "weak", its centre (z, y, x), length and confidence.

    What was left out could not be joined to the tree. A join is measured between the surfaces of the two ends.
    """

    kind: str
    point: tuple[float, float, float]
    length: float
    confidence: float


def trace(
    volume: Volume,
    *,
    threshold: float | str = "auto",
    root: tuple[float, float, float] | None = None,
    min_branch_um: float | None = None,
    max_gap_um: float | None = None,
    forest: bool = False,
    step_um: float | None = None,
    min_voxels: float = MIN_VOXELS,
) -> NeuronTree:
    """The tree of the neuron in a probability, a mask or an intensity volume.

    Coordinates, lengths and the tree are in um where the volume knows its spacing, else in voxels (then read
    every `_um` here as voxels too). Parents come before children; `confidence` is the mean probability around
    each node; a soma, where a blob stands out, is one node of type 1. Of several trees that cannot be joined, the one
    with most cable is kept (`vit3d.reconstruct` asks the stack which is the neuron). Background that the neuron
    encloses on all sides, an unlabelled nucleus say, is taken for neuron where it is at most 32 voxels wide.

    threshold: foreground lies above it; "auto" is 0.5 for a probability, as which voxels count that all lie from 0 to
    1, and for intensities, which are smoothed by about a voxel first, it is found; "intensity" finds it whatever their
    range. Where intensities seem to pass for a probability, a warning says so.
    root: (z, y, x); the tree then starts at the nearest foreground. Default: the soma or the thickest point.
    min_branch_um: side branches that reach less than this beyond their parent's surface are left out.
    max_gap_um: longest gap that is bridged; 10 in-plane voxels by default, 0 for none.
    forest: keep what cannot be joined as trees of their own, instead of dropping it.
    step_um: distance of nodes; branch points and tips stay in place. Default: about a voxel.
    min_voxels: connected pieces of fewer voxels are noise; more count as such where there is much salt.

    Raises ValueError for NaN, for a volume that is all foreground and for a root outside the volume. A volume
    without foreground gives an empty tree and a warning.
    """
    return trace_with_review(
        volume,
        threshold=threshold,
        root=root,
        min_branch_um=min_branch_um,
        max_gap_um=max_gap_um,
        forest=forest,
        step_um=step_um,
        min_voxels=min_voxels,
    )[0]


def trace_with_review(  # noqa: PLR0913 (those of `trace`, and one)
    volume: Volume,
    *,
    threshold: float | str | Threshold = "auto",
    root: tuple[float, float, float] | None = None,
    min_branch_um: float | None = None,
    max_gap_um: float | None = None,
    forest: bool = False,
    step_um: float | None = None,
    min_voxels: float = MIN_VOXELS,
    light: Callable[[NeuronTree], np.ndarray] | None = None,
    mask: np.ndarray | LazyVoxels | None = None,
) -> tuple[NeuronTree, list[Review]]:
    """As `trace`, with what deserves a look: what was left out, longest first, then joins and weak spots, least
    confident first.

    light: gives (N,) a tree's light of its own, as `centerlines.prominence` takes it; by it and by its cable one of
    several trees is kept, and of that no more than is the neuron. Without it, the one with most cable.
    mask: (Z, Y, X), 0 where no gap is bridged; the volume is dark there.
    """
    refuse_other_than_volume(volume)
    check_lengths(min_branch_um=min_branch_um, max_gap_um=max_gap_um, step_um=step_um)
    _check_root(volume, root)
    unit = "um" if volume.spacing_um else "voxel"
    volume, threshold = find_threshold(volume, threshold)
    foreground = find_foreground(volume, threshold)
    if not len(foreground):
        warnings.warn(f"No voxel lies above the threshold {threshold.value:g}: the tree is empty.", stacklevel=3)
        return NeuronTree.empty(unit, volume.spacing_um), []
    foreground = _without_dust(foreground, min_voxels)
    finest, step = voxel_of(volume)  # all that is chosen by length is chosen in units of the finest axis
    tree = skeletonize(foreground, (min_branch_um or 0.0) / finest)
    gap = _GAP_VOXELS * step[1:].min() if max_gap_um is None else max_gap_um / finest
    tree, bridges = join_fragments(tree, Ground(volume, threshold, step, mask), gap)
    whole = tree = replace(tree.scaled(finest), unit=unit, spacing_um=volume.spacing_um)
    tree, bridges, rows = _neuron(whole, bridges, root, forest, light)
    left_out = _left_out(whole, rows)
    _warn_of_rivals(tree, left_out, root)
    reviews = sorted(_joins(tree, bridges) + _weak_spots(tree, bridges), key=lambda review: review.confidence)
    main, *others = (_begun(part, foreground, finest, hub=root is None) for part in tree.split())
    main = main if root is None else _started(main, np.array(root))
    tree = NeuronTree.together([main, *others])
    tree = tree.sorted() if step_um is None else resample(tree, step_um)
    return tree, left_out + reviews


def check_lengths(**lengths_um: float | None) -> None:
    """ValueError: one that is given is no length >= 0, or, of `step_um`, > 0."""
    for name, length in lengths_um.items():
        positive = name == "step_um"
        if length is not None and not (math.isfinite(length) and (length > 0 if positive else length >= 0)):
            raise ValueError(f"`{name}` must be a length {'>' if positive else '>='} 0, got {length}.")


def _check_root(volume: Volume, root) -> None:
    if root is None:
        return
    step = np.array(volume.spacing_um or (1.0, 1.0, 1.0))
    place = np.asarray(root, float) / step
    if place.shape != (3,) or not ((place >= -0.5) & (place <= np.array(volume.shape) - 0.5)).all():
        extent = " x ".join(f"{size:g}" for size in (np.array(volume.shape) - 1) * step)
        unit = "um" if volume.spacing_um else "voxels"
        raise ValueError(f"`root` {tuple(root)} lies outside the volume of {extent} {unit} (z, y, x).")


def _without_dust(foreground: Foreground, min_voxels: float) -> Foreground:
    """The foreground without tiny components."""
    component = foreground.components()
    size = np.bincount(component)
    keep = size >= min(max(_salt(size), min_voxels), size.max())
    return foreground if keep.all() else foreground.select(keep[component])


def _salt(size: np.ndarray) -> int:
    """Where there is so much salt that specks clump: components of fewer voxels are clumps of it; else 0.

    Clumps of salt get rarer by a factor with each voxel more. Where small components are many and thin out like
    that, fewer than 0.05 of them are expected to be as large as this.
    """
    count = np.bincount(np.minimum(size, MIN_VOXELS), minlength=MIN_VOXELS + 1)[1:-1]
    many = count >= 10
    if count.sum() < _SPECKS or not many[:2].all():
        return 0
    last = int(many.argmin()) - 1 if not many.all() else len(many) - 1
    factor = (count[1 : last + 1] / count[:last]).max()
    if factor > _THINNING:
        return 0
    expected = count[last] / (1 - factor)  # of size last + 1 or larger
    return last + 1 + math.ceil(math.log(_SPECKS_LEFT / expected) / math.log(factor))


def _neuron(
    tree: NeuronTree, bridges: list[np.ndarray], root, forest: bool, light=None
) -> tuple[NeuronTree, list[np.ndarray], np.ndarray]:
    """The most prominent tree, or the one at `root`, its bridges and its rows in `tree`; with `forest` every tree, that
    one first.

    Each is rooted at its thickest node, or at the node nearest to `root`.
    """
    part = tree.root_of
    cable = np.bincount(part[tree.edges], tree.edge_lengths, len(tree))
    rivals = np.flatnonzero(cable >= _RIVAL * cable.max())
    neurons = {}  # of each rival the rows that are the neuron
    if light is not None and root is None:
        cable = np.zeros(len(tree))
        for rival in rivals:
            rows = np.flatnonzero(part == rival)
            alone = tree.take(rows)
            inside, cable[rival] = most_prominent_part(alone, light(alone))
            neurons[rival] = rows if forest or inside.all() else _without_stubs(tree, rows[inside], bridges)
    nearest = None if root is None else _nearest(tree, np.array(root))
    main = int(cable.argmax()) if root is None else part[nearest]
    neuron = neurons.get(main, np.flatnonzero(part == main))
    others = {top: rows for top, rows in _by_part(part) if top != main} if forest else {}
    tops = [nearest if root is not None else neuron[tree.radii[neuron].argmax()]]
    tops += [rows[tree.radii[rows].argmax()] for rows in others.values()]
    rows = np.concatenate([neuron, np.sort(np.concatenate([np.empty(0, int), *others.values()]))])
    new_row = np.full(len(tree), -1)
    new_row[rows] = np.arange(len(rows))
    bridges = [new_row[bridge] for bridge in bridges if (new_row[bridge] >= 0).all()]
    return tree.rerooted(tops).take(rows), bridges, rows


def _without_stubs(tree: NeuronTree, rows: np.ndarray, bridges: list[np.ndarray]) -> np.ndarray:
    """Those of the rows that are not the beginning of a bridge to what is left out; no branch goes off a bridge."""
    inside = np.zeros(len(tree), dtype=bool)
    inside[rows] = True
    for bridge in bridges:
        if inside[bridge[[0, -1]]].sum() == 1:
            inside[bridge[1:-1]] = False
    return rows[inside[rows]]


def _begun(tree: NeuronTree, foreground: Foreground, finest: float, hub: bool) -> NeuronTree:
    """One tree with the soma, or the `hub`, that it leaves; `finest` is the foreground's unit in the tree's."""
    begun = with_soma(tree.scaled(1 / finest), foreground).scaled(finest)
    tree = replace(begun, spacing_um=tree.spacing_um)  # to the last digit
    return with_hub(tree) if hub else tree


def _started(tree: NeuronTree, root: np.ndarray) -> NeuronTree:
    """The tree from the node nearest to `root`, or the soma around it, again: a soma made itself its root."""
    away = np.linalg.norm(tree.points - root, axis=1) - np.where(tree.types == SOMA, tree.radii, 0)
    return tree.rerooted(int(away.argmin()))


def _nearest(tree: NeuronTree, root: np.ndarray) -> int:
    """The row nearest to the root; a warning where that is far from it, or who mistook the axes would not know."""
    away = np.linalg.norm(tree.points - root, axis=1)
    row, finest = int(away.argmin()), min(tree.spacing_um or (1.0,))
    if away[row] > tree.radii[row] + _GAP_VOXELS * finest:
        unit = tree.unit if tree.unit == "um" else "voxels"
        warnings.warn(
            f"`root` lies {away[row]:.1f} {unit} from the nearest neurite, where the tree starts.", stacklevel=5
        )
    return row


def _left_out(tree: NeuronTree, kept: np.ndarray) -> list[Review]:
    """One entry per tree that could not be joined and was dropped, or that was in part, longest first."""
    if len(kept) == len(tree):
        return []
    part, gone = tree.root_of, np.setdiff1d(np.arange(len(tree)), kept)
    dropped = np.isin(tree.edges, gone)
    cable = np.bincount(part[tree.edges[dropped]], tree.edge_lengths[dropped], len(tree))
    reviews = []
    for root, rows in sorted(_by_part(part, gone), key=lambda item: -cable[item[0]]):
        middle = tuple(tree.points[rows].mean(0).tolist())
        reviews.append(Review("left out", middle, float(cable[root]), float(tree.confidence[rows].mean())))
    return reviews


def _by_part(part: np.ndarray, rows: np.ndarray | None = None) -> list[tuple[int, np.ndarray]]:
    """Of the rows, or all, those of each part, which `part` names for every row; both ascending."""
    rows = np.arange(len(part)) if rows is None else rows
    rows = rows[np.argsort(part[rows], kind="stable")]
    cuts = np.flatnonzero(np.diff(part[rows])) + 1
    return [(int(part[some[0]]), some) for some in np.split(rows, cuts)] if len(rows) else []


def _warn_of_rivals(tree: NeuronTree, left_out: list[Review], root) -> None:
    """A scale bar, or another neuron, may be what was kept."""
    kept = tree.edge_lengths.sum()
    if root is None and left_out and left_out[0].length > _CLOSE_RIVAL * kept:
        unit = tree.unit if tree.unit == "um" else "voxels"
        warnings.warn(
            f"A tree of {left_out[0].length:.0f} {unit} was left out beside the one of {kept:.0f} that was kept: "
            "--forest keeps all, and `vit3d trace --root` takes another.",
            stacklevel=4,
        )


def _joins(tree: NeuronTree, bridges: list[np.ndarray]) -> list[Review]:
    reviews = []
    for bridge in bridges:
        points, confidence = tree.points[bridge], tree.confidence[bridge]
        ends = points[[0, -1]]
        outside = (np.linalg.norm(points[:, None] - ends, axis=2) > tree.radii[bridge[[0, -1]]]).all(1)
        outside = outside if outside.any() else confidence == confidence.min()
        length = np.linalg.norm(np.diff(points, axis=0), axis=1).sum() - tree.radii[bridge[[0, -1]]].sum()
        middle = tuple(points[outside].mean(0).tolist())
        reviews.append(Review("join", middle, max(float(length), 0.0), float(confidence[outside].mean())))
    return reviews


def _weak_spots(tree: NeuronTree, bridges: list[np.ndarray]) -> list[Review]:
    """One entry per run of at least two neighbouring nodes whose confidence is far below the tree's median."""
    weak = tree.confidence < _WEAK * np.median(tree.confidence)
    for bridge in bridges:
        weak[bridge] = False
    tied = weak & (tree.parents >= 0) & weak[tree.parents]
    run = follow(np.where(tied, tree.parents, np.arange(len(tree))))
    length = np.zeros(len(tree))
    np.add.at(length, run[tied], np.linalg.norm(tree.points[tied] - tree.points[tree.parents[tied]], axis=1))
    reviews = []
    for top, rows in _by_part(run, np.flatnonzero(weak)):
        if length[top]:
            middle = tuple(tree.points[rows].mean(0).tolist())
            reviews.append(Review("weak", middle, float(length[top]), float(tree.confidence[rows].mean())))
    return reviews
