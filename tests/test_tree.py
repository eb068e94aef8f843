"""NeuronTree and SWC: what a file says is what the tree holds, and the other way round."""

import time
import warnings
from pathlib import Path

import numpy as np
import pandas
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from vit3d.tree import NeuronTree, read_swc, write_swc

SWC = Path(__file__).parent / "data" / "swc"


def y_tree(**more) -> NeuronTree:
    """A stem of 4 along x, then arms of 3 along y and of 5 along y and z."""
    points = np.array([[0, 0, 0], [0, 0, 4], [0, 3, 4], [3, -4, 4]], float)
    return NeuronTree(points, np.array([2, 1, 0.5, 0.5]), np.array([-1, 0, 1, 1]), **more)


def random_tree(size: int = 500, seed: int = 0) -> NeuronTree:
    rng = np.random.default_rng(seed)
    parents = np.array([-1, *(rng.integers(max(0, i - 3), i) for i in range(1, size))])
    parents[size // 2] = -1
    points, radii = 100 * rng.normal(size=(size, 3)), rng.random(size)
    confidence = rng.random(size)
    return NeuronTree(points, radii, parents, rng.integers(0, 4, size), "um", (1.0, 0.33, 0.3296485), confidence)


def assert_same(one: NeuronTree, other: NeuronTree, atol: float = 0) -> None:
    assert_allclose(one.points, other.points, atol=atol, rtol=0)
    assert_allclose(one.radii, other.radii, atol=atol, rtol=0)
    assert_array_equal(one.parents, other.parents)
    assert_array_equal(one.types, other.types)
    assert (one.unit, one.spacing_um) == (other.unit, other.spacing_um)


# --- files ---


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("cycle", r"cycle.swc, line 2 \(node 2\) lies on a cycle"),
        ("missing_parent", r"missing_parent.swc, line 3 \(node 2\) has parent 7, which is no node"),
        ("repeated_id", r"repeated_id.swc, line 3 \(node 2\) repeats an id"),
        ("nan", r"nan.swc, line 2 \(node 2\) has NaN or infinity"),
        ("infinity", r"infinity.swc, line 3 \(node 2\) has NaN or infinity"),
        ("too_few_columns", r"too_few_columns.swc, line 2 has 5 columns"),
        ("text", r"text.swc, line 2 has text where numbers belong: '2 axon 1 0 0 1 1'"),
        ("fractional_id", r"fractional_id.swc, line 1 \(node 1.5\) has an id, type or parent that is no whole number"),
        ("decimal_commas", r"decimal_commas.swc, line 1 has decimal commas"),
        ("no_nodes", r"no_nodes.swc has no nodes"),
        ("empty", r"empty.swc is empty"),
        ("binary", r"binary.swc is binary"),
    ],
)
def test_a_broken_file_is_refused_with_its_own_message(defect, message):
    with pytest.raises(ValueError, match=message):
        read_swc(SWC / f"{defect}.swc")


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    for path in (tmp_path / "nowhere.swc", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path.name} does not exist or is no file"):
            read_swc(path)


def test_errors_count_the_lines_of_a_file_from_windows_and_refuse_ids_beyond_integers(tmp_path):
    path = tmp_path / "windows.swc"
    path.write_bytes(b"# a\r\n\r\n1 2 0 0 0 1 -1\r\n1e300 2 0 0 0 1 1\r\n")
    with pytest.raises(ValueError, match=r"line 4 \(node 1e300\) has an id"):
        read_swc(path)


def test_garbage_without_a_zero_byte_is_refused_too(tmp_path):
    path = tmp_path / "garbage.swc"
    path.write_bytes(bytes(range(128, 256)) * 10)
    with pytest.raises(ValueError, match=r"garbage.swc, line 1 has"):
        read_swc(path)


@pytest.mark.parametrize(
    "form", ["crlf", "tabs", "commas", "float_ids", "extra_columns", "byte_order_mark", "zero_based"]
)
def test_unusual_but_sound_files_read_without_a_warning(form):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree = read_swc(SWC / f"{form}.swc")
    assert_array_equal(tree.points, [[3, 2, 1], [3, 2, 4], [3, 6, 4]])
    assert_array_equal(tree.parents, [-1, 0, 1])
    assert_array_equal(tree.types, [2, 2, 2])
    assert_array_equal(tree.radii, [0.5, 0.5, 0.5])
    assert tree.unit is None
    assert tree.confidence is None


