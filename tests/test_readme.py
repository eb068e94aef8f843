"""What the README shows is run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=range(len(PYTHON_BLOCKS)))
def test_the_python_blocks_run(block, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    if "write_swc(" in block:
        assert (tmp_path / "neuron.swc").stat().st_size > 0
        assert float(done.stdout) > 0.8


def test_the_pictures_and_files_it_names_exist():
    text = README.read_text()
    for path in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (README.parent / path).is_file(), path
    listed = re.findall(r"^ +([a-z]+\.py|[a-z]+/)", text.partition("src/vit3d/\n")[2], re.M)
    assert {"model/", "formats/", "volume.py"} <= set(listed)
    for name in listed:
        assert (README.parent / "src" / "vit3d" / name).exists(), name


def test_every_command_it_lists_exists():
    from vit3d.cli import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    listed = set(re.findall(r"^vit3d ([a-z]+) ", README.read_text(), re.M))
    assert names == listed
