"""Painted trees have the volume and the roundness that geometry gives them."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy import ndimage

from vit3d.targets import labels_from_codes, labels_from_mask, paint, radii_fit, training_labels
from vit3d.tree import NeuronTree


def tube(start, end, radii=(4.0, 4.0), **kinds) -> NeuronTree:
    return NeuronTree(np.array([start, end], float), np.array(radii), np.array([-1, 0]), **{"unit": "voxel", **kinds})


@pytest.mark.parametrize("radii", [(4.0, 4.0), (6.0, 2.0)])
def test_a_painted_tube_has_the_volume_of_a_capsule(radii):
    start, end = np.array([15.3, 14.1, 12.2]), np.array([24.8, 30.7, 50.4])
    volume = paint(tube(start, end, radii), (40, 48, 64)).sum()
    a, b = radii
    frustum = np.pi * np.linalg.norm(end - start) * (a * a + a * b + b * b) / 3
    assert volume == pytest.approx(frustum + 2 / 3 * np.pi * (a**3 + b**3), rel=0.03)


def test_a_painted_ball_is_round_in_um():
    ball = NeuronTree([[10.0, 10.0, 10.0]], [5.0], [-1], unit="um", spacing_um=(1.0, 0.5, 0.25))
    voxels = np.argwhere(paint(ball, (21, 41, 81))) * (1.0, 0.5, 0.25)
    assert_array_equal(np.ptp(voxels, axis=0), [10, 10, 10])
    assert len(voxels) * 0.125 == pytest.approx(4 / 3 * np.pi * 5**3, rel=0.03)


@pytest.mark.parametrize(
    ("centre", "radius"), [((8, 8, 8), 3.1), ((8.45, 7.6, 8.3), 2.6), ((8.5, 8.5, 8.5), 1.6), ((7.55, 8.2, 8.4), 3.5)]
)
def test_a_painted_ball_is_every_voxel_whose_centre_lies_in_it(centre, radius):
    away = np.linalg.norm(np.moveaxis(np.indices((18, 18, 18)), 0, -1) - centre, axis=-1)
    assert_array_equal(paint(NeuronTree([centre], [radius], [-1], unit="voxel"), (18, 18, 18)), away <= radius)


def test_axes_are_treated_alike():
    painted = paint(tube((9, 8, 5), (20, 11, 25)), (30, 20, 32))
    turned = paint(tube((5, 9, 8), (25, 20, 11)), (32, 30, 20))
    assert_array_equal(turned, painted.transpose(2, 0, 1))


def test_a_neurite_thinner_than_a_voxel_stays_in_one_piece():
    thin = NeuronTree([[2.5, 1.3, 1.2], [9.5, 30.4, 60.1]], [0.1, 0.1], [-1, 0], unit="um", spacing_um=(1.0, 0.5, 0.25))
    painted = paint(thin, (12, 64, 256))
    assert ndimage.label(painted, np.ones((3, 3, 3)))[1] == 1
    assert painted.any(axis=(0, 1)).sum() > 230


def test_radii_are_held_between_the_bounds_along_every_axis():
    long = dict(start=(20, 20, 10), end=(20, 20, 90), unit="voxel", spacing_um=(3.0, 1.0, 1.0))
    thick = paint(tube(radii=(9.0, 9.0), **long), (41, 41, 100), max_radius_vox=3.0)[:, :, 50]
    assert_array_equal(np.ptp(np.argwhere(thick), axis=0), [2, 6])
    thin = paint(tube(radii=(0.2, 0.2), **long), (41, 41, 100), min_radius_vox=2.0)[:, :, 50]
    assert_array_equal(np.ptp(np.argwhere(thin), axis=0), [4, 4])


def test_parts_outside_the_stack_are_left_out():
    whole = paint(tube((10, 10, 10), (10, 10, 50)), (20, 20, 60))
    corner = paint(tube((10, 10, -20), (10, 10, 20)), (20, 20, 30))
    assert_array_equal(corner, whole[:, :, 30:])
    assert not paint(tube((90, 90, 90), (99, 99, 99)), (20, 20, 30)).any()
    assert not paint(NeuronTree.empty("voxel"), (4, 5, 6)).any()


def test_a_tree_of_unknown_size_in_voxels_is_refused():
    with pytest.raises(ValueError, match="spacing"):
        paint(tube((1, 1, 1), (2, 2, 2), unit="um"), (4, 4, 4))


def test_labels_are_neurite_and_background():
    labels = training_labels(tube((16, 16, -20), (16, 16, 60), radii=(2.0, 2.0)), (32, 32, 40))
    assert labels.dtype == np.int8
    assert set(np.unique(labels)) == {0, 1}
    assert_array_equal(labels[16, 16:20, 20], [1, 1, 1, 0])


def test_what_a_soma_has_beyond_the_largest_radius_is_ignored():
    soma = NeuronTree([[20.0, 20.0, 20.0]], [10.0], [-1], unit="voxel")
    labels = training_labels(soma, (40, 40, 40), max_radius_vox=2.5)
    assert_array_equal(labels[20, 20, [20, 22, 23, 30, 31, 32]], [1, 1, -100, -100, 0, 0])


@pytest.mark.parametrize("unit_is_off_by", [10, 1000])
def test_radii_in_another_unit_leave_the_background_to_learn_from(unit_is_off_by):
    """um for voxels, or nm: by them the neuron would fill its stack, which then would all be ignored."""
    shape, right = (24, 64, 96), tube((12, 32, 8), (12, 30, 90), radii=(2.0, 1.0), spacing_um=(2.0, 1.0, 1.0))
    wrong = NeuronTree(right.points, right.radii * unit_is_off_by, right.parents, unit="voxel", spacing_um=(2, 1, 1))
    assert radii_fit(right, shape)
    assert not radii_fit(wrong, shape)
    labels = training_labels(wrong, shape)
    assert (labels == -100).mean() < 0.05
    assert labels[12, 31, 50] == 1
    assert radii_fit(NeuronTree([[12, 32, 30]], [20.0], [-1], unit="voxel"), shape)  # a soma may be wide


@pytest.mark.parametrize("radius", [0.0, 1.0])
def test_radii_that_say_nothing_paint_the_floor(radius):
    plain = tube((16, 16, 5), (16, 20, 30), radii=(radius, radius))
    floor = tube((16, 16, 5), (16, 20, 30), radii=(1.5, 1.5))
    options = {"shape": (32, 32, 40), "min_radius_vox": 1.5}
    assert_array_equal(training_labels(plain, **options), training_labels(floor, **options))


def test_a_node_that_comes_twice_changes_nothing():
    once = tube((16, 16, 5), (16, 20, 30))
    twice = NeuronTree(once.points[[0, 0, 1]], once.radii[[0, 0, 1]], [-1, 0, 1], unit="voxel")
    assert_array_equal(training_labels(twice, (32, 32, 40)), training_labels(once, (32, 32, 40)))


def test_untraced_structure_is_ignored_but_never_over_the_neurite():
    untraced = np.zeros((32, 32, 40), bool)
    untraced[10:20] = True
    labels = training_labels(tube((16, 16, 5), (16, 16, 30)), untraced.shape, untraced=untraced)
    assert labels[12, 2, 2] == -100
    assert labels[16, 16, 20] == 1
    assert labels[25, 2, 2] == 0
    with pytest.raises(ValueError, match=r"\(3, 3, 3\)"):
        training_labels(tube((16, 16, 5), (16, 16, 30)), (32, 32, 40), untraced=np.zeros((3, 3, 3), bool))


def test_codes_of_a_partial_annotation_become_labels():
    codes = np.array([[[0, 1, 2], [3, 4, 2]]], np.uint16)
    labels = labels_from_codes(codes)
    assert labels.dtype == np.int8
    assert_array_equal(labels, [[[-100, 0, 1], [0, -100, 1]]])
    assert_array_equal(labels_from_codes(codes, {0: 0, 1: 0, 2: 1, 3: 1, 4: -100}), [[[0, 0, 1], [1, -100, 1]]])
    with pytest.raises(ValueError, match=r"the label volume holds the codes \[2, 3, 4\]; known are \[0, 1\]"):
        labels_from_codes(codes, {0: 0, 1: 1})


@pytest.mark.parametrize("low, high", [(0, 255), (0, 1), (1, 2), (0.0, 0.5), (False, True)])
def test_of_two_values_in_a_mask_the_higher_is_neurite(low, high):
    inside = np.zeros((4, 5, 6), bool)
    inside[1, 2:4, 1:5] = True
    assert_array_equal(labels_from_mask(np.where(inside, high, low)), inside)
    with pytest.raises(ValueError, match="93% of the stack is neurite; is it inverted"):
        labels_from_mask(np.where(inside, low, high))


def test_ids_on_a_background_of_0_are_a_mask_and_grey_levels_are_none():
    ids = np.zeros((4, 5, 6), np.uint16)
    ids[1, 2, 1:4] = (3, 3, 9)
    assert_array_equal(labels_from_mask(ids), ids > 0)
    for grey in (ids + 1, ids / 10):
        with pytest.raises(ValueError, match="a mask holds whole numbers, 0 among them, or two values"):
            labels_from_mask(grey)
