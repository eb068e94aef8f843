"""Training: a few steps of a tiny network, what a run leaves behind, and what it refuses to begin."""

import json
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from runs import SIZES, WINDOW, equal, launch, losses, make_checkpoint, make_pairs, metrics, weights
from vit3d import ViT3DConfig, ViT3DForNeuronSegmentation, ViT3DImageProcessor, segment
from vit3d.checkpoint import load_checkpoint
from vit3d.cli import main
from vit3d.gold import estimate_shift
from vit3d.patches import CropDataset
from vit3d.reconstruction import reconstruct
from vit3d.scoring import score_trees
from vit3d.training import Clock, TrainingConfig, read_gold, save, train
from vit3d.training_data import read_pair, training_volumes
from vit3d.tree import read_swc, write_swc
from vit3d.volume import Volume, read_volume, write_volume

CONFIG = ViT3DConfig(**SIZES, **WINDOW)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Two pairs: one whose SWC says um, one as BigNeuron's, in voxels and silent about it."""
    return make_pairs(tmp_path_factory.mktemp("data"), {"um": "um", "voxel": "voxel"})


@pytest.fixture
def config(tiny, data, tmp_path) -> TrainingConfig:
    fast = {"simulated": 0, "max_steps": 3, "batch_size": 2, "warmup_steps": 1, "num_workers": 0}
    return TrainingConfig(str(data), tiny, str(tmp_path / "run"), **fast, validate=("um",), validate_every=2)


# ------------------------------------------------------------ a run


def test_three_steps_leave_metrics_and_two_checkpoints_that_predict(config, tmp_path):
    out = tmp_path / "run"
    best = train(replace(config, log_every=1))
    assert best == out / "best"
    expected = ["best", "curve.png", "last", "metrics.jsonl", "state", "training.json"]
    assert sorted(path.name for path in out.iterdir()) == expected
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 3]
    learned, validated = ([line for line in lines if key in line] for key in ("loss", "f1"))
    assert all(0 <= line["data_wait"] <= 1 and line["gradient"] > 0 for line in learned)
    assert all(0 <= line["f1/um"] == line["f1"] <= 1 and line["seconds"] > 0 for line in validated)
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
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


@pytest.mark.slow
def test_frozen_weights_stay(config, tiny, tmp_path):
    train(replace(config, validate=(), ema_decay=0.0, frozen=("vit3d",)))
    before, after = weights(Path(tiny)), weights(tmp_path / "run" / "last")
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"head"}


