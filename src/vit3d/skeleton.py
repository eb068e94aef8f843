"""From foreground voxels to centre lines: one shortest-path tree, its branches taken longest first.

The paths follow Sato et al. 2000 (TEASAR): shortest paths that avoid the border, each new branch covering what lies
around it. Here the border is avoided relative to the local depth, everything is sparse, and each voxel is covered once.
"""

from dataclasses import replace

import numpy as np
from scipy.linalg import solveh_banded

from vit3d.foreground import Foreground
from vit3d.tree import NeuronTree
from vit3d.voxel_graph import climb, extract_branches, largest_balls, shortest_paths

_CENTRING = 60.0  # how many times longer a step along the border is than one along the centre
_COVER_SCALE, _COVER_VOXELS = 1.3, 2.0  # a path covers what lies within scale * depth + steps * in-plane voxel
_STIFFNESS = 2.0
_BARE_HOPS = 2
_CAP_SLOPE = 0.4  # neurites do not taper faster than this; caps do
_SKIP = 0
_WINDOW, _FREE, _FREE_STEPS, _AIM, _PULL = 3.0, 1.0, 1.0, 6, 0.1


def skeletonize(foreground: Foreground, min_branch: float) -> NeuronTree:
    """Centre lines of every component, each rooted at one of its tips."""
    step = foreground.round_step
    depth, neighbours, index = foreground.depth, foreground.neighbours, foreground.index
    roots = climb(foreground.ends, depth, (neighbours, index, step), _CAP_SLOPE)
    paths = shortest_paths(roots, neighbours, foreground.neighbour_step, _cost(foreground))
    rule = (_COVER_SCALE, _COVER_VOXELS, _BARE_HOPS, min_branch, _CAP_SLOPE)
    voxel, parents, starts, owner = extract_branches(paths, depth, (neighbours, index, step), rule)
    skeleton = _smooth(foreground, voxel, parents, starts, owner)
    left_out = _straighten_junctions(skeleton, starts, step.min())
    skeleton = skeleton.take(np.flatnonzero(~left_out))
    return replace(skeleton, points=foreground.in_volume(skeleton.points / step))


def _cost(foreground):
    """(N,) float32 what a step costs: more off the centre line, and where the probability is low."""
    depth = foreground.depth
    ball = largest_balls(depth, foreground.neighbours, foreground.index, foreground.round_step)
    cost = (1 + _CENTRING * (1 - depth / depth[ball]) ** 2) / np.maximum(foreground.probability, 1e-3)
    return cost.astype(np.float32)


def _smooth(foreground, voxel, parents, starts, owner):
    """Sub-voxel positions: each branch is the stiff curve through the centroids of the voxels that its nodes own."""
    count, step = len(voxel), foreground.round_step
    owned = owner >= 0
    rows, weight = owner[owned], foreground.probability[owned].astype(np.float64)
    mass = np.bincount(rows, weight, count)
    number = np.bincount(rows, minlength=count)
    raw = foreground.index[voxel] * step
    centroid = np.stack(
        [np.bincount(rows, weight * foreground.index[owned, axis] * step[axis], count) for axis in range(3)], axis=1
    )
    centroid = np.where(mass[:, None] > 0, centroid / np.maximum(mass, 1e-9)[:, None], raw)
    confidence = np.where(number > 0, mass / np.maximum(number, 1), foreground.probability[voxel])
    radius = foreground.depth[voxel].astype(np.float64)
    np.maximum.at(radius, rows, foreground.depth[owned])
    filled = np.maximum(number, 1) * step.prod() / (step.min() * radius**2)
    trust = (_STIFFNESS * step.min() / radius) ** 4 * np.minimum(filled, 1)
    trust *= np.minimum(radius / (2 * step.max()), 1) ** 4  # few voxels across say little about where the centre is
    points, radius = _stiff_curves(centroid, radius, trust, parents, starts)
    return NeuronTree(points, radius, parents, unit=None, confidence=confidence)


