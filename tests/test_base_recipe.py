"""The command in vit3d-base's card runs: two steps, from a ViT-B with random weights."""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import ViTConfig, ViTModel

from vit3d.checkpoint import load_checkpoint

CARD = Path(__file__).parents[1] / "model_cards/vit3d-base/README.md"
SMALL = {"--max-steps": "2", "--batch-size": "1", "--simulated": "1", "--warmup-steps": "1"}
NEEDS_DATA = ("--data", "--validate", "--spacing")


def command_of_the_card() -> tuple[list[str], dict[str, str]]:
    """What stands before the training's flags, and the flags."""
    section = CARD.read_text().split("<!-- command -->")[1].split("<!-- /command -->")[0]
    words = shlex.split(section.strip().strip("`"))
    start = words.index("vit3d.training") + 1
    return words[:start], dict(zip(words[start::2], words[start + 1 :: 2], strict=True))


@pytest.mark.slow
def test_the_recipe_trains_a_vit_b_that_loads_again(tmp_path):
    ViTModel(ViTConfig(), add_pooling_layer=False).save_pretrained(tmp_path / "vit-b")
    launch, flags = command_of_the_card()
    assert launch[:2] == ["accelerate", "launch"]
    flags = {name: value for name, value in flags.items() if name not in NEEDS_DATA} | SMALL
    flags |= {"--init": str(tmp_path / "vit-b"), "--out": str(tmp_path / "run")}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", *launch[2:]]
    done = subprocess.run([*launch, *(word for pair in flags.items() for word in pair)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2
    assert math.isfinite(last["loss"])
    model, _ = load_checkpoint(str(tmp_path / "run/last"), device="cpu")
    assert model.config.hidden_size == 768
    assert model.config.position_grid == (14, 14)
