"""Gaps: which fragments of a traced neuron belong together, and the route from one to the other."""

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from scipy.spatial import cKDTree

from vit3d.centerlines.threshold import Threshold
from vit3d.formats.lazy_voxels import LazyVoxels
from vit3d.tree import NeuronTree
from vit3d.volume import Volume

_TURN = 2.0  # a gap met at a right angle counts as (1 + _TURN) times its length
_MIN_COSINE = 0.3  # a gap lies ahead of its tip, within 72 degrees, and not behind the other's, within as many
_BLIND_STEPS = 2.0  # ... but where the gap is that short and a fragment too short to have a direction
_AIM_STEPS = 6.0  # in-plane voxels behind a tip that give its direction
_SLACK_STEPS = 0.5  # where a gap ends is known to half a voxel
_LOOKS = 8  # per voxel of a gap: its length must be measured finer than it is known
_MOST_STRETCHED = 3.0  # blur along a coarse axis: a tip lies so many radii from where its neurite ends there
_TRUST = 1.5  # a fragment bridges no gap longer than its own extent times this


@dataclass(frozen=True)
class Join:
    """A bridge from the tip of one fragment to a node of another, both rows of the forest."""

    tip: int
    target: int


@dataclass(frozen=True)
class Ground:
    """What gaps lie in: a volume, what of it is neuron, the size (3,) of its voxels in the unit of the forest, and a
    `mask` (Z, Y, X), where there is one, that is 0 where nothing is traced."""

    volume: Volume
    threshold: Threshold
    step: np.ndarray
    mask: np.ndarray | LazyVoxels | None = None


def join_fragments(forest: NeuronTree, ground: Ground, max_gap: float) -> tuple[NeuronTree, list[np.ndarray]]:
    """One root per connected neuron: fragments joined, cheapest gap first, and the rows of each bridge, ends included.

    A gap is as long as the part of the straight line between two nodes that lies outside the foreground, in the unit
    of the forest; up to half of the finest voxel more than `max_gap` is bridged. Its cost is the distance
    of the surfaces, times what a neurite turns there, less what the volume shows of it.
    """
    fragment = forest.root_of
    joins = _candidates(forest, fragment, ground, max_gap)
    group = np.arange(len(forest))
    parents, routes, bridges, used = forest.parents.tolist(), [], [], set()
    for join in joins:
        ends = [_find(group, fragment[row]) for row in (join.tip, join.target)]
        if ends[0] == ends[1] or join.tip in used:
            continue
        group[ends[0]] = ends[1]
        used |= {join.tip, join.target}
        routes.append(_route(forest, join, ground))
        bridge = [join.target, *range(len(parents), len(parents) + len(routes[-1])), join.tip]
        parents += bridge[:-2]
        _hang(parents, join.tip, bridge[-2])
        bridges.append(np.array(bridge))
    return (_with_routes(forest, routes, parents) if bridges else forest), bridges


def _hang(parents: list[int], tip: int, target: int) -> None:
    """Make `tip` the root of its fragment, and `target` its parent."""
    row, above = tip, target
    while row >= 0:
        parents[row], above, row = above, row, parents[row]


def _with_routes(forest: NeuronTree, routes: list[np.ndarray], parents: list[int]) -> NeuronTree:
    """The forest with the nodes of all routes, (N, 5) each, behind its own."""
    new = np.concatenate(routes)
    return replace(
        forest,
        points=np.concatenate([forest.points, new[:, :3]]),
        radii=np.concatenate([forest.radii, new[:, 3]]),
        parents=np.array(parents, dtype=forest.parents.dtype),
        types=np.concatenate([forest.types, np.zeros(len(new), int)]),
        confidence=np.concatenate([forest.confidence, new[:, 4]]),
    )


def _find(group: np.ndarray, row: int) -> int:
    while group[row] != row:
        group[row] = group[group[row]]
        row = group[row]
    return row


