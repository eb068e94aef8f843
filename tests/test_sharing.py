"""Sharing a checkpoint: what the repository would hold, and that it works where vit3d is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vit3d
from vit3d import ViT3DConfig, ViT3DForNeuronSegmentation, sharing
from vit3d.cli import main
from vit3d.sharing import prepare, share

NETWORK = {path.name for path in (Path(vit3d.__file__).parent / "model").glob("*_vit3d.py")}
NEEDED = NETWORK - {"auto_vit3d.py", "blocks_vit3d.py"}  # nothing that is loaded by the Auto classes imports these


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViT3DConfig(**sizes, fused_layers=(1, 2), volume_size=(8, 32, 32), patch_size=(4, 8, 8))
    folder = tmp_path_factory.mktemp("checkpoint")
    ViT3DForNeuronSegmentation(config).save_pretrained(folder)
    return folder


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*_, **__):
        pytest.fail("nothing may be sent")

    monkeypatch.setattr(sharing, "HfApi", refuse)


def test_a_dry_run_lists_the_files_and_sends_nothing(tiny, no_hub, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["share", str(tiny), "lab/our-network", "--dry-run"])
    title, *files = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0
    assert title == f"lab/our-network would hold {len(files)} files:"
    assert {"config.json", "model.safetensors", "README.md", *NEEDED} <= set(files)
    assert not (tiny / "README.md").exists()


@pytest.mark.parametrize("repo_id", ["a/b/c", "no spaces/here", "-x/y", "alone", "lab/"])
def test_a_malformed_repository_id_is_refused(tiny, no_hub, repo_id):
    with pytest.raises(ValueError, match="no repository id NAMESPACE/NAME"):
        share(tiny, repo_id)


def test_what_is_no_checkpoint_is_refused(tmp_path, no_hub):
    with pytest.raises(ValueError, match="not a vit3d checkpoint"):
        share(tmp_path, "lab/name", dry_run=True)
    with pytest.raises(ValueError, match="no folder and no shipped checkpoint"):
        share(tmp_path / "none", "lab/name", dry_run=True)


def test_everything_goes_in_one_commit(tiny, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, {path.name for path in Path(folder_path).iterdir()}))
            return type("Commit", (), {"commit_url": "https://hub/commit/1"})

    monkeypatch.setattr(sharing, "HfApi", Hub)
    (said,) = share(tiny, "lab/name", private=True)
    assert [call[0] for call in calls] == ["create", "upload"]
    assert calls[0] == ("create", "lab/name", True, True)
    assert {"config.json", "model.safetensors", "README.md", *NEEDED} <= calls[1][2]
    assert said.endswith("in one commit: https://hub/commit/1")


def test_weights_are_shared_as_they_are_stored(tiny, tmp_path):
    half = ViT3DForNeuronSegmentation.from_pretrained(tiny, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    prepare(tmp_path / "half", "lab/name", tmp_path / "shared")
    stored, shared = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "shared"))
    assert stored.keys() == shared.keys()
    assert all(shared[name].dtype == torch.bfloat16 and torch.equal(shared[name], stored[name]) for name in stored)


def test_a_card_is_made_and_one_that_is_there_stays(tiny, tmp_path):
    prepare(tiny, "lab/name", tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert 'from_pretrained("lab/name", trust_remote_code=True)' in card
    (tmp_path / "a" / "README.md").write_text("# Our own words")
    prepare(tmp_path / "a", "lab/name", tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text() == "# Our own words"


def test_sharing_what_was_shared_gives_the_same_repository(tiny, tmp_path):
    first = prepare(tiny, "lab/name", tmp_path / "a")
    second = prepare(tmp_path / "a", "lab/name", tmp_path / "b")
    assert first == second
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in "ab"]
    assert configs[0] == configs[1]
    assert configs[0]["auto_map"] == {
        "AutoConfig": "configuration_vit3d.ViT3DConfig",
        "AutoModel": "modeling_vit3d.ViT3DModel",
        "AutoModelForSemanticSegmentation": "modeling_vit3d.ViT3DForNeuronSegmentation",
    }


def test_a_checkpoint_saved_after_sharing_is_as_one_saved_before(tiny, tmp_path):
    prepare(tiny, "lab/name", tmp_path / "shared")
    ViT3DForNeuronSegmentation.from_pretrained(tiny).save_pretrained(tmp_path / "after")
    assert {path.name for path in (tmp_path / "after").iterdir()} == {"config.json", "model.safetensors"}
    assert (tmp_path / "after" / "config.json").read_text() == (tiny / "config.json").read_text()


STRANGER = """
import sys
sys.modules["vit3d"] = None  # not installed here
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation

model = AutoModelForSemanticSegmentation.from_pretrained("shared", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("shared", trust_remote_code=True)
encoder = AutoModel.from_pretrained("shared", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
stack = torch.load("stack.pt", weights_only=True)
batch = processor(stack.numpy(), return_tensors="pt")
with torch.no_grad():
    tokens = encoder(batch["pixel_values"]).last_hidden_state
    logits = model(batch["pixel_values"], batch["token_mask"]).logits
torch.save({"logits": logits, "tokens": tokens, "mask": batch["token_mask"]}, "logits.pt")
"""


@pytest.mark.slow
def test_a_stranger_without_vit3d_gets_the_same_logits_to_the_last_bit(tiny, tmp_path):
    prepare(tiny, "lab/name", tmp_path / "shared")
    stack = torch.zeros(8, 32, 64)
    stack[3:6, 10:13] = 100 + 50 * torch.rand(3, 3, 64)
    torch.save(stack, tmp_path / "stack.pt")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = {**clean, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    model = ViT3DForNeuronSegmentation.from_pretrained(tiny)
    batch = vit3d.ViT3DImageProcessor.from_config(model.config)(stack.numpy(), return_tensors="pt")
    with torch.no_grad():
        logits = model(batch["pixel_values"], batch["token_mask"]).logits
        tokens = model.vit3d(batch["pixel_values"]).last_hidden_state
    assert 0 < batch["token_mask"].sum() < batch["token_mask"].numel()
    assert torch.equal(theirs["mask"], batch["token_mask"])
    assert torch.equal(theirs["logits"], logits)
    assert torch.equal(theirs["tokens"], tokens)
