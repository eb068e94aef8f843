"""Distances to segments are exact, and ways along the tree are the shortest paths of a graph."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.sparse import coo_array
from scipy.sparse.csgraph import shortest_path

from vit3d.sampling import SampledTree, connected_runs
from vit3d.tree import NeuronTree


def random_tree(size: int = 200, seed: int = 0, roots: int = 1, step: float = 3.0) -> NeuronTree:
    rng = np.random.default_rng(seed)
    parents = np.array([-1, *(rng.integers(max(0, i - 4), i) for i in range(1, size))])
    parents[rng.choice(size, roots - 1, replace=False)] = -1
    points = np.zeros((size, 3))
    for row, parent in enumerate(parents):
        points[row] = (points[parent] if parent >= 0 else 0) + step * rng.normal(size=3)
    return NeuronTree(points, np.ones(size), parents, unit="voxel")


def distances_one_by_one(points: np.ndarray, tree: NeuronTree) -> np.ndarray:
    """The definition, segment by segment."""
    best = np.full(len(points), np.inf)
    for row in range(len(tree)):
        parent = tree.parents[row]
        start, end = tree.points[row], tree.points[parent if parent >= 0 else row]
        length2 = ((end - start) ** 2).sum()
        along = ((points - start) @ (end - start) / length2).clip(0, 1) if length2 else np.zeros(len(points))
        best = np.minimum(best, np.linalg.norm(points - start - along[:, None] * (end - start), axis=1))
    return best


@pytest.mark.parametrize("step", [0.2, 3.0, 40.0])
@pytest.mark.parametrize("spread", [1.0, 30.0, 1000.0])
def test_the_distance_to_a_tree_is_the_exact_minimum_over_its_segments(step, spread):
    tree = random_tree(step=step)
    points = tree.points[::2] + spread * np.random.default_rng(1).normal(size=(100, 3))
    assert_allclose(SampledTree.of(tree).nearest(points)[0], distances_one_by_one(points, tree), atol=1e-8)


def test_the_distance_is_exact_from_the_centre_of_a_circle():
    turn = np.linspace(0, 2 * np.pi, 400)
    ring = np.stack([0 * turn, 100 * np.cos(turn), 100 * np.sin(turn)], axis=1)
    ring[250] *= 0.99  # the only place that is nearer, among hundreds of equals
    tree = NeuronTree(ring, np.ones(400), np.arange(400) - 1, unit="voxel")
    centre = np.zeros((1, 3))
    assert_allclose(SampledTree.of(tree).nearest(centre)[0], distances_one_by_one(centre, tree), atol=1e-9)


def test_samples_and_their_weights_are_those_of_every_edge():
    tree = random_tree(step=1.0, roots=3)
    sampled = SampledTree.of(tree)
    one_by_one = tree.sampled(1.0)
    assert_allclose(
        np.sort(np.repeat(sampled.points, sampled.weights, axis=0), axis=0),
        np.sort(one_by_one, axis=0),
        atol=1e-9,
    )


def test_pieces_make_up_the_cable_in_voxels_and_um():
    tree = random_tree()
    sampled = SampledTree.of(tree, (1.0, 0.5, 0.25))
    assert_allclose(sampled.lengths_vox.sum(), tree.cable_length)
    assert_allclose(sampled.lengths_um.sum(), tree.to("um", (1.0, 0.5, 0.25)).cable_length)
    assert (sampled.tree.parents < np.arange(len(sampled.points))).all()
    assert sampled.tree.edge_lengths.max() <= 1.5


def test_ways_are_the_shortest_paths_of_the_graph():
    sampled = SampledTree.of(random_tree(60, roots=3))
    tree = sampled.tree
    edges = (tree.edges, tree.parents[tree.edges])
    graph = coo_array((tree.edge_lengths, edges), shape=2 * (len(tree),))
    expected = shortest_path(graph, directed=False)
    one, other = np.indices(expected.shape).reshape(2, -1)
    assert_allclose(sampled.way(one, other), expected.ravel(), atol=1e-9)
    assert np.isinf(expected).any()


def test_marked_runs_are_connected_components():
    parents = np.array([-1, 0, 1, 2, 3, 2, -1])
    marked = np.array([True, False, True, True, False, True, True])
    assert_array_equal(connected_runs(parents, marked), [0, -1, 1, 1, -1, 1, 2])


def test_a_tree_longer_than_memory_is_refused():
    tree = NeuronTree([[0, 0, 0], [0, 0, 1e9]], [1, 1], [-1, 0], unit="voxel")
    with pytest.raises(ValueError, match="1e\\+09 voxels long; check its unit"):
        SampledTree.of(tree)


def test_a_tree_without_nodes_is_infinitely_far():
    assert_array_equal(SampledTree.of(NeuronTree.empty("voxel")).nearest(np.zeros((2, 3)))[0], [np.inf, np.inf])
