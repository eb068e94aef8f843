"""Which files make a pair, in the layouts that people have; file names are those of the gold166 archive."""

import json
import os
import warnings

import pytest

from vit3d.annotations.pairs import find_pairs, read_split_file, split_of, splits_of, survey

FLY = "GMR_57C10_AD_01-1xLwt_attp40_4stop1-f-A01-20110325_3_A1-right_optic_lobe.v3draw.extract_5"
FLIES = "p_checked7_janelia_flylight_part1"
CELL = "140921c3"


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1 0 0 0 0 1 -1\n")


@pytest.fixture
def gold166(tmp_path):
    """Three sets: a neuron in an `err_` folder with much beside its gold, a sorted eSWC, a set without `p_`."""
    fly, cell = f"{FLIES}/err_{FLY}/{FLY}.v3dpbd", f"p_checked6_mouse_RGC_uw/{CELL}/{CELL}.tif.v3dpbd"
    touch(tmp_path, fly, cell, "checked6_frog_scrippts/done_1/done_1.tif")
    touch(tmp_path, f"{fly}_stamp_2015_06_15_18_45.swc", f"{fly}.ano_stamp_2015_06_16_09_30.swc")
    touch(
        tmp_path,
        *(f"{fly}.ano_stamp_2015_07_01_10_00.swc{what}" for what in ("_resampled.swc", "_radiusreestimated.swc")),
    )
    touch(tmp_path, *(f"{fly}_{tracer}.swc" for tracer in ("APP2", "neutube", "x190_y210_z30_app2")))
    touch(tmp_path, f"{FLIES}/err_{FLY}/consensus_{FLY}.v3dpbd.ano_stamp_2016_01_01_10_00.swc")
    touch(tmp_path, f"{FLIES}/err_{FLY}/processed/{FLY}.v3dpbd_stamp_2017_01_01_10_00.swc")
    touch(
        tmp_path,
        f"p_checked6_mouse_RGC_uw/{CELL}/00_sorted_{CELL}.tif.v3dpbd.ano_stamp_2015_06_16_17_31.swc_sorted.eswc",
    )
    touch(tmp_path, "checked6_frog_scrippts/done_1/sorted_done_1.v3dpbd_stamp_201506_17_11_10.swc")
    return tmp_path


def by_name(folder, **how) -> dict[str, dict]:
    return {row["name"]: row for row in find_pairs(folder, **how)}


def test_neurons_of_one_name_are_told_apart_by_their_folders_wherever_those_lie(tmp_path):
    twins = ("p1/set/n1", "p2/set/n1", "p2/set/n2")
    for archive in ("here", "there"):
        touch(tmp_path / archive, *(f"{folder}/cell{end}" for folder in twins for end in (".tif", ".swc")))
        touch(tmp_path / archive, "p1/set/other/alone.tif", "p1/set/other/alone.swc")
    found = [by_name(tmp_path / archive) for archive in ("here", "there")]
    assert set(found[0]) == set(found[1]) == {"alone", *(f"{folder}/cell" for folder in twins)}
    assert all(name in row["image"] for name, row in found[0].items())


@pytest.mark.parametrize("name, said", [("p2/set/n1/cell", 1), ("cell", 3)])
def test_a_table_names_one_of_several_neurons_of_one_name_or_all(tmp_path, name, said):
    touch(tmp_path, *(f"{folder}/cell{end}" for folder in ("a/n1", "p2/set/n1", "n2") for end in (".tif", ".swc")))
    (tmp_path / "table.csv").write_text(f"name,z_um,y_um,x_um\n{name},1,0.5,0.5\n")
    rows = find_pairs(tmp_path, spacing_table=tmp_path / "table.csv")
    assert [row["spacing_um"] for row in rows].count((1.0, 0.5, 0.5)) == said


