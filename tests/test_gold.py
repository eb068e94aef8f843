"""A gold that was moved is found again; one that lies elsewhere is told apart; untraced neurites are seen."""

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from vit3d.annotations.gold import (
    align_gold,
    check_bounds,
    estimate_shift,
    lies_on_image,
    likely_cause,
    untraced_structure,
)
from vit3d.simulate import simulate_neuron
from vit3d.targets import paint
from vit3d.tree import NeuronTree, read_swc
from vit3d.volume import Volume, read_volume

SHAPE = (32, 96, 112)
NEURONS = ("OP_1", "OP_3", "OP_4", "OP_5", "OP_6", "OP_7")


@pytest.fixture(scope="module")
def neuron() -> tuple[Volume, NeuronTree]:
    """A stack and its tree in voxels."""
    volume, tree = simulate_neuron(seed=2, shape=SHAPE)
    return volume, tree.to("voxel")


@pytest.mark.parametrize("moved_vox", [(0, 0, 0), (1, -1.5, 2), (-2, 2.5, -0.5), (0.75, -1.25, 0.25)])
def test_a_shifted_tree_is_found_again(neuron, moved_vox):
    volume, tree = neuron
    shift = estimate_shift(tree.shifted(moved_vox), volume, step_vox=0.25)
    assert_allclose(shift, -np.array(moved_vox), atol=0.25)


def test_a_straight_trace_that_was_moved_off_its_neurite_is_found_again():
    image = np.zeros((9, 40, 60), np.uint8)
    image[4, 20, 5:55] = 200
    trace = NeuronTree(np.array([[4.0, 17.0, 5.0], [4.0, 17.0, 54.0]]), np.ones(2), np.array([-1, 0]), unit="voxel")
    assert_array_equal(estimate_shift(trace, Volume(image)), (0, 3, 0))
    assert_array_equal(estimate_shift(trace.shifted((0, -1, 0)), Volume(image)), (0, 3, 0))  # at most


def test_dark_neurites_and_trees_in_um_give_the_same_shift(neuron):
    volume, tree = neuron
    dark = Volume(255 - volume.voxels, volume.spacing_um)
    moved = tree.shifted((1.0, -1.5, 2.0))
    assert_array_equal(estimate_shift(moved, dark, polarity="dark"), (-1.0, 1.5, -2.0))
    assert_array_equal(estimate_shift(moved.to("um"), volume), (-1.0, 1.5, -2.0))
    with pytest.raises(ValueError, match="'grey'"):
        estimate_shift(moved, volume, polarity="grey")


def test_an_aligned_tree_lies_where_it_belongs_in_its_own_unit(neuron):
    volume, tree = neuron
    moved = tree.shifted((0.0, -1.5, 1.0)).to("um")
    aligned, shift_vox = align_gold(moved, volume)
    assert_array_equal(shift_vox, (0.0, 1.5, -1.0))
    assert aligned.unit == "um"
    assert_allclose(aligned.to("voxel").points, tree.points, atol=1e-9)


def test_a_shift_below_half_a_voxel_is_not_applied(neuron):
    volume, tree = neuron
    aligned, shift_vox = align_gold(tree, volume)
    assert aligned is tree
    assert_array_equal(shift_vox, np.zeros(3))


def test_a_shift_of_half_a_voxel_is_applied(neuron):
    volume, tree = neuron
    aligned, shift_vox = align_gold(tree.shifted((0, 0.5, 0)), volume)
    assert_array_equal(shift_vox, (0, -0.5, 0))
    assert_allclose(aligned.points, tree.points)


def test_no_nodes_and_constant_images_give_no_shift(neuron):
    volume, tree = neuron
    assert_array_equal(estimate_shift(NeuronTree.empty("voxel"), volume), np.zeros(3))
    assert_array_equal(estimate_shift(tree, Volume(np.full(SHAPE, 7, np.uint8))), np.zeros(3))


@pytest.mark.parametrize("name", NEURONS)
def test_the_op_neurons_have_their_known_shifts(shared, name):
    known = json.loads((shared / "data/op/gold_shift.json").read_text())[name]
    volume = read_volume(shared / f"data/op/{name}.tif")
    gold = read_swc(shared / f"data/op/{name}.swc", unit="voxel")
    assert_allclose(estimate_shift(gold, volume), known, atol=0.5)


def test_a_flip_is_told_from_a_gold_that_lies_on_its_image(neuron):
    volume, tree = neuron
    assert lies_on_image(tree.shifted((0, 2, -1)), volume)
    assert likely_cause(tree, volume) == "The trace lies on the image."
    flipped = tree.flipped(1, SHAPE[1] - 1)
    assert not lies_on_image(flipped, volume)
    mended = "y is flipped (y -> 95 - y): `vit3d convert --unit voxel --flip y:95` does that."
    assert likely_cause(flipped, volume) == f"The trace does not lie on the image as it is; it does when {mended}"


def test_a_flip_is_seen_in_a_small_stack_full_of_neurites():
    """Anything lies on something bright there; but not as well as where it belongs."""
    volume, tree = simulate_neuron(seed=3, shape=(12, 64, 72))
    assert lies_on_image(tree, volume)
    assert not lies_on_image(tree.to("voxel").flipped(1, 63), volume)
    assert "y is flipped (y -> 63 - y)" in likely_cause(tree.to("voxel").flipped(1, 63), volume)


def test_a_trace_in_a_background_without_noise_is_not_taken_for_one_of_the_brightest():
    """All voxels there are as bright as each other: that is the middle, not the top."""
    image = np.zeros((9, 60, 60), np.uint8)
    image[4, 10, 5:55] = 200
    trace = NeuronTree(np.array([[4.0, 40.0, 5.0], [4.0, 40.0, 54.0]]), np.ones(2), np.array([-1, 0]), unit="voxel")
    assert lies_on_image(trace.shifted((0, -30, 0)), Volume(image))
    assert not lies_on_image(trace, Volume(image))


