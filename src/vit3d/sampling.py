"""NOUN SampledTree: a tree cut into pieces of about one voxel; exact distances and ways along the cable."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.spatial import cKDTree

from vit3d.morphometry import branches, path_lengths, path_sums
from vit3d.tree import NeuronTree, Spacing, follow

MAX_SAMPLES = 200_000_000


@dataclass(frozen=True, eq=False)
class SampledTree:
    """A sorted tree in voxels whose nodes are Vaa3D's samples of another tree's edges.

    tree: NeuronTree of M nodes; its edges are the pieces. weights: (M,) how many edge samples lie on a node.
    lengths_vox, lengths_um: (M,) cable (no soma) of the piece between a node and its parent; um may be None.
    """

    tree: NeuronTree
    weights: np.ndarray
    lengths_vox: np.ndarray
    lengths_um: np.ndarray | None

    @classmethod
    def of(cls, tree: NeuronTree, spacing_um: Spacing | None = None) -> "SampledTree":
        """Cut every edge of length L into evenly spaced N = int(1 + L + 0.5) points, both ends included.

        With N = 1 (L < 0.5) that point is the child. A lone node is one sample. ValueError: absurdly long.
        """
        tree = tree.sorted()
        size, edges, parents = len(tree), tree.edges, tree.parents
        length = tree.edge_lengths.sum()
        if length > MAX_SAMPLES:
            raise ValueError(f"a tree is {length:.3g} voxels long; check its unit and spacing.")
        samples = np.ones(size, int)
        samples[edges] = (1 + tree.edge_lengths.round(9) + 0.5).astype(int)  # rounded: alike in um and in voxels
        pieces = np.maximum(samples - 1, 1)
        # Each node comes right after the samples between its parent and it.
        node, row_of = np.repeat(np.arange(size), pieces), np.cumsum(pieces) - 1
        nth = np.arange(len(node)) - (row_of - pieces)[node]
        parent = np.where(parents < 0, np.arange(size), parents)[node]
        fraction = (nth / pieces[node])[:, None]
        points = tree.points[parent] + fraction * (tree.points[node] - tree.points[parent])
        points[row_of] = tree.points
        above = np.where(nth == 1, row_of[parent], np.arange(len(node)) - 1)
        above[row_of[parents < 0]] = -1
        weights = np.ones(len(node), int)
        weights[row_of] = np.bincount(parents[edges][samples[edges] > 1], minlength=size)
        weights[row_of] += (parents >= 0) | (tree.degree == 0)
        fine = NeuronTree(points, np.zeros(len(node)), above, tree.types[node], "voxel", spacing_um)
        in_um = None if spacing_um is None else _per_piece(tree.to("um", spacing_um), pieces, node)
        return cls(fine, weights, _per_piece(tree, pieces, node), in_um)

    @property
    def points(self) -> np.ndarray:
        """(M, 3) sample points in voxels, each place of a node once."""
        return self.tree.points

    @cached_property
    def _piece_ends(self) -> tuple[np.ndarray, np.ndarray]:
        parents = self.tree.parents
        return self.points, self.points[np.where(parents < 0, np.arange(len(parents)), parents)]

    @cached_property
    def _middles(self) -> cKDTree:
        start, end = self._piece_ends
        return cKDTree((start + end) / 2, balanced_tree=False, compact_nodes=False)

    def nearest(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distance of each point to the nearest place on the tree's segments, and the row of its piece.

        Exact: the pieces with the k nearest middles are measured, and k grows until no other piece can be
        nearer, because no piece is nearer than its middle by more than half its length.
        """
        start, end = self._piece_ends
        half = self.tree.edge_lengths.max(initial=0) / 2
        distance, nearest = np.full(len(points), np.inf), np.full(len(points), -1)
        left, k = np.arange(len(points) if len(start) else 0), 6
        while len(left):
            k = min(k, len(start))
            unsure = []
            for chunk in np.array_split(left, 1 + k * len(left) // 2**20):
                away, rows = self._middles.query(points[chunk], k=np.arange(1, k + 1), workers=-1)
                exact = _to_segments(points[chunk, None], start[rows], end[rows])
                best = exact.argmin(axis=1)[:, None]
                distance[chunk] = np.take_along_axis(exact, best, axis=1)[:, 0]
                nearest[chunk] = np.take_along_axis(rows, best, axis=1)[:, 0]
                unsure.append(chunk[(away[:, -1] - half < distance[chunk]) & (k < len(start))])
            left, k = np.concatenate(unsure), 4 * k
        # Rounded, so that a shift by exactly the threshold is far whatever unit the tree came from.
        return distance.round(9), nearest

    @cached_property
    def _lift(self) -> tuple:
        """Branches, their depth, the branch 1, 2, 4, ... above each, and each node's distance and root."""
        found = branches(self.tree)
        number = np.arange(len(found.ends))
        above = np.where(found.parents < 0, number, found.parents)
        levels = [above]
        while not np.array_equal(levels[-1], levels[-1][levels[-1]]):
            levels.append(levels[-1][levels[-1]])
        as_tree = NeuronTree(np.zeros((len(number), 3)), np.zeros(len(number)), found.parents)
        depth = path_sums(as_tree, np.ones(len(number), int))
        return found, depth, levels, path_lengths(self.tree), self.tree.root_of

    def way(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Length of cable, in voxels, between rows a and rows b; inf in different trees (binary lifting)."""
        found, _, _, distance, root_of = self._lift
        meeting = np.minimum(distance[a], distance[b])  # right where one lies above the other
        apart = np.flatnonzero(found.of_node[a] != found.of_node[b])
        one, other = found.of_node[a[apart]], found.of_node[b[apart]]
        in_branches = (one >= 0) & (other >= 0)  # a root is in none, and above all
        apart, one, other = apart[in_branches], one[in_branches], other[in_branches]
        meeting[apart] = self._meeting(one, other, meeting[apart])
        return np.where(root_of[a] == root_of[b], distance[a] + distance[b] - 2 * meeting, np.inf)

    def _meeting(self, one: np.ndarray, other: np.ndarray, nearer_root: np.ndarray) -> np.ndarray:
        """Distance from the root to where the ways up from two branches meet, `nearer_root` on a branch."""
        found, depth, levels, distance, _ = self._lift
        gap = depth[one] - depth[other]
        for bit, above in enumerate(levels):
            one = np.where(np.maximum(gap, 0) >> bit & 1, above[one], one)
            other = np.where(np.maximum(-gap, 0) >> bit & 1, above[other], other)
        for above in levels[::-1]:
            apart = above[one] != above[other]
            one, other = np.where(apart, above[one], one), np.where(apart, above[other], other)
        return np.where(one == other, nearer_root, distance[found.starts[one]])

    def near(self, points: np.ndarray, radius: float) -> list[np.ndarray]:
        """For each point the rows of the pieces whose middle is at most `radius` voxels away."""
        return [np.array(rows, int) for rows in self._middles.query_ball_point(points, radius)]


def connected_runs(parents: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """(M,) the number, from 0, of the connected run of marked nodes that a node is in; -1 where unmarked."""
    joined = marked & (parents >= 0) & marked[parents]
    top = follow(np.where(joined, parents, np.arange(len(parents))))
    run_of = np.full(len(marked), -1)
    run_of[marked] = np.unique(top[marked], return_inverse=True)[1]
    return run_of


def _per_piece(tree: NeuronTree, pieces: np.ndarray, node: np.ndarray) -> np.ndarray:
    lengths = np.zeros(len(tree))
    lengths[tree.edges] = tree.cable_lengths
    return (lengths / pieces)[node]


def _to_segments(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distances (...) from points (..., 3) to the segments start-end (..., 3)."""
    along, to_point = end - start, points - start
    square = np.einsum("...i,...i->...", along, along)
    fraction = np.einsum("...i,...i->...", along, to_point) / np.where(square > 0, square, 1)
    along *= fraction.clip(0, 1)[..., None]
    to_point -= along
    return np.sqrt(np.einsum("...i,...i->...", to_point, to_point))
