"""Sharing a checkpoint: one commit that holds everything, on a Hub that fails; and that strangers can use it."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_imports

import vit3d
from hub import Hub, talking_to
from vit3d import ViT3DConfig, ViT3DForNeuronSegmentation, repository
from vit3d.annotations.file_facts import stamp
from vit3d.annotations.pairs import find_pairs
from vit3d.checkpoint import load_checkpoint
from vit3d.cli import main
from vit3d.learning.training_data import neuron_facts
from vit3d.model_card import Record, card_of, check_card
from vit3d.sharing import _described, _same_logits, prepare, share, share_dataset
from vit3d.tables import add_json_line, json_lines

REPO = "lab/our-network"
CARDS = Path(__file__).parents[1] / "model_cards"
CODE = {path.name for path in (Path(vit3d.__file__).parent / "model").glob("*_vit3d.py")}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WINDOW = {"volume": (8, 32, 32), "center_slice": (4, 32, 32)}
SCORES = {
    "real": [
        {"neuron": "A", "role": "trained on", "f1": 0.9, "precision": 0.8},
        {"neuron": "B", "role": "selected on", "f1": 0.7, "precision": 0.6},
        {"neuron": "C", "role": "trained on", "f1": 0.8, "precision": 0.7},
    ]
}
HISTORY = [
    {"step": 10, "loss": 0.5, "seconds": 3.0},
    {"step": 10, "f1": 0.6, "f1/B": 0.6, "seconds": 4.0},
    {"step": 20, "loss": 0.25, "seconds": 6.0},
    {"step": 20, "f1": 0.55, "f1/B": 0.55, "seconds": 7.0},
]
TRAINING = {
    **{"data": "/somewhere/our neurons", "init": "facebook/dino-vitb16", "strategy": "center", "validate": ["B"]},
    **{"simulated": 3, "max_steps": 20, "batch_size": 2, "seed": 0},
}


def tiny_model(prediction: str = "volume", seed: int = 0) -> ViT3DForNeuronSegmentation:
    torch.manual_seed(seed)
    window = WINDOW[prediction]
    config = ViT3DConfig(
        **SIZES, fused_layers=(1, 2), volume_size=window, patch_size=(4, 8, 8), prediction=prediction, head_channels=4
    )
    model = ViT3DForNeuronSegmentation(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A checkpoint as `train` leaves it: with its run around it, and a picture."""
    run = tmp_path / "run"
    tiny_model().save_pretrained(run / "best")
    (run / "training.json").write_text(json.dumps(TRAINING))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in HISTORY))
    (run / "scores.json").write_text(json.dumps(SCORES))
    (run / "picture.png").write_bytes(b"not looked at")
    return run / "best"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(repository, "WAITS_S", (0, 0.01, 0.02))
    monkeypatch.setattr(repository, "TIMEOUT_S", 1)
    with Hub() as hub, talking_to(hub, monkeypatch, tmp_path):
        yield hub


def card_in(folder: Path) -> tuple[str, dict]:
    card = ModelCard.load(folder / "README.md")
    return card.text, card.data.to_dict()


# --- what the repository holds ---------------------------------------------------------------------------------


def test_a_dry_run_lists_the_files_and_sends_nothing(tiny, hub, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["share", str(tiny), REPO, "--dry-run"])
    title, *files = capsys.readouterr().out.splitlines()
    assert not stopped.value.code
    assert title == f"{REPO} would hold {len(files)} files:"
    whole = {"config.json", "preprocessor_config.json", "model.safetensors", "README.md", *CODE}
    assert set(files) == whole | {"metrics.jsonl", "scores.json", "training.json", "picture.png"}
    assert not (tiny / "README.md").exists()
    assert not hub.requests


