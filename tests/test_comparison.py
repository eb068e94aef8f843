"""Trees on the command line: `score` with alignment, folders and pictures; `measure`, `convert`, `simulate`."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from vit3d.annotations.pairs import find_pairs
from vit3d.arguments import SWC_SUFFIXES, by_name
from vit3d.cli import main
from vit3d.reconstruction import find_stacks
from vit3d.simulate import simulate_neuron
from vit3d.tree import NeuronTree, read_swc, write_swc
from vit3d.volume import Volume, read_volume, stack_name, write_volume

SPACING = (1.0, 0.5, 0.5)
SWC_DEFECTS = Path(__file__).parent / "data" / "swc"


@pytest.fixture
def vit3d(capsys):
    """Run a command here: (exit status, what it prints, what it complains)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return stopped.value.code or 0, *capsys.readouterr()

    return run


def assert_refused(result, sentence: str):
    status, _, complaint = result
    said = [line for line in complaint.splitlines() if line.startswith("vit3d: ")]
    assert status == 2
    assert len(said) == 1, complaint
    assert sentence in said[0]


def line(path: Path, unit="um", spacing=SPACING, shift=0.0) -> Path:
    """A neurite along x, 30 long in its unit."""
    points = np.array([[4, 5 + shift, x] for x in range(2, 33)], float)
    write_swc(NeuronTree(points, np.full(31, 0.5), np.arange(31) - 1, unit=unit, spacing_um=spacing), path)
    return path


def two_trees(path: Path, spacing=SPACING) -> Path:
    points = np.array([[0, 0, 0], [0, 0, 10], [0, 10, 10], [3, 20, 0], [3, 20, 8]], float)
    write_swc(NeuronTree(points, np.ones(5), [-1, 0, 1, -1, 3], spacing_um=spacing), path)
    return path


# ------------------------------------------------------------ score


def test_a_tree_against_itself_is_perfect_also_across_units(vit3d, tmp_path):
    um, voxel = line(tmp_path / "um.swc"), tmp_path / "voxel.swc"
    vit3d("convert", um, voxel, "--swc-unit", "voxel")
    status, printed, _ = vit3d("score", um, voxel, "--json")
    (scores,) = json.loads(printed)
    assert status == 0
    assert [scores[key] for key in ("precision", "recall", "f1", "pds")] == [1, 1, 1, 0]
    assert scores["esa"] == pytest.approx(0, abs=1e-4)
    assert "dsa" in scores


def test_a_neurite_shifted_by_4_voxels_is_far_at_2_and_near_at_5(vit3d, tmp_path):
    moved, gold = line(tmp_path / "a.swc", shift=2.0), line(tmp_path / "b.swc")
    near, far = (json.loads(vit3d("score", moved, gold, "--json", "--threshold", t)[1])[0] for t in (5, 2))
    assert (near["f1"], far["f1"]) == (1, 0)
    assert near["esa"] == pytest.approx(4)


def test_trees_without_a_place_in_common_are_questioned(vit3d, tmp_path):
    moved, gold = line(tmp_path / "a.swc", shift=50.0), line(tmp_path / "b.swc")
    status, _, complaint = vit3d("score", moved, gold)
    assert status == 0
    assert "do their units and the spacing fit?" in complaint


def test_the_table_has_a_row_and_the_six_scores(vit3d, tmp_path):
    header, row = vit3d("score", line(tmp_path / "a.swc"), line(tmp_path / "b.swc"))[1].splitlines()
    assert header.split()[:7] == ["name", "precision", "recall", "f1", "esa", "dsa", "pds"]
    assert row.split()[:4] == ["a", "1.000", "1.000", "1.000"]


def test_units_that_nobody_stated_are_refused_with_the_flag_to_add(vit3d, tmp_path):
    bare = tmp_path / "bare.swc"
    bare.write_text("1 0 4 10 4 1 -1\n2 0 64 10 4 1 1\n")
    known = line(tmp_path / "a.swc", spacing=None)
    assert_refused(vit3d("score", known, bare), "--gold-unit um or voxel")
    assert_refused(vit3d("score", bare, known), "--predicted-unit um or voxel")
    assert_refused(vit3d("score", known, bare, "--gold-unit", "voxel"), "--spacing Z,Y,X")
    assert_refused(vit3d("score", known, bare, "--gold-unit", "mm"), "--gold-unit takes um or voxel")
    status, _, _ = vit3d("score", known, bare, "--gold-unit", "voxel", "--spacing", "1,0.5,0.5")
    assert status == 0


