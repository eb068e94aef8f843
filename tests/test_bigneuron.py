"""The `datasets` builder: rows of examined pairs, their splits, and that a cache never hides a change."""

import hashlib
import json
import os
import warnings

import datasets
import numpy as np
import pytest
import tifffile
from numpy.testing import assert_allclose, assert_array_equal

from vit3d import BigNeuron, NeuronTree, Volume, load_bigneuron, read_swc, read_volume, write_swc, write_volume
from vit3d.annotations.annotation import examine, read_gold, read_labels, read_stack
from vit3d.annotations.file_facts import digest
from vit3d.bigneuron import find_pairs, split_of
from vit3d.targets import IGNORED, paint

SHAPE = (12, 40, 48)


def tree(number: int = 0) -> NeuronTree:
    """A fork that no mirroring leaves where it is; another one for each number."""
    points = [[2, 4, 3], [4, 12, 12 + number % 5], [8, 30, 20], [9, 16, 44]]
    return NeuronTree(np.array(points, float), np.full(4, 1.2), [-1, 0, 1, 1], unit="voxel")


def add_pair(folder, name: str, number: int = 0, drawn: NeuronTree | None = None, spacing_um=None) -> None:
    """A stack of a neuron and its gold, or the gold `drawn` instead, without a header as others write it."""
    voxels = 200 * paint(tree(number), SHAPE).astype(np.uint8)
    write_volume(Volume(voxels, spacing_um), folder / f"{name}.tif")
    write_swc(tree(number) if drawn is None else drawn, folder / f"{name}.swc")
    lines = (folder / f"{name}.swc").read_text().splitlines(keepends=True)
    (folder / f"{name}.swc").write_text("".join(line for line in lines if not line.startswith("#")))