def _candidates(forest: NeuronTree, fragment: np.ndarray, ground: Ground, max_gap: float) -> list[Join]:
    """Every plausible join, cheapest first: for each tip the best node of each other fragment."""
    step = ground.step
    if max_gap <= 0 or (fragment == fragment[0]).all():
        return []
    tips, heading = _tips(forest, _AIM_STEPS * step.min())
    if not len(tips):
        return []
    cable, extent = _extents(forest, fragment)
    outward = np.zeros_like(forest.points)
    outward[tips] = heading
    behind = _behind_tips(forest, tips, _AIM_STEPS * step.min())
    everything = cKDTree(forest.points)
    widest = np.minimum(forest.radii.max(), 2 * max_gap)
    stretched = min(step.max() / step.min(), _MOST_STRETCHED)
    reach = max_gap + stretched * (forest.radii[tips] + widest)
    joins = []
    for tip, near in zip(tips, everything.query_ball_point(forest.points[tips], reach), strict=True):
        near = np.array(near)
        near = near[(fragment[near] != fragment[tip]) & ~behind[near]]
        if not len(near):
            continue
        across = forest.points[near] - forest.points[tip]
        length = np.linalg.norm(across, axis=1)
        gap = np.maximum(length - forest.radii[near] - forest.radii[tip], step.min())
        ahead = (across @ outward[tip]) / np.maximum(length, 1e-9)
        is_tip = outward[near].any(1)
        facing = np.where(is_tip, -(across * outward[near]).sum(1) / np.maximum(length, 1e-9), 1.0)
        onward = np.where(is_tip, -(outward[near] @ outward[tip]), 1.0)
        shorter = np.minimum(cable[fragment[near]], cable[fragment[tip]])
        blind = (shorter < _AIM_STEPS * step.min()) & (gap <= _BLIND_STEPS * step.min())
        plausible = blind | ((ahead > _MIN_COSINE) & (facing > -_MIN_COSINE))
        plausible &= gap <= _TRUST * np.minimum(extent[fragment[near]], extent[fragment[tip]])
        if not plausible.any():
            continue
        near, gap, ahead, facing, onward = (values[plausible] for values in (near, gap, ahead, facing, onward))
        seen, gap_in_volume, is_closed = _between(forest, tip, near, ground)
        # round a corner both ends look halfway at each other: what is turned is what lies between their directions
        turn = np.maximum(1 - ahead + (1 - facing) / 2, 1 - onward)
        cost = gap * (1 + _TURN * turn) * (1.2 - seen)
        allowed = ~is_closed & (gap_in_volume <= max_gap + _SLACK_STEPS * step.min())
        for other in np.unique(fragment[near[allowed]]):
            rows = np.flatnonzero(allowed & (fragment[near] == other))
            best = rows[cost[rows].argmin()]
            joins.append((cost[best], Join(int(tip), int(near[best]))))
    return [join for _, join in sorted(joins, key=lambda pair: (pair[0], pair[1].tip))]