@pytest.mark.slow
def test_what_is_kept_is_the_average_of_the_weights(config, tmp_path):
    few = replace(config, validate=(), save_every=1, max_steps=2)
    train(replace(few, ema_decay=0.5))
    rest = torch.load(tmp_path / "run" / "state" / "2" / "run.pt", weights_only=True)
    kept = weights(tmp_path / "run" / "last")
    now = weights(tmp_path / "run" / "state" / "2")
    assert all(torch.equal(kept[name], rest["average"][f"module.{name}"]) for name in kept)
    # the average starts at the weights after step 1, which the warm-up's rate of 0 left as they were
    first = weights(Path(config.init))
    assert all(torch.allclose(kept[name], (first[name] + now[name]) / 2, atol=1e-7) for name in kept)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(config, tmp_path):
    runs = [
        weights(train(replace(config, out=str(tmp_path / name), validate=(), seed=seed)))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


def test_without_validation_nothing_is_called_the_best(config, tmp_path):
    assert train(replace(config, validate=())) == tmp_path / "run" / "last"
    assert not (tmp_path / "run" / "best").exists()


@pytest.mark.slow
def test_accumulated_batches_teach_what_one_large_batch_does(config, tmp_path):
    """Nearly: the Dice part of the loss is taken over a batch, so it is no mean over crops."""
    same = replace(config, validate=(), ema_decay=0.0, log_every=1, max_steps=4)
    for name, change in (
        ("small", {}),
        ("large", {"batch_size": 4}),
        ("parts", {"accumulation": 2}),
    ):
        train(replace(same, out=str(tmp_path / name), **change))
    small, large, parts = (weights(tmp_path / name / "last") for name in ("small", "large", "parts"))
    assert distance(large, parts) < 0.5 * distance(large, small)
    assert losses(tmp_path / "parts")[0][1] == pytest.approx(losses(tmp_path / "large")[0][1], rel=0.1)


@pytest.mark.slow
def test_bf16_autocast_trains_fp32_weights_to_nearly_the_same(config, tmp_path):
    for name, precision in (("full", "no"), ("half", "bf16")):
        AcceleratorState._reset_state(reset_partial_state=True)  # one precision per process, says Accelerate
        train(replace(config, validate=(), log_every=1, mixed_precision=precision, out=str(tmp_path / name)))
    AcceleratorState._reset_state(reset_partial_state=True)
    full, half = (dict(losses(tmp_path / name)) for name in ("full", "half"))
    assert full[1] != half[1]
    assert full == pytest.approx(half, rel=0.02)
    assert {value.dtype for value in weights(tmp_path / "half" / "last").values()} == {torch.float32}


@pytest.mark.slow
def test_recomputed_activations_change_no_loss(config, tmp_path):
    runs = {"kept": False, "recomputed": True}
    for name, value in runs.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            quiet = replace(config, validate=(), log_every=1, out=str(tmp_path / name))
            train(replace(quiet, gradient_checkpointing=value))
    assert losses(tmp_path / "kept") == losses(tmp_path / "recomputed")


@pytest.mark.slow
def test_the_cldice_term_is_added_with_its_weight(config, tmp_path):
    found = []
    for weight in (0.0, 1.0, 2.0):
        out = tmp_path / str(weight)
        train(replace(config, validate=(), log_every=1, max_steps=1, cldice_weight=weight, out=str(out)))
        found.append(losses(out)[0][1])
    assert found[0] < found[1] < found[2]
    assert found[2] - found[1] == pytest.approx(found[1] - found[0], rel=1e-4)


def test_the_clock_counts_waiting_alone(monkeypatch):
    now = 0.0
    monkeypatch.setattr("vit3d.training.time.perf_counter", lambda: now)

    def batches():
        nonlocal now
        for wait in (100.0, 1.0, 2.0):  # the first is the workers' start
            now += wait
            yield wait

    clock = Clock()
    for _ in clock.timed(batches()):
        now += 3.0  # the step itself
    assert clock.share() == pytest.approx(3 / 12)
    now += 5.0
    assert clock.share() == 0


def test_the_command_trains_and_says_where(tiny, data, tmp_path, capsys):
    flags = f"--data {data} --init {tiny} --out {tmp_path / 'run'} --simulated 0 --max-steps 1 --batch-size 1"
    words = ["train", *flags.split()]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--validate", "um,voxel"])
    assert stopped.value.code == 2
    assert "Nothing to train on" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--validate", "um"])
    assert not stopped.value.code
    assert f"best checkpoint: {tmp_path / 'run' / 'best'}" in capsys.readouterr().out


@pytest.mark.slow
def test_simulated_neurons_alone_are_enough(config, tmp_path):
    train(replace(config, data="", validate=(), simulated=1, max_steps=1))
    assert (tmp_path / "run" / "last" / "model.safetensors").is_file()


# ------------------------------------------------------------ golds


@pytest.mark.parametrize("name", ["um", "voxel"])
def test_a_gold_is_read_in_voxels_and_lies_on_its_stack(data, name):
    volume = read_volume(data / f"{name}.tif")
    gold, polarity = read_gold(data / f"{name}.swc", volume, ViT3DImageProcessor.from_config(CONFIG))
    assert (gold.unit, polarity) == ("voxel", "bright")
    assert (gold.points.max(0) <= np.array(volume.shape)).all()
    assert np.abs(estimate_shift(gold, volume)).max() <= 0.5


def test_a_gold_is_aligned_to_dark_neurites_too(data):
    volume = read_volume(data / "um.tif")
    moved = Volume(np.roll(255 - volume.voxels, 2, axis=2), volume.spacing_um)
    gold, polarity = read_gold(data / "um.swc", moved, ViT3DImageProcessor.from_config(CONFIG))
    here, _ = read_gold(data / "um.swc", volume, ViT3DImageProcessor.from_config(CONFIG))
    assert polarity == "dark"
    np.testing.assert_allclose(gold.points - here.points, np.broadcast_to([0, 0, 2], gold.points.shape), atol=0.6)


def test_a_gold_outside_its_stack_is_refused_and_a_flipped_one_left_out(config, tmp_path):
    folder = make_pairs(tmp_path / "pairs", {"good": "um", "bad": "voxel"})
    tree = replace(read_swc(folder / "bad.swc"), unit="voxel")
    write_swc(tree.flipped(1, 63), folder / "bad.swc", unit="voxel")
    silent = replace(config, data=str(folder), validate=())
    processor = ViT3DImageProcessor.from_config(CONFIG)
    rows = [row("good", folder), row("bad", folder)]
    with pytest.warns(UserWarning, match="Left out of training: bad: .*y is flipped"):
        volumes, weights = training_volumes(silent, rows, processor, tmp_path / "store")
    assert ([volume.name for volume in volumes], weights) == (["good"], [1 - config.simulated_share])
    write_swc(replace(tree, points=tree.points * 3), folder / "bad.swc", unit="voxel")
    with pytest.raises(ValueError, match=r"^bad: \d+ of \d+ SWC nodes lie outside the stack"):
        train(silent)
    assert not Path(config.out).exists()


def test_a_partly_annotated_stack_is_trained_on_where_it_is_annotated(config, tmp_path):
    folder = make_pairs(tmp_path / "pairs", {"part": "um"})
    codes = np.zeros((12, 64, 72), np.uint8)
    codes[4], codes[4, 30:34] = 1, 2
    (folder / "part.swc").unlink()
    write_volume(Volume(codes), folder / "part_label.tif")
    train(replace(config, data=str(folder), validate=(), max_steps=1))
    with pytest.raises(ValueError, match=r"--validate names \['part'\], which have no SWC"):
        train(replace(config, data=str(folder), validate=("part",), out=str(tmp_path / "other")))


def row(name: str, folder: Path) -> dict:
    return {"name": name, "image": str(folder / f"{name}.tif"), "swc": str(folder / f"{name}.swc"), "label": ""}


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
        assert equal(before, weights(folder))
    save(model, processor, folder)
    assert weights(folder)["head.classifier.bias"].item() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_kill_between_the_two_renames_loses_nothing(tiny, tmp_path, monkeypatch):
    model, processor = load_checkpoint(tiny)
    save(model, processor, tmp_path / "last")
    (tmp_path / "last").rename(tmp_path / "last.old")  # killed here: only the old one and a partial one are left
    (tmp_path / "last.partial").mkdir()
    monkeypatch.setattr(ViT3DForNeuronSegmentation, "save_pretrained", lambda *_, **__: pytest.fail("killed again"))
    with pytest.raises(pytest.fail.Exception):
        save(model, processor, tmp_path / "last")
    assert (tmp_path / "last" / "model.safetensors").is_file()


# ------------------------------------------------------------ refused, and stopped


def test_a_folder_that_holds_a_run_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "training.json").touch()
    with pytest.raises(ValueError, match="already holds a run; choose another --out, or go on with --resume"):
        train(config)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"validate": ("um", "nobody")}, r"--validate names \['nobody'\]"),
        ({"data": "nosuch"}, "is no folder"),
        ({"data": "", "validate": ()}, "Nothing to train on"),
        ({"init": "nosuch"}, "no folder and no shipped checkpoint"),
        ({"device": "cuda"}, "--device cuda: 1 GPUs are asked for, this machine has 0"),
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU"),
        ({"log_with": "nosuch"}, r"--log-with nosuch: .*not installed \(pip install nosuch\)"),
        ({"frozen": ("nosuch",)}, "`frozen` names 'nosuch'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_is_refused_leaves_no_folder(config, tmp_path, change, sentence, resume):
    if torch.cuda.is_available() and {"device", "mixed_precision"} & change.keys():
        pytest.skip("this machine has a GPU")
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        train(replace(config, **change), resume=resume)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="FSDP works with a GPU")
def test_sharding_without_a_gpu_is_refused_and_not_quietly_something_else(config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP is asked for and would silently be DDP"):
        train(config)


def test_a_precision_that_only_accelerate_was_told_is_refused(config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="accelerate launch says mixed precision bf16: give --mixed-precision bf16"):
        train(config)


def test_a_folder_without_pairs_is_refused(config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no pair"):
        train(replace(config, data=str(tmp_path / "empty")))


def test_a_tracker_is_told_everything_that_is_logged(config, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    train(replace(config, log_with="tensorboard", log_every=1))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*.0")
    told = EventAccumulator(str(events)).Reload()
    assert [event.step for event in told.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in told.Scalars("loss")] == pytest.approx([v for _, v in losses(tmp_path / "run")])


@pytest.mark.parametrize(
    ("save_every", "where", "kept"),
    [(1, r"step 2, on crops of voxel; the last good checkpoint is .*run/last", ["1"]), (9, r"step 3, .* kept yet", [])],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_good(config, tmp_path, save_every, where, kept):
    """A rate that throws the weights away at step 2: seen when they are to be kept, or else at step 3."""
    wild = replace(config, validate=("um",), save_every=save_every, log_every=1, head_rate=1e30, max_steps=9)
    wild = replace(wild, validate_every=9)
    for resume in (False, True):
        with pytest.raises(ValueError, match=f"The loss is not finite at {where}"):
            train(wild, resume=resume)
        assert [step for step, loss in losses(tmp_path / "run") if np.isfinite(loss)] == [1, 2]
        assert [path.name for path in (tmp_path / "run" / "state").iterdir()] == kept
    if kept:
        assert equal(weights(tmp_path / "run" / "last"), weights(Path(config.init)))  # the first step's rate is 0


def test_the_name_of_a_crop_is_that_of_its_volume(config, tmp_path):
    from vit3d.bigneuron import find_pairs

    processor = ViT3DImageProcessor.from_config(CONFIG)
    volumes, shares = training_volumes(replace(config, validate=()), find_pairs(config.data), processor, tmp_path)
    swapped = [replace(volume, voxels=np.zeros_like(volume.voxels)) for volume in volumes[:1]] + volumes[1:]
    two = [CropDataset(part, shares, processor, 12, 3, CONFIG) for part in (volumes, swapped)]
    names = [two[0].name_of(index) for index in range(12)]
    changed = [not torch.equal(*(crops[index]["pixel_values"] for crops in two)) for index in range(12)]
    assert [name == volumes[0].name for name in names] == changed
    assert set(names) == {"um", "voxel"}


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


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        *((name, 0, f"`{name}` must be at least 1, got 0") for name in ("max_steps", "batch_size", "validate_every")),
        *((name, 0, f"`{name}` must be at least 1, got 0") for name in ("accumulation", "save_every", "log_every")),
        ("encoder_rate", float("nan"), "`encoder_rate` must be a number from 0 on, got nan"),
        ("layer_decay", 0.0, "`layer_decay` must lie between 0 and 1, got 0.0"),
        ("ema_decay", 1.5, "`ema_decay` must lie between 0 and 1, got 1.5"),
        ("mixed_precision", "fp8", "`mixed_precision` takes no, bf16, fp16, got 'fp8'"),
        ("device", "tpu", "`device` takes auto, cpu, cuda, got 'tpu'"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(name, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainingConfig("", "", "", **{name: value})


def test_an_out_with_a_file_in_its_place_is_refused(config, tmp_path, capsys):
    (tmp_path / "run").touch()
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--data", config.data, "--init", config.init, "--out", config.out])
    assert stopped.value.code == 2
    assert "run is a file" in capsys.readouterr().err


# ------------------------------------------------------------ several processes


@pytest.mark.slow
def test_two_processes_train_one_network_on_different_crops_and_share_the_validation(tiny, tmp_path):
    data = make_pairs(tmp_path / "data", {name: "um" for name in "abcd"})
    run = tmp_path / "run"
    flags = f"--data {data} --init {tiny} --simulated 0 --max-steps 2 --batch-size 2 --log-every 1 --warmup-steps 1"
    command, environment = launch(2, 29611, *flags.split(), "--validate", "a,b,c", "--out", str(run))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("best checkpoint") == 1
    assert json.loads((run / "training.json").read_text())["num_processes"] == 2
    assert [line["step"] for line in metrics(run)] == [1, 2, 2]  # one process writes
    # three neurons on two processes: each has its score once, and it is that of the checkpoint
    model, processor = load_checkpoint(str(run / "last"))
    for name in "abc":
        volume, gold, _ = read_pair(row(name, data))
        tree = reconstruct(model, volume, processor=processor).tree.to("voxel", volume.spacing_um)
        assert metrics(run)[-1][f"f1/{name}"] == pytest.approx(score_trees(tree, gold)["f1"], abs=0.02)
    # with crops of their own two processes take the steps of one with twice the batch; with the same crops they
    # would take those of one with their own batch
    distances = {}
    for batch_size in (2, 4):
        out = tmp_path / f"one_{batch_size}"
        words = flags.replace("--batch-size 2", f"--batch-size {batch_size}").split()
        with pytest.raises(SystemExit):
            main(["train", *words, "--validate", "a,b,c", "--out", str(out)])
        distances[batch_size] = distance(weights(out / "last"), weights(run / "last"))
    assert 0 < distances[4] < 0.7 * distances[2]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return float(sum((one[name] - other[name]).abs().sum() for name in one))


def test_the_sharding_configuration_names_the_layers_of_the_network():
    from accelerate.commands.config.config_args import load_config_from_file

    path = Path(__file__).parents[1] / "scripts" / "fsdp2.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == "FSDP"
    assert config.fsdp_config["fsdp_version"] == 2
    wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    assert set(wrapped) <= set(ViT3DForNeuronSegmentation._no_split_modules)
    assert wrapped[0] in {type(module).__name__ for module in ViT3DForNeuronSegmentation(CONFIG).modules()}


@pytest.mark.slow
def test_the_mode_that_predicts_slice_by_slice_learns_and_reconstructs(config, tmp_path):
    """The paper's: what it was trained to in a few steps goes through the whole of `reconstruct`."""
    slices = {"prediction": "center_slice", "patch_size": (5, 8, 8), "volume_size": (5, 32, 32)}
    init = make_checkpoint(tmp_path / "slices", **slices)
    best = train(replace(config, init=init, prediction="center_slice", max_steps=60, head_rate=0.01, log_every=1))
    learned = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert np.mean(learned[-10:]) < 0.8 * np.mean(learned[:10])
    model, processor = load_checkpoint(str(best), device="cpu")
    assert model.config.prediction == "center_slice"
    volume = read_volume(Path(config.data) / "um.tif")
    result = reconstruct(model, volume, processor=processor)
    assert result.probability.shape == volume.shape
    assert len(result.tree) > 1
