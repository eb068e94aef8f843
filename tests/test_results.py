"""How results get into their folder: all of them or none, whoever is killed on the way."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit3d.results import all_or_none

WRITE = """
import sys, time
from pathlib import Path
from vit3d.results import all_or_none

with all_or_none(Path(sys.argv[1]), "a") as whole:
    (whole / "a.swc").write_text("1 0 0 0 0 1 -1")
    print("writing", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def writer():
    """A process that is writing the results of `a`, and ends when it is told something."""
    started = []

    def start(out: Path) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", WRITE, str(out)], stdin=-1, stdout=-1, text=True)
        started.append(process)
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def hidden(out: Path) -> list[Path]:
    return list(out.glob(".a.*.partial"))


def write(out: Path, name: str = "a") -> None:
    with all_or_none(out, name) as whole:
        (whole / f"{name}.swc").write_text(name)


def test_what_a_killed_process_left_goes_with_the_next_write_of_the_name(writer, tmp_path):
    process = writer(tmp_path)
    process.kill()
    process.wait()
    assert len(hidden(tmp_path)) == 1
    write(tmp_path, "b")
    assert len(hidden(tmp_path)) == 1
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.swc", "b.swc"]


def test_what_a_living_process_is_writing_is_left_to_it(writer, tmp_path):
    process = writer(tmp_path)
    write(tmp_path)
    assert len(hidden(tmp_path)) == 1
    process.communicate("go on\n")
    assert process.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.swc"]
    assert (tmp_path / "a.swc").read_text() == "1 0 0 0 0 1 -1"


def test_a_process_of_another_machine_is_believed_to_live_until_it_was_silent_for_a_day(writer, tmp_path):
    process = writer(tmp_path)
    process.kill()
    process.wait()
    (folder,) = hidden(tmp_path)
    owner = folder / "owner.json"
    owner.write_text(json.dumps({**json.loads(owner.read_text()), "machine": "elsewhere"}))
    write(tmp_path)
    assert hidden(tmp_path) == [folder]
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.swc"]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / ".a.b.partial").mkdir()
    (tmp_path / ".a.b.partial" / "kept.txt").touch()
    write(tmp_path)
    assert (tmp_path / ".a.b.partial" / "kept.txt").exists()


@pytest.mark.parametrize("suffix", [".swc", ".SWC", ".eswc", ".ESWC"])
def test_a_tree_is_written_however_its_suffix_is_capitalised(tmp_path, suffix):
    with all_or_none(tmp_path, "a") as whole:
        (whole / f"a{suffix}").write_text("1 0 0 0 0 1 -1")
        (whole / "a_review.csv").write_text("kind")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"a{suffix}", "a_review.csv"])
