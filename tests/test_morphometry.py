"""Measures of trees small enough to do by hand."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from vit3d.morphometry import (
    branch_orders,
    branches,
    measure,
    path_lengths,
    path_sums,
    resample,
    sholl,
    strahler_number,
    volume,
)
from vit3d.tree import NeuronTree


def comb() -> NeuronTree:
    """A shaft along x to 10 in steps of 1, teeth of length 3 along y at x = 2, 5 and 8."""
    shaft = [[0, 0, x] for x in range(11)]
    teeth = [[0, y, x] for x in (2, 5, 8) for y in (1, 2, 3)]
    parents = [*range(-1, 10), 2, 11, 12, 5, 14, 15, 8, 17, 18]
    return NeuronTree(np.array(shaft + teeth), np.ones(20), parents, np.full(20, 2), confidence=np.ones(20))


def binary(depth: int) -> NeuronTree:
    parents = np.array([-1, 0, *((i - 2) // 2 + 1 for i in range(2, 2**depth))])
    points = np.random.default_rng(0).normal(size=(len(parents), 3))
    return NeuronTree(points, np.ones(len(parents)), parents)


def random_tree(size: int = 300) -> NeuronTree:
    rng = np.random.default_rng(0)
    parents = np.array([-1, *(rng.integers(max(0, i - 2), i) for i in range(1, size))])
    return NeuronTree(rng.normal(size=(size, 3)), rng.random(size), parents)


def test_the_branches_of_a_comb():
    found = branches(comb())
    assert_array_equal(found.starts, [0, 2, 5, 8, 2, 5, 8])
    assert_array_equal(found.ends, [2, 5, 8, 10, 13, 16, 19])
    assert_array_equal(found.parents, [-1, 0, 1, 2, 0, 1, 2])
    assert_allclose(found.lengths, [2, 3, 3, 2, 3, 3, 3])
    assert_array_equal(found.of_node[[0, 1, 2, 3, 9, 11]], [-1, 0, 0, 1, 3, 4])


def test_branches_make_up_the_whole_cable():
    tree = random_tree()
    assert_allclose(branches(tree).lengths.sum(), tree.cable_length)


def test_sums_along_the_tree_agree_with_a_walk_to_the_root():
    tree = random_tree().take(np.random.default_rng(1).permutation(300))
    values = np.random.default_rng(2).random(300)
    for node, total in enumerate(path_sums(tree, values)):
        expected, row = 0.0, node
        while row >= 0:
            expected, row = expected + values[row], tree.parents[row]
        assert_allclose(total, expected)
    assert path_lengths(comb())[19] == 11


def test_a_comb_has_order_three_and_strahler_two():
    assert branch_orders(comb()).max() == 3
    assert strahler_number(comb()) == 2


def test_a_step_that_makes_more_nodes_than_fit_is_refused():
    with pytest.raises(ValueError, match="more than 100000000 nodes"):
        resample(comb(), 1e-9)


def test_a_soma_inside_a_neurite_ends_branches_and_raises_no_order():
    points = [[0, 0, x] for x in (0, 3, 7, 10, 13)]
    tree = NeuronTree(points, np.ones(5), [-1, 0, 1, 2, 3], [2, 2, 1, 2, 2])
    assert_array_equal(branches(tree).ends, [2, 4])
    assert_array_equal(branch_orders(tree), [0, 0])
    again = resample(tree, 2.0)
    assert_array_equal(again.points[again.types == 1], [[0, 0, 7]])
    forked = NeuronTree([*points, [0, 5, 7]], np.ones(6), [-1, 0, 1, 2, 3, 2], [2, 2, 1, 2, 2, 2])
    assert_array_equal(branch_orders(forked), [0, 0, 0])


@pytest.mark.parametrize("step", [0.3, 1.0, 50.0])
def test_resampling_makes_no_cable_inside_a_soma(step):
    point = NeuronTree([[0, 0, 0], [0, 0, 6], [0, 0, 15], [0, 12, 0]], [5, 1, 1, 1], [-1, 0, 1, 0], [1, 3, 3, 3])
    ring = [[0, 5 * np.sin(a), 5 * np.cos(a)] for a in np.linspace(0, 2 * np.pi, 8, endpoint=False)]
    contour = NeuronTree(
        [*ring, [0, 0, 10], [0, 0, 20], [0, 0, -20]],
        [0.5] * 8 + [1] * 3,
        [-1, *range(7), 0, 8, 4],
        [1] * 8 + [3] * 3,
    )
    for tree in (point, contour):
        again = resample(tree, step)
        assert_array_equal(again.points[again.types == 1], tree.points[tree.types == 1])
        before, after = measure(tree), measure(again)
        length = after.pop("length_um")
        assert length == pytest.approx(before.pop("length_um"))
        assert before.pop("volume_um3") - 1e-9 <= after.pop("volume_um3") <= np.pi * length + 1e-9
        assert {**after, "nodes": 0} == pytest.approx({**before, "nodes": 0})


def test_resampling_begins_at_the_surface_of_a_soma_where_the_next_node_is_far():
    for order in ([0, 1, 2], [2, 1, 0]):  # away from the soma, and towards it
        points, radii, types = np.array([[0, 0, 0], [0, 0, 100], [0, 0, 110]]), np.array([5, 1, 1]), np.array([1, 3, 3])
        again = resample(NeuronTree(points[order], radii[order], [-1, 0, 1], types[order]), 1.0)
        assert_allclose(np.sort(again.points[:, 2]), [0, *range(5, 111)])
        assert (again.types == 1).sum() == 1


def test_a_soma_whose_last_node_is_an_inner_one_is_measured():
    tree = NeuronTree([[0, 0, 0], [0, 0, 10], [0, 5, 0]], [5, 1, 5], [-1, 0, 0], [1, 3, 1])
    assert measure(tree)["trees"] == 1
    assert len(sholl(tree, 1.0)[0]) > 0


def test_a_full_binary_tree_has_strahler_equal_to_its_depth():
    assert [strahler_number(binary(depth)) for depth in (1, 2, 3, 4)] == [1, 2, 3, 4]


def test_sholl_counts_what_crosses_each_sphere():
    radii, counts = sholl(comb(), 2.5)
    assert_array_equal(radii, [2.5, 5, 7.5, 10])
    assert_array_equal(counts, [2, 1, 1, 1])  # the shaft each time, and the first tooth between y = 1 and 2
    line = NeuronTree([[0, 0, 0], [0, 0, 10]], [1, 1], [-1, 0])
    assert_array_equal(sholl(line, 3)[1], [1, 1, 1])
    with pytest.raises(ValueError, match="positive"):
        sholl(line, 0)
    with pytest.raises(ValueError, match="a Sholl step of 1e-12 makes more than 100000 spheres"):
        sholl(line, 1e-12)


def test_the_volume_of_a_cylinder_and_of_a_cone():
    assert_allclose(volume(NeuronTree([[0, 0, 0], [0, 0, 6]], [2, 2], [-1, 0])), np.pi * 4 * 6)
    assert_allclose(volume(NeuronTree([[0, 0, 0], [0, 0, 6]], [2, 0], [-1, 0])), np.pi * 4 * 6 / 3)
    assert_allclose(volume(NeuronTree([[0, 0, 0], [0, 0, 6]], [5, 2], [-1, 0], [1, 2])), np.pi * 4 * 1)
    assert_allclose(volume(NeuronTree([[0, 0, 6], [0, 0, 0]], [2, 5], [-1, 0], [2, 1])), np.pi * 4 * 1)
    assert volume(NeuronTree([[0, 0, 0], [0, 0, 6]], [2, 2], [-1, 0], [1, 1])) == 0


def test_measure_names_the_unit_and_takes_any_tree():
    row = measure(comb())
    assert (row["nodes"], row["tips"], row["branch_points"], row["length_um"]) == (20, 4, 3, 19)
    assert measure(NeuronTree.empty("voxel"))["length_vox"] == 0
    assert measure(NeuronTree([[0, 0, 0]], [1], [-1], unit=None))["length_unknown_unit"] == 0


@pytest.mark.parametrize("step", [0.3, 1.0, 1.7, 100.0])
def test_resampling_keeps_roots_branch_points_and_tips_in_place(step):
    tree, again = comb(), resample(comb(), step)
    for kind in (lambda t: t.points[t.degree >= 3], lambda t: t.points[t.degree == 1]):
        assert_allclose(np.sort(kind(again), axis=0), np.sort(kind(tree), axis=0))
    assert_allclose(again.cable_length, tree.cable_length)
    assert (again.num_tips, again.num_branch_points, again.num_roots) == (4, 3, 1)
    assert (again.edge_lengths <= max(1.5 * step, 3)).all()
    assert (again.confidence == 1).all()
    assert (again.types == 2).all()


def test_resampling_puts_nodes_on_the_cable_at_the_step():
    bent = NeuronTree([[0, 0, 0], [0, 0, 3], [0, 5, 3]], [1, 2, 4], [-1, 0, 1])
    again = resample(bent, 2.0)
    assert_allclose(again.points, [[0, 0, 0], [0, 0, 2], [0, 1, 3], [0, 3, 3], [0, 5, 3]])
    assert_allclose(again.radii, [1, 5 / 3, 2.4, 3.2, 4])


def test_resampling_twice_changes_nothing_more_and_forests_stay_forests():
    tree = NeuronTree(
        np.vstack([comb().points, comb().points + 50]),
        np.ones(40),
        [*comb().parents, -1, *(comb().parents[1:] + 20)],
    )
    once = resample(tree, 1.0)
    assert once.num_roots == 2
    assert_allclose(resample(once, 1.0).points, once.points, atol=1e-9)
    with pytest.raises(ValueError, match="positive"):
        resample(tree, -1)


def test_a_lone_node_and_an_empty_tree_resample_to_themselves():
    lone = NeuronTree([[1, 2, 3]], [1], [-1])
    assert_array_equal(resample(lone, 1.0).points, lone.points)
    assert len(resample(NeuronTree.empty(), 1.0)) == 0


def test_a_soma_drawn_as_a_contour_counts_as_one_and_no_measure_holds_it():
    """An outline of four nodes, and one neurite of 14 that leaves its last one; then a second one from its second."""
    outline = [(0, 0, 0), (0, 4, 0), (0, 4, 4), (0, 0, 4)]
    neurite = [(0, 0, 4 + x) for x in (2, 9, 16)]
    tree = NeuronTree([*outline, *neurite], [1, 1, 1, 1, 0.5, 0.5, 0.5], range(-1, 6), [1, 1, 1, 1, 3, 3, 3])
    found = measure(tree)
    expected = {"nodes": 7, "tips": 1, "branch_points": 0, "max_branch_order": 0, "strahler": 1}
    assert {key: found[key] for key in expected} == expected
    assert found["length_um"] == found["max_path_um"] == 15
    assert found["mean_radius_um"] == 0.5
    two = NeuronTree([*tree.points, (0, 6, 0)], [*tree.radii, 0.5], [*tree.parents, 1], [*tree.types, 3])
    assert measure(two)["strahler"] == 1
    assert measure(two)["max_branch_order"] == 0


def test_sholl_spheres_lie_around_the_middle_of_a_contour_and_its_outline_is_no_crossing():
    outline = [(0, 10 * np.sin(a), 10 * np.cos(a)) for a in 2 * np.pi * np.arange(10) / 10]
    points, types = [*outline, (0, 0, 20), (0, 0, 60)], [*[1] * 10, 3, 3]
    radii, crossings = sholl(NeuronTree(points, np.ones(12), [-1, *range(9), 0, 10], types), 5.0)
    assert radii[-1] == 60
    assert (crossings == 1).all()