def test_everything_goes_in_one_commit_and_is_read_back(tiny, hub, tmp_path):
    count, same = share(tiny, REPO, private=True)
    prepare(tiny, REPO, tmp_path / "expected")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    found = hub.files(REPO)
    found.pop(".gitattributes")
    assert found == expected
    made = hub.repos["models", REPO]
    assert made.private
    assert len(made.commits) == 2  # the empty one of every repository, and ours
    assert f"{len(expected)} files in one commit: {hub.url}/{REPO}/commit/{made.head}" == count
    assert "every logit to the last bit" in same


def test_a_network_that_comes_back_with_other_logits_is_told(tmp_path):
    for seed in (0, 1):
        tiny_model(seed=seed).save_pretrained(tmp_path / str(seed))
    check = _same_logits(tmp_path / "0")
    check(tmp_path / "0")
    with pytest.raises(ValueError, match="has other logits"):
        check(tmp_path / "1")


def test_weights_are_shared_as_they_are_stored(tiny, tmp_path):
    half = ViT3DForNeuronSegmentation.from_pretrained(tiny, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half", max_shard_size="50KB")
    shutil.copy(tiny.parent / "picture.png", tmp_path / "half")
    prepare(tmp_path / "half", REPO, tmp_path / "shared")
    shards = sorted(path.name for path in (tmp_path / "half").glob("*.safetensors"))
    assert len(shards) > 1
    for name in shards:
        stored, shared = (load_file(tmp_path / folder / name) for folder in ("half", "shared"))
        assert stored.keys() == shared.keys()
        assert all(shared[key].dtype == torch.bfloat16 and torch.equal(shared[key], stored[key]) for key in stored)
    assert json.loads((tmp_path / "shared/config.json").read_text())["dtype"] == "bfloat16"


def test_the_processor_is_the_checkpoints_own(tiny, tmp_path):
    vit3d.ViT3DImageProcessor.from_config(ViT3DConfig.from_pretrained(tiny), polarity="dark").save_pretrained(tiny)
    prepare(tiny, REPO, tmp_path / "shared")
    assert json.loads((tmp_path / "shared/preprocessor_config.json").read_text())["polarity"] == "dark"


def test_sharing_what_was_shared_gives_the_same_repository(tiny, tmp_path):
    first = prepare(tiny, REPO, tmp_path / "a")
    second = prepare(tmp_path / "a", REPO, tmp_path / "b")
    assert first == second
    for name in first:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.slow
def test_a_checkpoint_without_a_picture_gets_one(tiny, tmp_path):
    (tiny.parent / "picture.png").unlink()
    assert "preview.png" in prepare(tiny, REPO, tmp_path / "shared")
    assert (tmp_path / "shared/preview.png").read_bytes().startswith(b"\x89PNG")
    assert "](preview.png)" in (tmp_path / "shared/README.md").read_text()


# --- the card --------------------------------------------------------------------------------------------------


def test_the_card_says_what_is_on_file_and_nothing_else(tiny, tmp_path):
    prepare(tiny, REPO, tmp_path / "shared", licence="mit")
    text, data = card_in(tmp_path / "shared")
    assert {key: data[key] for key in ("license", "base_model", "datasets", "metrics", "pipeline_tag")} == {
        "license": "mit",
        "base_model": "facebook/dino-vitb16",
        "datasets": ["our-neurons"],
        "metrics": ["precision", "f1"],
        "pipeline_tag": "image-segmentation",
    }
    (index,) = data["model-index"]
    found = {r["dataset"]["name"]: {m["type"]: m["value"] for m in r["metrics"]} for r in index["results"]}
    assert found["real (trained on)"] == {"precision": pytest.approx(0.75), "f1": pytest.approx(0.85)}
    assert found["real (selected on)"] == {"precision": 0.6, "f1": 0.7}
    assert found["validation"] == {"f1": 0.6}  # of the best step, which `best` is
    for words in ("(depth, height, width)", "8 x 32 x 32", "4 x 8 x 8", "not on file", "0.449", "| center | 20 | 2 |"):
        assert words in text, words
    assert not [path for path in (tmp_path / "shared").iterdir() if b"/somewhere" in path.read_bytes()]
    assert json.loads((tmp_path / "shared/training.json").read_text())["data"] == "our neurons"


def test_a_licence_that_the_hub_does_not_know_is_refused(tiny, hub, tmp_path):
    with pytest.raises(ValueError, match=r"--licence takes what the Hub knows, mit, .* got foo"):
        share(tiny, REPO, dry_run=True, licence="foo")
    prepare(tiny, REPO, tmp_path / "shared", licence="MIT")
    assert card_in(tmp_path / "shared")[1]["license"] == "mit"


def test_the_curve_of_a_training_is_shown_as_what_it_is(tiny, tmp_path):
    (tiny.parent / "curve.png").write_bytes(b"not looked at")
    assert "curve.png" in prepare(tiny, REPO, tmp_path / "shared")
    text, _ = card_in(tmp_path / "shared")
    assert re.findall(r"!\[(.*)\]\((.*)\)", text) == [
        ("A stack and what is found in it", "picture.png"),
        ("The training, step by step", "curve.png"),
    ]
    (tiny.parent / "picture.png").unlink()
    assert Record.read(tiny).picture is None  # so that `prepare` draws one


def test_a_checkpoint_of_which_nothing_is_known_has_a_card_that_says_so(tmp_path):
    tiny_model().save_pretrained(tmp_path / "bare")
    (tmp_path / "bare/picture.png").write_bytes(b"")
    prepare(tmp_path / "bare", REPO, tmp_path / "shared")
    text, data = card_in(tmp_path / "shared")
    assert not {"license", "base_model", "datasets", "metrics", "model-index"} & set(data)
    for words in ("No record of the training", "None are on file.", "not stated; ask whoever shares them"):
        assert words in text, words


@pytest.mark.parametrize(
    "prediction, words", [("volume", "of every voxel of the window"), ("center_slice", "so that `depth` is 1")]
)
def test_the_card_says_what_of_a_window_is_predicted(prediction, words, tmp_path):
    model = tiny_model(prediction)
    assert words in card_of(Record(), model.config, REPO)
    depth = model(torch.zeros(1, 1, *model.config.volume_size)).logits.shape[2]
    assert (depth == 1) == (prediction == "center_slice")


def test_the_card_names_the_packages_that_its_code_imports():
    text = card_of(Record(), ViT3DConfig(), REPO)
    imported = {name for path in CODE for name in get_imports(Path(vit3d.__file__).parent / "model" / path)}
    (needed,) = re.findall(r"`pip install (.*?)`", text)
    comes_with = {"numpy", "huggingface_hub"} | sys.stdlib_module_names  # transformers requires them
    assert imported - comes_with == {"torch", "transformers"} == set(re.findall(r"[a-z]+", needed)) - {"pillow"}
    stated = re.search(r"transformers(>=[\d.]+)", needed)[1]
    assert f'"transformers{stated},' in (CARDS.parent / "pyproject.toml").read_text()


def test_words_that_are_there_stay_and_get_what_they_lack(tiny, tmp_path):
    (tiny / "README.md").write_text("---\nlicense: cc-by-4.0\nlanguage: en\n---\n# Our own words\n")
    prepare(tiny, REPO, tmp_path / "shared")
    text, data = card_in(tmp_path / "shared")
    assert text.lstrip().startswith("# Our own words\n")
    assert f'pipeline("neuron-segmentation", model="{REPO}"' in text
    assert (data["license"], data["language"], data["library_name"]) == ("cc-by-4.0", "en", "transformers")
    assert data["model-index"]
    prepare(tmp_path / "shared", "lab/another", tmp_path / "again")
    again = (tmp_path / "again/README.md").read_text()
    assert 'model="lab/another"' in again
    assert REPO not in again


def tampered(folder: Path, name: str, number: str, instead: str) -> None:
    text = (folder / name).read_text()
    assert number in text
    (folder / name).write_text(text.replace(number, instead, 1))


@pytest.mark.parametrize(
    "name, number, instead, sentence",
    [
        ("README.md", "| 0.900 |", "| 0.910 |", "The table 'real' is not what scores.json holds"),
        ("README.md", "| 0.600 |\n<!--", "| 0.700 |\n<!--", "The table 'validation' is not"),
        ("README.md", "| 0.375 |", "| 0.275 |", "The table 'this run' is not what training.json"),
        ("scores.json", "0.9", "0.91", "The table 'real' is not what scores.json holds"),
    ],
)
def test_a_card_whose_numbers_are_not_on_file_is_not_shared(tiny, hub, tmp_path, name, number, instead, sentence):
    prepare(tiny, REPO, tmp_path / "shared")
    tampered(tmp_path / "shared", name, number, instead)
    with pytest.raises(ValueError, match=sentence):
        share(tmp_path / "shared", REPO)
    assert not hub.requests


def test_a_model_index_that_is_not_on_file_is_said(tiny, tmp_path):
    prepare(tiny, REPO, tmp_path / "shared")
    record = Record.read(tmp_path / "shared")
    text = (tmp_path / "shared/README.md").read_text()
    assert check_card(text, record) == []
    index = "The metadata's model-index is not what scores.json and metrics.jsonl hold."
    assert check_card(text.replace("value: 0.6\n", "value: 0.8\n", 1), record) == [index]


@pytest.mark.parametrize("name", ["vit3d-tiny", "tracing"])
def test_the_numbers_in_our_own_cards_are_those_on_file(name):
    assert check_card((CARDS / name / "README.md").read_text(), Record.read(CARDS / name)) == []


def test_a_wrong_number_in_our_own_card_is_found(tmp_path):
    shutil.copytree(CARDS / "vit3d-tiny", tmp_path / "card")
    rows = json.loads((tmp_path / "card/scores.json").read_text())["real"]
    tampered(tmp_path / "card", "README.md", f"| {rows[0]['f1']:.3f} |", "| 0.999 |")
    wrong = check_card((tmp_path / "card/README.md").read_text(), Record.read(tmp_path / "card"))
    assert wrong == ["The table 'real neurons' is not what scores.json holds."]


# --- what is refused -------------------------------------------------------------------------------------------


def test_a_malformed_repository_id_is_refused_before_anything_is_read(tmp_path, hub):
    for sharing in (share, lambda *names: share_dataset(*names, licence="mit")):
        with pytest.raises(ValueError, match="'alone' is no repository id NAMESPACE/NAME"):
            sharing(tmp_path / "none", "alone")
    assert not hub.requests


def test_what_is_no_checkpoint_is_refused(tmp_path, hub):
    with pytest.raises(ValueError, match="not a vit3d checkpoint"):
        share(tmp_path, "lab/name", dry_run=True)
    with pytest.raises(ValueError, match="no folder and no shipped checkpoint"):
        share(tmp_path / "none", "lab/name", dry_run=True)
    with pytest.raises(ValueError, match="--card takes a folder"):
        share("vit3d-tiny", "lab/name", dry_run=True, card=tmp_path / "none")
    assert not hub.requests


@pytest.mark.parametrize("trouble", ["no token", "no permission", "a fault that stays"])
def test_what_the_hub_refuses_is_one_line_of_the_command_and_nothing_is_published(
    tiny, hub, monkeypatch, capfd, trouble
):
    if trouble == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif trouble == "no permission":
        monkeypatch.setenv("HF_TOKEN", "hf_reader")
    else:
        hub.fault("PUT", "/lfs/", "corrupt", 9)
    with pytest.raises(SystemExit) as stopped:
        main(["share", str(tiny), REPO])
    assert stopped.value.code == 2
    assert len([line for line in capfd.readouterr().err.splitlines() if line.startswith("vit3d: ")]) == 1
    assert not hub.repos


def test_a_missing_token_is_said_before_any_work(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="hf auth login"):
        share(tmp_path / "no checkpoint", REPO)
    with pytest.raises(ValueError, match="hf auth login"):
        share_dataset(tmp_path / "no data", REPO, licence="mit")
    assert not hub.requests


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults",
    [
        (("PUT", "/lfs/", "cut"), ("POST", "/commit/", 500)),
        (("POST", "/preupload/", 503), ("POST", "/commit/", "lost")),
    ],
    ids=str,
)
def test_a_push_with_two_faults_gives_the_same_network(tiny, hub, faults):
    for fault in faults:
        hub.fault(*fault)
    assert "every logit to the last bit" in share(tiny, REPO)[1]
    assert len(hub.met) == 2
    assert hub.files(REPO)["model.safetensors"] == (tiny / "model.safetensors").read_bytes()