def test_gold166_pairs_the_newest_gold_with_its_image(gold166):
    rows = by_name(gold166)
    assert set(rows) == {FLY, CELL, "done_1"}
    folder = gold166 / FLIES / f"err_{FLY}"
    assert rows[FLY]["image"] == str(folder / f"{FLY}.v3dpbd")
    assert rows[FLY]["swc"] == str(folder / f"{FLY}.v3dpbd.ano_stamp_2015_06_16_09_30.swc")
    assert rows[CELL]["swc"].endswith(f"00_sorted_{CELL}.tif.v3dpbd.ano_stamp_2015_06_16_17_31.swc_sorted.eswc")
    assert rows["done_1"]["swc"].endswith("sorted_done_1.v3dpbd_stamp_201506_17_11_10.swc")
    assert {key: rows[FLY][key] for key in ("species", "lab")} == {"species": "fruit fly", "lab": "Janelia"}
    assert rows[CELL]["species"] == "mouse"
    assert rows["done_1"]["lab"] == "Scripps"
    assert {row["spacing_um"] for row in rows.values()} == {None}


def test_a_set_or_a_neuron_folder_can_be_given_itself(gold166):
    assert list(by_name(gold166 / FLIES)) == [FLY]
    assert list(by_name(gold166 / FLIES / f"err_{FLY}")) == [FLY]
    assert by_name(gold166 / FLIES)[FLY]["lab"] == "Janelia"


@pytest.mark.parametrize("pattern, chosen", [
    ("*_resampled.swc", ".v3dpbd.ano_stamp_2015_07_01_10_00.swc_resampled.swc"),
    ("*_APP2.swc", ".v3dpbd_APP2.swc"),
    ("consensus*", ".v3dpbd.ano_stamp_2016_01_01_10_00.swc"),
])  # fmt: skip
def test_what_is_no_gold_can_be_asked_for(gold166, pattern, chosen):
    with pytest.warns(UserWarning, match="2 stacks have no gold"):
        rows = by_name(gold166, gold=pattern)
    assert list(rows) == [FLY]
    assert rows[FLY]["swc"].endswith(chosen)


def test_asking_for_several_at_once_is_refused(gold166):
    with pytest.raises(ValueError, match=r"several SWCs fit '\*\[aA\]\[pP\]\[pP\]2\.swc' .* give a narrower pattern"):
        find_pairs(gold166 / FLIES, gold="*[aA][pP][pP]2.swc")


def test_what_is_asked_for_of_neuron_10_is_not_that_of_neuron_1(tmp_path):
    touch(tmp_path, *(f"cell{n}{end}" for n in (1, 10) for end in (".tif", "_resampled.swc")))
    rows = by_name(tmp_path, gold="*_resampled.swc")
    assert [row["swc"] for row in rows.values()] == [str(tmp_path / f"cell{n}_resampled.swc") for n in (1, 10)]


def test_of_two_with_the_latest_stamp_neither_is_taken_whatever_was_there_before(tmp_path):
    latest = (f"a.v3dpbd{what}_stamp_2015_07_01_10_00.swc" for what in ("", ".ano"))
    touch(tmp_path, "a.v3dpbd", "a.v3dpbd_stamp_2015_06_15_18_45.swc", *latest)
    with pytest.raises(ValueError, match="several SWCs fit"):
        find_pairs(tmp_path, gold="*stamp*")


def test_beside_the_golds_of_single_neurons_an_swc_of_the_whole_stack_is_none(tmp_path):
    touch(tmp_path, "a.v3dpbd", "a.swc", *(f"a.v3dpbd.neuron{n}.ano_stamp_2015_06_16_17_57.swc" for n in (1, 2)))
    assert set(by_name(tmp_path)) == {"a.neuron1", "a.neuron2"}


def test_of_one_stamp_the_annotators_own_file_is_taken(tmp_path):
    own = "b.v3dpbd.ano_stamp_2015_06_16_17_57.swc"
    touch(tmp_path, "b.v3dpbd", own, f"00_sorted_{own}", f"{own}_sorted.swc")
    assert by_name(tmp_path)["b"]["swc"] == str(tmp_path / own)


