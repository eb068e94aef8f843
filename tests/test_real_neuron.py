"""The whole path on a real neuron, as a person runs it: OP_6 from TIFF to SWC, with the shipped network."""

import subprocess
import sys

import numpy as np
import pytest
import tifffile

from vit3d.annotations.gold import align_gold
from vit3d.scoring import score_trees
from vit3d.tree import read_swc
from vit3d.volume import read_volume

pytestmark = pytest.mark.slow
SPACING_UM = (1.0, 0.33, 0.33)


def reconstruct(*arguments) -> str:
    command = [sys.executable, "-m", "vit3d.cli", "reconstruct", *map(str, arguments), "--spacing", "1,0.33,0.33"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def out(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reconstruction")
    reconstruct(shared / "data/op/OP_6.tif", "--out", folder)
    return folder


@pytest.fixture(scope="module")
def volume(shared):
    return read_volume(shared / "data/op/OP_6.tif", spacing_um=SPACING_UM)


@pytest.fixture(scope="module")
def gold(shared, volume):
    gold = read_swc(shared / "data/op/OP_6.swc", unit="voxel").to("voxel", SPACING_UM)
    return align_gold(gold, volume)[0]


def test_the_tree_lies_on_the_aligned_gold_in_one_piece(out, gold):
    tree = read_swc(out / "OP_6.swc")
    assert (tree.unit, tree.num_roots) == ("um", 1)
    assert tree.spacing_um == SPACING_UM
    assert score_trees(tree, gold)["f1"] >= 0.90


def test_everything_a_person_wants_is_written(out, volume):
    names = {path.name for path in out.iterdir()}
    assert names == {"OP_6.swc", "OP_6_probability.tif", "OP_6_review.csv", "OP_6.png"}
    probability = read_volume(out / "OP_6_probability.tif")
    assert probability.shape == volume.shape
    assert probability.spacing_um == pytest.approx(SPACING_UM)
    assert 0 <= probability.voxels.min() < probability.voxels.max() <= 1


def test_the_neurite_is_bright_where_the_tree_runs(out, volume):
    points = np.rint(read_swc(out / "OP_6.swc").to("voxel").points).astype(int)
    on_tree = volume.voxels[tuple(np.clip(points, 0, np.array(volume.shape) - 1).T)]
    assert np.median(on_tree) > np.percentile(volume.voxels, 99.5)


def test_dark_on_bright_gives_the_same_tree(out, volume, tmp_path):
    tifffile.imwrite(tmp_path / "dark.tif", 255 - volume.voxels)
    reconstruct(tmp_path / "dark.tif", "--out", tmp_path)
    tree, dark = read_swc(out / "OP_6.swc"), read_swc(tmp_path / "dark.swc")
    assert score_trees(dark, tree)["f1"] > 0.99


def test_a_crop_keeps_the_coordinates_of_the_stack(out, tmp_path, shared):
    reconstruct(shared / "data/op/OP_6.tif", "--out", tmp_path, "--crop", "20:90,150:350,40:400")
    part, whole = read_swc(tmp_path / "OP_6.swc"), read_swc(out / "OP_6.swc")
    assert score_trees(part, whole)["precision"] > 0.95


def test_voxels_are_written_for_who_works_in_voxels(out, tmp_path, shared):
    reconstruct(shared / "data/op/OP_6.tif", "--out", tmp_path, "--swc-unit", "voxel")
    in_voxels, in_um = read_swc(tmp_path / "OP_6.swc"), read_swc(out / "OP_6.swc")
    assert in_voxels.unit == "voxel"
    np.testing.assert_allclose(in_voxels.points * SPACING_UM, in_um.points, atol=1e-3)


def test_the_network_marks_the_neuron_and_not_the_box(out):
    """About the share of voxels that neurites fill."""
    probability = read_volume(out / "OP_6_probability.tif")
    assert 0.0001 < np.mean(probability.voxels > 0.5) < 0.003
