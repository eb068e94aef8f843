"""Where neurites begin: a soma that stands out as a blob, or the place that several stems leave together."""

import math
from dataclasses import replace

import numpy as np
from scipy.spatial import cKDTree

from vit3d.centerlines.foreground import Foreground
from vit3d.morphometry import branches
from vit3d.tree import SOMA, NeuronTree, follow

_FACTORS = (3.0, 1.8)  # a soma is this much thicker than the median and the 90th percentile of the neurites
_MIN_VOXELS = 4.0
_STUB_REACH = 0.3  # radii of the soma beyond its surface; what ends nearer is an uneven surface
_HUB_REACH, _HUB_ARMS = 1.5, 5  # forks so many radii apart are one place where so many neurites leave it


def with_soma(tree: NeuronTree, foreground: Foreground) -> NeuronTree:
    """The tree with a soma as its root, where a blob stands out from the neurites; else the same tree.

    The soma is one node of type 1 at the blob's centre, with the radius of a ball of its volume. Nodes inside it
    go, and so does what ends close to it; each neurite that leaves it starts with a node on its surface.
    """
    row = foreground.nearest(tree.points)
    # Neurites are measured as if round, since blur stretches them. A soma it hardly stretches; that would flatten it.
    thick = np.maximum(tree.radii, np.where(row >= 0, foreground.true_depth[row], 0))
    thickest = int(thick.argmax())
    radius = thick[thickest]
    outside = np.linalg.norm(tree.points - tree.points[thickest], axis=1) > 1.5 * radius
    if not outside.any():
        return tree
    usual = [f * np.percentile(thick[outside], q) for f, q in zip(_FACTORS, (50, 90), strict=True)]
    if radius < max(*usual, _MIN_VOXELS * foreground.step.min()):
        return tree
    radius = min(radius, float(foreground.true_depth.max()))
    core = _core(foreground, tree.points[thickest], radius / 2)
    tree = tree.rerooted(thickest)
    inside = core.query(tree.points, distance_upper_bound=radius / 2)[0] <= radius / 2
    inside &= tree.root_of == thickest
    inside[thickest] = True
    inside |= _ways_in(tree, inside)
    body = foreground.points
    body = body[(np.abs(body - tree.points[thickest]) <= 4 * radius).all(1)]
    body = body[core.query(body, distance_upper_bound=radius / 2)[0] <= radius / 2]
    equivalent = (3 * len(body) * foreground.step.prod() / (4 * math.pi)) ** (1 / 3)
    whole = _collapse(tree, inside, thickest, body.mean(0), equivalent, core, radius / 2)
    return _without_stubs(whole, core, (0.5 + _STUB_REACH) * radius)


def with_hub(tree: NeuronTree) -> NeuronTree:
    """The tree with all neurites that leave its thickest place, a root, led to that; else the same tree.

    Stems that meet in a cell body no thicker than they are leave a clump of forks there, whose order says nothing. They
    become one node in the middle, and the way from there to the surface of that place is straight. Where a soma stands
    out, the tree stays as it is.
    """
    if (tree.types == SOMA).any():
        return tree
    tree = tree.sorted()
    top = int(np.where(tree.parents < 0, tree.radii, -1).argmax())
    found, is_fork, radius = branches(tree), tree.degree >= 3, tree.radii[top]
    thickness = np.maximum(tree.radii[found.starts], tree.radii[found.ends])
    near = is_fork[found.ends] & (found.lengths <= _HUB_REACH * thickness)
    last = follow(np.where(near & (found.parents >= 0), found.parents, np.arange(len(near))))
    hub = near & near[last] & (found.starts[last] == top)
    if not hub.any() or (tree.degree[found.ends[hub]] - 2).sum() + tree.degree[top] < _HUB_ARMS:
        return tree
    inside = np.append(hub, False)[found.of_node]
    inside[top] = True
    weight = tree.radii[inside] ** 4  # the middle of the blob, not of the clump
    centre = weight @ tree.points[inside] / weight.sum()
    close = (np.linalg.norm(tree.points - centre, axis=1) < radius) & (tree.degree == 2) | inside
    rows = np.arange(len(tree))
    swallowed = close & (follow(np.where(close & (tree.parents >= 0), tree.parents, rows)) == top)
    points, parents = tree.points.copy(), tree.parents.copy()
    points[top] = centre
    parents[swallowed[parents] & (parents >= 0)] = top
    return replace(tree, points=points, parents=parents).take(np.flatnonzero(~swallowed | (rows == top)))


def _core(foreground: Foreground, centre: np.ndarray, depth: float) -> cKDTree:
    """The voxels deeper than this that are connected to the one at the centre."""
    deep = foreground.select(foreground.true_depth >= depth)
    component = deep.components()
    points = deep.points
    return cKDTree(points[component == component[np.linalg.norm(points - centre, axis=1).argmin()]])


def _ways_in(tree: NeuronTree, inside: np.ndarray) -> np.ndarray:
    """(N,) bool: nodes by which a branch that hangs on another neurite, outside, comes in beside that neurite."""
    ways = np.zeros(len(tree), bool)
    for row in tree.parents[inside & (tree.parents >= 0) & ~inside[tree.parents]]:
        while not inside[row] and tree.degree[row] == 2:
            ways[row] = True
            row = tree.parents[row]
    return ways


def _without_stubs(tree: NeuronTree, core: cKDTree, reach: float) -> NeuronTree:
    """Without what leaves the soma and ends within `reach` of its core."""
    soma, rows = int(np.flatnonzero(tree.types == SOMA)[0]), np.arange(len(tree))
    near = core.query(tree.points, distance_upper_bound=reach)[0] <= reach
    near[soma] = True
    near = follow(np.where(near & (tree.parents >= 0), tree.parents, rows)) == soma
    keep = ~near
    keep[soma] = True
    row = tree.parents[keep & (tree.parents >= 0)]
    while len(row := np.unique(row[~keep[row]])):  # each round a step nearer to the soma
        keep[row] = True
        row = tree.parents[row]
    return tree.take(np.flatnonzero(keep))


def _collapse(tree, inside, top, centre, radius, core, margin) -> NeuronTree:
    """The nodes inside become one soma; each edge out of it begins on the surface."""
    leaving = np.flatnonzero(~inside & (tree.parents >= 0) & inside[tree.parents])
    points = tree.points.copy()
    starts = points[tree.parents[leaving]]
    low, high = np.zeros(len(leaving)), np.ones(len(leaving))
    for _ in range(12):
        middle = (low + high) / 2
        out = core.query(starts + middle[:, None] * (points[leaving] - starts))[0] > margin
        low, high = np.where(out, low, middle), np.where(out, middle, high)
    surface = starts + low[:, None] * (points[leaving] - starts)
    count = len(tree)
    parents = tree.parents.copy()
    parents[leaving] = count + np.arange(len(leaving))
    types = tree.types.copy()
    types[top], points[top] = SOMA, centre
    radii = tree.radii.copy()
    radii[top] = radius
    whole = replace(
        tree,
        points=np.concatenate([points, surface]),
        radii=np.concatenate([radii, tree.radii[leaving]]),
        parents=np.concatenate([parents, np.full(len(leaving), top)]),
        types=np.concatenate([types, np.zeros(len(leaving), int)]),
        confidence=np.concatenate([tree.confidence, tree.confidence[leaving]]),
    )
    keep = np.append(~inside, np.ones(len(leaving), bool))
    keep[top] = True
    return whole.take(np.flatnonzero(keep))
