"""Tracing: drawn neurites come back with their length, place, radius and branches, however the volume lies."""

import re
import warnings

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import cKDTree

from vit3d.centerlines import threshold as threshold_module
from vit3d.centerlines.foreground import find_foreground
from vit3d.centerlines.junctions import _depth_at
from vit3d.centerlines.prominence import light_of_its_own, most_prominent_part
from vit3d.centerlines.threshold import find_threshold, intensity_threshold, seems_labels, smoothed
from vit3d.formats.lazy_voxels import LazyVoxels
from vit3d.model.intensity_vit3d import IntensityStatistics
from vit3d.morphometry import measure
from vit3d.reconstruction import masked, trace_part
from vit3d.simulate import random_neuron, simulate_neuron
from vit3d.targets import paint
from vit3d.tracing import trace, trace_with_review
from vit3d.tree import SOMA, NeuronTree
from vit3d.volume import Volume

SPACINGS = [None, (1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (1.0, 3.0, 1.0), (1.0, 0.33, 0.33)]


def polyline(points, radius, spacing_um=None) -> NeuronTree:
    """A neurite through the points (N, 3), in um when a spacing is given."""
    points = np.asarray(points, float)
    parents = np.arange(len(points)) - 1
    unit = "um" if spacing_um else "voxel"
    return NeuronTree(points, np.full(len(points), float(radius)), parents, unit=unit, spacing_um=spacing_um)


def together(*trees: NeuronTree) -> NeuronTree:
    """Several trees as one forest."""
    starts = np.cumsum([0] + [len(tree) for tree in trees[:-1]])
    parents = [np.where(t.parents < 0, -1, t.parents + s) for t, s in zip(trees, starts, strict=True)]
    return NeuronTree(
        np.concatenate([t.points for t in trees]),
        np.concatenate([t.radii for t in trees]),
        np.concatenate(parents),
        unit=trees[0].unit,
        spacing_um=trees[0].spacing_um,
    )


def helix(spacing_um=None) -> NeuronTree:
    """A slow turn through all directions, 100 to 110 units long, inside 24 x 48 x 72 units."""
    t = np.linspace(0, 1, 200)
    points = np.stack([8 + 8 * t, 24 + 14 * np.cos(5 * t), 8 + 56 * t + 3 * np.sin(5 * t)], axis=1)
    return polyline(points, 3.0, spacing_um)


def y_tree() -> NeuronTree:
    """A stem of 40 voxels that forks at (16, 32, 48) into two arms of 34."""
    stem = polyline(np.linspace((16, 32, 8), (16, 32, 48), 41), 2.0)
    up = polyline(np.linspace((16, 32, 48), (16, 8, 72), 35), 2.0)
    down = polyline(np.linspace((16, 32, 48), (16, 56, 72), 35), 2.0)
    return together(stem, up, down)


class Counted(LazyVoxels):
    """Voxels as if on disk, in chunks of 8 planes, that refuse to be read as a whole."""

    def __init__(self, voxels):
        super().__init__(voxels.shape, voxels.dtype, (8, 64, 80))
        self.voxels, self.largest = voxels, 0

    def _fetch(self, box):
        self.largest = max(self.largest, self.voxels[box].size)
        return self.voxels[box]

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("read as a whole")


def farthest(a: NeuronTree, b: NeuronTree) -> float:
    """Hausdorff distance of two trees, sampled every half unit."""
    p, q = a.sampled(0.5), b.sampled(0.5)
    return max(cKDTree(p).query(q)[0].max(), cKDTree(q).query(p)[0].max())


@pytest.mark.parametrize("spacing_um", SPACINGS)
def test_a_tube_of_known_length_is_traced_within_2_percent(spacing_um):
    gold = helix(spacing_um)
    shape = tuple(np.ceil(np.array((24, 48, 72)) / (spacing_um or (1, 1, 1))).astype(int))
    tree = trace(Volume(paint(gold, shape), spacing_um))
    assert tree.unit == ("um" if spacing_um else "voxel")
    assert tree.num_tips + (tree.degree[0] == 1) == 2
    assert tree.cable_length == pytest.approx(gold.cable_length, rel=0.02)
    assert farthest(tree, gold) < 1.5 * max(spacing_um or (1,))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_coarse_axis_leaves_length_and_place_alone_whichever_it_is(axis):
    gold = helix((1.0, 1.0, 1.0))
    spacing_um = tuple(np.roll((3.0, 1.0, 1.0), axis))
    gold = NeuronTree(np.roll(gold.points, axis, 1), gold.radii, gold.parents, unit="um", spacing_um=spacing_um)
    shape = tuple(np.ceil(np.roll((24, 48, 72), axis) / spacing_um).astype(int))
    tree = trace(Volume(paint(gold, shape), spacing_um))
    assert tree.cable_length == pytest.approx(gold.cable_length, rel=0.02)
    assert farthest(tree, gold) < 1.5


def test_no_edge_jumps_on_a_ragged_neurite(shared):
    from scipy.ndimage import gaussian_filter
    from tifffile import imread

    voxels = gaussian_filter(imread(shared / "data/op/OP_6.tif").astype(np.float32), (0.7, 1, 1))
    tree = trace(Volume(voxels, (1.0, 0.33, 0.33)), threshold=22.9, max_gap_um=0).to("voxel")
    assert tree.edge_lengths.max() < 20


@pytest.mark.parametrize("cut", [20, 40, 60])
def test_a_flat_end_costs_about_its_radius_and_bends_the_tree_by_less_than_half_of_it(cut):
    mask = paint(polyline([(12, 20, 10), (12, 20, 80)], 3.0), (24, 40, 90))
    mask[:, :, cut:] = False
    ends = trace(Volume(mask)).points[:, 2]
    assert ends.min() == pytest.approx(10, abs=1)
    assert cut - 5 < ends.max() < cut
    assert cKDTree([(12, 20)]).query(trace(Volume(mask)).points[:, :2])[0].max() < 1.5


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("flips", [(), (0,), (1, 2)])
def test_flips_and_transpositions_of_the_input_give_the_same_tree(axes, flips):
    mask = paint(y_tree(), (32, 64, 80))
    mask[20, 10:30, 60] = True  # a whisker, so that the neuron is not its own mirror image
    there = np.flip(np.transpose(mask, axes), flips)
    tree, again = trace(Volume(mask)), trace(Volume(np.ascontiguousarray(there)))
    for axis in flips:
        again = again.flipped(axis, there.shape[axis] - 1)
    points = np.empty_like(again.points)
    points[:, list(axes)] = again.points
    assert len(points) == len(tree)
    assert cKDTree(tree.points).query(points)[0].max() < 1e-6


def test_a_probability_that_rounding_took_beyond_its_range_is_one():
    probability = ndimage.gaussian_filter(paint(y_tree(), (32, 64, 80)).astype(np.float32), 1)
    beyond = np.where(probability > 0.8, 1 + 2e-7, probability - 1e-7).astype(np.float32)
    assert beyond.min() < 0 < 1 < beyond.max()
    tree, again = trace(Volume(np.clip(beyond, 0, 1))), trace(Volume(beyond))
    assert np.array_equal(again.points, tree.points)
    assert again.confidence.max() <= 1


@pytest.mark.parametrize("factor", [10, 1000, 1 / 3, 7.3])
def test_the_unit_of_the_spacing_changes_no_path(factor):
    volume, gold = simulate_neuron(seed=2, shape=(32, 96, 96), spacing_um=(1.0, 0.33, 0.33))
    mask = paint(gold, volume.shape, min_radius_vox=1)
    mask[:, 40:43] = False
    step = np.zeros((20, 40, 90), np.float32)  # its middle lies between two voxels, and so does the gap's
    step[8:10, 16:18, 5:44] = step[8:10, 18:20, 52:85] = 1
    for seen in (mask, ndimage.gaussian_filter(step, (0.6, 0.8, 0.8))):
        tree, reviews = trace_with_review(Volume(seen, (1.0, 0.33, 0.33)))
        again, reviews_again = trace_with_review(Volume(seen, (1.0 * factor, 0.33 * factor, 0.33 * factor)))
        assert np.array_equal(again.parents, tree.parents)
        assert again.points / factor == pytest.approx(tree.points, abs=1e-6)
        assert again.radii / factor == pytest.approx(tree.radii, abs=1e-6)
        assert any(review.kind == "join" for review in reviews)
        for one, other in zip(reviews, reviews_again, strict=True):
            assert other.kind == one.kind
            assert np.divide(other.point, factor) == pytest.approx(one.point, abs=1e-6)
            assert (other.length / factor, other.confidence) == pytest.approx((one.length, one.confidence), abs=1e-6)


@pytest.mark.parametrize("radius", [2.0, 3.0, 5.0])
def test_radii_of_a_tube_are_within_half_a_voxel(radius):
    gold = polyline(np.linspace((16, 12, 10), (16, 50, 90), 80), radius)
    tree = trace(Volume(paint(gold, (32, 64, 100))))
    inner = (tree.points[:, 2] > 15) & (tree.points[:, 2] < 85)
    assert np.abs(tree.radii[inner] - radius).max() < 0.5


def test_a_y_has_one_branch_point_where_it_forks_and_three_ends():
    tree = trace(Volume(paint(y_tree(), (32, 64, 80))))
    forks = tree.points[tree.degree == 3]
    assert len(forks) == 1
    assert np.linalg.norm(forks[0] - (16, 32, 48)) < 3
    assert (tree.degree == 1).sum() == 3


@pytest.mark.parametrize("degrees", [30, 45, 65, 90])
def test_a_fork_lies_where_the_axes_meet_and_no_cable_is_lost_there(degrees):
    angle = np.radians(degrees)
    stem = polyline(np.linspace((20, 30, 6), (20, 30, 106), 101), 3.0)
    twig = polyline(np.linspace((20, 30, 40), (20, 30 + 40 * np.sin(angle), 40 + 40 * np.cos(angle)), 41), 2.0)
    tree = trace(Volume(paint(together(stem, twig), (40, 84, 112))))
    (fork,) = tree.points[tree.degree == 3]
    assert np.linalg.norm(fork - (20, 30, 40)) < 3
    assert tree.cable_length == pytest.approx(140, rel=0.02)


def test_a_soft_probability_draws_the_path_to_its_ridge():
    mask = paint(polyline([(16, 20, -5), (16, 20, 95)], 3.0), (32, 44, 90)).astype(np.float32)
    halo = 0.7 * paint(polyline([(16, 23, -5), (16, 23, 95)], 3.0), (32, 44, 90))
    soft, hard = (trace(Volume(np.maximum(mask, side.astype(np.float32)))) for side in (halo, halo > 0))
    assert np.median(hard.points[:, 1]) == pytest.approx(21.5, abs=0.1)
    assert np.median(soft.points[:, 1]) == pytest.approx(20, abs=1)


def test_the_result_is_one_tree_with_parents_before_children_and_a_confidence():
    tree = trace(Volume(0.8 * paint(y_tree(), (32, 64, 80)).astype(np.float32)))
    assert tree.num_roots == 1
    assert tree.parents[0] == -1
    assert (tree.parents[1:] < np.arange(1, len(tree))).all()
    np.testing.assert_allclose(tree.confidence, 0.8, atol=1e-6)


@pytest.mark.parametrize("make", [
    lambda mask: mask,
    lambda mask: mask.astype(np.uint8) * 255,
    lambda mask: mask.astype(np.uint8),
    lambda mask: mask.astype(np.float32),
    lambda mask: mask.astype(np.uint16) * 1000,
], ids=["bool", "0/255", "0/1", "float", "uint16"])  # fmt: skip
def test_every_kind_of_mask_gives_the_same_tree(make):
    mask = paint(y_tree(), (32, 64, 80))
    tree, other = trace(Volume(mask)), trace(Volume(make(mask)))
    np.testing.assert_array_equal(tree.points, other.points)


def test_the_tree_starts_at_the_root_that_is_asked_for():
    tree = trace(Volume(paint(y_tree(), (32, 64, 80)), (2.0, 1.0, 1.0)), root=(32.0, 8.0, 72.0))
    assert np.linalg.norm(tree.points[0] - (32, 8, 72)) < 4
    assert tree.num_roots == 1


def test_a_root_inside_a_thick_neurite_is_not_far_from_it():
    thick = polyline([(16, 20, 16), (16, 20, 54)], 14.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(Volume(paint(thick, (33, 41, 70))), root=(16, 32, 35))


def test_every_tree_of_a_forest_starts_at_its_thickest_node():
    along, wide = np.linspace((10, 36, 10), (10, 36, 70), 61), np.exp(-(((np.arange(61) - 30) / 8) ** 2))
    swollen = NeuronTree(along, 1.5 + 3 * wide, np.arange(61) - 1, unit="voxel")
    volume = Volume(paint(together(polyline([(10, 12, 6), (10, 12, 90)], 3.0), swollen), (21, 50, 100)))
    trees = trace(volume, forest=True).split()
    assert [tree.radii[0] for tree in trees] == [tree.radii.max() for tree in trees]
    assert trees[1].points[0] == pytest.approx((10, 36, 40), abs=2)


def test_a_gap_along_a_neurite_is_bridged_and_listed():
    mask = paint(helix(), (24, 48, 72))
    whole = trace(Volume(mask))
    mask[:, :, 34:42] = False
    tree, reviews = trace_with_review(Volume(mask))
    assert tree.num_roots == 1
    assert farthest(tree, whole) < 2.5
    joins = [review for review in reviews if review.kind == "join"]
    assert len(joins) == 1
    assert 33 < joins[0].point[2] < 42
    assert 6 < joins[0].length < 16


def test_a_gap_is_left_open_when_it_is_longer_than_allowed_and_forest_keeps_both_sides():
    mask = paint(helix(), (24, 48, 72))
    mask[:, :, 34:42] = False
    tree = trace(Volume(mask), max_gap_um=3)
    both = trace(Volume(mask), max_gap_um=3, forest=True)
    assert (tree.num_roots, both.num_roots) == (1, 2)
    assert both.cable_length > 1.5 * tree.cable_length
    np.testing.assert_array_equal(both.points[: len(tree)], tree.points)


@pytest.mark.parametrize("gap", range(4, 12))
def test_a_gap_may_be_half_a_voxel_longer_than_allowed(gap):
    mask = paint(polyline([(14, 20, 12), (14, 20, 90)], 3.0), (29, 45, 100))
    mask[:, :, 41 : 41 + gap] = False
    trees = [trace(Volume(mask), max_gap_um=gap - less, forest=True).num_roots for less in (0.3, 0.7)]
    assert trees == [1, 2]


def test_by_default_ten_voxels_of_the_plane_are_bridged_however_coarse_the_slices_are():
    spacing_um = (3.0, 1.0, 1.0)
    first = polyline([(30, 10, 6), (30, 10, 40)], 3.0, spacing_um)
    for gap, trees in ((8, 1), (18, 2)):
        second = polyline([(30, 10, 46 + gap), (30, 10, 100)], 3.0, spacing_um)
        volume = Volume(paint(together(first, second), (20, 21, 110)), spacing_um)
        assert trace(volume, forest=True).num_roots == trees


def test_a_join_of_ends_that_touch_but_for_a_voxel_has_no_length_below_zero():
    sides = [polyline([(14, 20, a), (14, 20, b)], 3.0) for a, b in ((12, 40), (43, 90))]
    mask = paint(together(*sides), (29, 45, 100))
    mask[:, :, 41] = False
    (join,) = trace_with_review(Volume(mask))[1]
    assert (join.kind, join.length) == ("join", 0)


def test_a_speck_bridges_no_gap_much_longer_than_itself():
    stem = paint(polyline([(10, 10, 6), (10, 10, 60)], 2.0), (21, 21, 80))
    for gap, trees in ((4, 1), (9, 2)):
        mask = stem.copy()
        mask[9:12, 9:12, 62 + gap : 65 + gap] = True
        assert trace(Volume(mask), forest=True).num_roots == trees


def test_an_end_is_joined_to_one_of_two_neurites_beyond_it():
    stem, beyond = polyline([(30, 30, 4), (30, 30, 28)], 1.5), ((26, 36), (35, 37))
    sides = [polyline([(4, y, x), (56, y, x)], 1.5) for y, x in beyond]
    assert trace(Volume(paint(together(stem, *sides), (60, 60, 60))), forest=True).num_roots == 2


@pytest.mark.parametrize("axis", range(3))
def test_a_gap_is_as_long_as_what_is_missing_whichever_way_a_neurite_runs(axis):
    """In voxels of 1 x 0.33 x 0.33 um a tip lies further from the end of its neurite along z."""
    step = np.array([1.0, 0.33, 0.33])
    way = np.roll([40.0, 6.0, 6.0], axis)
    points = np.moveaxis(np.indices(np.rint(way / step).astype(int) + 1), 0, -1) * step
    tube = np.linalg.norm(np.delete(points - way / 2, axis, -1), axis=-1) <= 0.8
    missing = np.abs(points[..., axis] - 20) < 1.2  # three slices, or 2.3 um of columns
    volume = Volume(tube & ~missing, tuple(step))
    length = [np.ptp(trace(volume, max_gap_um=gap).points[:, axis]) for gap in (1.5, 3.5)]
    assert length[0] < 20
    assert length[1] > 36


@pytest.mark.parametrize(
    "low, high, dtype", [(0, 255, np.uint8), (0, 2, np.uint16), (-7, 300, np.int16), (-1, 5, float)]
)
def test_a_mask_is_sure_of_itself_whatever_its_two_values(low, high, dtype):
    mask = paint(helix(), (24, 48, 72))
    mask[:, :, 34:38] = False
    other = np.where(mask, high, low).astype(dtype)
    (tree, reviews), (same, others) = trace_with_review(Volume(mask)), trace_with_review(Volume(other))
    np.testing.assert_array_equal(same.points, tree.points)
    np.testing.assert_array_equal(same.confidence, tree.confidence)
    assert tree.confidence.max() == 1
    assert [review.kind for review in reviews] == ["join"]
    assert others == reviews


@pytest.mark.parametrize(
    "low, high, dtype", [(-128, 127, np.int8), (-1, 0, np.int16), (0, 255, np.uint8), (3, 9, float)]
)
def test_what_a_mask_blanks_of_a_stack_of_two_values_is_ground(low, high, dtype):
    voxels = np.where(paint(helix(), (24, 48, 72)), high, low).astype(dtype)
    inside = np.ones(voxels.shape, bool)
    inside[:, :, 50:] = False
    blurred, threshold = find_threshold(Volume(voxels))
    blanked = find_foreground(masked(blurred, inside, threshold.dark), threshold)
    assert len(blanked) == np.count_nonzero((voxels == high) & inside)


def test_above_0_all_that_is_neuron_is_sure_of_it_and_gaps_are_joined():
    mask = paint(helix(), (24, 48, 72)).astype(np.uint8) * 255
    mask[:, :, 34:38] = 0
    tree = trace(Volume(mask), threshold=0)
    assert tree.num_roots == 1
    assert (tree.confidence[tree.confidence > 0] == 1).all()
    assert farthest(tree, trace(Volume(mask))) < 3


def test_a_tree_left_out_that_is_not_much_shorter_than_the_one_kept_is_told():
    long = polyline(np.linspace((8, 16, 6), (8, 16, 90), 85), 2.0)
    for reach, told in ((70, True), (30, False)):
        short = polyline(np.linspace((8, 44, 6), (8, 44, reach), reach - 5), 2.0)
        volume = Volume(paint(together(long, short), (16, 60, 96)))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trace(volume)
        assert [bool(re.match(r"A tree of \d+ voxels was left out .*--root", str(one.message))) for one in said] == [
            True
        ] * told
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trace(volume, root=(8, 44, 6))
            trace(volume, forest=True)


@pytest.mark.parametrize("seed", [1, 4, 7])
def test_no_node_lies_outside_the_stack(seed):
    shape = (24, 96, 96)
    tree = trace(Volume(paint(random_neuron(seed, shape)[1].to("voxel"), shape, min_radius_vox=1)), forest=True)
    assert (tree.points >= 0).all()
    assert (tree.points <= np.array(shape) - 1).all()


def test_a_mask_that_is_inverted_is_told():
    mask = paint(y_tree(), (32, 64, 80))
    with pytest.warns(UserWarning, match=r"9\d% of the volume lies above .* inverted"):
        trace(Volume((~mask)[:, 20:44, 4:40]))


def test_what_cannot_be_joined_is_listed_with_its_cable_and_not_when_it_is_kept():
    a, b = polyline([(8, 12, 6), (8, 12, 54)], 2.0), polyline([(8, 28, 16), (8, 28, 46)], 2.0)
    volume = Volume(paint(together(a, b), (16, 40, 60)))
    (left_out,) = [review for review in trace_with_review(volume)[1] if review.kind == "left out"]
    np.testing.assert_allclose(left_out.point, (8, 28, 31), atol=1)
    assert left_out.length == pytest.approx(30, abs=4)
    assert not [review for review in trace_with_review(volume, forest=True)[1] if review.kind == "left out"]


def test_a_join_follows_the_faint_bridge_and_reports_its_probability():
    a, b = polyline([(8, 30, 6), (8, 20, 26)], 2.0), polyline([(8, 20, 34), (8, 30, 54)], 2.0)
    faint = polyline([(8, 20, 26), (8, 16, 30), (8, 20, 34)], 1.5)
    probability = np.maximum(paint(together(a, b), (16, 48, 60)), 0.3 * paint(faint, (16, 48, 60)))
    tree, reviews = trace_with_review(Volume(probability.astype(np.float32)))
    (join,) = [review for review in reviews if review.kind == "join"]
    assert tree.num_roots == 1
    assert 0.15 < join.confidence < 0.45
    assert np.abs(tree.points - (8, 16.5, 30)).max(1).min() < 2


@pytest.mark.parametrize("aside", [4, 6, 12])
@pytest.mark.parametrize("further", [0, 4, 8])
def test_neurites_side_by_side_are_not_joined_across_wherever_they_end(aside, further):
    """All their ends look the same way, and none at another."""
    a, b = polyline([(8, 12, 6), (8, 12, 46)], 1.5), polyline([(8, 12 + aside, 6), (8, 12 + aside, 46 + further)], 1.5)
    assert trace(Volume(paint(together(a, b), (16, 36, 60))), forest=True).num_roots == 2


@pytest.mark.parametrize("beyond", [[(8, 18, 54), (8, 18, 84)], [(8, 18, 44), (8, 46, 44)], [(8, 18, 53), (8, 46, 47)]])
def test_a_neurite_goes_on_beside_its_end_and_round_a_corner(beyond):
    mask = paint(together(polyline([(8, 12, 6), (8, 12, 46)], 1.5), polyline(beyond, 1.5)), (16, 60, 90))
    assert trace(Volume(mask), forest=True).num_roots == 1


def test_of_a_beaded_neurite_most_beads_are_joined():
    """A bead is too short to have a direction, and so little lies between two that none is needed."""
    found = []
    for seed in range(8):
        rng, mask, x = np.random.default_rng(seed), np.zeros((20, 30, 120), bool), 8.0
        while x < 112:
            radii, middle = 1.2 * rng.uniform(0.7, 1.5, 3), (*rng.uniform((9.3, 14.3), (10.7, 15.7)), x)
            away = np.moveaxis(np.indices(mask.shape), 0, -1) - middle
            mask |= ((away / radii) ** 2).sum(-1) <= 1
            x += 2 * radii[2] + 0.5
        found.append(np.ptp(trace(Volume(mask)).points[:, 2]) / 104)
    assert np.mean(found) > 0.65


@pytest.mark.parametrize("hole", [5, 7, 9])
def test_a_broken_crossing_is_joined_straight_on_and_not_round_its_corners(hole):
    reach = hole / 2 + 2
    along = [polyline([(10, 40, a), (10, 40, b)], 2.0) for a, b in ((6, 40 - reach), (40 + reach, 74))]
    across = [polyline([(10, a, 40), (10, b, 40)], 2.0) for a, b in ((6, 40 - reach), (40 + reach, 74))]
    trees = trace(Volume(paint(together(*along, *across), (20, 80, 80))), forest=True).split()
    spans = sorted(np.round(np.ptp(tree.points, axis=0)).tolist() for tree in trees)
    assert len(spans) == 2
    assert max(spans[0][1], spans[1][2]) < 4
    assert min(spans[0][2], spans[1][1]) > 60


def test_no_gap_is_bridged_where_nothing_is_to_be_traced():
    neurite = np.zeros((21, 40, 100), np.uint8)
    neurite[9:12, 19:22, 5:95] = 255
    mask = np.ones_like(neurite)
    mask[:, :, 48:54] = 0
    tree, reviews = trace_part(Volume(neurite), mask=mask, forest=True)
    assert tree.num_roots == 2
    assert not reviews
    assert not ((tree.points[:, 2] > 47.5) & (tree.points[:, 2] < 53.5)).any()


def test_a_bridge_goes_round_where_nothing_is_to_be_traced():
    a, b = polyline([(8, 30, 6), (8, 20, 26)], 2.0), polyline([(8, 20, 34), (8, 30, 54)], 2.0)
    faint = polyline([(8, 20, 26), (8, 16, 30), (8, 20, 34)], 1.5)
    probability = np.maximum(paint(together(a, b), (16, 48, 60)), 0.3 * paint(faint, (16, 48, 60)))
    mask = np.ones(probability.shape, np.uint8)
    mask[:, :18, 29:32] = 0
    tree, _ = trace_part(Volume(probability.astype(np.float32)), mask=mask)
    assert tree.num_roots == 1
    assert tree.points[:, 2].max() > 50
    nearest = np.rint(tree.points).astype(int)
    assert mask[tuple(nearest.T)].all()


@pytest.mark.parametrize("radii", [(4.0, 1.5), (1.5, 4.0)])
def test_a_bridge_tapers_from_one_end_to_the_other(radii):
    ends = [(8, 40), (54, 84)]
    sides = [polyline([(10, 30, a), (10, 30, b)], r) for (a, b), r in zip(ends, radii, strict=True)]
    tree, (join,) = trace_with_review(Volume(paint(together(*sides), (20, 60, 90))))
    assert join.kind == "join"
    along = np.argsort(tree.points[:, 2])
    between = tree.radii[along][(tree.points[along, 2] > 44) & (tree.points[along, 2] < 52)]
    steps = np.diff(between) * (1 if radii[1] > radii[0] else -1)
    assert len(steps) > 3
    assert (steps > 0).all()
    assert max(steps) < 0.7


def test_a_bump_is_no_branch_and_min_branch_um_prunes_longer_ones():
    stem = polyline(np.linspace((12, 30, 6), (12, 30, 90), 85), 3.0)
    bump, twig = polyline([(12, 30, 30), (12, 34, 30)], 1.0), polyline([(12, 30, 60), (12, 44, 60)], 1.5)
    volume = Volume(paint(together(stem, bump, twig), (24, 60, 96)))
    assert trace(volume).num_branch_points == 1
    assert trace(volume, min_branch_um=14.0).num_branch_points == 0


def test_a_branch_that_barely_leaves_its_parent_counts_by_its_depth_and_salt_beside_it_does_not():
    stem, twig = polyline(np.linspace((12, 30, 6), (12, 30, 90), 85), 2.5), polyline([(12, 30, 60), (12, 35, 60)], 2.0)
    mask = paint(together(stem, twig), (24, 60, 96))
    mask[12, 33:36, 30] = 1
    tree = trace(Volume(mask))
    forks = tree.points[tree.degree > 2]
    np.testing.assert_allclose(forks, [[12, 30, 60]], atol=2)


@pytest.mark.parametrize(("radius", "apart"), [(2, 3), (3, 4), (4, 5), (5, 6)])
def test_a_flat_neurite_has_no_ribs(radius, apart):
    sides = [polyline([(16, y, -5), (16, y, 95)], radius) for y in (20, 20 + apart)]
    tree = trace(Volume(paint(together(*sides), (32, 50, 90))))
    assert tree.num_branch_points == 0
    assert tree.cable_length == pytest.approx(89, rel=0.05)


def test_salt_noise_adds_no_tree_and_hardly_any_cable():
    rng = np.random.default_rng(0)
    mask = paint(y_tree(), (32, 64, 80))
    clean = trace(Volume(mask))
    noisy = trace(Volume(mask | (rng.random(mask.shape) < 0.01)))
    assert noisy.num_roots == 1
    assert noisy.cable_length == pytest.approx(clean.cable_length, rel=0.08)
    assert farthest(noisy, clean) < 6


def test_clumped_salt_in_a_larger_box_leaves_no_tree_of_its_own_and_a_small_fragment_stays():
    rng = np.random.default_rng(0)
    mask = np.zeros((160, 200, 200), bool)
    mask[:32, :64, :80] = paint(y_tree(), (32, 64, 80))
    mask[120:122, 120:122, 120:123] = True
    assert trace(Volume(mask), forest=True).num_roots == 2
    noisy = mask | (rng.random(mask.shape) < 0.01)
    assert trace(Volume(noisy), forest=True, max_gap_um=0).num_roots <= 2


def test_an_intensity_on_disk_is_traced_slab_by_slab_as_in_memory(monkeypatch):
    monkeypatch.setattr(threshold_module, "_PIECE", (8, 64, 80))
    monkeypatch.setattr(threshold_module, "_SAMPLE_VOXELS", 1 << 14)
    rng = np.random.default_rng(0)
    mask = np.pad(paint(y_tree(), (32, 64, 80)), ((8, 40), (0, 0), (0, 0)))
    voxels = rng.poisson(3.0 + 60 * mask).astype(np.uint8)
    lazy = Counted(voxels)
    np.testing.assert_array_equal(trace(Volume(lazy)).points, trace(Volume(voxels)).points)
    assert 0 < lazy.largest <= 40 * 64 * 80


def test_blurring_slab_by_slab_changes_nothing():
    from scipy.ndimage import gaussian_filter

    voxels = np.random.default_rng(0).integers(0, 200, (13, 20, 24)).astype(np.uint8)
    blurred = smoothed(Volume(voxels, (2.0, 1.0, 1.0))).voxels
    whole = gaussian_filter(voxels.astype(np.float32), 0.7 * np.sqrt([0.5, 1, 1]), truncate=3)
    for z in range(0, 13, 3):
        np.testing.assert_allclose(blurred[z : z + 3, 2:9], whole[z : z + 3, 2:9], rtol=1e-5)


def test_a_soma_is_one_node_at_its_centre_and_neurites_start_on_its_surface():
    centre, radius = np.array([20.0, 32.0, 40.0]), 9.0
    arms = [polyline([centre, centre + arm], 1.5) for arm in ((0, 0, 34), (0, 24, -24), (2, -26, -10))]
    away = np.linalg.norm(np.indices((40, 64, 80)) - centre[:, None, None, None], axis=0)
    tree = trace(Volume(paint(together(*arms), (40, 64, 80)) | (away <= radius)))
    assert (tree.types == SOMA).nonzero()[0].tolist() == [0]
    assert tree.parents[0] == -1
    assert np.linalg.norm(tree.points[0] - centre) < 1
    assert tree.radii[0] == pytest.approx(radius, abs=0.5)
    first = tree.parents == 0
    assert first.sum() == 3
    np.testing.assert_allclose(np.linalg.norm(tree.points[first] - centre, axis=1), radius, atol=1.2)
    assert (np.linalg.norm(tree.points[1:] - centre, axis=1) > radius - 1.2).all()


def test_a_root_moves_the_root_and_nothing_else_of_a_cell():
    mask, centre, radius = _cell()
    volume = Volume(mask, (1.0, 0.33, 0.33))
    alone = trace(volume)
    for root in (centre, centre + np.array([0, 0, radius / 2]), alone.points[-1]):
        found = trace(volume, root=root)
        assert (found.types == SOMA).sum() == found.num_roots == 1
        assert measure(found)["length_um"] == pytest.approx(measure(alone)["length_um"])
        assert found.radii.max() == alone.radii.max()
    assert found.points[0] == pytest.approx(alone.points[-1])


def test_every_cell_of_a_forest_has_its_soma():
    mask, _, _ = _cell()
    two = np.concatenate([mask, np.zeros((40, 10, 160), bool), mask], axis=1)
    cells = trace(Volume(two, (1.0, 0.33, 0.33)), forest=True).split()
    first, second = map(measure, cells)
    assert [(cell.types == SOMA).sum() for cell in cells] == [1, 1]
    assert second == pytest.approx(first, rel=0.01)


def _cell(bumps: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """(Z, Y, X) mask of 1 x 0.33 x 0.33 um: a round soma, three neurites that blur made three times as high as wide."""
    spacing, centre, radius = np.array([1.0, 0.33, 0.33]), np.array([20.0, 26.0, 26.0]), 5.0
    grid = np.moveaxis(np.indices((40, 160, 160)), 0, -1) * spacing
    mask = np.linalg.norm(grid - centre, axis=-1) <= radius
    ways = [(angle, 20.0, 0.7) for angle in (0.3, 2.2, 4.4)]
    ways += [(angle, 1.15 * radius, 0.5) for angle in np.linspace(1, 4, bumps)]
    for angle, length, thick in ways:
        way = centre + np.linspace(0, length, 200)[:, None] * (0, np.sin(angle), np.cos(angle))
        mask |= cKDTree(way / (3, 1, 1)).query(grid / (3, 1, 1), distance_upper_bound=thick)[0] < np.inf
    return mask, centre, radius


@pytest.mark.parametrize("seed", range(12))
def test_what_neuron_encloses_on_all_sides_is_neuron(seed):
    rng = np.random.default_rng(seed)
    mask = ndimage.gaussian_filter(rng.random(rng.integers(4, 24, 3)), 0.7) > 0.46
    found = find_foreground(*find_threshold(Volume(mask)))
    filled = np.zeros(mask.shape, bool)
    filled[tuple(found.points.astype(int).T)] = True
    assert (filled == ndimage.binary_fill_holes(mask)).all()
    assert (np.diff(found.linear) > 0).all()


@pytest.mark.parametrize(("wide", "filled"), [(32, True), (33, False)])
def test_what_neuron_encloses_may_be_32_voxels_wide(wide, filled):
    mask = np.pad(np.zeros((wide, wide, wide), bool), 1, constant_values=True)
    found = find_foreground(*find_threshold(Volume(np.pad(mask, 2))))
    assert len(found) == (mask.size if filled else mask.sum())


def test_what_neuron_encloses_counts_as_sure_as_what_is_around_it():
    voxels = np.zeros((9, 9, 9), np.float32)
    voxels[1:8, 1:8, 1:8] = 0.8
    voxels[3:6, 3:6, 3:6] = 0.1
    found = find_foreground(*find_threshold(Volume(voxels)))
    assert len(found) == 7**3
    np.testing.assert_allclose(found.probability, 0.8)


def test_a_soma_whose_nucleus_is_not_labelled_is_that_soma():
    mask, centre, _ = _cell()
    grid = np.moveaxis(np.indices(mask.shape), 0, -1) * (1.0, 0.33, 0.33)
    whole, hollow = (
        trace(Volume(labelled, (1.0, 0.33, 0.33)))
        for labelled in (mask, mask & (np.linalg.norm(grid - centre, axis=-1) > 3))
    )
    np.testing.assert_array_equal(hollow.points, whole.points)
    assert (hollow.types == SOMA).sum() == 1


@pytest.mark.parametrize("bumps", [0, 4])
def test_a_soma_is_measured_as_it_is_beside_neurites_that_blur_stretched(bumps):
    mask, centre, radius = _cell(bumps)
    tree = trace(Volume(mask, (1.0, 0.33, 0.33)))
    assert (tree.types == SOMA).nonzero()[0].tolist() == [0]
    assert np.linalg.norm(tree.points[0] - centre) < 0.5
    assert tree.radii[0] == pytest.approx(radius, rel=0.1)
    assert (tree.parents == 0).sum() == 3  # none at a bump of its surface
    assert tree.cable_length == pytest.approx(3 * (20 - radius), rel=0.1)


def test_neurites_beside_a_long_soma_are_no_stubs_of_it():
    centre, half = np.array([20.0, 40.0, 60.0]), np.array([10.0, 10.0, 24.0])
    grid = np.moveaxis(np.indices((40, 80, 120)), 0, -1)
    soma = (((grid - centre) / half) ** 2).sum(-1) <= 1
    ends = [polyline([centre, (20, 40, x)], 1.5) for x in (5, 115)]
    sides = [polyline([(20, 40, x), (20, y, x)], 1.5) for y, x in ((56, 52), (24, 60), (56, 68))]
    tree = trace(Volume(paint(together(*ends, *sides), soma.shape) | soma))
    assert (tree.types == SOMA).sum() == 1
    assert (tree.degree == 1).sum() == 5


def test_a_neurite_that_tapers_has_no_soma():
    points = np.linspace((12, 20, 6), (12, 20, 100), 95)
    gold = NeuronTree(points, np.linspace(4, 1.2, 95), np.arange(95) - 1, unit="voxel")
    assert not (trace(Volume(paint(gold, (24, 40, 106)))).types == SOMA).any()


def test_a_swelling_of_a_few_voxels_is_no_soma():
    z, y, x = np.indices((21, 21, 100)) - np.array([10, 10, 50])[:, None, None, None]
    mask = (np.hypot(z, y) < 0.9) | (np.sqrt(z**2 + y**2 + x**2) < 3.2)
    assert not (trace(Volume(mask)).types == SOMA).any()


@pytest.mark.parametrize("turn", range(4))
def test_stems_that_meet_in_a_cell_body_no_thicker_than_they_are_leave_one_point(turn):
    centre, number = np.array([40.0, 40.0, 40.0]), np.arange(6)
    height, angle = (5 - 2 * number) / 6, (np.pi * (1 + 5**0.5)) * number + turn
    wide = np.sqrt(1 - height**2)
    away = 34 * np.stack([height, wide * np.cos(angle), wide * np.sin(angle)], axis=1)  # all over a sphere
    tree = trace(Volume(paint(together(*(polyline([centre, centre + arm], 3.0) for arm in away)), (80, 80, 80))))
    assert np.flatnonzero(tree.degree >= 3).tolist() == [0]
    assert tree.degree[0] == len(away)
    assert np.linalg.norm(tree.points[0] - centre) < 1.7
    assert tree.cable_length == pytest.approx(34 * len(away), rel=0.03)


def test_forks_that_follow_one_another_stay_apart():
    trunk = polyline([(16, 32, 6), (16, 32, 94)], 3.0)
    places = (30, 42, 54, 66)
    sides = [polyline([(16, 32, x), (16, 32 + 24 * (-1) ** n, x + 6)], 2.0) for n, x in enumerate(places)]
    tree = trace(Volume(paint(together(trunk, *sides), (32, 64, 100))))
    forks = np.sort(tree.points[tree.degree >= 3, 2])
    np.testing.assert_allclose(forks, places, atol=2)


@pytest.mark.parametrize("offset", [-32768, -100])
def test_grey_levels_below_zero_change_nothing(offset):
    rng = np.random.default_rng(0)
    voxels = rng.poisson(10 + 60 * paint(helix(), (24, 48, 72))).astype(np.int32)
    voxels -= voxels.min()
    there, again = trace(Volume(voxels)), trace(Volume(voxels + offset))
    np.testing.assert_allclose(again.points, there.points, atol=1e-3)
    np.testing.assert_allclose(again.confidence, there.confidence, atol=1e-3)
    assert 0 < again.confidence.min() <= again.confidence.max() < 1


def test_of_several_trees_the_one_that_counts_most_is_kept_and_never_a_speck():
    long, short, speck = (polyline([(8, y, 8), (8, y, 8 + size)], 2.0) for y, size in ((12, 90), (36, 50), (60, 2)))
    volume = Volume(paint(together(long, short, speck), (16, 72, 108)))
    tree, _ = trace_with_review(volume, light=lambda tree: np.full(len(tree), 0.2 if tree.cable_length > 70 else 0.3))
    assert tree.cable_length == pytest.approx(50, abs=6)
    assert trace(volume).cable_length == pytest.approx(90, abs=6)


def comb(places: tuple[int, ...] = (25, 45, 65, 85)) -> Volume:
    """A fibre along x at y = 10, 100 voxels long, that others of 80 voxels touch."""
    teeth = (polyline([(8, 10, x), (8, 90, x)], 1.5) for x in places)
    return Volume(paint(together(polyline([(8, 10, 8), (8, 10, 108)], 2.0), *teeth), (16, 100, 120)))


def seen_as(dim: float):
    """The light of the comb's neurites: 1 of the fibre, `dim` of what touches it."""
    return lambda tree: np.where(tree.points[:, 1] < 13, 1.0, dim)


def test_of_a_tree_that_is_mostly_dim_neurites_of_others_the_bright_part_is_the_neuron():
    tree, reviews = trace_with_review(comb(), light=seen_as(0.1))
    assert tree.num_roots == 1
    assert tree.points[:, 1].max() < 13
    assert tree.cable_length == pytest.approx(100, abs=6)
    assert [review.kind for review in reviews][:1] == ["left out"]
    assert reviews[0].length == pytest.approx(4 * 80, rel=0.1)
    assert reviews[0].point[1] > 40
    for kept in ({"root": (8.0, 10.0, 8.0)}, {"forest": True}):  # who names a root, or all trees, wants all
        assert trace_with_review(comb(), light=seen_as(0.1), **kept)[0].cable_length > 380


@pytest.mark.parametrize(("dim", "places"), [(0.4, (25, 45, 65, 85)), (0.0, (65,)), (np.nan, (25, 45, 65, 85))])
def test_dim_branches_of_a_neuron_are_kept(dim, places):
    """Many of two fifths of its light, one that has next to none, or where nobody can tell."""
    volume = comb(places)
    assert trace_with_review(volume, light=seen_as(dim))[0].cable_length == trace(volume).cable_length


def test_of_a_join_to_what_is_left_out_no_stub_stays_on_the_neuron():
    """The fibre ends at x = 60, and is joined over a gap to the side of a dim one that others touch."""
    teeth = (polyline([(8, y, 70), (8, y, 114)], 1.5) for y in (8, 22, 56, 70, 90))
    fibres = (polyline([(8, 40, 8), (8, 40, 60)], 2.0), polyline([(8, 4, 70), (8, 96, 70)], 1.5))
    volume = Volume(paint(together(*fibres, *teeth), (16, 100, 120)))
    assert trace(volume).num_roots == 1
    assert trace(volume).cable_length > 330
    tree, _ = trace_with_review(volume, light=lambda tree: np.where(tree.points[:, 2] < 65, 1.0, 0.05))
    assert tree.num_roots == 1
    assert tree.points[:, 2].max() < 63


def test_a_neuron_among_dim_neurites_is_preferred_to_a_smaller_tree_beside_it():
    beside = paint(polyline([(8, 97, 8), (8, 97, 58)], 1.5), (16, 100, 120))
    volume = Volume(comb().voxels | beside)

    def light(tree):
        return np.where(tree.points[:, 1] > 94, 0.6, seen_as(0.1)(tree))

    tree, _ = trace_with_review(volume, max_gap_um=0, light=light)
    assert tree.points[:, 1].max() < 13


def branched(*branches: tuple[float, float]) -> tuple[NeuronTree, np.ndarray]:
    """A trunk along x and one branch more after every 100 voxels, and their light: of (length, light) each; the trunk
    is the first."""
    trunk = np.arange(branches[0][0] + 1)
    points, parents = [np.stack([0 * trunk, 0 * trunk, trunk], 1)], [np.arange(len(trunk)) - 1]
    light = [np.full(len(trunk), branches[0][1])]
    for number, (length, bright) in enumerate(branches[1:], start=1):
        y, first = np.arange(1, length + 1), sum(map(len, parents))
        points.append(np.stack([0 * y, y, np.full(len(y), 100 * number)], 1))
        parents.append(np.concatenate([[100 * number], np.arange(first, first + len(y) - 1)]))
        light.append(np.full(len(y), bright))
    points, parents = np.concatenate(points), np.concatenate(parents).astype(int)
    return NeuronTree(points, np.ones(len(points)), parents), np.concatenate(light)


def test_the_part_that_is_kept_is_the_most_prominent_one():
    tree, light = branched((5000, 0.05), (200, 1.0), (500, 0.5))
    part, _ = most_prominent_part(tree, light)
    assert light[part].min() == 1.0
    assert part.sum() == pytest.approx(200, abs=2)
    tree, light = branched((5000, 0.05), (200, 1.0), (900, 0.6))  # long and dimmer, it is no part of that
    assert light[most_prominent_part(tree, light)[0]].min() == 1.0
    tree, light = branched((5000, 0.05), *[(40, bright) for bright in np.linspace(0.2, 1, 30)], (400, 0.9))
    assert most_prominent_part(tree, light)[0][-1]


def test_a_twig_of_which_nothing_is_known_is_as_bright_as_the_branch_that_it_leaves():
    tree, light = branched((5000, 0.05), (200, 1.0))
    fork, count = len(tree) - 100, len(tree)
    points = np.concatenate([tree.points, tree.points[fork] + np.arange(1, 41)[:, None] * (1, 0, 0)])
    parents = np.concatenate([tree.parents, [fork], np.arange(count, count + 39)])
    part, _ = most_prominent_part(NeuronTree(points, np.ones(len(points)), parents), np.append(light, [np.nan] * 40))
    assert part[-40:].all()
    assert part.sum() == pytest.approx(240, abs=2)


def test_a_bright_spot_and_a_soma_make_nothing_else_dim():
    """A neuron is not cut down to a branch of three voxels fifty times as bright."""
    tree, light = branched((900, 1.0), (3, 50.0))
    assert most_prominent_part(tree, light)[0].all()
    volume = np.zeros((24, 60, 200))
    volume[12, 30, 20:190] = 1.0
    volume = ndimage.gaussian_filter(volume, 1.5)
    volume /= volume.max()
    z, y, x = np.indices(volume.shape)
    soma = np.sqrt((z - 12) ** 2 + (y - 30) ** 2 + (x - 20) ** 2) < 9
    stack = Volume(10 + 20 * volume + 2000 * soma)
    neuron = trace(Volume(((volume > 0.3) | soma).astype(np.uint8)))
    light = light_of_its_own(neuron, stack, IntensityStatistics(10, 1, 30))
    assert np.isnan(light[neuron.radii > 6]).all()
    assert most_prominent_part(neuron, light)[0].all()


def test_what_is_darker_than_its_surroundings_has_no_light_of_its_own():
    voxels = np.full((9, 40, 60), 100, np.uint8)
    voxels[3:6, 18:23] = 40
    tree = polyline([(4, 20, x) for x in range(10, 50)], 1.0)
    assert set(light_of_its_own(tree, Volume(voxels), IntensityStatistics(40, 1, 200))) == {0}


@pytest.mark.parametrize("other", [np.zeros((4, 5, 6)), "stack.tif"])
def test_what_is_no_volume_is_told_how_to_become_one(other):
    with pytest.raises(TypeError, match=r"Volume\(array, spacing_um\)"):
        trace(other)


def test_weak_spots_are_listed_with_the_least_confident_first():
    mask = paint(helix(), (24, 48, 72)).astype(np.float32) * 0.95
    mask[:, :, 30:36] = np.minimum(mask[:, :, 30:36], 0.52)
    _, reviews = trace_with_review(Volume(mask), threshold=0.4)
    assert [review.kind for review in reviews] == ["weak"]
    assert 29 < reviews[0].point[2] < 37
    assert reviews[0].confidence == pytest.approx(0.52, abs=0.05)


def test_one_node_alone_is_no_weak_spot():
    probability = np.zeros((5, 5, 60), np.float32)
    probability[2, 2, 5:55] = 0.95
    for weak, kinds in ((slice(30, 31), []), (slice(30, 32), ["weak"])):
        there = probability.copy()
        there[2, 2, weak] = 0.52
        assert [review.kind for review in trace_with_review(Volume(there))[1]] == kinds


def test_resampling_keeps_tips_and_branch_points():
    volume = Volume(paint(y_tree(), (32, 64, 80)))
    fine, coarse = trace(volume), trace(volume, step_um=5.0)
    ends = fine.points[fine.degree != 2]
    assert cKDTree(coarse.points).query(ends)[0].max() < 1e-9
    assert len(coarse) < len(fine) / 3
    assert coarse.cable_length == pytest.approx(fine.cable_length, rel=0.02)


def test_a_neurite_that_leaves_the_volume_keeps_its_radius_at_the_border():
    gold = polyline([(12, 20, -10), (12, 20, 60)], 3.0)
    tree = trace(Volume(paint(gold, (24, 40, 50))))
    assert tree.radii.min() > 2.3
    assert tree.cable_length > 42


def test_an_empty_mask_gives_an_empty_tree_and_a_sentence():
    with pytest.warns(UserWarning, match="No voxel lies above the threshold"):
        tree = trace(Volume(np.zeros((8, 8, 8)), (2.0, 1.0, 1.0)))
    assert len(tree) == 0
    assert tree.unit == "um"


def test_one_voxel_is_a_tree_of_one_node():
    mask = np.zeros((8, 8, 8), bool)
    mask[3, 4, 5] = True
    tree = trace(Volume(mask))
    np.testing.assert_allclose(tree.points, [[3, 4, 5]])
    assert tree.num_roots == 1


def test_a_volume_that_what_is_foreground_encloses_is_refused():
    mask = np.ones((9, 9, 9), np.uint8)
    mask[4, 4, 4] = 0
    with pytest.raises(ValueError, match=r"or is enclosed by what does: .* seems inverted"):
        trace(Volume(mask))


@pytest.mark.parametrize("value", [True, np.uint8(1), np.uint8(255), np.float32(0.9), np.float32(40)])
def test_a_volume_that_is_all_foreground_is_refused_with_the_fraction(value):
    with pytest.raises(ValueError, match=r"fraction 1\.0"):
        trace(Volume(np.full((4, 5, 6), value)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(bad):
    voxels = np.zeros((60, 80, 100))
    voxels[58, 2, 3] = bad  # not in the part that is looked at first
    for given in (voxels, Counted(voxels)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            trace(Volume(given))


@pytest.mark.parametrize("root", [(-1, 0, 0), (0, 0, 100), (31.6, 8, 8), (np.nan, 0, 0)])
def test_a_root_outside_the_volume_is_refused(root):
    with pytest.raises(ValueError, match="outside the volume"):
        trace(Volume(paint(y_tree(), (32, 64, 80))), root=root)


@pytest.mark.parametrize(("x", "end"), [(-0.4, 0), (39.4, 39)])
def test_a_root_anywhere_in_a_voxel_of_the_border_is_taken(x, end):
    through = paint(polyline([(8, 8, -10), (8, 8, 60)], 2.0), (17, 17, 40))
    assert trace(Volume(through), root=(8, 8, x)).points[0] == pytest.approx((8, 8, end), abs=1)


@pytest.mark.parametrize("name", ["min_branch_um", "max_gap_um", "step_um"])
def test_a_negative_length_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        trace(Volume(paint(y_tree(), (32, 64, 80))), **{name: -1.0})


def test_depth_is_the_exact_distance_to_background():
    from scipy.ndimage import distance_transform_edt

    spacing_um = (2.5, 1.0, 1.3)
    mask = paint(y_tree(), (32, 64, 80))
    mask[10:26, 20:44, 20:44] = True
    volume = Volume(mask, spacing_um)
    foreground = find_foreground(*find_threshold(volume))
    object.__setattr__(foreground, "round_step", foreground.step)
    exact = distance_transform_edt(mask, spacing_um)
    rows = np.rint(foreground.points / spacing_um).astype(int)
    np.testing.assert_allclose(foreground.depth, exact[tuple(rows.T)], rtol=1e-5)


def test_a_point_beyond_the_stack_lies_in_no_voxel():
    mask = np.zeros((6, 7, 8), np.uint8)
    mask[:, 3] = mask[3] = 1
    found = find_foreground(*find_threshold(Volume(mask)))
    assert (found.nearest(np.array([(0, 3, 7), (5, 3, 0), (3, 0, 4), (3.4, 6.4, 4)])) >= 0).all()
    beyond = np.array([(-1, 3, 4), (6, 3, 4), (3, -1, 4), (3, 7, 4), (3, 3, -1), (3, 3, 8), (2, 3, 8), (3, 5, 8)])
    assert set(found.nearest(beyond)) == {-1}


@pytest.mark.parametrize("flat_axis", [0, 1])
def test_voxels_are_never_taken_for_longer_than_they_are_nor_for_shorter_than_the_finest(flat_axis):
    """However flat neurites are: a ribbon in the plane, and one across it."""
    mask = np.zeros((24, 40, 60), np.uint8)
    mask[(slice(10, 11), slice(15, 25))] = flat_axis == 0
    mask[(slice(4, 20), slice(20, 21))] |= flat_axis == 1
    found = find_foreground(*find_threshold(Volume(mask, (3.0, 1.0, 1.0))))
    assert (found.round_step <= found.step).all()
    assert (found.round_step >= 1).all()


def test_depth_between_voxels_is_interpolated_and_0_out_of_the_foreground():
    mask = ndimage.gaussian_filter(np.random.default_rng(0).random((12, 16, 20)), 1.5) > 0.5
    found = find_foreground(*find_threshold(Volume(mask.astype(np.uint8))))
    dense = np.zeros(found.shape, np.float32)
    dense[tuple(found.index.T)] = found.depth
    last = np.array(dense.shape) - 1
    points = np.random.default_rng(1).uniform(-2, last + 2, (900, 3))
    graph = found.linear, np.array(found.shape), found.neighbours, found.depth
    depth = [_depth_at.py_func(*point, *graph) for point in points]
    points = np.clip(points, 0, last)  # beyond the volume as at its border
    nearest = dense[tuple(np.rint(points).astype(int).T)]
    expected = np.where(nearest > 0, ndimage.map_coordinates(dense, points.T, order=1), 0)
    np.testing.assert_allclose(depth, expected, atol=1e-5)
    assert 200 < (nearest > 0).sum() < 800


def test_auto_threshold_separates_neurite_from_noise_also_on_a_cleaned_background():
    rng = np.random.default_rng(0)
    mask = paint(y_tree(), (32, 64, 80))
    noisy = np.clip(rng.normal(20, 3, mask.shape) + 120 * mask, 0, 255).astype(np.uint8)
    cleaned = np.where(mask, rng.integers(30, 200, mask.shape), 0).astype(np.uint8)
    for voxels in (noisy, cleaned):
        found = voxels > intensity_threshold(voxels)
        assert (found & mask).sum() > 0.93 * mask.sum()
        assert (found & ~mask).sum() < 0.02 * mask.sum()


def test_intensities_from_0_to_1_are_told_from_a_probability():
    """What passes for a probability loses all that is dimmer than half of the brightest voxel, and a warning asks."""
    rng = np.random.default_rng(0)
    tree = polyline(np.linspace((8, 8, 8), (8, 56, 56), 60), 2.0)
    dim = np.where(np.arange(64) < 30, 1.0, 0.2) * paint(tree, (16, 64, 64))
    grey = np.rint(np.clip(ndimage.gaussian_filter(200 * dim, 0.7) + rng.normal(10, 2, dim.shape), 0, 255))
    expected = trace(Volume(grey.astype(np.uint8)))
    scaled = Volume((grey / 255).astype(np.float32))
    for voxels in (scaled.voxels, Counted(scaled.voxels)):
        with pytest.warns(UserWarning, match="--threshold intensity"):
            assert trace(Volume(voxels)).edge_lengths.sum() < 0.7 * expected.edge_lengths.sum()
    with pytest.warns(UserWarning, match="--threshold intensity"):
        assert not len(trace(Volume(scaled.voxels / 10)))  # so dim that nothing is left
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = trace(scaled, threshold="intensity")
        trace(Volume(paint(tree, (16, 64, 64)).astype(np.float32)))
        trace(Volume(ndimage.gaussian_filter(paint(tree, (16, 64, 64)).astype(np.float32), 0.7)))
    assert len(found) == len(expected)
    np.testing.assert_allclose(found.points, expected.points, atol=1e-3)


def test_ids_of_several_neurons_are_told_from_grey_levels():
    one, other = (paint(polyline(np.linspace((8, y, 6), (8, y, 58), 53), 2.0), (16, 48, 64)) for y in (14, 34))
    with pytest.warns(UserWarning, match="ids of several neurons"):
        trace(Volume((one + 40 * other).astype(np.uint16)), forest=True)
    noise = np.random.default_rng(0).normal(0, 8, one.shape) * (one | other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(Volume(np.clip(60 * one + 200 * other + noise, 0, 255).astype(np.uint8)), forest=True)
        trace(Volume((one + 40 * other).astype(np.uint16)), forest=True, threshold=0)


def test_even_grey_levels_of_the_ground_and_what_lies_on_disk_are_not_taken_for_ids():
    class OnDisk(LazyVoxels):
        def _fetch(self, box):
            raise AssertionError("it was read")

    neurite = paint(polyline([(8, 24, 6), (8, 24, 58)], 2.0), (16, 48, 64))
    assert seems_labels(np.where(neurite, 3, 0) + neurite * (np.arange(64) > 30))
    assert not seems_labels(np.where(neurite, 60, 200))
    assert not seems_labels(OnDisk((16, 48, 64), np.uint8))


def test_shot_noise_on_an_intensity_adds_hardly_any_cable():
    rng = np.random.default_rng(0)
    mask = paint(y_tree(), (32, 64, 80))
    shot = 120 * (rng.random(mask.shape) < 0.08)
    voxels = (rng.poisson(1.0, mask.shape) + rng.poisson(60 * mask) + shot).astype(np.uint8)
    clean, noisy = trace(Volume(mask)), trace(Volume(voxels))
    assert noisy.cable_length == pytest.approx(clean.cable_length, rel=0.08)
    assert farthest(noisy, clean) < 4


def test_tracing_warns_of_nothing_on_good_input():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(Volume(paint(y_tree(), (32, 64, 80))))
