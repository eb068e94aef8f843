"""Training: a few steps of a tiny network, what a run leaves behind, and what it refuses to begin."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vit3d import ViT3DConfig, ViT3DForNeuronSegmentation, ViT3DImageProcessor, segment
from vit3d.checkpoint import load_checkpoint
from vit3d.cli import main
from vit3d.gold import estimate_shift
from vit3d.simulate import simulate_neuron
from vit3d.training import TrainingConfig, initial_model, parameter_groups, read_gold, save, train
from vit3d.tree import write_swc
from vit3d.volume import Volume, read_volume, write_volume

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CONFIG = ViT3DConfig(**SIZES, fused_layers=(1, 2), volume_size=(8, 32, 32), patch_size=(4, 8, 8))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A tiny network that has learned nothing."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    ViT3DForNeuronSegmentation(CONFIG).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Two simulated pairs: one whose SWC says um, one as BigNeuron's, in voxels and silent about it."""
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("um", "voxel")):
        volume, tree = simulate_neuron(seed=seed, shape=(12, 64, 72))
        write_volume(volume, folder / f"{name}.tif")
        write_swc(tree, folder / f"{name}.swc", unit=name)
    silent = [line for line in (folder / "voxel.swc").read_text().splitlines() if not line.startswith("#")]
    (folder / "voxel.swc").write_text("\n".join(silent))
    return folder


@pytest.fixture
def config(tiny, data, tmp_path) -> TrainingConfig:
    fast = {"simulated": 0, "max_steps": 3, "batch_size": 2, "warmup_steps": 1, "num_workers": 0}
    return TrainingConfig(str(data), tiny, str(tmp_path / "run"), **fast, validate=("um",), validate_every=2)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# ------------------------------------------------------------ a run


def test_three_steps_leave_metrics_and_two_checkpoints_that_predict(config, tmp_path):
    out = tmp_path / "run"
    best = train(config)
    assert best == out / "best"
    assert sorted(path.name for path in out.iterdir()) == ["best", "last", "metrics.jsonl", "training.json"]
    lines = metrics(out)
    assert [line["step"] for line in lines] == [2, 3]
    assert all(0 <= line["f1/um"] == line["f1"] <= 1 and line["seconds"] > 0 for line in lines)
    facts = json.loads((out / "training.json").read_text())
    assert (facts["max_steps"], facts["num_processes"], facts["validate"]) == (3, 1, ["um"])
    volume = Volume(read_volume(Path(config.data) / "um.tif").voxels[:8, :32, :32])
    for name in ("best", "last"):
        model, processor = load_checkpoint(str(out / name))
        assert segment(model, volume, processor=processor).shape == volume.shape


def test_a_step_changes_every_weight_that_the_prediction_depends_on(config, tiny, tmp_path):
    train(replace(config, validate=(), ema_decay=0.0))
    before, after = weights(Path(tiny)), weights(tmp_path / "run" / "last")
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {"vit3d.layernorm.weight", "vit3d.layernorm.bias"}  # the head reads the layers before it


