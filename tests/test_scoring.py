"""Scores one can work out by hand, and what must hold for any pair."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from vit3d.comparison import compare
from vit3d.morphometry import path_sums
from vit3d.scoring import score_forest, score_masks, score_trees
from vit3d.tree import NeuronTree, read_swc
from vit3d.volume import Volume

SPACING_UM = (2.0, 0.5, 0.5)


def path(*points, unit="voxel", spacing_um=None) -> NeuronTree:
    """One unbranched neurite through the points (z, y, x)."""
    return NeuronTree(points, np.ones(len(points)), np.arange(len(points)) - 1, unit=unit, spacing_um=spacing_um)


def line(length: float = 100, y: float = 0, **more) -> NeuronTree:
    return path((0, y, 0), (0, y, length), **more)


def together(*trees: NeuronTree) -> NeuronTree:
    """Several trees as one forest."""
    return NeuronTree.together(trees)


def tee(**more) -> NeuronTree:
    """A shaft of 100 along x with an arm of 30 along y at its middle."""
    points = [(0, 0, 0), (0, 0, 50), (0, 0, 100), (0, 30, 50)]
    return NeuronTree(points, np.ones(4), [-1, 0, 1, 1], unit="voxel", **more)


def random_tree(seed: int, size: int = 60) -> NeuronTree:
    rng = np.random.default_rng(seed)
    parents = np.array([-1, *(rng.integers(max(0, i - 3), i) for i in range(1, size))])
    points = np.zeros((size, 3))
    for row in range(1, size):
        points[row] = points[parents[row]] + 4 * rng.normal(size=3)
    return NeuronTree(points, np.ones(size), parents, unit="voxel")


# --- distances ---


@pytest.mark.parametrize("tree", [tee(spacing_um=SPACING_UM), random_tree(0), path((1, 2, 3)), line()])
def test_a_tree_against_itself_is_perfect(tree):
    scores = score_trees(tree, tree)
    for name in ("precision", "recall", "f1", "branch_f1", "tip_f1"):
        assert scores[name] == 1, name
    for name in (
        "esa",
        "dsa",
        "pds",
        "distance_max",
        "missing_length_vox",
        "surplus_length_vox",
        "corrections",
    ):
        assert scores[name] == 0, name


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.99])
def test_a_straight_neurite_shifted_sideways_by_d_has_distance_d(shift):
    scores = score_trees(line(y=shift), line())
    assert_allclose([scores["esa"], scores["distance_max"]], shift)
    assert (scores["f1"], scores["dsa"], scores["pds"]) == (1, 0, 0)


@pytest.mark.parametrize("direction", [(0, 1, 0), (1, 0, 0), (0, 0.6, 0.8)])
def test_a_shift_by_exactly_the_threshold_is_far(direction):
    along = np.cross(direction, (0, 0, 1) if direction[2] == 0 else (1, 0, 0)) * 50
    gold, shift = path((0, 0, 0), along), 2 * np.array(direction)
    scores = score_trees(gold.shifted(shift), gold)
    assert (scores["precision"], scores["recall"], scores["f1"], scores["pds"]) == (0, 0, 0, 1)
    assert_allclose([scores["esa"], scores["dsa"]], 2)
    assert score_trees(gold.shifted(0.9999 * shift), gold)["f1"] == 1
    in_um = [tree.to("um", (1, 0.33, 0.33)) for tree in (gold.shifted(shift), gold)]
    assert score_trees(*in_um)["f1"] == 0


def test_distances_are_to_segments_and_not_to_nodes():
    dense = path(*[(0, 1, x) for x in range(101)])
    assert_allclose(score_trees(dense, line())["esa"], 1)


@pytest.mark.parametrize(("length", "samples"), [(0.4, 1), (1.4, 2), (1.5, 3), (2.49, 3), (10, 11), (10.5, 12)])
def test_an_edge_of_length_l_has_int_of_one_plus_l_plus_half_samples(length, samples):
    # Beside a matching line of 101 samples, the samples of a far edge are what lowers the precision.
    gold = line(length)
    far = line(length, y=50)
    scores = score_trees(together(far, line(100)), line(100))
    assert_allclose(scores["precision"], 101 / (101 + samples))
    assert score_trees(far, gold)["pds"] == 1


def test_dsa_averages_the_directions_that_have_far_points():
    # Gold 0..100, predicted 0..103: only the prediction has far samples, x = 102 and 103, 2 and 3 away.
    longer = path((0, 0, 0), (0, 0, 103))
    scores = score_trees(longer, line())
    assert_allclose(scores["dsa"], 2.5)
    assert_allclose(scores["precision"], 102 / 104)
    assert scores["recall"] == 1
    assert_allclose(scores["pds"], (2 / 104) / 2)
    assert_allclose(scores["esa_predicted_to_gold"], (1 + 2 + 3) / 104)
    assert_allclose(scores["esa"], (1 + 2 + 3) / 104 / 2)
    assert scores["distance_max"] == 0
    # With a gold longer by 4 at its start, its far samples are 2, 3 and 4 away: the mean of 2.5 and 3.
    both = score_trees(longer, path((0, 0, -4), (0, 0, 100)))
    assert_allclose(both["dsa"], (2.5 + 3) / 2)


def test_both_orders_agree():
    one, other = random_tree(0), random_tree(1)
    forth, back = score_trees(one, other), score_trees(other, one)
    for name in ("f1", "esa", "dsa", "pds", "distance_max", "branch_f1", "tip_f1"):
        assert_allclose(forth[name], back[name], err_msg=name)
    for name, mirror in (("precision", "recall"), ("missing_length_vox", "surplus_length_vox")):
        assert_allclose(forth[name], back[mirror])
    assert (forth["wrong_joins"], forth["missed_joins"]) == (back["missed_joins"], back["wrong_joins"])


def test_scores_do_not_depend_on_the_root_or_the_order_of_nodes():
    one, other = tee(), tee().shifted((0, 1.2, 0.7))
    expected = score_trees(one, other)
    moved = one.rerooted(3).take(np.array([2, 0, 3, 1]))
    for name, value in score_trees(moved, other).items():
        assert_allclose(value, expected[name], err_msg=name)


# --- units ---


def test_thresholds_are_voxels_whatever_the_unit():
    gold, predicted = tee(spacing_um=SPACING_UM), tee(spacing_um=SPACING_UM).shifted((0, 1.5, 0))
    expected = score_trees(predicted, gold)
    for one, other in (
        (predicted.to("um"), gold),
        (predicted, gold.to("um")),
        (predicted.to("um"), gold.to("um")),
    ):
        scores = score_trees(one, other)
        assert scores.keys() == expected.keys()
        assert_allclose(list(scores.values()), list(expected.values()), atol=1e-9)
    assert_allclose(scores["gold_length_um"], 65)
    assert_allclose(scores["gold_length_vox"], 130)


def test_the_spacing_of_either_tree_serves_both():
    um = tee(spacing_um=SPACING_UM).to("um")
    assert score_trees(um, tee())["f1"] == 1
    assert score_trees(tee(), um)["f1"] == 1
    assert "gold_length_um" not in score_trees(tee(), tee())


def test_units_that_do_not_fit_are_refused_with_the_flag_to_add():
    with pytest.raises(ValueError, match="--predicted-unit"):
        score_trees(line(unit=None), line())
    with pytest.raises(ValueError, match="--gold-unit"):
        score_trees(line(unit="um"), line(unit=None))
    with pytest.raises(ValueError, match="--spacing"):
        score_trees(line(unit="um"), line(unit="um"))
    with pytest.raises(ValueError, match="spacing"):
        score_trees(line(spacing_um=(1, 1, 1)), line(spacing_um=(1, 1, 2)))
    with pytest.warns(UserWarning, match="both are taken as voxels"):
        assert score_trees(line(unit=None, spacing_um=(1, 1, 1)), line(unit=None))["f1"] == 1


# --- nothing there ---


def test_a_gold_without_nodes_and_a_threshold_of_nothing_are_refused():
    with pytest.raises(ValueError, match="gold tree has no nodes"):
        score_trees(line(), NeuronTree.empty("voxel"))
    for threshold in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="`threshold`"):
            score_trees(line(), line(), threshold=threshold)


def test_an_empty_prediction_recalls_nothing():
    scores = score_trees(NeuronTree.empty("um", SPACING_UM), tee(spacing_um=SPACING_UM))
    assert [scores[name] for name in ("precision", "recall", "f1", "branch_f1", "tip_f1")] == [0] * 5
    assert [scores[name] for name in ("esa", "dsa", "distance_max")] == [np.inf] * 3
    assert scores["pds"] == 1
    assert scores["missing_length_um"] == scores["gold_length_um"] == 65
    assert scores["predicted_length_um"] == 0
    assert scores["missing_branches"] == 3  # one for each end


def test_single_nodes_are_points():
    assert score_trees(path((0, 1, 50)), line())["precision"] == 1
    assert score_trees(path((0, 3, 50)), line())["precision"] == 0
    scores = score_trees(line(), path((0, 0, 50)))
    assert scores["recall"] == 1
    assert_allclose(scores["precision"], 3 / 101)


# --- points, lengths, corrections ---


def test_branch_points_and_tips_are_matched_one_to_one():
    scores = score_trees(tee().shifted((0, 0, 3)), tee())
    assert (scores["branch_f1"], scores["tip_f1"]) == (1, 1)
    assert score_trees(tee().shifted((0, 0, 4.1)), tee())["branch_f1"] == 0
    assert score_trees(tee().shifted((0, 0, 3)), tee(), point_tolerance=2.9)["branch_f1"] == 0
    twin = together(tee(), tee().shifted((0, 1, 0)))
    scores = score_trees(twin, tee())
    assert (scores["branch_precision"], scores["branch_recall"]) == (0.5, 1)
    assert (scores["tip_precision"], scores["tip_recall"]) == (0.5, 1)


def test_a_soma_is_neither_branch_point_nor_cable():
    points = [(0, 0, 0), (0, 0, 40), (0, 40, 0), (0, -40, 0)]
    tree = NeuronTree(points, [10, 1, 1, 1], [-1, 0, 0, 0], [1, 3, 3, 3], "voxel")
    scores = score_trees(tree, tree)
    assert scores["gold_length_vox"] == 90
    bare = NeuronTree(points, [10, 1, 1, 1], [-1, 0, 0, 0], None, "voxel")
    assert score_trees(bare, tree)["branch_precision"] == 0
    assert score_trees(tree, tree)["branch_precision"] == 1


def test_a_soma_at_an_end_is_no_tip():
    gold, elsewhere = (
        NeuronTree([soma, (0, 0, 50)], [5, 1], [-1, 0], [1, 3], "voxel") for soma in ((0, 0, 0), (0, 30, 0))
    )
    assert score_trees(elsewhere, gold)["tip_f1"] == 1


def test_a_missing_arm_is_missing_length_and_one_correction():
    scores = score_trees(line(spacing_um=SPACING_UM), tee())
    assert_allclose(scores["missing_length_vox"], 28.5)  # from distance 1.5, half of the piece between 1 and 2, on
    assert_allclose(scores["missing_length_um"], 14.25)
    assert scores["surplus_length_vox"] == 0
    assert (scores["missing_branches"], scores["surplus_branches"], scores["corrections"]) == (1, 0, 1)
    assert_allclose(scores["corrections_per_mm"], 1 / 0.065)


def test_a_surplus_arm_is_surplus_length_and_one_correction():
    scores = score_trees(tee(), line())
    assert_allclose(scores["surplus_length_vox"], 28.5)
    assert (scores["missing_branches"], scores["surplus_branches"], scores["corrections"]) == (0, 1, 1)


def test_a_far_run_shorter_than_the_threshold_needs_no_correction():
    stub = NeuronTree([(0, 0, 0), (0, 0, 50), (0, 0, 100), (0, 4, 50)], np.ones(4), [-1, 0, 1, 1], unit="voxel")
    scores = score_trees(stub, line())  # far from y = 2 to y = 4: two voxels of cable
    assert (scores["surplus_length_vox"], scores["surplus_branches"]) == (2.5, 0)
    assert score_trees(stub, line(), threshold=1.9)["surplus_branches"] == 1


def test_a_missing_bush_counts_each_of_its_tips_and_a_gap_counts_once():
    bush = NeuronTree(
        [(0, 0, 0), (0, 0, 50), (0, 0, 100), (0, 30, 50), (0, 40, 40), (0, 40, 60)],
        np.ones(6), [-1, 0, 1, 1, 3, 3], unit="voxel",
    )  # fmt: skip
    assert score_trees(line(), bush)["missing_branches"] == 2
    gap = together(line(40), line(40).shifted((0, 0, 60)))
    scores = score_trees(gap, line())
    assert (scores["missing_branches"], scores["missed_joins"], scores["corrections"]) == (1, 0, 1)


def test_a_hop_from_one_neurite_to_its_neighbour_is_a_wrong_and_a_missed_join():
    crossing = [path((0, 0, 0), (0, 100, 100)), path((0, 100, 0), (0, 0, 100))]
    gold = together(*crossing)
    swapped = together(path((0, 0, 0), (0, 50, 50), (0, 0, 100)), path((0, 100, 0), (0, 50, 50), (0, 100, 100)))
    scores = score_trees(swapped, gold)
    assert scores["f1"] == 1
    assert (scores["wrong_joins"], scores["missed_joins"], scores["corrections"]) == (2, 2, 4)
    merged = NeuronTree(
        [(0, 50, 50), (0, 0, 0), (0, 100, 100), (0, 100, 0), (0, 0, 100)],
        np.ones(5), [-1, 0, 0, 0, 0], unit="voxel",
    )  # fmt: skip
    scores = score_trees(merged, gold)
    assert (scores["wrong_joins"], scores["missed_joins"]) == (1, 0)


def test_a_hop_is_seen_where_neurites_cross_at_a_small_angle():
    middle, away = np.array([0, 0, 100]), 100 * np.array([0, np.sin(np.radians(35)), np.cos(np.radians(35))])
    along, up = np.array([0, 0, 100]), np.array([1, 0, 0])
    ends = [middle - along, middle + along, middle + up - away, middle + up + away]
    gold = together(path(*ends[:2]), path(*ends[2:]))
    swapped = together(path(ends[0], middle, middle + up, ends[3]), path(ends[2], middle + up, middle, ends[1]))
    scores = score_trees(swapped, gold)
    assert (scores["f1"], scores["wrong_joins"], scores["missed_joins"]) == (1, 2, 2)


def test_a_neurite_cut_without_a_gap_is_a_missed_join():
    cut = together(line(50), line(50).shifted((0, 0, 50.5)))
    scores = score_trees(cut, line())
    assert (scores["wrong_joins"], scores["missed_joins"], scores["corrections"]) == (0, 1, 1)


def test_close_parallel_neurites_are_no_wrong_joins():
    gold = path((0, 0, 0), (0, 0, 100), (0, 1.5, 100), (0, 1.5, 0))  # a hairpin narrower than the threshold
    noisy = path(*[(0, y + 0.7 * (x % 2), x) for y, xs in ((0, range(101)), (1.5, range(100, -1, -1))) for x in xs])
    scores = score_trees(noisy, gold)
    assert (scores["f1"], scores["wrong_joins"], scores["missed_joins"]) == (1, 0, 0)


@pytest.mark.parametrize("name", ["OP_1", "OP_3", "OP_4", "OP_5", "OP_6", "OP_7"])
def test_a_real_neuron_with_half_a_voxel_of_jitter_needs_no_correction(shared, name):
    gold = read_swc(shared / "data" / "op" / f"{name}.swc", unit="voxel")
    jitter = 0.4 * np.random.default_rng(0).normal(size=gold.points.shape)
    scores = score_trees(NeuronTree(gold.points + jitter, gold.radii, gold.parents, unit="voxel"), gold)
    assert scores["f1"] > 0.999
    assert scores["corrections"] == 0
    assert (scores["branch_f1"], scores["tip_f1"]) == (1, 1)


def test_the_shift_of_op_6_costs_what_is_known(shared):
    gold = read_swc(shared / "data" / "op" / "OP_6.swc", unit="voxel")
    shift = json.loads((shared / "data" / "op" / "gold_shift.json").read_text())["OP_6"]
    distance = np.linalg.norm(shift)
    scores = score_trees(gold.shifted(shift), gold)
    assert scores["f1"] == 1
    assert 0.6 * distance < scores["esa"] <= distance


@pytest.mark.slow
def test_a_million_nodes_in_thousands_of_branches_score_in_seconds():
    count, length, rng = 5000, 200, np.random.default_rng(0)
    headings = np.cumsum(0.1 * rng.normal(size=(count, length, 3)), axis=1) + rng.normal(size=(count, 1, 3))
    steps = headings / np.linalg.norm(headings, axis=2, keepdims=True)
    parents = np.arange(count * length) - 1
    starts = np.arange(1, count) * length
    parents[starts] = rng.integers(0, starts)
    grown = NeuronTree(steps.reshape(-1, 3), np.ones(count * length), parents, unit="voxel", spacing_um=SPACING_UM)
    gold = replace(grown, points=np.stack([path_sums(grown, along) for along in grown.points.T], axis=1))
    predicted = replace(gold, points=gold.points + 0.5 * rng.normal(size=gold.points.shape))
    start = time.process_time()
    scores = score_trees(predicted, gold)
    assert time.process_time() - start < 60  # under 10 s on two idle cores
    assert scores["f1"] > 0.999


# --- masks ---


def tube(y: int = 10, shape=(9, 30, 60), radius: int = 2) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[4 - radius : 5 + radius, y - radius : y + radius + 1, 5:55] = True
    return mask


def test_masks_score_by_hand():
    gold, predicted = np.zeros((2, 4, 4), bool), np.zeros((2, 4, 4), bool)
    gold[0, 0], predicted[0, 0, :2], predicted[1, 0, :2] = True, True, True
    scores = score_masks(predicted, gold)
    assert_allclose([scores[n] for n in ("dice", "iou", "precision", "recall")], [0.5, 1 / 3, 0.5, 0.5])


def test_a_mask_against_itself_is_perfect_and_two_empty_ones_agree():
    for mask in (tube(), np.zeros((3, 4, 5), bool)):
        scores = score_masks(mask, mask, spacing_um=SPACING_UM)
        assert [scores[n] for n in ("dice", "iou", "precision", "recall", "cldice")] == [1] * 5
        assert (scores["hd95_vox"], scores["hd95_um"]) == (0, 0)


def test_one_empty_mask_scores_zero_at_an_infinite_distance():
    for scores in (score_masks(tube(), np.zeros_like(tube())), score_masks(np.zeros_like(tube()), tube())):
        assert [scores[n] for n in ("dice", "iou", "precision", "recall", "cldice")] == [0] * 5
        assert scores["hd95_vox"] == np.inf


def test_cldice_forgives_a_thinner_tube_and_dice_does_not():
    scores = score_masks(tube(radius=1), tube(radius=2))
    assert scores["cldice"] > 0.95
    assert scores["dice"] < 0.6


def test_a_tube_shifted_by_d_has_hausdorff_distance_d():
    scores = score_masks(tube(13), tube(10), spacing_um=(2.0, 0.5, 0.5))
    assert_allclose([scores["hd95_vox"], scores["hd95_um"]], [3, 1.5])


def test_the_hausdorff_distance_sees_what_is_missing_and_what_is_surplus():
    half = tube()
    half[:, :, 30:] = False
    assert 20 < score_masks(half, tube())["hd95_vox"] < 25
    assert 20 < score_masks(tube(), half)["hd95_vox"] < 25


def test_outside_the_evaluation_mask_nothing_counts():
    wrong = tube()
    wrong[:, 20:] = True
    evaluate = np.ones(wrong.shape, bool)
    evaluate[:, 20:] = False
    assert score_masks(wrong, tube(), evaluate=evaluate) == score_masks(tube(), tube())
    assert score_masks(wrong, tube())["precision"] < 0.5


def test_masks_may_be_volumes_and_bring_their_spacing():
    scores = score_masks(Volume(tube(13)), Volume(255 * tube(10).astype(np.uint8), (2.0, 0.5, 0.5)))
    assert_allclose(scores["hd95_um"], 1.5)


def test_masks_of_different_voxels_are_refused_unless_a_size_is_given():
    mask = np.zeros((4, 5, 6), bool)
    mask[2, 2, 1:5] = True
    one, other = Volume(mask, (1.0, 0.5, 0.5)), Volume(mask, (5.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"one spacing; .*\(1.0, 0.5, 0.5\) and \(5.0, 1.0, 1.0\)"):
        score_masks(one, other)
    assert score_masks(one, other, spacing_um=SPACING_UM)["dice"] == 1


def test_of_two_values_the_lower_one_is_background_whatever_they_are():
    labels = np.where(tube(), 2, 1).astype(np.uint8)  # as ilastik writes them
    assert score_masks(labels, np.where(tube(), 255, 0))["dice"] == 1
    assert score_masks(labels, ~tube())["dice"] == 0


def test_masks_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        score_masks(tube(), tube()[1:])
    with pytest.raises(ValueError, match="one shape"):
        score_masks(tube(), tube(), evaluate=tube()[1:])
    with pytest.raises(ValueError, match="predicted mask must hold two values"):
        score_masks(np.linspace(0, 1, tube().size).reshape(tube().shape), tube())
    with pytest.raises(ValueError, match="gold mask must hold two values"):
        score_masks(tube(), np.where(tube(), np.nan, 0))


def test_trees_that_cross_once_are_told_to_hardly_meet():
    with pytest.warns(UserWarning, match="a: the trees have hardly a place in common; do their units"):
        compare("a", line(), path((0, -50, 50), (0, 50, 50)), 2.0)


# --- several trees against labels ---


def two_lines() -> tuple[list[NeuronTree], np.ndarray]:
    """Gold neurites of length 100 at y = 5 and y = 15, each under its own label."""
    labels = np.zeros((3, 20, 110), int)
    labels[:, 3:8], labels[:, 12:18] = 1, 2
    return [line(100, y=5).shifted((1, 0, 2)), line(100, y=15).shifted((1, 0, 2))], labels


def test_a_perfect_labelling_has_no_split_no_merge_and_full_runs():
    trees, labels = two_lines()
    scores = score_forest(trees, labels)
    assert (scores["splits"], scores["merges"], scores["omitted_length_vox"]) == (0, 0, 0)
    assert (scores["expected_run_length_vox"], scores["erl_normalised"]) == (100, 1)


def test_a_split_an_omission_and_a_merge_cost_what_they_should():
    trees, labels = two_lines()
    labels[:, 3:8, 43:] = 3  # the samples x = 2..42 and 43..102: runs of 40 and 59
    scores = score_forest(trees, labels)
    assert (scores["splits"], scores["merges"]) == (1, 0)
    assert_allclose(scores["expected_run_length_vox"], (40**2 + 59**2 + 100**2) / 200)
    trees, labels = two_lines()
    labels[:, 3:8, 50:60] = 0  # ten samples: eleven pieces
    scores = score_forest(trees, labels)
    assert scores["splits"] == 0
    assert_allclose(scores["omitted_length_vox"], 11)
    assert_allclose(scores["expected_run_length_vox"], (47**2 + 42**2 + 100**2) / 200)
    scores = score_forest(trees, np.minimum(labels, 1))
    assert (scores["merges"], scores["expected_run_length_vox"]) == (1, 0)


def test_runs_are_in_um_when_the_spacing_is_known_and_outside_is_background():
    trees, labels = two_lines()
    trees = [NeuronTree(t.points, t.radii, t.parents, unit="voxel", spacing_um=SPACING_UM) for t in trees]
    assert_allclose(score_forest([tree.to("um") for tree in trees], labels)["expected_run_length_um"], 50)
    for z in (9, -2):
        assert_allclose(score_forest([tree.shifted((z, 0, 0)) for tree in trees], labels)["omitted_length_um"], 100)


def test_a_merge_has_more_than_so_many_samples_on_each_of_two_trees():
    trees, labels = two_lines()  # of 101 samples each
    merged = [score_forest(trees, np.minimum(labels, 1), merge_nodes=nodes)["merges"] for nodes in (100, 101)]
    assert merged == [1, 0]


def test_a_forest_without_cable_is_refused():
    with pytest.raises(ValueError, match="no cable"):
        score_forest([], np.zeros((2, 2, 2), int))


def test_where_a_tree_is_rooted_decides_no_score():
    """A forest of wriggling neurites against the same with joins, gaps and shifted parts."""
    rng = np.random.default_rng(3)
    gold = together(*(path(*np.cumsum(rng.normal((0, 2, 4), 2, (60, 3)), axis=0)) for _ in range(3)))
    moved = gold.points + np.where(rng.random((len(gold), 1)) < 0.1, 6.0, 0.0)
    parents = gold.parents.copy()
    parents[60] = 30  # one wrong join
    predicted = replace(gold, points=moved, parents=parents)
    expected = score_trees(predicted, gold)
    assert expected["corrections"] > 2
    for row in range(0, 120, 7):
        rooted = predicted.rerooted([row]).sorted(), gold.rerooted([row]).sorted()
        for one, other in ((rooted[0], gold), (predicted, rooted[1]), rooted):
            found = score_trees(one, other)
            assert {key: found[key] for key in expected} == pytest.approx(expected), row


def test_identical_trees_need_no_corrections_even_without_cable():
    soma = NeuronTree([(0, 5, 5), (0, 5, 7)], [4, 1], [-1, 0], [1, 3], unit="um", spacing_um=SPACING_UM)
    assert score_trees(soma, soma)["corrections_per_mm"] == 0
    longer = path((0, 5, 5), (0, 5, 50), unit="um", spacing_um=SPACING_UM)
    assert score_trees(longer, soma)["corrections_per_mm"] == np.inf


@pytest.mark.parametrize("seed", range(6))
def test_how_a_pair_lies_in_space_decides_no_score(seed):
    """Random trees with cuts, one rejoined elsewhere, mirrored and with axes exchanged."""
    rng = np.random.default_rng(seed)
    gold = random_tree(seed, 150)
    parents = gold.parents.copy()
    parents[rng.choice(np.arange(20, 150), 12, replace=False)] = -1
    predicted = replace(gold, points=gold.points + 0.3 * rng.normal(size=gold.points.shape), parents=parents)
    expected = score_trees(predicted, gold)
    assert expected["missed_joins"] > 2
    for mirrored in ((-1, 1, 1), (1, -1, 1), (-1, -1, -1)):
        pair = (replace(tree, points=(tree.points * mirrored)[:, [1, 2, 0]]) for tree in (predicted, gold))
        assert score_trees(*pair) == pytest.approx(expected), mirrored


def test_a_score_is_the_same_in_um_as_in_voxels_where_distances_tie():
    spacing = (1.0, 0.33, 0.33)
    gold = path((0, 7, 7), (0, 7, 17), spacing_um=spacing)
    short = path((85, 63.5, 51), (85, 63.5, 52.5), (85, 63.5, 55), (85, 68.5, 55), spacing_um=spacing)
    for pair in ((gold.shifted((0, 4, 0)), gold), (short.take([0, 1, 2]), short)):
        first, *others = (score_trees(*(tree.to(unit) for tree in pair)) for unit in ("voxel", "um"))
        assert others == [pytest.approx(first)]


def test_the_largest_distance_is_that_of_a_sample():
    stub = path((0, 3.4, 0), (0, 3, 0))  # an edge shorter than half a voxel has one sample, its child
    scores = score_trees(stub, line(10))
    assert scores["distance_max"] == scores["esa_predicted_to_gold"] == 3


def test_a_perfect_segmentation_has_the_best_run_length_whether_cells_are_trees_or_one_forest():
    cells = together(line(9), line(9, y=5))
    labels = np.zeros((1, 6, 10), int)
    labels[0, 0], labels[0, 5] = 1, 2
    assert score_forest([cells], labels)["erl_normalised"] == score_forest(cells.split(), labels)["erl_normalised"] == 1