def test_an_swc_outside_its_stack_is_named_with_its_farthest_node(neuron):
    _, tree = neuron
    check_bounds(tree, SHAPE, "cell")
    edge = NeuronTree([[-3, 0, 0], [SHAPE[0] + 2, 95, 111]], [1, 1], [-1, 0], unit="voxel")
    check_bounds(edge, SHAPE, "cell")  # no further than an alignment may move it
    beyond = NeuronTree([[0, -3.5, 0], [0, 50, 111 + 20]], [1, 1], [-1, 0], unit="voxel", spacing_um=(1, 0.5, 0.5))
    sentence = (
        r"^cell: 2 of 2 SWC nodes lie outside the stack of 32 x 96 x 112 voxels \(z, y, x\), the farthest at x = 131\.0"
    )
    above = NeuronTree([[0, 0, 0], [0, SHAPE[1] + 2.5, 0]], [1, 1], [-1, 0], unit="voxel")
    with pytest.raises(ValueError, match=r"1 of 2 SWC nodes .* the farthest at y = 98\.5"):
        check_bounds(above, SHAPE, "cell")
    for one in (beyond, beyond.to("um")):
        with pytest.raises(ValueError, match=sentence):
            check_bounds(one, SHAPE, "cell")


def test_other_causes_are_named(neuron):
    volume, tree = neuron
    in_um = tree.to("um", volume.spacing_um)
    as_voxels = NeuronTree(in_um.points, in_um.radii, in_um.parents, unit="voxel")
    assert "read as um: a line `# unit: um` in the SWC says so." in likely_cause(as_voxels, volume)
    assert "taken as dark" in likely_cause(tree, Volume(255 - volume.voxels, volume.spacing_um))
    swapped = NeuronTree(tree.points[:, [0, 2, 1]], tree.radii, tree.parents, unit="voxel")
    assert "y and x are swapped" in likely_cause(swapped, volume)
    noise = Volume(np.random.default_rng(0).integers(0, 255, SHAPE, np.uint8))
    assert "belongs to this image" in likely_cause(tree, noise)
    assert not lies_on_image(NeuronTree.empty("voxel"), volume)


@pytest.mark.parametrize("noise", [0, 8])
def test_a_neurite_without_gold_is_untraced_and_noise_is_not(noise):
    traced = NeuronTree([[10, 12, 4], [10, 12, 90]], [4, 4], [-1, 0], unit="voxel")
    missing = NeuronTree([[20, 44, 4], [20, 50, 90]], [2, 2], [-1, 0], unit="voxel")
    image = 150.0 * (paint(traced, (32, 64, 96)) | paint(missing, (32, 64, 96)))
    image[28:30, 10:12, 50:52] = 255  # a speck
    image += np.random.default_rng(0).normal(20 * (noise > 0), noise, image.shape)
    volume = Volume(np.clip(image, 0, 255).astype(np.uint8))
    untraced = untraced_structure(traced, volume)
    assert untraced[paint(missing, untraced.shape)].mean() > 0.9
    assert not untraced[:, :30].any()
    assert untraced.sum() < 4 * paint(missing, untraced.shape).sum()
    both = NeuronTree(np.concatenate([traced.points, missing.points]), np.full(4, 2.0), [-1, 0, -1, 2], unit="voxel")
    assert not untraced_structure(both, volume).any()
    assert_array_equal(untraced_structure(traced, Volume(255 - volume.voxels), polarity="dark"), untraced)


def test_a_neurite_without_gold_may_be_as_dim_as_the_dimmest_that_has_one():
    shape, image = (32, 64, 96), np.zeros((32, 64, 96), np.uint8)
    bright, dim, missing = (
        NeuronTree([[10, y, 4], [10, y, x]], [2, 2], [-1, 0], unit="voxel") for y, x in ((12, 90), (30, 25), (50, 90))
    )
    for tree, level in ((bright, 250), (dim, 80), (missing, 80)):
        image[paint(tree, shape)] = level
    untraced = untraced_structure(NeuronTree.together([bright, dim]), Volume(image))
    assert untraced[10, 50, 4:90].mean() > 0.9


@pytest.mark.parametrize(("min_voxels", "seen"), [(100, True), (200, False)])
def test_a_piece_of_too_few_voxels_is_noise(min_voxels, seen):
    image = np.zeros((32, 64, 96), np.uint8)
    image[20:22, 40:43, 50:52] = 60  # blurred, some 150 voxels are bright
    found = untraced_structure(NeuronTree.empty("voxel"), Volume(image), min_voxels=min_voxels)
    assert found.any() == seen


def test_noise_alone_holds_no_structure():
    noise = np.clip(np.random.default_rng(0).normal(120, 35, (32, 64, 96)), 0, 255).astype(np.uint8)
    assert not untraced_structure(NeuronTree.empty("voxel"), Volume(noise)).any()
    assert not untraced_structure(NeuronTree.empty("voxel"), Volume(np.full((8, 16, 16), 9, np.uint8))).any()


@pytest.mark.slow
def test_the_untraced_axon_of_op_5_is_seen(shared):
    """The gold begins at x = 190; the axon goes on to (z, y, x) = (10, 390, 137)."""
    volume = read_volume(shared / "data/op/OP_5.tif")
    gold, _ = align_gold(read_swc(shared / "data/op/OP_5.swc", unit="voxel"), volume)
    untraced = untraced_structure(gold, volume)
    assert untraced[:, 300:400, 120:180].any(axis=(0, 2)).all()
    assert untraced.mean() < 0.002