def test_the_same_seed_gives_the_same_weights(config, tmp_path):
    runs = [
        train(replace(config, out=str(tmp_path / name), validate=(), seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    a, b, c = map(weights, runs)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_without_validation_the_best_is_the_last(config, tmp_path):
    train(replace(config, validate=()))
    best, last = (weights(tmp_path / "run" / name) for name in ("best", "last"))
    assert all(torch.equal(best[name], last[name]) for name in best)


def test_the_command_trains_and_says_where(tiny, data, tmp_path, capsys):
    flags = f"--data {data} --init {tiny} --out {tmp_path / 'run'} --simulated 0 --max-steps 1 --batch-size 1"
    words = ["train", *flags.split()]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--validate", "um,voxel"])
    assert stopped.value.code == 2
    assert "Nothing to train on" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0
    assert f"best checkpoint: {tmp_path / 'run' / 'best'}" in capsys.readouterr().out


@pytest.mark.slow
def test_simulated_neurons_alone_are_enough(config, tmp_path):
    train(replace(config, data="", validate=(), simulated=1, max_steps=1))
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()


# ------------------------------------------------------------ golds and parameters


@pytest.mark.parametrize("name", ["um", "voxel"])
def test_a_gold_is_read_in_voxels_and_lies_on_its_stack(data, name):
    volume = read_volume(data / f"{name}.tif")
    gold, polarity = read_gold(data / f"{name}.swc", volume, ViT3DImageProcessor.from_config(CONFIG))
    assert (gold.unit, polarity) == ("voxel", "bright")
    assert (gold.points.max(0) <= np.array(volume.shape)).all()
    assert np.abs(estimate_shift(gold, volume)).max() <= 0.5


def test_a_gold_is_aligned_to_dark_neurites_too(data, tmp_path):
    volume = read_volume(data / "um.tif")
    moved = Volume(np.roll(255 - volume.voxels, 2, axis=2), volume.spacing_um)
    gold, polarity = read_gold(data / "um.swc", moved, ViT3DImageProcessor.from_config(CONFIG))
    here, _ = read_gold(data / "um.swc", volume, ViT3DImageProcessor.from_config(CONFIG))
    assert polarity == "dark"
    np.testing.assert_allclose(gold.points - here.points, np.broadcast_to([0, 0, 2], gold.points.shape), atol=0.6)


def test_every_parameter_is_in_one_group(config, tiny):
    model = initial_model(config)
    inherited, new = parameter_groups(model, config)
    both = [id(parameter) for parameter in (*inherited["params"], *new["params"])]
    assert len(both) == len(set(both)) == len(list(model.parameters()))
    assert (inherited["lr"], new["lr"]) == (config.encoder_rate, config.head_rate)
    assert id(model.vit3d.embeddings.depth_embeddings) in {id(parameter) for parameter in new["params"]}
    assert id(model.vit3d.layers[0].mlp.fc1.weight) in {id(parameter) for parameter in inherited["params"]}


# ------------------------------------------------------------ checkpoints


def test_saving_leaves_the_previous_checkpoint_when_it_fails_anywhere(tiny, tmp_path, monkeypatch):
    model, processor = load_checkpoint(tiny)
    folder = tmp_path / "last"
    save(model, processor, folder)
    before = weights(folder)
    torch.nn.init.ones_(model.head.classifier.bias)

    def no_place_for(name):
        rename = Path.rename

        def fail(self, target):
            if self.name == name:
                raise OSError("no space left")
            return rename(self, target)

        return fail

    for name in ("last", "last.partial"):
        with monkeypatch.context() as broken:
            broken.setattr(Path, "rename", no_place_for(name))
            with pytest.raises(OSError, match="no space"):
                save(model, processor, folder)
        assert all(torch.equal(before[key], value) for key, value in weights(folder).items())
    save(model, processor, folder)
    assert weights(folder)["head.classifier.bias"].item() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_kill_between_the_two_renames_loses_nothing(tiny, tmp_path, monkeypatch):
    model, processor = load_checkpoint(tiny)
    save(model, processor, tmp_path / "last")
    (tmp_path / "last").rename(tmp_path / "last.old")  # killed here: only the old one and a partial one are left
    (tmp_path / "last.partial").mkdir()
    monkeypatch.setattr(ViT3DForNeuronSegmentation, "save_pretrained", lambda *_: pytest.fail("killed again"))
    with pytest.raises(pytest.fail.Exception):
        save(model, processor, tmp_path / "last")
    assert (tmp_path / "last" / "model.safetensors").is_file()


# ------------------------------------------------------------ refused before it begins


def test_a_folder_that_holds_a_run_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "training.json").touch()
    with pytest.raises(ValueError, match="already holds a run"):
        train(config)


def test_a_run_that_is_refused_leaves_no_folder(config, tmp_path):
    for change, sentence in (
        ({"validate": ("um", "nobody")}, r"--validate names \['nobody'\]"),
        ({"data": str(tmp_path / "none")}, "is no folder"),
        ({"data": "", "validate": ()}, "Nothing to train on"),
        ({"init": "nosuch"}, "no folder and no shipped checkpoint"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            train(replace(config, **change))
    assert not (tmp_path / "run").exists()


def test_an_init_that_is_no_vit_is_refused(config, tmp_path, capsys):
    for content, sentence in (('{"model_type": "bert"}', "'bert' model, not a 'vit'"), ("{}", "model_type"), ("{", "")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--data", config.data, "--init", str(tmp_path), "--out", str(tmp_path / "run")])
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vit3d: ")]
        assert stopped.value.code == 2
        assert len(said) == 1
        assert sentence in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["max_steps", "batch_size", "validate_every"])
def test_a_number_below_one_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        TrainingConfig("", "", "", **{name: 0})


def test_an_out_with_a_file_in_its_place_is_refused(config, tmp_path, capsys):
    (tmp_path / "run").touch()
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--data", config.data, "--init", config.init, "--out", config.out])
    assert stopped.value.code == 2
    assert "run is a file" in capsys.readouterr().err


# ------------------------------------------------------------ two processes


@pytest.mark.slow
def test_two_processes_train_one_network_on_different_crops(tiny, data, tmp_path):
    run = tmp_path / "run"
    flags = f"--data {data} --init {tiny} --simulated 0 --max-steps 2 --batch-size 2 --validate um --validate-every 1"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    command = [*torchrun, "-m", "vit3d.training", *flags.split(), "--out", str(run)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((run / "training.json").read_text())["num_processes"] == 2
    assert [line["step"] for line in metrics(run)] == [1, 2]  # one process writes
    # with crops of their own two processes take the steps of one with twice the batch; with the same crops they
    # would take those of one with their own batch
    two = weights(run / "last")
    distance = {}
    for batch_size in (2, 4):
        out = tmp_path / f"one_{batch_size}"
        with pytest.raises(SystemExit):
            main(["train", *flags.replace("--batch-size 2", f"--batch-size {batch_size}").split(), "--out", str(out)])
        one = weights(out / "last")
        distance[batch_size] = float(sum((one[name] - two[name]).abs().sum() for name in one))
    assert 0 < distance[4] < 0.7 * distance[2]
