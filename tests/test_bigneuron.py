"""The `datasets` builder: which files are pairs, how they are split, and that a cache never hides a change."""

import datasets
import pytest

from vit3d import BigNeuron
from vit3d.bigneuron import find_pairs, split_of


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Rows by name and split, built offline in a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def run(folder):
        builder = BigNeuron(data_path=str(folder), cache_dir=str(tmp_path / "cache"))
        builder.download_and_prepare()
        return {row["name"]: (split, row) for split, rows in builder.as_dataset().items() for row in rows}

    return run


@pytest.fixture
def neurons(tmp_path):
    """A folder of twelve pairs; nothing here looks into the files."""
    folder = tmp_path / "neurons"
    folder.mkdir()
    for number in range(12):
        add_pair(folder, f"neuron_{number}")
    return folder


def add_pair(folder, name, suffix=".tif"):
    for path in (folder / f"{name}{suffix}", folder / f"{name}.swc"):
        path.write_bytes(b"1 0 0 0 0 1 -1\n")


def test_pairs_are_a_stack_and_an_swc_of_the_same_name(tmp_path):
    add_pair(tmp_path, "b", ".v3dpbd")
    add_pair(tmp_path, "a", ".tif")
    (tmp_path / "image_alone.tif").touch()
    (tmp_path / "gold_alone.swc").touch()
    assert [row["name"] for row in find_pairs(tmp_path)] == ["a", "b"]
    assert find_pairs(tmp_path)[1]["image"] == str(tmp_path / "b.v3dpbd")
    assert find_pairs(tmp_path)[1]["swc"] == str(tmp_path / "b.swc")


def test_a_folder_without_pairs_and_no_folder_are_refused(tmp_path):
    (tmp_path / "image_alone.tif").touch()
    with pytest.raises(FileNotFoundError, match=r"holds no pair of a stack .* and an SWC of the same name"):
        find_pairs(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        find_pairs(tmp_path / "none")


def test_about_a_fifth_of_the_names_is_for_testing():
    share = sum(split_of(f"neuron {number}") == "test" for number in range(5000)) / 5000
    assert share == pytest.approx(0.2, abs=0.03)


def test_the_builder_gives_every_pair_once_in_the_split_of_its_name(build, neurons):
    rows = build(neurons)
    assert sorted(rows) == sorted(row["name"] for row in find_pairs(neurons))
    assert {split for split, _ in rows.values()} == {"train", "test"}
    for name, (split, row) in rows.items():
        assert split == split_of(name)
        assert row["image"] == str(neurons / f"{name}.tif")
        assert row["swc"] == str(neurons / f"{name}.swc")


def test_a_new_pair_is_seen_and_moves_no_other(build, neurons):
    before = build(neurons)
    add_pair(neurons, "a_new_one")
    after = build(neurons)
    assert after.keys() - before.keys() == {"a_new_one"}
    assert all(after[name][0] == split for name, (split, _) in before.items())
    (neurons / "a_new_one.swc").unlink()
    assert build(neurons).keys() == before.keys()


def test_a_changed_file_gives_another_fingerprint(neurons):
    prints = [BigNeuron(data_path=str(neurons)).config.fingerprint]
    (neurons / "neuron_3.swc").write_text("1 0 0 0 0 1 -1\n2 0 1 1 1 1 1\n")
    prints.append(BigNeuron(data_path=str(neurons)).config.fingerprint)
    assert len(set(prints)) == 2
