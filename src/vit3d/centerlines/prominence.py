"""Which neurites are the neuron's, where others lie behind it or touch it: those with light of their own."""

import math

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from vit3d.tree import NeuronTree, follow
from vit3d.volume import Volume

_SAMPLED = 400  # nodes of a tree whose light is looked up
_POWER = 3  # blurred cells may have fifteen times the cable of the neuron in front of them
_FAR_MORE = 4.5  # a part so many times as prominent as its whole tree is the neuron; of one neuron none is twice
_EXTENT_POWER = 2  # what of its dimmer branches it then keeps
_LEVELS = 20  # of brightness at which a tree is cut, at most


def light_of_its_own(tree: NeuronTree, volume: Volume, statistics) -> np.ndarray:
    """(N,) how much brighter a tree is than what lies around it; 1 as a bright neurite on an empty ground, 0 or more.

    What lies out of focus blurs away around it and has little light of its own, however bright it is; so has what is
    dim. 3 x 3 x 3 voxels above the median of a circle in the plane, four voxels outside the surface, as a share of
    the contrast that `statistics`, the stack's grey levels, know of. NaN at nodes that were left out, where there are
    many, and where the stack is narrower than the circle.
    """
    step, last = np.array(volume.spacing_um or (1.0, 1.0, 1.0)), np.array(volume.shape) - 1
    light = np.full(len(tree), np.nan)
    for row in range(0, len(tree), max(1, -(-len(tree) // _SAMPLED))):
        z, y, x = np.clip(np.rint(tree.points[row] / step), 0, last).astype(int).tolist()
        reach = math.ceil(tree.radii[row] / step[2]) + 4
        low = [max(z - 1, 0), max(y - reach, 0), max(x - reach, 0)]
        box = tuple(map(slice, low, (z + 2, y + reach + 1, x + reach + 1)))
        voxels = np.asarray(volume.voxels[box]).astype(np.float64)
        z, y, x = z - low[0], y - low[1], x - low[2]
        down, right = np.ogrid[: voxels.shape[1], : voxels.shape[2]]
        around = np.abs(np.hypot(down - y, right - x) - reach) < 0.7
        if around.any():
            here = voxels[:, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].mean()
            above = (here - np.median(voxels[z][around])) * statistics.sign / statistics.contrast
            light[row] = max(above, 0.0)
    return light


def prominence(cable, light, power: float = _POWER):
    """What tells the neuron from others: its cable times the cube of its light; where that is 0, its cable tells."""
    return cable * np.maximum(light, 1e-2) ** power


def mean_light(light: np.ndarray) -> float:
    """Of a tree; 1 where nobody can tell."""
    known = light[np.isfinite(light)]
    return float(known.mean()) if len(known) else 1.0


def most_prominent_part(tree: NeuronTree, light: np.ndarray) -> np.ndarray:
    """(N,) bool: the connected part of a tree that is the neuron, where most of it is neurites of other cells; all of
    it where no part is far more prominent than the whole.

    A branch is as bright as its nodes on average. Parts are what is left when all branches below some brightness go.
    """
    everything = np.ones(len(tree), dtype=bool)
    has_parent = tree.parents >= 0
    above = np.where(has_parent, tree.parents, np.arange(len(tree)))
    goes_on = has_parent & (tree.num_children[above] == 1)
    branch = follow(np.where(goes_on, above, np.arange(len(tree))))  # its first node
    known = np.isfinite(light)
    samples = np.bincount(branch[known], minlength=len(tree))
    if not known.any():
        return everything
    level = np.bincount(branch[known], light[known], len(tree)) / np.maximum(samples, 1)
    level = level[follow(np.where(samples[branch] > 0, branch, branch[above]))]  # without a sample: as what it leaves
    cable = np.bincount(branch[tree.edges], tree.edge_lengths, len(tree))
    whole = prominence(cable.sum(), (cable * level).sum() / max(cable.sum(), 1e-12))
    heads = np.unique(branch)
    best, part = np.zeros(2), everything
    for cut in np.unique(np.quantile(level[heads], np.linspace(0, 1, _LEVELS, endpoint=False))):
        kept = heads[level[heads] >= cut]
        label = _components(tree, branch, kept)[kept]
        length, bright = np.bincount(label, cable[kept]), np.bincount(label, (cable * level)[kept])
        mean = bright / np.maximum(length, 1e-12)
        for place, power in enumerate((_POWER, _EXTENT_POWER)):
            scores = prominence(length, mean, power)
            if scores.max() > best[place]:
                best[place] = scores.max()
                if power == _EXTENT_POWER:
                    part = np.isin(branch, kept[label == scores.argmax()])
    if best[0] < _FAR_MORE * whole:
        return everything
    forks = np.bincount(tree.parents[has_parent & part], minlength=len(tree)) >= 2
    return part | forks  # two of its branches may meet at the end of one that is none of its own


def _components(tree: NeuronTree, branch: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(N,) a number per connected part, at the first nodes of the branches in `kept`; branches meet at forks."""
    below = kept[tree.parents[kept] >= 0]
    forks = tree.parents[below]
    parents = np.isin(branch[forks], kept)
    pairs = np.concatenate([[below, forks], [branch[forks][parents], forks[parents]]], axis=1)
    graph = coo_matrix((np.ones(pairs.shape[1]), pairs), shape=(len(tree), len(tree)))
    return connected_components(graph, directed=False)[1]