# --- data sets -------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path) -> Path:
    folder = tmp_path / "our neurons"
    folder.mkdir()
    for name in ("a", "b"):
        volume, tree = vit3d.simulate_neuron(seed=ord(name), shape=(8, 48, 48))
        vit3d.write_volume(volume, folder / f"{name}.tif")
        vit3d.write_swc(tree, folder / f"{name}.swc")
    return folder


def test_a_data_set_is_shared_as_checksums_and_nothing_of_it_is_sent(pairs, hub, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["share", str(pairs), "lab/neurons", "--dataset", "--licence", "cc-by-4.0"])
    assert not stopped.value.code
    files = hub.files("lab/neurons", "datasets")
    assert set(files) == {".gitattributes", "README.md", "metadata.jsonl"}
    rows = [json.loads(line) for line in files["metadata.jsonl"].splitlines()]
    assert [(row["image"], row["swc"]) for row in rows] == [("a.tif", "a.swc"), ("b.tif", "b.swc")]
    for row in rows:
        for key in ("image", "swc"):
            data = (pairs / row[key]).read_bytes()
            assert (row[f"{key}_bytes"], row[f"{key}_sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    card = files["README.md"].decode()
    assert "license: cc-by-4.0" in card
    assert str(pairs.parent) not in files["metadata.jsonl"].decode() + card
    assert "same to the last byte" in capsys.readouterr().out


def test_of_a_history_a_last_line_cut_short_is_passed_over_and_another_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\n{"step": 2}\n{"step": 3, "lo')
    assert json_lines(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no JSON"):
        json_lines(path)
    assert json_lines(tmp_path / "none.jsonl") == json_lines(None) == []


def test_of_a_zarr_stack_bytes_and_checksum_are_those_of_all_its_files(pairs):
    import zarr

    voxels = vit3d.read_volume(pairs / "a.tif").voxels
    (pairs / "a.tif").unlink()
    zarr.create_array(pairs / "a.zarr", data=voxels, chunks=(8, 24, 24))
    row = find_pairs(pairs)[0]
    described = _described(row, pairs)
    files = [path for path in (pairs / "a.zarr").rglob("*") if path.is_file()]
    assert described["image_bytes"] == sum(path.stat().st_size for path in files) == neuron_facts([row])["a"][0]
    stamps, digests = [stamp(row["image"])], [described["image_sha256"]]
    chunk = next(path for path in files if path.name != "zarr.json")
    chunk.write_bytes(chunk.read_bytes()[::-1])
    assert stamp(row["image"]) != stamps[0]
    assert _described(row, pairs)["image_sha256"] != digests[0]


@pytest.mark.parametrize("flag", ["--card", "--base-model"])
def test_a_flag_of_a_checkpoint_is_refused_for_a_data_set(pairs, hub, capsys, flag):
    with pytest.raises(SystemExit) as stopped:
        main(["share", str(pairs), "lab/neurons", "--dataset", "--licence", "mit", flag, str(pairs)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"vit3d: {flag} is for a checkpoint, and --dataset shares none.\n"
    assert not hub.requests


@pytest.mark.parametrize("licence", [None, "unknown", "all rights reserved", "cc-by-nd-4.0"])
def test_a_data_set_whose_licence_does_not_let_others_have_it_is_not_shared(pairs, hub, licence):
    with pytest.raises(ValueError, match="a licence that lets others have it"):
        share_dataset(pairs, "lab/neurons", licence=licence)
    with pytest.raises(FileNotFoundError):
        share_dataset(pairs / "none", "lab/neurons", licence="mit")
    assert not hub.requests


# --- every save ------------------------------------------------------------------------------------------------


def saves(model) -> dict:
    """What can be saved of a network, by a name for its folder."""
    processor = vit3d.ViT3DImageProcessor.from_config(model.config)
    return {"model": model, "encoder": model.vit3d, "config": model.config, "processor": processor}


@pytest.mark.parametrize("name", ["model", "encoder", "config", "processor"])
def test_any_save_carries_the_code_and_says_where_every_class_is(name, tmp_path):
    saves(tiny_model())[name].save_pretrained(tmp_path)
    file = "preprocessor_config.json" if name == "processor" else "config.json"
    stored = json.loads((tmp_path / file).read_text())
    places = stored["auto_map"]
    assert set(places) == {"AutoConfig", "AutoModel", "AutoModelForSemanticSegmentation", "AutoImageProcessor"}
    if name != "processor":
        places |= {"pipeline": stored["custom_pipelines"]["neuron-segmentation"]["impl"]}
    for place in places.values():
        module, cls = place.split(".")
        assert f"class {cls}(" in (tmp_path / f"{module}.py").read_text()
    assert {path.name for path in tmp_path.glob("*.py")} == CODE


# --- strangers -------------------------------------------------------------------------------------------------

STRANGER = """
import sys
sys.modules["vit3d"] = None  # not installed here
import numpy as np
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, pipeline

stack = np.load("stack.npy")
for source, revision in SOURCES:
    trusted = {"trust_remote_code": True, "revision": revision}
    model = AutoModelForSemanticSegmentation.from_pretrained(source, dtype=torch.float32, **trusted)
    processor = AutoImageProcessor.from_pretrained(source, **trusted)
    encoder = AutoModel.from_pretrained(source, dtype=torch.float32, **trusted)
    config = AutoConfig.from_pretrained(source, **trusted)
    for thing in (model, processor, encoder, config):
        assert type(thing).__module__.startswith("transformers_modules"), type(thing)
    batch = processor(stack[: config.volume_size[0], :32, :64], return_tensors="pt")
    with torch.no_grad():
        tokens = encoder(batch["pixel_values"]).last_hidden_state
        logits = model(batch["pixel_values"], batch["token_mask"]).logits
    found = pipeline("neuron-segmentation", model=source, **trusted)(stack)
    assert set(found) == {"probability", "mask"}, found.keys()
    results = {"logits": logits, "tokens": tokens, "mask": batch["token_mask"]}
    results["probability"] = torch.from_numpy(found["probability"])
    torch.save(results, f"theirs {source.replace('/', ' ')} {revision}.pt")
"""


def in_a_fresh_process(code: str, cwd: Path, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def stranger(sources: list[tuple[str, str | None]], cwd: Path, **environment: str) -> None:
    """Loads each (source, revision) where vit3d is not installed, and keeps what it gives."""
    for left in cwd.glob("theirs*"):
        left.unlink()
    in_a_fresh_process(STRANGER.replace("SOURCES", repr(sources)), cwd, **environment)


def stack_larger_than_a_window() -> np.ndarray:
    stack = np.zeros((20, 60, 150), dtype=np.uint8)
    z, y, x = np.indices(stack.shape)
    stack[np.hypot(z - 3, y - 10 - x / 5) < 2] = 180
    return stack


def assert_theirs_is_ours(checkpoint: Path | str, cwd: Path, source: str = REPO, revision: str | None = None) -> None:
    theirs = torch.load(cwd / f"theirs {source.replace('/', ' ')} {revision}.pt", weights_only=True)
    stack = np.load(cwd / "stack.npy")
    model, processor = load_checkpoint(str(checkpoint), "cpu", dtype=torch.float32)
    batch = processor(stack[: model.config.volume_size[0], :32, :64], return_tensors="pt")
    with torch.no_grad():
        logits = model(batch["pixel_values"], batch["token_mask"]).logits
        tokens = model.vit3d(batch["pixel_values"]).last_hidden_state
    assert 0 < batch["token_mask"].sum() < batch["token_mask"].numel()
    assert torch.equal(theirs["mask"], batch["token_mask"])
    assert torch.equal(theirs["logits"], logits)
    assert torch.equal(theirs["tokens"], tokens)
    ours = vit3d.segment(model, vit3d.Volume(stack)).voxels
    assert ours.any()
    assert np.array_equal(theirs["probability"].numpy(), ours)


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    np.save(folder / "stack.npy", stack_larger_than_a_window())
    return folder


@pytest.mark.slow
def test_a_stranger_without_vit3d_gets_the_same_from_the_hub_and_then_offline(hub, elsewhere, tmp_path):
    """`vit3d-tiny`, and a network of its size that predicts centre slices; each push meets two faults."""
    torch.manual_seed(0)
    slices = ViT3DConfig(prediction="center_slice", volume_size=(5, 112, 112), patch_size=(5, 8, 8))
    model = ViT3DForNeuronSegmentation(slices)
    torch.nn.init.constant_(model.head.classifier.bias, 0.0)
    model.save_pretrained(tmp_path / "slices")
    checkpoints = {"lab/tiny": "vit3d-tiny", "lab/slices": tmp_path / "slices"}
    for repo_id, checkpoint in checkpoints.items():
        hub.fault("POST", "/commit/", 500)
        hub.fault("PUT", "/lfs/", "cut")
        share(checkpoint, repo_id, card=CARDS / "vit3d-tiny")
    assert len(hub.met) == 4
    environment = hub.environment(tmp_path / "their cache", token=None)
    sources = [(repo_id, None) for repo_id in checkpoints]
    stranger(sources, elsewhere, **environment)
    for repo_id, checkpoint in checkpoints.items():
        assert_theirs_is_ours(checkpoint, elsewhere, repo_id)
    hub.server.shutdown()
    hub.server.server_close()
    stranger(sources, elsewhere, **{**environment, "HF_HUB_OFFLINE": "1"})
    for repo_id, checkpoint in checkpoints.items():
        assert_theirs_is_ours(checkpoint, elsewhere, repo_id)


@pytest.mark.slow
def test_a_stranger_who_pins_a_revision_gets_that_one(tiny, hub, elsewhere, tmp_path):
    share(tiny, REPO)
    pinned = hub.repos["models", REPO].head
    shutil.copytree(tiny, tmp_path / "first")
    tiny_model(seed=1).save_pretrained(tiny)
    share(tiny, REPO)
    environment = hub.environment(tmp_path / "their cache", token=None)
    stranger([(REPO, pinned), (REPO, None)], elsewhere, **environment)
    assert_theirs_is_ours(tmp_path / "first", elsewhere, revision=pinned)
    assert_theirs_is_ours(tiny, elsewhere)


@pytest.mark.slow
def test_what_save_pretrained_and_push_to_hub_write_works_for_strangers_too(hub, elsewhere, tmp_path):
    from transformers import pipeline

    model = tiny_model()
    processor = vit3d.ViT3DImageProcessor.from_config(model.config)
    model.save_pretrained(elsewhere / "saved")
    processor.save_pretrained(elsewhere / "saved")
    pipeline("neuron-segmentation", model=str(elsewhere / "saved")).save_pretrained(elsewhere / "from-pipeline")
    model.push_to_hub(REPO)
    processor.push_to_hub(REPO)
    environment = hub.environment(tmp_path / "their cache", token=None)
    sources = ("saved", "from-pipeline", REPO)
    stranger([(source, None) for source in sources], elsewhere, **environment)
    for source in sources:
        assert_theirs_is_ours(elsewhere / "saved", elsewhere, source)


EACH = """
import sys
sys.modules["vit3d"] = None  # not installed here
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, pipeline

trusted = {"trust_remote_code": True}
AutoConfig.from_pretrained("config", **trusted)
AutoImageProcessor.from_pretrained("processor", **trusted)
AutoModel.from_pretrained("encoder", **trusted)
model = AutoModelForSemanticSegmentation.from_pretrained("encoder", **trusted)
assert all(parameter.isfinite().all() for parameter in model.parameters())
with torch.no_grad():
    model.head.classifier.bias.fill_(3.0)  # learned here
model.save_pretrained("theirs")
again = AutoModelForSemanticSegmentation.from_pretrained("theirs", **trusted)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
print(type(pipeline("neuron-segmentation", model="theirs", **trusted)).__name__)
"""


@pytest.mark.slow
def test_a_stranger_loads_each_save_alone_and_what_they_save_works_on(tmp_path):
    for name, thing in saves(tiny_model()).items():
        thing.save_pretrained(tmp_path / name)
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    assert in_a_fresh_process(EACH, tmp_path, **environment) == "NeuronSegmentationPipeline\n"
    assert {path.name for path in (tmp_path / "theirs").glob("*.py")} == CODE
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("encoder", "theirs"))
    assert all(torch.equal(value, theirs[f"vit3d.{name}"]) for name, value in ours.items())


@pytest.mark.slow
def test_the_get_started_blocks_of_the_cards_run_where_vit3d_is_not_installed(tiny, pairs, hub, tmp_path):
    share(tiny, REPO)
    share_dataset(pairs, "lab/neurons", licence="mit")
    absent = 'import sys\nsys.modules["vit3d"] = None\n'
    environment = hub.environment(tmp_path / "their cache", token=None)
    said = {}
    for repo_id, kind in ((REPO, "models"), ("lab/neurons", "datasets")):
        (block,) = hub.files(repo_id, kind)["README.md"].decode().split("```python\n")[1:]
        said[repo_id] = in_a_fresh_process(absent + block.split("```")[0], tmp_path, **environment)
    probability, voxels = said[REPO].split()
    assert 0 < float(probability) <= 1
    assert int(voxels) >= 0
    assert said["lab/neurons"].startswith("2 a.tif ")


@pytest.mark.slow
def test_the_command_shares_from_a_shell_and_shares_on_what_is_on_the_hub(tiny, hub, tmp_path):
    commands = [["share", str(tiny), REPO], ["share", REPO, "lab/copy"]]
    code = f"""
from vit3d.cli import main
for command in {commands!r}:
    try:
        main(command)
    except SystemExit as stopped:
        assert not stopped.code, stopped.code
"""
    said = in_a_fresh_process(code, tmp_path, **hub.environment(tmp_path / "cache"))
    assert said.count("files in one commit") == 2
    first, second = hub.files(REPO), hub.files("lab/copy")
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} == {"README.md"}
    assert first["model.safetensors"] == (tiny / "model.safetensors").read_bytes()


def test_a_row_takes_the_place_of_a_last_line_cut_short(tmp_path):
    path = tmp_path / "rows.jsonl"
    add_json_line(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    add_json_line(path, {"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 1}\n{"step": 2}')
    add_json_line(path, {"step": 3})
    assert json_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