@pytest.mark.parametrize(
    ("defect", "repair"),
    [
        ("children_before_parents", "nodes sorted, parents before children"),
        ("self_parent", r"1 node\(s\) whose parent is the node itself"),
        ("parent_zero", r"1 node\(s\) whose parent is 0"),
        ("negative_radius", "1 negative radii set to 0"),
    ],
)
def test_a_repairable_file_is_read_and_the_repair_reported_once(defect, repair):
    with pytest.warns(UserWarning, match=repair) as caught:
        tree = read_swc(SWC / f"{defect}.swc")
    assert len(caught) == 1
    assert_array_equal(tree.points, [[3, 2, 1], [3, 2, 4], [3, 6, 4]])
    assert_array_equal(tree.parents, [-1, 0, 1])
    assert_array_equal(tree.radii, [0.5, 0 if defect == "negative_radius" else 0.5, 0.5])


def test_several_roots_are_several_trees():
    tree = read_swc(SWC / "several_roots.swc")
    assert tree.num_roots == 2
    assert [len(part) for part in tree.split()] == [2, 1]
    assert_array_equal(tree.split()[1].points, [[0, 0, 9]])


def test_a_three_point_soma_becomes_one_node_and_no_cable():
    with pytest.warns(UserWarning, match="three-point soma"):
        tree = read_swc(SWC / "three_point_soma.swc", unit="um")
    assert_array_equal(tree.types, [1, 3, 3])
    assert_array_equal(tree.parents, [-1, 0, 1])
    assert tree.radii[0] == 5
    assert tree.cable_length == 4  # 1 from the soma's surface to node 4, then 3


