"""From foreground voxels to centre lines: one shortest-path tree, its branches taken longest first.

The paths follow Sato et al. 2000 (TEASAR): shortest paths that avoid the border, each new branch covering what lies
around it. Here the border is avoided relative to the local depth, everything is sparse, and each voxel is covered once.
"""

from dataclasses import replace

import numpy as np
from scipy.linalg import solveh_banded

from vit3d.centerlines.foreground import Foreground
from vit3d.centerlines.junctions import place_junctions
from vit3d.centerlines.voxel_graph import extract_branches, largest_balls, shortest_paths
from vit3d.tree import NeuronTree

_CENTRING = 60.0  # how many times longer a step along the border is than one along the centre
_COVER_SCALE, _COVER_VOXELS = 1.1, 1.3  # a path covers what lies within scale * depth + steps * in-plane voxel
_STIFFNESS = 2.0
_BARE_DEPTH = 1.2  # steps; above 1, or salt that touches a neurite grows into spurs
_RIDGE = 2  # power of the probability that draws a path to the ridge; in a mask all voxels weigh the same
_PIECE_VOXELS, _PIECES = 1 << 12, 16  # voxels weighed at once: at least so many, and at most so many times
_CAP_SLOPE = 0.4  # neurites do not taper faster than this; caps do


def skeletonize(foreground: Foreground, min_branch: float) -> NeuronTree:
    """Centre lines of every component, each rooted at one of its tips."""
    step = foreground.round_step
    depth, neighbours, index = foreground.depth, foreground.neighbours, foreground.index
    graph = (neighbours, index, step)
    rule = (_COVER_SCALE, _COVER_VOXELS, _BARE_DEPTH * step.min(), min_branch, _CAP_SLOPE)
    voxel, parents, starts, owner = extract_branches(  # the paths are let go afterwards
        shortest_paths(foreground.ends, graph, foreground.neighbour_step, _cost(foreground), depth, _CAP_SLOPE),
        *(depth, graph, rule),
    )
    skeleton = _smooth(foreground, voxel, parents, starts, owner)
    skeleton = place_junctions(skeleton, starts, foreground)
    index = np.clip(skeleton.points / step, 0, np.array(foreground.shape) - 1)  # stiff curves may leave at a face
    return replace(skeleton, points=foreground.in_volume(index))


def _cost(foreground):
    """(N,) float32 what a step costs: more off the centre line, and where the probability is low."""
    depth = foreground.depth
    ball = largest_balls(depth, foreground.neighbours, foreground.index, foreground.round_step)
    cost = (1 + _CENTRING * (1 - depth / depth[ball]) ** 2) / np.maximum(foreground.probability, 1e-3)
    return cost.astype(np.float32)


def _smooth(foreground, voxel, parents, starts, owner):
    """Sub-voxel positions: each branch is the stiff curve through the centroids of the voxels that its nodes own."""
    count, step = len(voxel), foreground.round_step
    total, number, mass, moment = np.zeros(count), np.zeros(count), np.zeros(count), np.zeros((3, count))
    radius = foreground.depth[voxel]
    highest = foreground.probability.max()  # so that all weights of a mask are 1, whatever its value
    size = max(_PIECE_VOXELS, len(owner) // _PIECES)
    for first in range(0, len(owner), size):  # in pieces, because weighted sums need 64 bits
        piece = first + np.flatnonzero(owner[first : first + size] >= 0)
        rows, probability = owner[piece], foreground.probability[piece].astype(np.float64)
        weight = (probability / highest) ** _RIDGE
        total += np.bincount(rows, probability, count)
        mass += np.bincount(rows, weight, count)
        number += np.bincount(rows, minlength=count)
        for axis in range(3):
            moment[axis] += np.bincount(rows, weight * foreground.index[piece, axis], count)
        np.maximum.at(radius, rows, foreground.depth[piece])
    radius = radius.astype(np.float64)  # only now: `maximum.at` is slow where types differ
    raw = foreground.index[voxel] * step
    centroid = np.where(mass[:, None] > 0, moment.T * step / np.maximum(mass, 1e-30)[:, None], raw)
    confidence = np.where(number > 0, total / np.maximum(number, 1), foreground.probability[voxel])
    filled = np.maximum(number, 1) * step.prod() / (step.min() * radius**2)
    trust = (_STIFFNESS * step.min() / radius) ** 4 * np.minimum(filled, 1)
    trust *= np.minimum(radius / (2 * step.max()), 1) ** 4  # few voxels across say little about where the centre is
    points, radius = _stiff_curves(centroid, radius, trust, parents, starts)
    return NeuronTree(points, radius, parents, unit=None, confidence=confidence)


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