def _tips(forest: NeuronTree, behind: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all ends, roots included, and the unit vectors along which the cable would go on."""
    tips = np.flatnonzero(forest.degree == 1)
    child = np.full(len(forest), -1)
    child[forest.parents[forest.edges]] = forest.edges
    heading = np.zeros((len(tips), 3))
    for n, tip in enumerate(tips):
        onward = forest.parents if forest.parents[tip] >= 0 else child
        row, travelled = tip, 0.0
        while travelled < behind and onward[row] >= 0:
            travelled += float(np.linalg.norm(forest.points[onward[row]] - forest.points[row]))
            row = onward[row]
        heading[n] = forest.points[tip] - forest.points[row]
    return tips, heading / np.maximum(np.linalg.norm(heading, axis=1, keepdims=True), 1e-9)


def _behind_tips(forest: NeuronTree, tips: np.ndarray, reach: float) -> np.ndarray:
    """(N,) bool: nodes so close behind a tip that a bridge which meets them means the tip."""
    behind = np.zeros(len(forest), bool)
    child = np.full(len(forest), -1)
    child[forest.parents[forest.edges]] = forest.edges
    inner = forest.degree == 2
    for tip in tips:
        onward = forest.parents if forest.parents[tip] >= 0 else child
        row, travelled = tip, 0.0
        while travelled < reach + forest.radii[tip] and onward[row] >= 0 and inner[onward[row]]:
            travelled += float(np.linalg.norm(forest.points[onward[row]] - forest.points[row]))
            row = onward[row]
            behind[row] = True
    return behind


def _extents(forest: NeuronTree, fragment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) each, by the row of a fragment's root: its cable, and that with the caps of its thickest node."""
    cable = np.bincount(fragment[forest.edges], forest.edge_lengths, len(forest))
    thickest = np.zeros(len(forest))
    np.maximum.at(thickest, fragment, forest.radii)
    return cable, cable + 2 * thickest


def _between(forest: NeuronTree, tip: int, near: np.ndarray, ground: Ground):
    """Of the straight lines from a tip to the nodes `near` (N,): (N,) the mean probability on the part outside of the
    neurites at both ends, how much of their length is no foreground, and whether they meet what is closed."""
    start, ends, step = forest.points[tip], forest.points[near], ground.step
    length = np.linalg.norm(ends - start, axis=1)
    count = max(8, math.ceil(_LOOKS * length.max() / step.min()))
    fraction = (np.arange(count) + 0.5) / count
    points = start + fraction[None, :, None] * (ends[:, None] - start)
    index = np.clip(np.rint(points / step).astype(int), 0, np.array(ground.volume.shape) - 1)
    low, high = index.min((0, 1)), index.max((0, 1)) + 1
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    at = tuple(np.moveaxis(index - low, -1, 0))
    values = np.asarray(ground.volume.voxels[box])[at]
    travelled = fraction * length[:, None]
    outside = (travelled > forest.radii[tip]) & (length[:, None] - travelled > forest.radii[near][:, None])
    outside[~outside.any(1)] = np.abs(fraction - 0.5) < 0.4
    seen = np.average(ground.threshold.probability(values), axis=1, weights=outside)
    is_closed = np.zeros(len(near), bool) if ground.mask is None else (np.asarray(ground.mask[box])[at] == 0).any(1)
    return seen, length * (values <= ground.threshold.value).mean(1), is_closed


def _route(forest: NeuronTree, join: Join, ground: Ground) -> np.ndarray:
    """(N, 5) points strictly between the ends of a join, about a voxel apart, along the most probable route; their
    radii; and what is seen there."""
    start, stop, step = *forest.points[[join.target, join.tip]], ground.step
    low = np.floor(np.minimum(start, stop) / step).astype(int) - 3
    high = np.ceil(np.maximum(start, stop) / step).astype(int) + 4
    low, high = np.maximum(low, 0), np.minimum(high, ground.volume.shape)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    seen = ground.threshold.probability(ground.volume.voxels[box])
    count = max(int(np.linalg.norm(stop - start) / step.min()), 1)
    points = start + np.linspace(0, 1, count + 1)[1:-1, None] * (stop - start)
    if ((seen > 0) & (seen < 1)).any():  # a mask says nothing about its gaps
        points = _most_probable(start, stop, seen, low, step, count)
    index = np.clip(np.rint(points / step).astype(int) - low, 0, np.array(seen.shape) - 1)
    thick, thin = forest.radii[[join.target, join.tip]]
    radii = np.minimum(np.linspace(thick, thin, len(points) + 2)[1:-1], thin)
    return np.column_stack([points, radii, seen[tuple(index.T)]])


def _most_probable(start, stop, seen, low, step, count) -> np.ndarray:
    from skimage.graph import MCP_Geometric

    ends = [np.clip(np.rint(end / step).astype(int) - low, 0, np.array(seen.shape) - 1) for end in (start, stop)]
    ridge = gaussian_filter(seen, step.min() / step)  # so that the middle is the cheapest
    finder = MCP_Geometric(1 / (0.05 + ridge) ** 2, sampling=tuple(step))
    finder.find_costs([ends[0]], [ends[1]])
    path = (np.array(finder.traceback(ends[1])) + low) * step
    path = np.concatenate([start[None], path[1:-1], stop[None]])
    smooth = gaussian_filter1d(path, 1.5, axis=0, mode="nearest")
    smooth[[0, -1]] = start, stop
    along = np.append(0, np.cumsum(np.linalg.norm(np.diff(smooth, axis=0), axis=1)))
    wanted = np.linspace(0, along[-1], count + 1)[1:-1]
    return np.column_stack([np.interp(wanted, along, column) for column in smooth.T])