def test_the_only_neuron_of_a_stack_is_called_as_the_stack(tmp_path):
    touch(tmp_path, "a.v3dpbd", "a.v3dpbd.neuron1.ano_stamp_2015_06_16_17_57.swc")
    assert list(by_name(tmp_path)) == ["a"]


def test_two_neurons_of_one_stack_are_two_rows_in_one_split(tmp_path):
    touch(tmp_path, "a.v3dpbd", *(f"a.v3dpbd.neuron{n}.ano_stamp_2015_06_16_17_57.swc" for n in (1, 2)))
    assert {name: row["neuron"] for name, row in by_name(tmp_path).items()} == {"a.neuron1": "a", "a.neuron2": "a"}
    rows, file = find_pairs(tmp_path), tmp_path / "split.json"
    assert len(set(splits_of(rows).values())) == 1
    file.write_text('{"train": ["a.neuron1"], "test": ["a.neuron2"]}')
    with pytest.raises(
        ValueError, match=r"a\.neuron1 and a\.neuron2 lie in one stack, .*in two splits \(train and test\)"
    ):
        splits_of(rows, file)
    file.write_text('{"held out": ["a"]}')
    assert set(splits_of(rows, file).values()) == {"held out"}


def test_a_stack_in_two_formats_is_one_neuron(tmp_path):
    touch(
        tmp_path, "a.tif", "a.tif.v3dpbd", "a.tif.v3dpbd.ano_stamp_2015_06_16_17_57.swc", "b.v3draw", "b.tif", "b.swc"
    )
    rows = by_name(tmp_path)
    assert rows["a"]["image"] == str(tmp_path / "a.tif.v3dpbd")  # the one that was drawn on
    assert rows["b"]["image"] == str(tmp_path / "b.tif")


def test_neurons_of_one_name_keep_their_folders_apart(tmp_path):
    touch(
        tmp_path, *(f"set_{s}/Image5/Image5.v3dpbd{end}" for s in "ab" for end in ("", "_stamp_2015_06_15_17_13.swc"))
    )
    rows = by_name(tmp_path)
    assert set(rows) == {"set_a/Image5/Image5", "set_b/Image5/Image5"}
    assert {row["neuron"] for row in rows.values()} == {"Image5"}


def test_pairs_are_found_down_to_the_neurons_of_the_sets_of_an_archive(tmp_path):
    for folder in ("archive/set/neuron", "archive/set/neuron/too deep"):
        touch(tmp_path, *(f"{folder}/{folder[-4:]}{end}" for end in (".tif", ".swc")))
    assert list(by_name(tmp_path)) == ["uron"]
    (tmp_path / "archive/set/neuron/uron.tif").unlink()
    with pytest.raises(FileNotFoundError, match="holds no pair"):
        find_pairs(tmp_path)


def test_results_below_a_folder_of_pairs_are_not_taken(tmp_path):
    touch(tmp_path, "a.tif", "a.swc", "predicted/a.tif", "predicted/a.swc", ".hidden/b.tif", ".hidden/b.swc")
    assert [row["image"] for row in find_pairs(tmp_path)] == [str(tmp_path / "a.tif")]


def test_labels_stand_in_for_an_swc(tmp_path):
    touch(tmp_path, "a.tif", "a_label.tif", "b.tif", "b_mask.tif", "c.tif", "c_label.tif", "c.swc")
    rows = by_name(tmp_path)
    assert {name: (row["swc"] != "", row["label"]) for name, row in rows.items()} == {
        "a": (False, str(tmp_path / "a_label.tif")),
        "b": (False, str(tmp_path / "b_mask.tif")),
        "c": (True, ""),
    }