@pytest.mark.parametrize(
    "sides", ["2 1 0 8 0 5 1\n3 1 0 -8 0 5 1\n", "2 1 0 5 0 5 1\n3 1 0 -5 0 5 2\n"], ids=["farther", "in a row"]
)
def test_a_soma_drawn_as_three_nodes_in_another_way_stays_as_it_is(tmp_path, sides):
    (tmp_path / "tree.swc").write_text(f"1 1 0 0 0 5 -1\n{sides}4 3 20 0 0 1 1\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_array_equal(read_swc(tmp_path / "tree.swc").types, [1, 1, 1, 3])


def test_writing_then_reading_is_the_identity(tmp_path):
    tree = random_tree()
    write_swc(tree, tmp_path / "tree.eswc")
    back = read_swc(tmp_path / "tree.eswc")
    assert_same(back, tree, atol=0.6e-5)
    assert_allclose(back.confidence, tree.confidence, atol=1e-4)


def test_an_swc_has_the_seven_columns_that_other_readers_name(tmp_path):
    tree, names = random_tree(), ["n", "type", "x", "y", "z", "r", "parent"]
    write_swc(tree, tmp_path / "tree.swc")
    table = pandas.read_csv(tmp_path / "tree.swc", sep=" ", comment="#", names=names)
    assert_array_equal(table["n"], np.arange(1, len(tree) + 1))
    assert_allclose(table["r"], read_swc(tmp_path / "tree.swc").radii)


@pytest.mark.parametrize("unit", ["um", "voxel", None])
def test_the_header_states_the_unit_and_never_another(tmp_path, unit):
    write_swc(y_tree(unit=unit), tmp_path / "tree.swc")
    assert_same(read_swc(tmp_path / "tree.swc"), y_tree(unit=unit))


def test_x_comes_first_in_the_file_and_ids_count_from_one(tmp_path):
    write_swc(NeuronTree([[3, 2, 1]], [0.5], [-1], [1]), tmp_path / "tree.swc")
    assert (tmp_path / "tree.swc").read_text().splitlines()[-1] == "1 1 1.00000 2.00000 3.00000 0.50000 -1"


def test_a_file_in_voxels_gives_the_tree_in_um_back(tmp_path):
    tree = y_tree(spacing_um=(1.0, 0.5, 0.25))
    write_swc(tree, tmp_path / "tree.swc", unit="voxel")
    back = read_swc(tmp_path / "tree.swc")
    assert back.unit == "voxel"
    assert_same(back.to("um"), tree)


def test_a_stated_unit_fills_a_silent_header_and_may_not_contradict_one(tmp_path):
    assert read_swc(SWC / "tabs.swc", unit="voxel").unit == "voxel"
    write_swc(y_tree(), tmp_path / "tree.swc")
    assert read_swc(tmp_path / "tree.swc", unit="um").unit == "um"
    with pytest.raises(ValueError, match="says '# unit: um', but 'voxel' was given"):
        read_swc(tmp_path / "tree.swc", unit="voxel")


def test_a_header_with_a_spacing_that_is_no_spacing_is_refused(tmp_path):
    path = tmp_path / "tree.swc"
    path.write_text("# spacing_um (z, y, x): 1, wide, 1\n1 2 0 0 0 1 -1\n")
    with pytest.raises(ValueError, match="spacing is not three positive numbers"):
        read_swc(path)


def test_an_empty_tree_survives_the_file(tmp_path):
    write_swc(NeuronTree.empty("um", (1, 0.5, 0.5)), tmp_path / "tree.swc")
    back = read_swc(tmp_path / "tree.swc")
    assert (len(back), back.unit, back.spacing_um) == (0, "um", (1, 0.5, 0.5))


def test_nodes_are_written_parents_first(tmp_path):
    tree = random_tree()
    shuffled = tree.take(np.random.default_rng(1).permutation(len(tree)))
    write_swc(shuffled, tmp_path / "tree.swc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = read_swc(tmp_path / "tree.swc")
    assert (back.parents < np.arange(len(back))).all()
    assert_allclose(back.cable_length, tree.cable_length, atol=1e-2)
    assert_allclose(np.sort(back.points, axis=0), np.sort(tree.points, axis=0), atol=1e-5)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "tree.swc"
    write_swc(y_tree(), path)
    before = path.read_bytes()
    monkeypatch.setattr("vit3d.tree.node_lines", lambda table: ["1 2 0 0 0 1 -1\n", None])
    with pytest.raises(TypeError):
        write_swc(random_tree(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_writing_into_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"):
        write_swc(y_tree(), tmp_path / "nowhere" / "tree.swc")


def test_a_table_of_edited_lines_without_confidence_says_so(tmp_path):
    write_swc(random_tree(), tmp_path / "tree.eswc")
    with open(tmp_path / "tree.eswc", "a") as file:
        file.write("501 2 0 0 0 1 500\n")
    with pytest.warns(UserWarning, match="confidence"):
        tree = read_swc(tmp_path / "tree.eswc")
    assert len(tree) == 501
    assert tree.confidence is None


@pytest.mark.slow
def test_a_million_nodes_read_and_write_in_seconds(tmp_path):
    size = 1_000_000
    points = np.cumsum(np.random.default_rng(0).normal(size=(size, 3)), axis=0)
    tree = NeuronTree(points, np.ones(size), np.arange(size) - 1)
    start = time.perf_counter()
    write_swc(tree, tmp_path / "tree.swc")
    back = read_swc(tmp_path / "tree.swc")
    assert time.perf_counter() - start < 30  # 4 s on an idle core
    assert_same(back, tree, atol=0.6e-5)


def test_real_neurons_have_the_counts_of_their_files(shared):
    tree = read_swc(shared / "data" / "op" / "OP_6.swc", unit="voxel")
    assert (len(tree), tree.num_roots, tree.num_tips, tree.num_branch_points) == (193, 1, 18, 17)
    assert_allclose(tree.points[0], [10, 412.01, 15.074])


# --- the noun ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"points": np.zeros((2, 2))}, r"`points` must have shape \(N, 3\)"),
        ({"radii": [1.0]}, r"`radii` must have shape \(2,\)"),
        ({"radii": [1.0, -1.0]}, "`radii` must not be negative; row 1"),
        ({"points": [[0, 0, 0], [0, np.nan, 0]]}, "`points` must be finite; row 1"),
        ({"parents": [-1, 2]}, "row 1 has parent 2"),
        ({"parents": [-2, 0]}, "row 0 has parent -2"),
        ({"parents": [1, 0]}, "no cycle"),
        ({"parents": [0, -1]}, "no cycle"),
        ({"parents": [-1, 0.5]}, "`parents` must be whole numbers"),
        ({"unit": "nm"}, "`unit` must be 'um', 'voxel' or None"),
        ({"spacing_um": (1, 0, 1)}, "three positive numbers"),
        ({"spacing_um": (1, 1)}, "three positive numbers"),
        ({"confidence": [1.0]}, "`confidence` must have shape"),
    ],
)
def test_a_tree_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NeuronTree(**{"points": np.zeros((2, 3)), "radii": [1.0, 1.0], "parents": [-1, 0], **fields})


def test_the_y_tree_has_the_counts_one_can_see():
    tree = y_tree()
    assert (tree.num_roots, tree.num_tips, tree.num_branch_points, tree.cable_length) == (1, 2, 1, 12)
    assert_array_equal(tree.edges, [1, 2, 3])
    assert_array_equal(tree.degree, [1, 3, 1, 1])
    assert_array_equal(tree.edge_lengths, [4, 3, 5])


def test_a_node_inside_the_soma_takes_no_cable_away():
    inside = NeuronTree([[0, 0, 0], [0, 0, 3], [0, 0, 20]], [10, 1, 1], [-1, 0, 1], [1, 3, 3])
    assert_array_equal(inside.cable_lengths, [0, 17])


def test_counts_other_than_tips_do_not_depend_on_the_root():
    tree = random_tree().split()[0]
    turned = tree.rerooted(len(tree) - 1)
    assert_array_equal(turned.degree, tree.degree)
    assert_allclose(turned.cable_length, y_tree().cable_length + tree.cable_length - 12)
    assert turned.num_branch_points == tree.num_branch_points
    assert turned.parents[len(tree) - 1] == -1
    assert turned.num_roots == 1


def test_an_empty_tree_has_nothing():
    tree = NeuronTree.empty("voxel")
    assert (len(tree), tree.num_roots, tree.num_tips, tree.num_branch_points, tree.cable_length) == (0,) * 5
    assert tree.sampled(1).shape == (0, 3)
    assert tree.split() == []
    assert len(tree.sorted().to("um", (1, 1, 1))) == 0


def test_units_convert_by_the_spacing_and_back():
    tree = y_tree(spacing_um=(1.0, 0.5, 0.25))
    voxel = tree.to("voxel")
    assert_allclose(voxel.points[3], [3, -8, 16])
    assert_allclose(voxel.radii, tree.radii / 0.25)
    assert_same(voxel.to("um"), tree)
    assert_same(y_tree(unit="voxel").to("um", (2, 2, 2)).to("voxel"), y_tree(unit="voxel", spacing_um=(2, 2, 2)))


def test_conversion_without_unit_or_spacing_is_refused():
    with pytest.raises(ValueError, match="unit of this tree was never stated"):
        y_tree(unit=None).to("um")
    with pytest.raises(ValueError, match="none is known"):
        y_tree().to("voxel")
    with pytest.raises(ValueError, match="converts to 'um' or 'voxel', got 'nm'"):
        y_tree().to("nm")


def test_shift_flip_and_scale_do_what_they_say():
    tree = y_tree(unit="voxel", spacing_um=(1, 1, 1))
    assert_array_equal(tree.shifted((1, 2, 3)).points, tree.points + np.array([1, 2, 3]))
    assert_array_equal(tree.flipped(2, last=10).points[1], [0, 0, 6])
    assert_same(tree.flipped(1, 7).flipped(1, 7), tree)
    scaled = tree.scaled((1, 0.5, 0.5))
    assert_allclose(scaled.points[3], [3, -2, 2])
    assert_allclose(scaled.to("um").points, tree.to("um").points)
    in_um = tree.to("um").scaled(2)
    assert_allclose(in_um.points, 2 * tree.points)
    assert_allclose(in_um.to("voxel").points, tree.points)
    with pytest.raises(ValueError, match="positive"):
        tree.scaled(-1)


def test_sorting_changes_the_order_and_nothing_else():
    tree = random_tree()
    rows = np.random.default_rng(1).permutation(len(tree))
    back = tree.take(rows).sorted()
    assert (back.parents < np.arange(len(back))).all()
    edge = {(*tree.points[i], *tree.points[tree.parents[i]]) for i in tree.edges}
    assert {(*back.points[i], *back.points[back.parents[i]]) for i in back.edges} == edge
    assert tree.sorted() is tree


def test_the_parts_of_a_split_make_up_the_whole():
    tree = random_tree()
    parts = tree.split()
    assert len(parts) == tree.num_roots == 2
    assert all(part.num_roots == 1 for part in parts)
    assert_allclose(sum(part.cable_length for part in parts), tree.cable_length)


def test_sampling_counts_by_hand():
    # int(1 + L + 0.5) points: L 4 -> 5, L 3 -> 4, L 5 -> 6
    assert y_tree().sampled(1.0).shape == (15, 3)
    line = NeuronTree([[0, 0, 0], [0, 0, 1.4], [0, 0, 2.9]], [1, 1, 1], [-1, 0, 1])  # L 1.4 -> 2, L 1.5 -> 3
    assert_allclose(np.sort(line.sampled(1.0)[:, 2]), [0, 1.4, 1.4, 2.15, 2.9])
    assert_array_equal(NeuronTree([[1, 2, 3]], [1], [-1]).sampled(1.0), [[1, 2, 3]])
