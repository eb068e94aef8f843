"""What is written is there as a whole or not at all."""

import pytest

from vit3d.formats.appearing import appearing
from vit3d.results import write_review
from vit3d.tracing import Review


def test_a_file_has_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    with appearing(path) as first, appearing(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second
        assert not path.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "a_review.csv"
    write_review([Review("join", (1.0, 2.0, 3.0), 4.0, 0.5)], path, "um")
    before = path.read_text()
    with pytest.raises(AttributeError):
        write_review([Review("join", (1.0, 2.0, 3.0), 4.0, 0.5), None], path, "um")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == before