def test_a_stack_without_a_gold_is_listed_and_skipped(tmp_path):
    touch(tmp_path, "a.tif", "a.swc", "alone.tif", "other.v3dpbd", "swc_alone.swc")
    with pytest.warns(UserWarning, match=r"^2 stacks have no gold and are skipped: alone, other\.$"):
        assert [row["name"] for row in find_pairs(tmp_path)] == ["a"]
    (tmp_path / "other.v3dpbd").unlink()
    assert survey(tmp_path).alone == ["alone"]
    (tmp_path / "alone.tif").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_pairs(tmp_path)


def test_a_folder_without_pairs_and_no_folder_are_refused(tmp_path):
    touch(tmp_path, "image_alone.tif")
    with pytest.raises(
        FileNotFoundError, match=r"holds no pair of a stack .* 1 stack has no gold and is skipped: image_alone"
    ):
        find_pairs(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        find_pairs(tmp_path / "none")


def test_the_fingerprint_follows_every_file(gold166):
    prints = [survey(gold166).fingerprint]
    gold = next(gold166.rglob("*2015_06_16_09_30.swc"))
    os.utime(gold, ns=(1, 1))
    prints.append(survey(gold166).fingerprint)
    gold.write_text("1 0 0 0 0 1 -1\n2 0 1 1 1 1 1\n")
    prints.append(survey(gold166).fingerprint)
    touch(gold166, f"{FLIES}/new/alone.tif")
    prints.append(survey(gold166).fingerprint)
    assert len(set(prints)) == 4
    assert survey(gold166).fingerprint == prints[-1]


def test_a_link_that_leads_nowhere_is_a_file_like_others(tmp_path):
    touch(tmp_path, "a.tif", "a.swc")
    before = survey(tmp_path).fingerprint
    (tmp_path / "a.eswc").symlink_to("nowhere")
    assert survey(tmp_path).fingerprint == before  # no file
    (tmp_path / "b.tif").symlink_to("nowhere")
    assert survey(tmp_path).fingerprint != before


# --- tables ---


def test_bigneurons_own_table_gives_the_spacing(gold166):
    lines = [
        f"/home/someone/gold/23/00_sorted_{FLY}.v3dpbd.ano_stamp_2015_06_16_09_30.swc,23,0.38,0.5",
        f"/home/someone/gold/118/00_sorted_{CELL}.tif.v3dpbd.ano_stamp_2015_06_16_17_31.swc_sorted.swc,118,0.1,0.3",
        "/home/someone/gold/7/00_sorted_done_1.v3dpbd.swc,7,NA,NA",
    ]
    (gold166 / "scaling_gold.csv").write_text("swc_file,id,x_y_pix_size,z_pix_size\n" + "\n".join(lines))
    rows = by_name(gold166)
    assert rows[FLY]["spacing_um"] == (0.5, 0.38, 0.38)
    assert rows[CELL]["spacing_um"] == (0.3, 0.1, 0.1)
    assert rows["done_1"]["spacing_um"] is None


def test_one_name_with_two_spacings_says_nothing_unless_the_stamp_decides(tmp_path):
    touch(
        tmp_path,
        *(f"set_a/Image5/Image5.v3dpbd{end}" for end in ("", "_stamp_2015_06_15_17_13.swc")),
        *(f"set_b/Image5/Image5.v3dpbd{end}" for end in ("", ".swc")),
    )
    (tmp_path / "scaling_gold.csv").write_text(
        "swc_file,id,x_y_pix_size,z_pix_size\n"
        "gold/1/00_sorted_Image5.v3dpbd_stamp_2015_06_15_17_13.swc,1,0.4,0.5\n"
        "gold/2/00_sorted_Image5.v3dpbd_stamp_2015_06_15_19_00.swc,2,0.1,0.2\n"
    )
    rows = by_name(tmp_path)
    assert rows["set_a/Image5/Image5"]["spacing_um"] == (0.5, 0.4, 0.4)
    assert rows["set_b/Image5/Image5"]["spacing_um"] is None


def test_a_table_of_ones_own_gives_spacing_species_and_lab(gold166, tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text(f"name,z_um,y_um,x_um,species,lab\n{CELL},1,0.33,0.34,rat,ours\ndone_1,,,,newt,\n")
    rows = by_name(gold166, spacing_table=table)
    assert {key: rows[CELL][key] for key in ("spacing_um", "species", "lab")} == {
        "spacing_um": (1.0, 0.33, 0.34),
        "species": "rat",
        "lab": "ours",
    }
    assert (rows["done_1"]["spacing_um"], rows["done_1"]["species"], rows["done_1"]["lab"]) == (None, "newt", "Scripps")


@pytest.mark.parametrize("text, sentence", [
    ("name,z,y,x\na,1,1,1\n", r"must have the columns .* it has name, x, y, z"),
    ("name,z_um,y_um,x_um\na,1,0,1\n", r"line 2: a voxel size is a positive number of um, got 1, 0, 1"),
    ("name,z_um,y_um,x_um\na,1,1,x\n", r"line 2: a voxel size is a positive number of um, got 1, 1, x"),
    ("name,z_um,y_um,x_um\na,1\n", "line 2 has fewer columns than the first line"),
])  # fmt: skip
def test_a_table_that_cannot_be_read_is_refused(gold166, tmp_path, text, sentence):
    table = tmp_path / "mine.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        find_pairs(gold166, spacing_table=table)
    with pytest.raises(FileNotFoundError, match=r"spacing table .* does not exist"):
        find_pairs(gold166, spacing_table=tmp_path / "none.csv")
    table = tmp_path / "others.csv"
    table.write_text("name,z_um,y_um,x_um\nzzz,1,1,1\n")
    with pytest.raises(ValueError, match=r"others\.csv says nothing of any neuron in .*: it names zzz"):
        find_pairs(gold166, spacing_table=table)


# --- splits ---


def test_about_a_fifth_of_the_names_is_for_testing():
    share = sum(split_of(f"neuron {number}") == "test" for number in range(5000)) / 5000
    assert share == pytest.approx(0.2, abs=0.03)


def test_a_split_file_is_json_or_csv(gold166, tmp_path):
    rows = find_pairs(gold166)
    as_json, as_csv = tmp_path / "split.json", tmp_path / "split.csv"
    as_json.write_text(json.dumps({"train": [CELL], "held_out": [FLY]}))
    as_csv.write_text(f"name,split\n{CELL},train\n{FLY},held_out\n")
    expected = {CELL: "train", FLY: "held_out"}
    assert read_split_file(as_json, rows) == read_split_file(as_csv, rows) == expected
    as_csv.write_text(f"name, split\n{CELL} , Train \n{FLY},held_out\n,\n")  # as spreadsheets and people write it
    assert read_split_file(as_csv, rows) == expected
    as_csv.write_bytes("name,split\nn\u00fcrnberg,train\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"split\.csv is no text in UTF-8"):
        read_split_file(as_csv, rows)


@pytest.mark.parametrize("name, text, sentence", [
    ("a.json", '{"train": ["140921c3", "nobody"]}', "names nobody, which the folder does not hold"),
    ("a.json", '{"train": ["140921c3"], "test": ["140921c3"]}', "puts 140921c3 into two splits; a neuron belongs"),
    ("a.json", '["140921c3"]', 'is no split file: JSON has the form {"train"'),
    ("a.json", "train", "is no split file"),
    ("a.json", '{"train": "140921c3"}', "is no split file"),
    ("a.csv", "name,split\n140921c3,\n", "puts 140921c3 into no split"),
    ("a.csv", "neuron,part\na,train\n", "must have the columns name, split; it has neuron, part"),
])  # fmt: skip
def test_a_split_file_that_makes_no_sense_is_refused(gold166, tmp_path, name, text, sentence):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_split_file(path, find_pairs(gold166))
    with pytest.raises(FileNotFoundError, match=r"split file .* does not exist"):
        read_split_file(tmp_path / "none.json", [])