@pytest.fixture
def load(tmp_path, monkeypatch):
    """(split, row) by name, built offline in a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def run(folder, **options):
        loaded = load_bigneuron(folder, cache_dir=tmp_path / "cache", **options)
        return {row["name"]: (split, row) for split, rows in loaded.items() for row in rows}

    return run


@pytest.fixture
def neurons(tmp_path):
    folder = tmp_path / "neurons"
    folder.mkdir()
    for number in range(8):
        add_pair(folder, f"neuron_{number}", number)
    return folder


def test_a_row_says_what_the_files_say_and_holds_no_voxels(load, tmp_path, capfd):
    folder = tmp_path / "mouse_korea"
    folder.mkdir()
    add_pair(folder, "cell", spacing_um=(1.0, 0.25, 0.5))
    split, row = load(folder)["cell"]
    assert split == split_of("cell")
    assert row == {
        **{"name": "cell", "neuron": "cell", "species": "mouse", "lab": "KIST"},
        **{"image": str(folder / "cell.tif"), "swc": str(folder / "cell.swc"), "label": ""},
        **{"spacing_um": [1.0, 0.25, 0.5], "unit": "voxel", "shape": list(SHAPE), "shift_vox": [0, 0, 0]},
        **{f"{what}_sha256": hashlib.sha256((folder / f"cell.{end}").read_bytes()).hexdigest()
           for what, end in (("image", "tif"), ("gold", "swc"))},
        "polarity": "bright",
    }  # fmt: skip
    assert capfd.readouterr().err == ""  # no bars outside a terminal


def test_what_nobody_states_is_none_and_a_table_states_it(load, neurons):
    assert load(neurons)["neuron_0"][1]["spacing_um"] is None
    (neurons / "scaling_gold.csv").write_text(
        "swc_file,id,x_y_pix_size,z_pix_size\n/gold/1/00_sorted_neuron_0.v3dpbd.swc,1,0.3,1\n"
    )
    rows = load(neurons)
    assert rows["neuron_0"][1]["spacing_um"] == [1.0, 0.3, 0.3]
    assert rows["neuron_1"][1]["spacing_um"] is None


def test_an_swc_in_um_is_known_by_its_header(load, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    add_pair(folder, "cell", spacing_um=(1.0, 0.5, 0.5))
    write_swc(tree().to("um", (1.0, 0.5, 0.5)), folder / "cell.swc")
    row = load(folder)["cell"][1]
    assert row["unit"] == "um"
    assert_allclose(read_gold(row).points, tree().points, atol=1e-4)


# --- the cache ---


def test_every_pair_comes_once_in_the_split_of_its_name(load, neurons):
    rows = load(neurons)
    assert sorted(rows) == sorted(row["name"] for row in find_pairs(neurons))
    assert {split for split, _ in rows.values()} == {"train", "test"}
    assert all(split == split_of(name) for name, (split, _) in rows.items())


def test_a_new_pair_is_seen_and_moves_no_other(load, neurons):
    before = load(neurons)
    add_pair(neurons, "a_new_one")
    after = load(neurons)
    assert after.keys() - before.keys() == {"a_new_one"}
    assert all(after[name][0] == split for name, (split, _) in before.items())
    (neurons / "a_new_one.swc").unlink()
    (neurons / "a_new_one.tif").unlink()
    assert load(neurons).keys() == before.keys()


def test_a_gold_drawn_again_is_seen(load, neurons):
    before = load(neurons)["neuron_0"][1]
    add_pair(neurons, "neuron_0", drawn=tree().shifted((0, -1, 2)))
    after = load(neurons)["neuron_0"][1]
    assert before["gold_sha256"] != after["gold_sha256"]
    assert after["shift_vox"] == [0, 1, -2]


def test_an_unchanged_folder_is_not_examined_again(load, neurons, monkeypatch):
    before = load(neurons)
    stamp = (neurons / "neuron_0.tif").stat()
    (neurons / "neuron_0.tif").write_bytes(bytes(stamp.st_size))  # who would read it now, would fail
    os.utime(neurons / "neuron_0.tif", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert load(neurons) == before


def test_the_builder_can_be_used_itself(neurons, tmp_path):
    builder = BigNeuron(data_path=str(neurons), cache_dir=str(tmp_path / "other"))
    builder.download_and_prepare()
    assert len(builder.as_dataset("train")) + len(builder.as_dataset("test")) == 8
    assert builder.info.description == ""


# --- splits ---


def test_a_split_file_overrides_and_the_rest_goes_by_name(load, neurons, tmp_path):
    moved = [f"neuron_{n}" for n in range(8) if split_of(f"neuron_{n}") == "train"][:2]
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"test": moved[:1], "validation": moved[1:]}))
    before, after = load(neurons), load(neurons, split_file=file)
    assert [after[name][0] for name in moved] == ["test", "validation"]
    assert all(after[name][0] == before[name][0] for name in before.keys() - set(moved))
    file.write_text(json.dumps({"train": ["nobody"]}))
    with pytest.raises(ValueError, match="names nobody, which the folder does not hold"):
        load(neurons, split_file=file)


# --- alignment, and pairs that are none ---


def test_a_shift_is_reported_and_applied_when_reading_or_not_at_all(load, neurons):
    add_pair(neurons, "neuron_0", drawn=tree().shifted((0.0, -1.5, 1.0)))
    row = load(neurons)["neuron_0"][1]
    assert row["shift_vox"] == [0, 1.5, -1]
    assert_allclose(read_gold(row).points, tree().points, atol=1e-4)
    raw = load(neurons, align=False)["neuron_0"][1]
    assert raw["shift_vox"] == [0, 0, 0]
    assert_allclose(read_gold(raw).points, tree().shifted((0, -1.5, 1)).points, atol=1e-4)


def test_a_flipped_gold_is_left_out_by_name_unless_asked_for(load, neurons):
    add_pair(neurons, "neuron_0", drawn=tree().flipped(1, SHAPE[1] - 1))
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match=r"Left out of .*neuron_0: .* it does when y is flipped \(y -> 39 - y\)"):
            rows = load(neurons)
        assert len(rows) == 7
        assert "neuron_0" not in rows
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "neuron_0" in load(neurons, keep_misplaced=True)


def test_an_swc_outside_its_image_is_left_out_by_name_unless_asked_for(load, neurons):
    add_pair(neurons, "neuron_0", drawn=tree().shifted((0, 0, 20)))
    with pytest.warns(UserWarning, match=r"neuron_0: 1 of 4 SWC nodes lie outside .* 12 x 40 x 48 .* x = 64\.0"):
        assert "neuron_0" not in load(neurons)
    assert "neuron_0" in load(neurons, keep_misplaced=True)


def test_a_stack_without_an_swc_is_listed_and_skipped(load, neurons):
    (neurons / "neuron_3.swc").unlink()
    with pytest.warns(UserWarning, match="1 stack has no gold and is skipped: neuron_3"):
        assert "neuron_3" not in load(neurons)


def test_a_damaged_file_is_left_out_by_name(load, neurons):
    (neurons / "neuron_0.tif").write_bytes((neurons / "neuron_0.tif").read_bytes()[:-200])
    (neurons / "neuron_1.swc").write_text("1 0 0 0 0 1 7\n")
    both = r"neuron_0\.tif.*neuron_1\.swc, line 1 \(node 1\) has parent 7"
    with pytest.warns(UserWarning, match=both):
        assert len(load(neurons)) == 6


def test_a_folder_without_a_usable_pair_is_refused(load, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no pair of a stack"):
        load(folder)
    add_pair(folder, "cell", drawn=tree().flipped(2, SHAPE[2] - 1))
    with pytest.raises(ValueError, match=r"holds no pair that can be used\. .*cell: .* x is flipped"):
        load(folder)


@pytest.mark.slow
def test_the_op_neurons_are_rows_with_their_known_shifts(shared):
    known = json.loads((shared / "data/op/gold_shift.json").read_text())
    for name in ("OP_5", "OP_6"):
        row = examine(next(row for row in find_pairs(shared / "data/op") if row["name"] == name))
        assert_allclose(row["shift_vox"], known[name], atol=0.5)
        assert row["shape"] == read_volume(row["image"]).shape
        raw = read_swc(row["swc"], unit="voxel")
        assert_allclose(read_gold(row).points - raw.points, np.broadcast_to(row["shift_vox"], raw.points.shape))


def test_a_v3dpbd_of_gold166_gets_its_spacing_from_the_table(shared, tmp_path):
    stem = "p_checked6_mouse_korea/err_smalltest/smalltest.v3dpbd"
    (tmp_path / stem).parent.mkdir(parents=True)
    (tmp_path / stem).symlink_to(shared / "data/vaa3d/smalltest.v3dpbd")
    write_swc(tree(), tmp_path / f"{stem}.ano_stamp_2015_06_16_17_57.swc")
    (tmp_path / "scaling_gold.csv").write_text(
        "swc_file,id,x_y_pix_size,z_pix_size\ngold/9/00_sorted_smalltest.v3dpbd.ano_stamp_2015_06_16_17_57.swc,9,0.104,0.5\n"
    )
    row = examine(find_pairs(tmp_path)[0], align=False, keep_misplaced=True)
    assert {key: row[key] for key in ("shape", "spacing_um", "lab")} == {
        "shape": (41, 512, 512),
        "spacing_um": (0.5, 0.104, 0.104),
        "lab": "KIST",
    }


def test_a_zarr_store_is_a_stack_too(load, tmp_path):
    folder = tmp_path / "stores"
    folder.mkdir()
    add_pair(folder, "cell", spacing_um=(1.0, 0.5, 0.5))
    write_volume(read_volume(folder / "cell.tif"), folder / "cell.zarr")
    (folder / "cell.tif").unlink()
    row = load(folder)["cell"][1]
    assert row["image"] == str(folder / "cell.zarr")
    assert (row["shape"], row["spacing_um"]) == (list(SHAPE), [1.0, 0.5, 0.5])
    chunk = max((path for path in (folder / "cell.zarr").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    os.utime(chunk, ns=(1, 1))
    assert load(folder)["cell"][1] == row  # examined again, with the same bytes
    (folder / "other.zarr.partial").mkdir()
    assert list(load(folder)) == ["cell"]


# --- from a row to labels ---


def test_a_store_whose_chunk_lies_elsewhere_is_another_one(tmp_path):
    (tmp_path / "a.zarr/c/0").mkdir(parents=True)
    (tmp_path / "a.zarr/c/1").mkdir()
    (tmp_path / "a.zarr/c/0/0").write_bytes(b"voxels")
    before = digest(tmp_path / "a.zarr")
    (tmp_path / "a.zarr/c/0/0").rename(tmp_path / "a.zarr/c/1/0")
    assert digest(tmp_path / "a.zarr") != before


def test_a_gold_is_aligned_with_its_volume_where_its_row_was_not_examined(tmp_path):
    add_pair(tmp_path, "cell", drawn=tree().shifted((0, -2, 0)))
    row = find_pairs(tmp_path)[0]
    aligned = read_gold(row, read_stack(row))
    assert_allclose(aligned.points, tree().points, atol=1e-4)
    assert_allclose(read_gold(examine(row)).points, aligned.points)
    assert_allclose(read_gold(row, align=False).points, tree().shifted((0, -2, 0)).points, atol=1e-4)
    with pytest.raises(ValueError, match="cell was not examined"):
        read_gold(row)


def test_a_gold_in_um_that_says_its_spacing_is_converted_by_that(tmp_path):
    add_pair(tmp_path, "cell", spacing_um=(1.0, 1.0, 1.0))
    write_swc(tree().to("um", (2.0, 0.5, 0.5)), tmp_path / "cell.swc")
    row = find_pairs(tmp_path)[0]
    assert_allclose(read_gold(row, read_stack(row), align=False).points, tree().points, atol=1e-4)


def test_without_checks_a_stack_is_not_judged(tmp_path):
    add_pair(tmp_path, "cell", drawn=tree().shifted((0, 300, 0)))
    row = find_pairs(tmp_path)[0]
    assert examine(row, align=False, keep_misplaced=True)["polarity"] == ""
    with pytest.raises(ValueError, match=r"^cell: 4 of 4 SWC nodes lie outside the stack of 12 x 40 x 48 voxels"):
        examine(row, align=False)


def test_label_volumes_and_masks_are_annotations(load, tmp_path):
    folder = tmp_path / "labelled"
    folder.mkdir()
    codes = np.zeros(SHAPE, np.uint8)
    codes[5] = 1
    codes[5, 10:20, 10:20], codes[5, 30:, :], codes[5, :2, :] = 2, 4, 3
    for name, label in (("a_label", codes), ("b_mask", np.where(codes == 2, 255, 0).astype(np.uint8))):
        tifffile.imwrite(folder / f"{name}.tif", label)
        write_volume(Volume(200 * (codes == 2).astype(np.uint8)), folder / f"{name[0]}.tif")
    rows = load(folder)
    assert {name: row["swc"] for name, (_, row) in rows.items()} == {"a": "", "b": ""}
    partial, whole = (read_labels(rows[name][1], SHAPE) for name in "ab")
    assert_array_equal(partial[5, [0, 5, 15, 35], 15], [0, 0, 1, IGNORED])
    assert (np.delete(partial, 5, axis=0) == IGNORED).all()
    assert_array_equal(whole, codes == 2)


def test_labels_that_do_not_fit_are_refused(tmp_path):
    write_volume(Volume(np.zeros(SHAPE, np.uint8)), tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "a_label.tif", np.full(SHAPE, 9, np.uint8))
    row = find_pairs(tmp_path)[0]
    with pytest.raises(ValueError, match=r"a_label\.tif: the label volume holds the codes \[9\]; known are \[0, 1, 2"):
        examine(row)
    with pytest.raises(ValueError, match=r"a_label\.tif has the shape \(12, 40, 48\), but its stack has \(1, 2, 3\)"):
        read_labels(row, (1, 2, 3))


def test_trailmaps_folder_is_one_partly_annotated_stack(shared):
    row = find_pairs(shared / "data/trailmap")[0]
    stack = read_stack(row)
    labels = read_labels(row, stack.shape)
    codes = tifffile.imread(shared / "data/trailmap/label.tif")
    assert stack.shape == labels.shape == (101, 120, 120)
    assert_array_equal(labels == 1, codes == 2)
    assert_array_equal(labels == IGNORED, np.isin(codes, (0, 4)))