def _straighten_junctions(skeleton, starts, step):
    """Move each hook to where the free part of the branch points, and say which nodes (M,) this leaves out.

    A shortest path cuts the corner inside the thicker neurite, so it meets the centre line too near to the root.
    """
    points, radii, parents = skeleton.points, skeleton.radii, skeleton.parents
    stops = np.append(starts[1:], len(parents))
    run = np.repeat(np.arange(len(starts)), stops - starts)
    left_out = np.zeros(len(parents), bool)
    moved = {}
    for first, stop in zip(starts, stops, strict=True):
        hook = parents[first]
        if hook < 0:
            continue
        hook = moved.get(hook, hook)
        reach = int(np.ceil(_WINDOW * radii[hook] / step)) + 5
        trunk = np.arange(max(starts[run[hook]], hook - reach), min(stops[run[hook]], hook + reach + 1))
        trunk = trunk[~left_out[trunk]]
        twig = points[first : min(stop, first + 2 * reach)]
        away = np.linalg.norm(twig[:, None] - points[trunk][None], axis=2)
        nearest = away.argmin(1)
        free = np.flatnonzero(away.min(1) > _FREE * radii[trunk[nearest]] + _FREE_STEPS * step)
        if not len(free) or len(twig) - free[0] < 3 + _SKIP:
            parents[first] = hook
            continue
        start = free[0]
        ahead = twig[start + _SKIP : start + _SKIP + _AIM + int(radii[hook] / step)]
        centre = ahead.mean(0)
        direction = np.linalg.svd(ahead - centre, full_matrices=False)[2][0]
        if direction @ (ahead[0] - ahead[-1]) < 0:
            direction = -direction
        to_trunk = points[trunk] - centre
        forward = to_trunk @ direction
        beside = np.linalg.norm(to_trunk - forward[:, None] * direction, axis=1)
        beside += _PULL * np.linalg.norm(points[trunk] - twig[start], axis=1)
        best = trunk[np.where(forward > 0, beside, np.inf).argmin()] if (forward > 0).any() else hook
        left_out[first : first + start] = True
        for gone in range(first, first + start):
            moved[gone] = first + start
        parents[first + start] = best
    for row in np.flatnonzero(parents >= 0):
        parents[row] = moved.get(parents[row], parents[row])
    return left_out


def _stiff_curves(centroid, radius, trust, parents, starts):
    """Minimise sum w |x - centroid|^2 + stiffness |second difference|^2 along each branch, all branches at once.

    Each branch runs from the node it hangs on (a copy) to its tip; then it is tied to where that node went.
    """
    length = np.diff(np.append(starts, len(parents)))
    hooked = parents[starts] >= 0
    place = np.arange(len(parents)) + np.repeat(np.cumsum(hooked), length)
    total = len(parents) + hooked.sum()
    values, weight = np.zeros((total, 4)), np.zeros(total)
    hook = place[starts[hooked]] - 1
    for at, rows in ((place, np.arange(len(parents))), (hook, parents[starts[hooked]])):
        values[at, :3], values[at, 3], weight[at] = centroid[rows], radius[rows], trust[rows]
    weight += 1e-6
    first = np.zeros(total, bool)
    first[hook] = True
    first[place[starts[~hooked]]] = True
    run = np.cumsum(first)
    bend = np.flatnonzero((run[:-2] == run[2:]) if total > 2 else np.zeros(0, bool))
    bands = np.zeros((3, total))
    bands[2] = weight
    for a, ca in enumerate((1, -2, 1)):
        np.add.at(bands[2], bend + a, ca * ca)
    np.add.at(bands[1], bend + 1, -2)
    np.add.at(bands[1], bend + 2, -2)
    np.add.at(bands[0], bend + 2, 1)
    solved = solveh_banded(bands, values * weight[:, None], check_finite=False)[place]
    return solved[:, :3], np.clip(solved[:, 3], 0.5 * radius, 1.2 * radius)