DEFECTS = {
    "cycle": "lies on a cycle",
    "missing_parent": "no node of the file",
    "repeated_id": "repeats an id",
    "nan": "has NaN",
    "no_nodes": "has no nodes",
    "empty": "is empty",
    "binary": "is binary",
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defective_swc_is_refused_by_every_command_that_reads_one(vit3d, tmp_path, defect):
    bad, good, out = SWC_DEFECTS / f"{defect}.swc", line(tmp_path / "a.swc"), tmp_path / "b.swc"
    for command in (("score", bad, good), ("score", good, bad), ("measure", bad), ("convert", bad, out)):
        assert_refused(vit3d(*command), DEFECTS[defect])
    assert_refused(vit3d("score", tmp_path / "none.swc", good), "does not exist")
    assert not out.exists()


def test_an_image_adds_a_row_against_the_aligned_gold(vit3d, tmp_path):
    voxels = np.zeros((12, 40, 90), np.uint8)
    voxels[3:6, 10:13, 4:65] = 200  # the neurite that the gold traces
    voxels[3:6, 30:33, 4:65] = 200  # another one that it does not
    write_volume(Volume(voxels, SPACING), tmp_path / "image.tif")
    gold = line(tmp_path / "gold.swc", shift=-0.5)  # the gold lies 2 voxels off, at y = 9
    points = np.array([[4, 11, 4], [4, 11, 64], [4, 31, 4], [4, 31, 64]], float)
    tree = NeuronTree(points, np.ones(4), [-1, 0, -1, 2], unit="voxel", spacing_um=SPACING)
    write_swc(tree, tmp_path / "a.swc")
    plot = tmp_path / "d.png"
    command = ("score", tmp_path / "a.swc", gold, "--image", tmp_path / "image.tif", "--plot", plot, "--json")
    raw, aligned = json.loads(vit3d(*command)[1])
    assert raw["recall"] == 0
    assert (aligned["recall"], aligned["precision"]) == (1, 0.5)
    assert aligned["precision_of_traced"] == 1
    assert "precision_of_traced" not in raw
    assert "aligned by (+0.00, +2.00, +0.00) voxels" in aligned["name"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(vit3d(*command[:-1])[1].splitlines()) == 3


def test_folders_are_scored_by_name_with_a_mean_and_a_picture_each(vit3d, tmp_path):
    for folder, shift in (("found", 2.0), ("gold", 0.0)):
        (tmp_path / folder).mkdir()
        line(tmp_path / folder / "a.swc")
        line(tmp_path / folder / "b.swc", shift=shift)
        write_volume(Volume(np.zeros((3, 4, 5), np.uint8)), tmp_path / folder / "a.tif")
    line(tmp_path / "gold" / "c.swc")
    line(tmp_path / "found" / "a.eswc", shift=9.0)
    (tmp_path / "plots").mkdir()
    command = ("score", tmp_path / "found", tmp_path / "gold")
    status, printed, said = vit3d(*command, "--json", "--plot", tmp_path / "plots")
    a, b, mean = json.loads(printed)
    assert status == 0
    assert (a["name"], b["name"], mean["name"]) == ("a", "b", "mean")
    assert (a["f1"], b["f1"], mean["f1"]) == (1, 0, 0.5)
    assert "Not scored, for want of a partner: c." in said
    assert "Passed over, beside an SWC of the same name: a.eswc." in said
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["a.png", "b.png"]
    assert [row.split()[0] for row in vit3d(*command)[1].splitlines()] == ["name", "a", "b", "mean"]


def test_an_ome_tiff_has_the_name_of_its_tree(vit3d, tmp_path):
    for folder in ("found", "gold"):
        (tmp_path / folder).mkdir()
        line(tmp_path / folder / "a.swc")
    voxels = np.zeros((6, 12, 40), np.uint8)
    voxels[4, 10, 4:64] = 200
    write_volume(Volume(voxels, SPACING), tmp_path / "gold" / "a.ome.tif")
    assert list(find_stacks(tmp_path / "gold")) == ["a"]
    assert [stack_name(name) for name in (".tif", ".zarr", "b.c.TIF.v3dpbd", "d.v2")] == [
        ".tif",
        ".zarr",
        "b.c",
        "d.v2",
    ]
    write_volume(Volume(voxels, SPACING), tmp_path / "gold" / "a.tif")
    assert list(find_stacks(tmp_path / "gold")) == ["a.ome.tif", "a.tif"]
    (tmp_path / "gold" / "a.tif").unlink()
    command = ("score", tmp_path / "found", tmp_path / "gold", "--json", "--image", tmp_path / "gold")
    assert [row["name"].split()[0] for row in json.loads(vit3d(*command)[1])] == ["a", "a", "mean", "mean"]


def test_one_pair_that_cannot_be_scored_does_not_hide_the_others(vit3d, tmp_path):
    for folder in ("found", "gold"):
        (tmp_path / folder).mkdir()
        line(tmp_path / folder / "a.swc")
        line(tmp_path / folder / "b.swc")
    write_swc(NeuronTree.empty(spacing_um=SPACING), tmp_path / "gold" / "b.swc")
    status, printed, said = vit3d("score", tmp_path / "found", tmp_path / "gold")
    assert status == 2
    assert [row.split()[0] for row in printed.splitlines()] == ["name", "a", "mean"]
    assert "vit3d: b failed: the gold tree has no nodes" in said
    write_swc(NeuronTree.empty(spacing_um=SPACING), tmp_path / "gold" / "a.swc")
    status, printed, said = vit3d("score", tmp_path / "found", tmp_path / "gold", "--json")
    assert (status, printed) == (2, "")
    assert "vit3d: a failed: the gold tree has no nodes" in said
    assert_refused(vit3d("score", tmp_path / "found", tmp_path / "gold", "--spacing", "x"), "--spacing")


def test_folders_that_share_no_name_are_refused(vit3d, tmp_path):
    for folder in ("found", "gold"):
        (tmp_path / folder).mkdir()
        line(tmp_path / folder / f"{folder}.swc")
    assert_refused(vit3d("score", tmp_path / "found", tmp_path / "gold"), "has the name of one in")
    assert_refused(vit3d("score", tmp_path / "found", tmp_path / "gold" / "gold.swc"), "folders are scored against")


def test_masks_are_scored_as_masks(vit3d, tmp_path):
    gold, found = np.zeros((2, 6, 10, 10), np.uint8)
    gold[2:4, 2:8, 2:8] = 255
    found[2:4, 2:8, 2:5] = 1
    for folder, mask in (("found", found), ("gold", gold)):
        (tmp_path / folder).mkdir()
        write_volume(Volume(mask, SPACING), tmp_path / folder / "a.tif")
    (alone,) = json.loads(vit3d("score", tmp_path / "found" / "a.tif", tmp_path / "gold" / "a.tif", "--json")[1])
    assert (alone["precision"], alone["recall"], alone["dice"]) == (1, 0.5, pytest.approx(2 / 3))
    status, printed, _ = vit3d("score", tmp_path / "found", tmp_path / "gold")
    assert status == 0
    assert [row.split()[0] for row in printed.splitlines()] == ["name", "a", "mean"]
    assert "dice" in printed


def test_score_and_help_start_without_torch(tmp_path):
    path = line(tmp_path / "a.swc")
    code = (
        "import sys\nfrom vit3d.cli import main\n"
        "try: main()\nfinally: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    for words in (("score", path, path, "--plot", tmp_path / "a.png"), ("--help",), ("measure", path)):
        command = [sys.executable, "-c", code, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "False False"


# ------------------------------------------------------------ measure


def test_measure_gives_the_length_of_a_drawn_line_as_csv(vit3d, tmp_path):
    status, printed, _ = vit3d("measure", line(tmp_path / "a.swc"), two_trees(tmp_path / "b.swc"), "--sholl-step", 10)
    a, b = csv.DictReader(io.StringIO(printed))
    assert status == 0
    assert (a["name"], float(a["length_um"]), a["tips"], a["trees"]) == ("a", 30, "1", "1")
    assert (b["name"], float(b["length_um"]), b["tips"], b["trees"]) == ("b", 28, "2", "2")
    assert (a["sholl_10"], a["sholl_20"]) == ("1", "1")


# ------------------------------------------------------------ convert


def test_um_to_voxel_to_um_gives_the_tree_back(vit3d, tmp_path):
    um, voxel, back = two_trees(tmp_path / "a.swc"), tmp_path / "v.swc", tmp_path / "b.swc"
    vit3d("convert", um, voxel, "--swc-unit", "voxel")
    vit3d("convert", voxel, back, "--swc-unit", "um")
    first, middle, last = read_swc(um), read_swc(voxel), read_swc(back)
    np.testing.assert_allclose(middle.points, first.points / SPACING, atol=1e-4)
    np.testing.assert_allclose(last.points, first.points, atol=1e-4)
    np.testing.assert_allclose(last.radii, first.radii, atol=1e-4)
    assert (last.unit, last.spacing_um, last.parents.tolist()) == ("um", SPACING, first.parents.tolist())


def test_flipping_twice_gives_the_tree_back_and_once_does_not(vit3d, tmp_path):
    paths = two_trees(tmp_path / "a.swc"), tmp_path / "b.swc", tmp_path / "c.swc"
    for source, out in pairwise(paths):
        vit3d("convert", source, out, "--flip", "y:25.5")
    first, once, twice = (read_swc(path).points for path in paths)
    np.testing.assert_allclose(once[:, 1], 25.5 - first[:, 1])
    np.testing.assert_allclose(twice, first)


def test_scale_resample_and_spacing_do_what_they_say(vit3d, tmp_path):
    source, out = line(tmp_path / "a.swc"), tmp_path / "b.swc"
    vit3d("convert", source, out, "--scale", "2")
    assert read_swc(out).cable_length == pytest.approx(60)
    vit3d("convert", source, out, "--scale", "1,1,3", "--resample", "10")
    assert (len(read_swc(out)), read_swc(out).cable_length) == (10, pytest.approx(90))
    vit3d("convert", line(tmp_path / "c.swc", spacing=None), out, "--spacing", "2,1,1")
    assert read_swc(out).spacing_um == (2, 1, 1)


def test_split_writes_one_file_per_tree(vit3d, tmp_path):
    vit3d("convert", two_trees(tmp_path / "a.swc"), tmp_path / "b.swc", "--split")
    assert not (tmp_path / "b.swc").exists()
    assert [read_swc(tmp_path / f"b_{n}.swc").num_roots for n in (1, 2)] == [1, 1]
    assert sum(len(read_swc(tmp_path / f"b_{n}.swc")) for n in (1, 2)) == 5
    assert vit3d("convert", tmp_path / "a.swc", tmp_path / "b.swc", "--split")[0] == 0  # its own are replaced
    fewer = vit3d("convert", tmp_path / "b_1.swc", tmp_path / "b.swc", "--split", "--flip", "x:9")
    assert_refused(fewer, "b_1.swc is no result of vit3d, or what is split")
    line(tmp_path / "one.swc")
    assert "not of this one: b_2.swc" in vit3d("convert", tmp_path / "one.swc", tmp_path / "b.swc", "--split")[2]
    (tmp_path / "c_2.swc").write_text("1 2 0 0 0 1 -1\n")
    assert_refused(vit3d("convert", tmp_path / "a.swc", tmp_path / "c.swc", "--split"), "c_2.swc is no result of vit3d")
    two_trees(tmp_path / "d_1.swc")
    assert_refused(vit3d("convert", tmp_path / "d_1.swc", tmp_path / "d.swc", "--split"), "d_1.swc is no result")
    assert not (tmp_path / "c_1.swc").exists()
    assert read_swc(tmp_path / "d_1.swc").num_roots == 2


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--flip", "w:3"), "--flip takes AXIS:LAST"),
        (("--flip", "y:nan"), "--flip AXIS:LAST takes a number"),
        (("--scale", "big"), "--scale takes a number"),
        (("--scale", "0"), "positive"),
        (("--scale", "1,2"), "--scale takes three positive numbers"),
        (("--resample", "0"), "must be positive"),
        (("--swc-unit", "mm"), "--swc-unit takes um or voxel"),
        (("--unit", "voxel"), "leave the unit out"),
        (("--swc-unit", "voxel"), "add --spacing"),
    ],
)
def test_a_conversion_that_cannot_be_is_refused(vit3d, tmp_path, flags, sentence):
    out = tmp_path / "b.swc"
    assert_refused(vit3d("convert", line(tmp_path / "a.swc", spacing=None), out, *flags), sentence)
    assert not out.exists()


def test_a_foreign_swc_needs_its_unit_stated(vit3d, tmp_path):
    bare, out = tmp_path / "bare.swc", tmp_path / "b.swc"
    bare.write_text("1 0 4 10 4 1 -1\n2 0 64 10 4 1 1\n")
    assert_refused(vit3d("convert", bare, out, "--swc-unit", "um"), "add --unit um or --unit voxel")
    vit3d("convert", bare, out, "--unit", "voxel", "--swc-unit", "um", "--spacing", "1,0.5,0.5")
    assert read_swc(out).cable_length == pytest.approx(30)


# ------------------------------------------------------------ simulate


def test_simulate_writes_the_same_stack_and_tree_as_the_function(vit3d, tmp_path):
    command = ("simulate", tmp_path / "a.tif", "--seed", 3, "--shape", "10,40,48", "--spacing", "2,0.5,0.5")
    assert vit3d(*command)[0] == 0
    volume, tree = simulate_neuron(seed=3, shape=(10, 40, 48), spacing_um=(2, 0.5, 0.5))
    read = read_volume(tmp_path / "a.tif")
    assert (read.voxels == volume.voxels).all()
    assert read.spacing_um == (2, 0.5, 0.5)
    np.testing.assert_allclose(read_swc(tmp_path / "a.swc").points, tree.sorted().points, atol=1e-4)


@pytest.mark.parametrize("flags", [("--shape", "0,4,4"), ("--shape", "4,4"), ("--polarity", "grey")])
def test_a_simulation_that_cannot_be_is_refused(vit3d, tmp_path, flags):
    assert_refused(vit3d("simulate", tmp_path / "a.tif", *flags), "got")
    assert not list(tmp_path.iterdir())


def test_a_unit_on_the_command_line_is_for_the_files_of_a_folder_that_say_none(vit3d, tmp_path):
    predicted, gold = tmp_path / "p", tmp_path / "g"
    predicted.mkdir()
    gold.mkdir()
    tree = NeuronTree([(0, 0, 0), (0, 0, 20)], [1, 1], [-1, 0], unit="um", spacing_um=SPACING)
    for name in ("states", "silent"):
        write_swc(tree, predicted / f"{name}.swc")
    write_swc(tree, gold / "states.swc")
    (gold / "silent.swc").write_text("1 3 0 0 0 1 -1\n2 3 40 0 0 1 1\n")
    status, printed, complaint = vit3d("score", predicted, gold, "--gold-unit", "voxel", "--json")
    assert status == 0, complaint
    assert [row["f1"] for row in json.loads(printed)] == [1, 1, 1]
    status, printed, _ = vit3d("measure", gold / "states.swc", gold / "silent.swc", "--unit", "um")
    assert status == 0
    assert [row["length_um"] for row in csv.DictReader(io.StringIO(printed))] == ["20.0", "40.0"]
    assert_refused(vit3d("measure", gold / "states.swc", "--unit", "voxel"), "'voxel' was given; leave the unit out")


def test_a_sphere_that_a_smaller_tree_does_not_reach_is_crossed_by_nothing_of_it(vit3d, tmp_path):
    for length in (20, 35):
        tree = NeuronTree([(0, 0, 0), (0, 0, length)], [1, 1], [-1, 0], unit="um")
        write_swc(tree, tmp_path / f"{length}.swc")
    _, printed, _ = vit3d("measure", tmp_path / "20.swc", tmp_path / "35.swc", "--sholl-step", "10")
    assert [row["sholl_30"] for row in csv.DictReader(io.StringIO(printed))] == ["0", "1"]


def test_a_gold_that_does_not_lie_on_its_image_is_told_with_the_likely_cause(vit3d, tmp_path):
    volume, tree = simulate_neuron(seed=1, shape=(24, 96, 128), spacing_um=SPACING)
    write_volume(volume, tmp_path / "a.tif")
    write_swc(tree, tmp_path / "a.swc")
    write_swc(tree.flipped(1, 95 * SPACING[1]), tmp_path / "flipped.swc")
    write_swc(replace(tree, points=3 * tree.points), tmp_path / "large.swc")

    def said(name):
        return vit3d("score", tmp_path / name, tmp_path / name, "--image", tmp_path / "a.tif")[2]

    assert said("a.swc") == ""
    assert "y is flipped" in said("flipped.swc")
    assert re.search("nodes lie outside the stack.*The aligned scores mean little.", said("large.swc"))


def test_trees_take_the_voxel_size_of_the_stack_that_is_given_and_may_not_contradict_it(vit3d, tmp_path):
    volume, tree = simulate_neuron(seed=1, shape=(24, 96, 128), spacing_um=SPACING)
    write_volume(volume, tmp_path / "a.tif")
    write_swc(tree, tmp_path / "a.swc")
    lines = (tmp_path / "a.swc").read_text().splitlines(keepends=True)
    (tmp_path / "a.swc").write_text("".join(line for line in lines if line[0] != "#"))
    units = ("--predicted-unit", "um", "--gold-unit", "um", "--image", tmp_path / "a.tif")
    status, printed, complaint = vit3d("score", tmp_path / "a.swc", tmp_path / "a.swc", *units, "--json")
    assert status == 0, complaint
    assert json.loads(printed)[0]["f1"] == 1
    write_swc(tree.to("voxel").to("um", (1.0, 0.4, 0.4)), tmp_path / "other.swc")
    result = vit3d("score", tmp_path / "other.swc", tmp_path / "other.swc", "--image", tmp_path / "a.tif")
    assert_refused(result, "the predicted tree's spacing (1.0, 0.4, 0.4) (z, y, x) um is not the stack's")


def test_a_stack_and_a_tree_named_as_ome_are_a_pair(vit3d, tmp_path):
    status, printed, _ = vit3d("simulate", tmp_path / "j.ome.tif", "--shape", "8,64,64")
    assert status == 0
    assert f"its tree {tmp_path / 'j.swc'}" in printed
    (tmp_path / "j.swc").rename(tmp_path / "j.ome.swc")
    (row,) = find_pairs(tmp_path)
    assert (row["name"], Path(row["swc"]).name) == ("j", "j.ome.swc")
    assert by_name(tmp_path, SWC_SUFFIXES).keys() == {"j"}
    (tmp_path / "j.swc").write_bytes((tmp_path / "j.ome.swc").read_bytes())
    assert by_name(tmp_path, SWC_SUFFIXES).keys() == {"j", "j.ome"}


def test_a_header_with_two_spacings_is_refused_with_its_file(vit3d, tmp_path):
    (tmp_path / "two.swc").write_text("# spacing_um (z, y, x): 1.0, 0.5\n1 3 0 0 0 1 -1\n")
    assert_refused(vit3d("measure", tmp_path / "two.swc"), "two.swc has a header whose spacing is not three positive")


def test_files_of_one_name_in_two_folders_are_told_apart(vit3d, tmp_path):
    tree = NeuronTree([(0, 0, 0), (0, 0, 20)], [1, 1], [-1, 0], unit="um")
    paths = [tmp_path / name for name in ("a/neuron.swc", "b/neuron.swc", "other.swc")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        write_swc(tree, path)
    _, printed, _ = vit3d("measure", *paths)
    assert [row["name"] for row in csv.DictReader(io.StringIO(printed))] == [str(paths[0]), str(paths[1]), "other"]
