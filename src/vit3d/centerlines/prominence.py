"""Which neurites are the neuron's, where others lie behind it or touch it: those with light of their own."""

import math

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from vit3d.tree import NeuronTree, follow
from vit3d.volume import Volume

_SAMPLED = 2000  # nodes of a tree whose light is looked up
_SOMA = 3.0  # times the median radius: a soma outshines every neurite, and tells nothing
_WIDER = 1.7  # radii at least from a node to the circle around it
_POWER = 3  # blurred cells may have fifteen times the cable of the neuron in front of them
_FAR_MORE = 3.5  # a part so many times as prominent as its whole tree is the neuron; of one neuron none is
_EXTENT_POWER = 2.2  # what of its dimmer branches it then keeps
_LEVELS = 25  # of brightness at which a tree is cut
_FEWEST = 0.01  # of a tree's cable: the brightest so many are as bright as the dimmest of them, or a spot would count


def light_of_its_own(tree: NeuronTree, volume: Volume, statistics) -> np.ndarray:
    """(N,) how much brighter a tree is than what lies around it; 1 as a bright neurite on an empty ground, 0 or more.

    What lies out of focus blurs away around it and has little light of its own, however bright it is; so has what is
    dim. 3 x 3 x 3 voxels above the median of a circle in the plane, four voxels outside the surface and more around
    what is thick, or most of the circle would lie on the neurite itself; as a share of the contrast that `statistics`,
    the stack's grey levels, know of. NaN at nodes that were left out, where there are many, in what is as thick as a
    soma, and where the stack is narrower than the circle.
    """
    step, last = np.array(volume.spacing_um or (1.0, 1.0, 1.0)), np.array(volume.shape) - 1
    light = np.full(len(tree), np.nan)
    thin = np.flatnonzero(tree.radii <= _SOMA * np.median(tree.radii)) if len(tree) else []
    for row in thin[:: 1 + len(thin) // _SAMPLED]:
        z, y, x = np.clip(np.rint(tree.points[row] / step), 0, last).astype(int).tolist()
        radius = tree.radii[row] / step[2]
        reach = math.ceil(max(radius + 4, _WIDER * radius))
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


def most_prominent_part(tree: NeuronTree, light: np.ndarray) -> tuple[np.ndarray, float]:
    """(N,) bool: the connected part of a tree that is the neuron, where most of it is neurites of other cells; all of
    it where no part is far more prominent than the whole. And how prominent that is.

    Prominent is what has much cable and light: cable times the cube of the light, per branch the mean of its nodes.
    """
    everything, known = np.ones(len(tree), dtype=bool), np.isfinite(light)
    cable = tree.edge_lengths.sum()
    if not known.any() or not cable:
        return everything, float(cable)
    branches = _Branches(tree, np.where(known, light, 0), known)
    whole = _prominence(cable, branches.mean_level(branches.heads), _POWER)
    core, score = branches.best_part(_POWER)
    if score < _FAR_MORE * whole:
        return everything, whole
    extent, _ = branches.best_part(_EXTENT_POWER, around=core[0])
    part = np.isin(branches.of_node, extent)
    forks = np.bincount(tree.parents[(tree.parents >= 0) & part], minlength=len(tree)) >= 2
    return part | forks, score  # two of its branches may meet at the end of one that is none of its own


def _prominence(cable, light, power: float):
    return cable * np.maximum(light, 1e-2) ** power  # where there is no light, cable tells


class _Branches:
    """The branches of a tree, each called by its first node, and how bright they are."""

    def __init__(self, tree: NeuronTree, light: np.ndarray, known: np.ndarray):
        rows, count = np.arange(len(tree)), len(tree)
        self.parents = tree.parents
        above = np.where(tree.parents >= 0, tree.parents, rows)
        goes_on = (tree.parents >= 0) & (tree.num_children[above] == 1)
        self.of_node = follow(np.where(goes_on, above, rows))
        self.heads = np.unique(self.of_node)
        self.cable = np.bincount(self.of_node[tree.edges], tree.edge_lengths, count)
        samples = np.bincount(self.of_node[known], minlength=count)
        level = np.bincount(self.of_node[known], light[known], count) / np.maximum(samples, 1)
        # one without a sample is as bright as the one that it leaves
        told = follow(np.where(samples[self.of_node] > 0, self.of_node, self.of_node[above]))
        level = np.where(samples[told] > 0, level[told], light[known].mean())
        by_level = self.heads[np.argsort(-level[self.heads])]
        share = np.cumsum(self.cable[by_level]) / self.cable.sum()  # of the cable, that is as bright or brighter
        top = level[by_level[np.searchsorted(share, _FEWEST)]]
        self.level = np.minimum(level, top)
        self.cuts = np.linspace(0, top, _LEVELS)

    def mean_level(self, heads: np.ndarray) -> float:
        return float(np.average(self.level[heads], weights=self.cable[heads]))

    def best_part(self, power: float, around: int | None = None) -> tuple[np.ndarray, float]:
        """(The branches of the most prominent connected part; its prominence): of all that is left where the branches
        below some brightness go, and, with `around`, that holds this branch."""
        best, most = self.heads, 0.0
        for cut in self.cuts:
            kept = self.heads[self.level[self.heads] >= cut]
            if around is not None and around not in kept:
                break
            label = self._components(kept)[kept]
            length = np.bincount(label, self.cable[kept])
            bright = np.bincount(label, (self.cable * self.level)[kept]) / np.maximum(length, 1e-12)
            scores = _prominence(length, bright, power)
            if around is not None:
                scores[np.arange(len(scores)) != label[kept == around]] = 0.0
            if scores.max() > most:
                best, most = kept[label == scores.argmax()], float(scores.max())
        return best, most

    def _components(self, kept: np.ndarray) -> np.ndarray:
        """(N,) a number per connected part, at the branches in `kept`; branches meet at forks."""
        below = kept[self.parents[kept] >= 0]
        forks = self.parents[below]
        parents = np.isin(self.of_node[forks], kept)
        pairs = np.concatenate([[below, forks], [self.of_node[forks][parents], forks[parents]]], axis=1)
        graph = coo_matrix((np.ones(pairs.shape[1]), pairs), shape=(len(self.parents), len(self.parents)))
        return connected_components(graph, directed=False)[1]
