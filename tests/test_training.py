"""Training: a few steps of a tiny network, what a run leaves behind, and what it refuses to begin."""

import json
import os
import re
import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from scipy.spatial import cKDTree
from tifffile import imwrite

from runs import SIZES, WINDOW, equal, launch, losses, make_checkpoint, make_pairs, metrics, weights
from vit3d import ViT3DConfig, ViT3DForNeuronSegmentation, ViT3DImageProcessor, segment
from vit3d.annotations.annotation import examine, read_gold, spacing_of
from vit3d.annotations.gold import estimate_shift
from vit3d.annotations.pairs import find_pairs, split_of, survey
from vit3d.checkpoint import load_checkpoint
from vit3d.cli import main
from vit3d.learning.augmentation import Augmentation
from vit3d.learning.launching import num_workers
from vit3d.learning.patches import CropDataset
from vit3d.learning.training_data import (
    MIN_RADIUS_VOX,
    _box_around,
    _part,
    chosen_neurons,
    crop_dataset,
    read_pair,
    tell_spacing,
    training_spacing,
    training_volumes,
)
from vit3d.learning.validation import Validator
from vit3d.metrics import metric_folder
from vit3d.morphometry import resample
from vit3d.reconstruction import reconstruct
from vit3d.regridding import as_trained
from vit3d.scoring import score_trees
from vit3d.simulate import Style, random_neuron, simulate_neuron
from vit3d.targets import IGNORED, training_labels
from vit3d.training import Clock, TrainingConfig, TrainingRun, save, train
from vit3d.tree import NeuronTree, read_swc, write_swc
from vit3d.volume import Volume, read_volume, write_volume

CONFIG = ViT3DConfig(**SIZES, **WINDOW)
KNOWING = ViT3DConfig(**SIZES, **WINDOW, training_spacing_um=(1.0, 0.33, 0.33))


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
    assert validated[-1] == validated[-1] | scores_of(out / "last", row("um", Path(config.data)))
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    facts = json.loads((out / "training.json").read_text())
    assert (facts["max_steps"], facts["num_processes"], facts["validate"]) == (3, 1, ["um"])
    volume = Volume(read_volume(Path(config.data) / "um.tif").voxels[:8, :32, :32])
    for name in ("best", "last"):
        model, processor = load_checkpoint(str(out / name))
        assert segment(model, volume, processor=processor).shape == volume.shape


def scores_of(checkpoint: Path, row: dict) -> dict[str, float]:
    """What a user computes with the metric as it is shared."""
    pair, metric = read_pair(row), evaluate.load(metric_folder("neuron_tracing"), keep_in_memory=True)
    model, processor = load_checkpoint(str(checkpoint))
    tree = reconstruct(model, pair.volume, processor=processor).tree.to("voxel", pair.volume.spacing_um)
    metric.add(**metric.row(row["name"], tree, pair.gold))
    scores = metric.compute()
    keys = ("f1", "precision", "recall", "esa", "dsa", "pds")
    return {key: scores[key] for key in keys if np.isfinite(scores[key])}


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
    few = replace(config, validate=(), save_every=1, max_steps=2, warmup_steps=0)
    once = replace(few, max_steps=1, out=str(tmp_path / "once"))
    before = train(once)
    train(replace(few, ema_decay=0.5))
    rest = torch.load(tmp_path / "run" / "state" / "2" / "run.pt", weights_only=True)
    kept = weights(tmp_path / "run" / "last")
    assert all(torch.equal(kept[name], rest["average"][f"module.{name}"]) for name in kept)
    # the average starts at the weights after step 1, of which few are kept at first
    first, now = weights(before), weights(tmp_path / "run" / "state" / "2")
    assert all(torch.allclose(kept[name], torch.lerp(now[name], first[name], 2 / 11), atol=1e-7) for name in kept)


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


def test_the_windows_of_a_pair_are_compared_and_the_term_is_added_with_its_weight(config, tmp_path, monkeypatch):
    compared = []

    def spy(logits, token_mask, places, patch):
        compared.append((token_mask, places))
        return 0 * logits.sum() + 0.5

    monkeypatch.setattr("vit3d.training.disagreement", spy)
    found = []
    for weight in (1.0, 3.0):
        out = tmp_path / str(weight)
        chosen = {"batch_size": 3, "consistency_weight": weight, "out": str(out)}
        train(replace(config, validate=(), log_every=1, max_steps=1, **chosen))
        found.append(losses(out)[0][1])
    assert found[1] - found[0] == pytest.approx(1.0, abs=1e-5)
    masks, places = compared[0]
    assert len(masks) == len(places) == 6
    for pair in range(0, 6, 2):
        (first, second), corners = masks[pair : pair + 2], places[pair : pair + 2].tolist()
        shift = [b - a for a, b in zip(*corners, strict=True)]
        one = first[tuple(slice(max(s, 0), n + min(s, 0)) for s, n in zip(shift, first.shape, strict=True))]
        other = second[tuple(slice(max(-s, 0), n + min(-s, 0)) for s, n in zip(shift, first.shape, strict=True))]
        assert torch.equal(one, other)
    assert any(mask.any() for mask in masks)


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


@pytest.mark.slow
def test_a_training_hardly_waits_for_its_crops(tmp_path):
    """The network that ships, its window and batch, with the one worker that is the default on a CPU."""
    config = TrainingConfig("", "vit3d-tiny", str(tmp_path / "run"), simulated=1, max_steps=8, log_every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(config)
    waits = [line["data_wait"] for line in metrics(tmp_path / "run")]
    assert len(waits) == 8
    assert np.mean(waits) < 0.05


def test_a_run_that_waits_for_its_crops_says_which_flag_helps():
    rows = [{"data_wait": wait} for wait in (0.0, 0.1, 0.2, 0.1, 0.1)] + [{"f1": 0.5}]
    run = SimpleNamespace(folder=SimpleNamespace(rows=lambda: rows), num_workers=1)
    with pytest.warns(UserWarning, match="Steps wait 10% of their time for crops; try --num-workers 2 instead of 1"):
        TrainingRun._warn_of_waiting(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.num_workers = 0  # as asked for
        TrainingRun._warn_of_waiting(run)
        run.num_workers, rows[:] = 1, rows[1:]  # too few to say anything
        TrainingRun._warn_of_waiting(run)
        rows[:] = 9 * [{"data_wait": 0.04}]
        TrainingRun._warn_of_waiting(run)


def test_a_gpu_has_as_many_workers_as_its_cores_allow(config, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    gpu = SimpleNamespace(device=torch.device("cuda"))
    unasked = replace(config, num_workers=None)
    assert num_workers(unasked, Accelerator(cpu=True)) == 1
    assert num_workers(unasked, gpu) == 8
    assert num_workers(config, gpu) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert num_workers(unasked, gpu) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert num_workers(unasked, gpu) == 1


def test_the_command_trains_and_says_where(tiny, data, tmp_path, capsys):
    flags = f"--data {data} --init {tiny} --out {tmp_path / 'run'} --simulated 0 --max-steps 1 --batch-size 1"
    words = ["train", *flags.split()]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--validate", "um,voxel"])
    assert stopped.value.code == 2
    assert "is left to train on: all validate, or are in another split" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--validate", "um"])
    assert not stopped.value.code
    assert f"best checkpoint: {tmp_path / 'run' / 'best'}" in capsys.readouterr().out


def test_one_of_several_channels_is_trained_on_as_if_it_were_alone(config, data, tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("um", "voxel"):
        neuron = read_volume(data / f"{name}.tif")
        both = np.stack([np.random.default_rng(0).permuted(neuron.voxels, axis=2), neuron.voxels], axis=1)
        z, y, x = neuron.spacing_um
        known = {"axes": "ZCYX", "spacing": z, "unit": "um"}
        imwrite(folder / f"{name}.tif", both, imagej=True, metadata=known, resolution=(1 / x, 1 / y))
        shutil.copy(data / f"{name}.swc", folder)
    with pytest.raises(ValueError, match="2 channels; choose one with `--channel 0` to `--channel 1`"):
        train(replace(config, data=str(folder)))
    train(replace(config, data=str(folder), channel=1, log_every=1))
    alone = replace(config, out=str(tmp_path / "alone"), log_every=1)
    train(alone)
    timeless = [
        [{key: line[key] for key in line.keys() - {"seconds", "data_wait"}} for line in metrics(Path(out))]
        for out in (config.out, alone.out)
    ]
    assert timeless[0] == timeless[1]


def test_what_was_made_ready_of_one_channel_is_not_taken_for_another(config, data, tmp_path):
    neuron = read_volume(data / "voxel.tif")
    both = np.stack([neuron.voxels, neuron.voxels // 2], axis=1)
    imwrite(tmp_path / "voxel.tif", both, imagej=True, metadata={"axes": "ZCYX"})
    shutil.copy(data / "voxel.swc", tmp_path)
    for channel in (0, 1):
        pair = {**row("voxel", tmp_path), "channel": channel}
        (volume,), _ = training_volumes(config, [pair], CONFIG, tmp_path / "store")
        np.testing.assert_array_equal(volume.voxels, both[:, channel])


def test_a_neurite_that_the_gold_leaves_out_is_not_learned_as_background(config, data, tmp_path):
    voxels = read_volume(data / "voxel.tif").voxels
    voxels[4:8, 5:60, 2:5] = 255
    write_volume(Volume(voxels), tmp_path / "voxel.tif")
    shutil.copy(data / "voxel.swc", tmp_path)
    (volume,), _ = training_volumes(config, [row("voxel", tmp_path)], CONFIG, tmp_path / "store")
    assert (volume.labels[4:8, 5:60, 2:5] == IGNORED).all()
    assert (volume.labels == 0).mean() > 0.9


@pytest.mark.slow
def test_simulated_neurons_alone_are_enough(config, tmp_path):
    train(replace(config, data="", validate=(), simulated=1, max_steps=1))
    assert (tmp_path / "run" / "last" / "model.safetensors").is_file()


@pytest.mark.slow
def test_simulated_neurons_are_learned_on_the_voxels_that_reconstruct_shows_the_network(config, tmp_path):
    asked = replace(config, data="", validate=(), simulated=2, seed=1)  # of 2.35 x 0.52 and of 1.24 x 0.39 um
    (coarse, near), _ = training_volumes(asked, [], KNOWING, tmp_path / "store")
    (own, _), _ = training_volumes(asked, [], CONFIG, tmp_path / "store")
    assert np.array_equal(near.voxels, random_neuron(20_001)[0].voxels)
    assert own.voxels.shape == random_neuron(20_000)[0].shape
    assert coarse.voxels.shape == (128, 384, 384)  # of 151 x 404 x 404
    assert len(coarse.neurite) > 1000


@pytest.mark.parametrize("polarity", ["bright", "dark"])
@pytest.mark.parametrize("spacing_um", [(2.0, 0.66, 0.66), (1.0, 0.5, 0.5)])
def test_a_part_of_a_refined_stack_has_its_grey_levels_and_its_labels(spacing_um, polarity):
    volume, tree = simulate_neuron(seed=1, shape=(16, 64, 64), spacing_um=spacing_um, polarity=polarity)
    seen, processor = as_trained(volume, KNOWING), ViT3DImageProcessor.from_config(KNOWING)
    tree = tree.to("voxel", seen.spacing_um)
    box = (slice(3, 15), slice(20, 80), slice(11, 90))
    part = _part("part", seen, tree, box, processor)
    whole = training_labels(tree, seen.shape, min_radius_vox=MIN_RADIUS_VOX)
    assert seen is not volume
    assert part.statistics == processor.measure(seen.voxels) != processor.measure(seen.voxels[box])
    assert np.array_equal(part.voxels, seen.voxels[box])
    assert np.array_equal(part.labels, whole[box])


def test_a_thick_simulated_neurite_is_labelled_to_its_surface_and_a_soma_as_far_as_that():
    thick = Style(stem_radius_um=6.0, thinnest_um=6.0, beads=0, boutons=0, branch_every_um=1e9, tortuosity=0)
    volume, tree = simulate_neuron(shape=(60, 60, 60), spacing_um=(1.0, 1.0, 1.0), style=thick)
    away = cKDTree(resample(tree, 0.5).points).query(np.stack(np.indices(volume.shape), -1))[0]
    whole = (slice(0, 60),) * 3
    labels = _part("thick", volume, tree.to("voxel"), whole, ViT3DImageProcessor.from_config(KNOWING)).labels
    assert (labels[away < 5] == 1).all()
    assert (labels[away > 7] == 0).all()
    soma = NeuronTree([[30.0, 30.0, 30.0]], [15.0], [-1], unit="voxel", spacing_um=(1.0, 1.0, 1.0))
    away = np.linalg.norm(np.indices(volume.shape) - 30.0, axis=0)
    labels = _part("soma", volume, soma, whole, ViT3DImageProcessor.from_config(KNOWING)).labels
    assert (labels[away < 7] == 1).all()
    assert (labels[(away > 9) & (away < 14)] == IGNORED).all()


@pytest.mark.parametrize("at", [0, 0.3, 1])
def test_a_box_lies_in_its_stack_and_around_its_point_where_there_is_room(at):
    shape = np.array([100, 500, 800])
    point = at * (shape - 1)
    box = _box_around(point, tuple(shape))
    assert [part.stop - part.start for part in box] == [100, 384, 384]
    for part, size, where in zip(box, shape, point, strict=True):
        assert 0 <= part.start <= where < part.stop <= size
        assert part.start == 0 or part.stop == size or abs((part.start + part.stop) / 2 - where) <= 1


def test_the_network_of_another_loop_is_told_the_spacing_of_what_it_learns_on(data, tmp_path):
    network, stated = ViT3DConfig(**SIZES, **WINDOW), (4.0, 2.0, 2.0)
    crop_dataset(data, network, 2, tmp_path, validate=("um",), spacing_um=stated)
    assert network.training_spacing_um == stated


def test_crops_for_other_loops_heed_the_options_of_a_training(data, tmp_path):
    network = ViT3DConfig(**SIZES, **WINDOW)
    assert "places" in crop_dataset(data, network, 2, tmp_path, validate=("um",), consistency_weight=1.0)[0]
    assert "places" not in crop_dataset(data, network, 2, tmp_path, validate=("um",), simulated_share=1.0)[0]


def test_a_stack_coarser_than_the_others_is_learned_on_the_voxels_that_reconstruct_shows(config, tmp_path):
    """Its SWC and its labels too: bright is what is labelled, and little else."""
    coarse, tree = simulate_neuron(seed=1, shape=(16, 64, 64), spacing_um=(2.0, 0.66, 0.66))
    write_volume(coarse, tmp_path / "traced.tif")
    write_swc(tree, tmp_path / "traced.swc")
    write_volume(coarse, tmp_path / "coded.tif")
    codes = 1 + (training_labels(tree.to("voxel", coarse.spacing_um), coarse.shape) == 1)
    write_volume(Volume(codes.astype(np.uint8), coarse.spacing_um), tmp_path / "coded_label.tif")
    (coded, traced), _ = training_volumes(config, find_pairs(tmp_path), KNOWING, tmp_path / "store")
    seen = as_trained(coarse, KNOWING)
    for volume in (traced, coded):
        assert volume.voxels.shape == volume.labels.shape == seen.shape != coarse.shape
        np.testing.assert_array_equal(volume.voxels, seen.voxels[:])
        neurite, ground = volume.voxels[volume.labels == 1].mean(), volume.voxels[volume.labels == 0].mean()
        assert neurite > ground + 0.5 * volume.statistics.contrast
    both = ((traced.labels == 1) & (coded.labels == 1)).sum()
    assert both > 0.6 * (traced.labels == 1).sum()


def test_a_stack_that_would_grow_too_large_is_learned_on_its_own_voxels(config, tmp_path, monkeypatch):
    monkeypatch.setattr("vit3d.learning.training_data._LARGEST_REFINED", 10_000)
    coarse, tree = simulate_neuron(seed=1, shape=(16, 64, 64), spacing_um=(2.0, 0.66, 0.66))
    write_volume(coarse, tmp_path / "cell.tif")
    write_swc(tree, tmp_path / "cell.swc")
    with pytest.warns(UserWarning, match="cell is learned on its own voxels"):
        (volume,), _ = training_volumes(config, find_pairs(tmp_path), KNOWING, tmp_path / "store")
    np.testing.assert_array_equal(volume.voxels, coarse.voxels)
    assert volume.voxels[volume.labels == 1].mean() > volume.voxels[volume.labels == 0].mean() + 20


def test_neurons_of_one_stack_are_no_background_to_each_other(config, tmp_path):
    """Nor does one whose SWC cannot be read keep the others from being learned."""
    volume, tree = simulate_neuron(seed=3, shape=(12, 64, 72))
    write_volume(volume, tmp_path / "cell.tif")
    below = np.ones(len(tree))
    for row in range(len(tree) - 1, 0, -1):
        below[tree.parents[row]] += below[row]
    first = np.arange(len(tree)) == np.abs(below - len(tree) / 2).argmin()  # cut in halves there
    for row, parent in enumerate(tree.parents):
        first[row] |= parent > 0 and first[parent]
    for number, rows in enumerate((np.flatnonzero(first), np.flatnonzero(~first)), start=1):
        write_swc(tree.take(rows), tmp_path / f"cell.tif.neuron{number}.ano_stamp_2015_01_01_10_10.swc")
    parts = find_pairs(tmp_path)
    (one, other), _ = training_volumes(config, parts, KNOWING, tmp_path / "store")
    for mine, theirs in ((one, other), (other, one)):
        assert (mine.labels == 1).sum() > 300
        assert not ((mine.labels == 1) & (theirs.labels == 0)).any()
    Path(parts[1]["swc"]).write_text("no tree")
    with pytest.warns(UserWarning, match="Left out of training"):
        (alone,), _ = training_volumes(config, parts, KNOWING, tmp_path / "store")
    assert alone.name == one.name


@pytest.mark.slow
def test_simulated_neurons_are_bright_to_a_network_that_takes_stacks_for_dark(config, tmp_path):
    asked, dark = replace(config, data="", simulated=2), ViT3DImageProcessor.from_config(CONFIG, polarity="dark")
    for volume in training_volumes(asked, [], CONFIG, tmp_path / "store", dark)[0]:
        values = dark.pixel_values(volume.voxels, volume.statistics)
        assert values[volume.labels == 1].mean() > values[volume.labels == 0].mean() + 1
    assert dark.polarity == "dark"


# ------------------------------------------------------------ golds


@pytest.mark.parametrize("name", ["um", "voxel"])
def test_a_gold_is_read_in_voxels_and_lies_on_its_stack(data, name):
    volume = read_volume(data / f"{name}.tif")
    gold = read_gold({"name": name, "swc": str(data / f"{name}.swc")}, volume)
    assert gold.unit == "voxel"
    assert (gold.points.max(0) <= np.array(volume.shape)).all()
    assert np.abs(estimate_shift(gold, volume)).max() <= 0.5


def test_a_gold_is_aligned_to_dark_neurites_too(data):
    volume = read_volume(data / "um.tif")
    moved = Volume(np.roll(255 - volume.voxels, 2, axis=2), volume.spacing_um)
    row = {"name": "um", "swc": str(data / "um.swc")}
    gold, here = read_gold(row, moved), read_gold(row, volume)
    np.testing.assert_allclose(gold.points - here.points, np.broadcast_to([0, 0, 2], gold.points.shape), atol=0.6)


def test_what_cannot_be_trained_on_is_left_out_and_where_that_is_all_it_is_refused(config, tmp_path):
    folder = make_pairs(tmp_path / "pairs", {"good": "um", "bad": "voxel"})
    tree = replace(read_swc(folder / "bad.swc"), unit="voxel")
    write_swc(tree.flipped(1, 63), folder / "bad.swc", unit="voxel")
    silent = replace(config, data=str(folder), validate=())
    rows = [row("good", folder), row("bad", folder)]
    with pytest.warns(UserWarning, match="Left out of training: bad: .*y is flipped"):
        volumes, weights = training_volumes(silent, rows, CONFIG, tmp_path / "store")
    assert ([volume.name for volume in volumes], weights) == (["good"], [1.0])  # nothing is simulated
    write_swc(replace(tree, points=tree.points * 3), folder / "bad.swc", unit="voxel")
    (folder / "broken.tif").write_bytes((folder / "good.tif").read_bytes()[:1000])
    (folder / "broken.swc").write_bytes((folder / "good.swc").read_bytes())
    (folder / "gone.tif").symlink_to(folder / "nowhere.tif")
    (folder / "gone.swc").write_bytes((folder / "good.swc").read_bytes())
    told = r"bad: \d+ of \d+ SWC nodes lie outside the stack.*broken.tif is cut short.*gone.tif"
    with pytest.warns(UserWarning, match=f"Left out of training: {told}"):
        train(replace(silent, max_steps=1))
    assert survey(folder).fingerprint
    (folder / "good.tif").unlink()
    other = str(tmp_path / "other")
    with pytest.raises(ValueError, match=f"No pair of .* can be trained on: {told}"):
        train(replace(silent, out=other))
    assert not Path(other).exists()


def test_a_partly_annotated_stack_is_trained_on_where_it_is_annotated(config, tmp_path):
    folder = make_pairs(tmp_path / "pairs", {"part": "um"})
    codes = np.zeros((12, 64, 72), np.uint8)
    codes[4], codes[4, 30:34] = 1, 2
    (folder / "part.swc").unlink()
    write_volume(Volume(codes), folder / "part_label.tif")
    train(replace(config, data=str(folder), validate=(), max_steps=1))
    write_volume(Volume((codes == 2).astype(np.uint8)), folder / "part_label.tif")
    with pytest.raises(ValueError, match=r"part_label\.tif holds no neurite, which is code 2; a mask .* NAME_mask"):
        train(replace(config, data=str(folder), validate=(), out=str(tmp_path / "as codes")))
    write_volume(Volume((codes == 2).astype(np.uint8) * 2), folder / "part_label.tif")
    with pytest.raises(ValueError, match=r"part_label\.tif holds no background, which is code 1"):
        train(replace(config, data=str(folder), validate=(), out=str(tmp_path / "neurite alone")))
    with pytest.raises(ValueError, match=r"--validate names \['part'\], which have no SWC"):
        train(replace(config, data=str(folder), validate=("part",), out=str(tmp_path / "other")))


def test_what_a_trace_wrote_is_taken_for_a_gold_with_a_warning(config, tmp_path):
    folder = make_pairs(tmp_path / "pairs", {"one": "um", "two": "um"})
    (folder / "two_review.csv").write_text("kind,x_um,y_um,z_um,length_um,confidence\n")
    with pytest.warns(UserWarning, match=r"lists of places to review lie beside them: two\.swc; proofread\?"):
        chosen_neurons(replace(config, data=str(folder), validate=()))


def test_a_shift_is_reported_and_not_applied_with_no_align(config, tmp_path):
    folder = make_pairs(tmp_path / "pairs", {"one": "voxel", "two": "voxel"})
    for name, shift in (("one", (0, 1.5, -1)), ("two", (1, 0, 2))):
        tree = replace(read_swc(folder / f"{name}.swc"), unit="voxel")
        write_swc(tree.shifted(shift), folder / f"{name}.swc", unit="voxel")
    known = {row["name"]: row["shift_vox"] for row in map(examine, find_pairs(folder))}
    np.testing.assert_allclose([known["one"], known["two"]], [(0, -1.5, 1), (-1, 0, -2)], atol=0.5)
    said = {name: f"{name} ({', '.join(f'{step:g}' for step in shift)})" for name, shift in known.items()}
    moved = replace(config, data=str(folder), validate=("two",), max_steps=1)
    sentence = r"^Moved onto their images, by voxels \(z, y, x\): "
    with pytest.warns(UserWarning, match=f"{sentence}{re.escape(said['two'])}"):  # neurons that validate, too
        Validator(moved, find_pairs(folder), Accelerator())
    for _ in range(2):  # the second time from the store
        with pytest.warns(UserWarning, match=f"{sentence}{re.escape(said['one'])}"):
            training_volumes(*store_of(moved, tmp_path / "store"))
    pairs = [read_pair(row("one", folder), align=align) for align in (True, False)]
    np.testing.assert_allclose(pairs[0].gold.points - pairs[1].gold.points, [known["one"]] * len(pairs[0].gold))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        (raw,), _ = training_volumes(*store_of(replace(moved, align=False), tmp_path / "store"))
    assert raw.shift_vox == (0, 0, 0)


def store_of(config, store: Path):
    rows, config = chosen_neurons(config)
    return config, rows, CONFIG, store


def test_a_misplaced_gold_is_taken_when_asked_for(config, tmp_path):
    folder = make_pairs(tmp_path / "pairs", {"bad": "voxel"})
    tree = replace(read_swc(folder / "bad.swc"), unit="voxel")
    for wrong in (tree.flipped(1, 63), replace(tree, points=tree.points * 3)):
        write_swc(wrong, folder / "bad.swc", unit="voxel")
        asked = replace(config, data=str(folder), validate=(), keep_misplaced=True)
        assert [volume.name for volume in training_volumes(*store_of(asked, tmp_path / "store"))[0]] == ["bad"]


def test_radii_that_would_fill_the_stack_are_not_used_and_that_is_said(config, tmp_path):
    folder = make_pairs(tmp_path / "pairs", {"nm": "voxel"})
    tree = replace(read_swc(folder / "nm.swc"), unit="voxel")
    write_swc(replace(tree, radii=1000 * tree.radii), folder / "nm.swc", unit="voxel")
    with pytest.warns(UserWarning, match="nm: by its radii the gold fills its stack; they are not used"):
        (volume,), _ = training_volumes(*store_of(replace(config, data=str(folder), validate=()), tmp_path / "store"))
    assert (volume.labels == 0).mean() > 0.9


KINDS = {
    "12 of 16 bits": lambda grey: grey.astype(np.uint16) * 16,
    "16 bits above an offset": lambda grey: grey.astype(np.uint16) * 16 + 30000,
    "signed": lambda grey: grey.astype(np.int16) - 200,
    "floats to 1": lambda grey: (grey / 255).astype(np.float32),
    "tiny floats": lambda grey: (grey / 255e3).astype(np.float32),
    "floats below 0": lambda grey: grey.astype(np.float32) - 100,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_of_any_kind_of_number_gives_the_crops_of_the_8_bit_one(config, tmp_path, kind):
    folder = make_pairs(tmp_path / "pairs", {"one": "um"})
    plain = replace(config, data=str(folder), validate=())
    volumes = [training_volumes(*store_of(plain, tmp_path / "store"))[0][0]]
    stack = read_volume(folder / "one.tif")
    write_volume(Volume(KINDS[kind](stack.voxels), stack.spacing_um), folder / "one.tif")
    volumes += training_volumes(*store_of(plain, tmp_path / "store"))[0]
    np.testing.assert_array_equal(volumes[0].labels, volumes[1].labels)
    processor, nothing = ViT3DImageProcessor.from_config(CONFIG), Augmentation.none()
    eight, other = (CropDataset([v], [1.0], processor, 6, 0, CONFIG, augmentation=nothing) for v in volumes)
    for index in range(6):
        torch.testing.assert_close(eight[index]["pixel_values"], other[index]["pixel_values"], atol=0.05, rtol=0)


def test_a_stack_smaller_than_the_window_is_trained_on_and_a_single_slice_refused(config, tmp_path):
    folder = make_pairs(tmp_path / "pairs", {"flat": "voxel"})
    stack, tree = read_volume(folder / "flat.tif"), replace(read_swc(folder / "flat.swc"), unit="voxel")
    flat = np.broadcast_to(stack.voxels.max(0)[:20, 30:60], (2, 20, 30))  # of the projection
    inside = ((tree.points[:, 1:] >= (0, 30)) & (tree.points[:, 1:] < (20, 60))).all(axis=1)
    part = tree.take(np.flatnonzero(inside)).shifted((0, 0, -30))
    write_volume(Volume(flat), folder / "flat.tif")
    write_swc(replace(part, points=part.points * (0, 1, 1)), folder / "flat.swc", unit="voxel")
    small = replace(config, data=str(folder), validate=(), max_steps=1)
    train(small)
    assert np.isfinite(losses(Path(config.out))[0][1])
    write_volume(Volume(flat[:1]), folder / "flat.tif")
    with pytest.raises(ValueError, match=r"flat\.tif is a 2D image .* a stack is needed"):
        train(replace(small, out=str(tmp_path / "other")))


def test_an_swc_of_a_stack_with_holes_in_its_numbers_is_refused_by_name(config, tmp_path):
    folder = make_pairs(tmp_path / "pairs", {"holes": "um"})
    voxels = read_volume(folder / "holes.tif").voxels.astype(np.float32)
    voxels[0, 0, 0] = np.nan
    write_volume(Volume(voxels), folder / "holes.tif")
    with pytest.raises(ValueError, match=r"holes\.tif holds NaN or infinite voxels; replace them before use"):
        train(replace(config, data=str(folder), validate=()))
    assert not Path(config.out).exists()


# ------------------------------------------------------------ who trains, who validates


@pytest.fixture
def many(tmp_path) -> Path:
    """A folder of names alone; in no file is looked."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(20):
        (folder / f"n{number}.tif").touch()
        (folder / f"n{number}.swc").touch()
    (folder / "n0_label.tif").touch()
    (folder / "n0.swc").unlink()
    return folder


def names(rows: list[dict]) -> set[str]:
    return {row["name"] for row in rows}


def test_a_neuron_beside_one_that_validates_is_not_trained_on(config, many):
    for number in (1, 2):
        (many / f"n5.tif.neuron{number}.ano_stamp_2015_06_16_17_57.swc").touch()
    (many / "n5.swc").unlink()
    with pytest.warns(UserWarning, match=r"Not trained on, for a neuron of the same stack validates: n5\.neuron2\."):
        rows, chosen = chosen_neurons(replace(config, data=str(many), validate=("n5.neuron1",)))
    assert chosen.validate == ("n5.neuron1",)
    assert names(rows) == {f"n{number}" for number in range(20) if number != 5} | {"n5.neuron1"}


def test_a_split_can_validate_and_only_the_split_train_is_then_trained_on(config, many, tmp_path):
    all_of_them = {f"n{number}" for number in range(20)}
    rows, chosen = chosen_neurons(replace(config, data=str(many), validate=("n3",)))
    assert (names(rows), chosen.validate) == (all_of_them, ("n3",))  # no split is asked for: all others train
    held_out = {name for name in all_of_them if split_of(name) == "test"}
    assert chosen_neurons(replace(config, data=str(many), validate=("Test",)))[1].validate == tuple(
        name for name in chosen_neurons(replace(config, data=str(many), validate=("test",)))[1].validate
    )
    rows, chosen = chosen_neurons(replace(config, data=str(many), validate=("test",)))
    assert (names(rows), set(chosen.validate)) == (all_of_them, held_out - {"n0"})
    file = tmp_path / "split.csv"
    file.write_text("name,split\n" + "".join(f"{name},train\n" for name in all_of_them - {"n1", "n2", "n4"}))
    file.write_text(file.read_text() + "n1,test\nn2,validation\nn4,validation\n")
    with_file = replace(config, data=str(many), split_file=str(file))
    rows, chosen = chosen_neurons(replace(with_file, validate=("validation",)))
    assert (names(rows), chosen.validate) == (all_of_them - {"n1"}, ("n2", "n4"))
    rows, chosen = chosen_neurons(replace(with_file, validate=("n3",)))
    assert (names(rows), chosen.validate) == (all_of_them - {"n1", "n2", "n4"}, ("n3",))
    file.write_text("name,split\n" + "".join(f"{name},test\n" for name in all_of_them))
    with pytest.warns(UserWarning, match=r"No neuron of .*many is trained on, simulated ones alone"):
        chosen_neurons(replace(with_file, validate=(), simulated=3))
    with pytest.raises(ValueError, match=r"No neuron of .*many is left to train on"):
        chosen_neurons(replace(with_file, validate=(), simulated=0))
    file.write_text("name,split\nn0,test\n")
    few = replace(with_file, data=str(many), validate=("validation",))
    with pytest.raises(ValueError, match=r"--validate names \['validation'\], which .*many does not hold"):
        chosen_neurons(few)
    for name in held_out - {"n0"}:
        (many / f"{name}.swc").unlink()
    with pytest.warns(UserWarning, match="no gold"), pytest.raises(ValueError, match="--validate test: no neuron with"):
        chosen_neurons(replace(config, data=str(many), validate=("test",)))


def test_tables_and_patterns_reach_the_pairs(config, many):
    (many / "mine.csv").write_text("name,z_um,y_um,x_um\nn3,1,0.5,0.5\n")
    (many / "n3_traced.swc").touch()
    options = {"spacing_table": str(many / "mine.csv"), "gold": "*_traced.swc", "validate": ()}
    with pytest.warns(UserWarning, match="no gold"):
        rows, _ = chosen_neurons(replace(config, data=str(many), **options))
    found = {row["name"]: (row["spacing_um"], Path(row["swc"]).name) for row in rows}
    assert found["n3"] == ((1.0, 0.5, 0.5), "n3_traced.swc")


def test_a_checkpoint_says_at_which_spacing_it_was_trained(config, tiny, data, tmp_path):
    def recorded(**changes) -> tuple[float, ...]:
        last = train(replace(config, out=str(tmp_path / str(len(changes))), validate=(), **changes))
        return ViT3DForNeuronSegmentation.from_pretrained(last).config.training_spacing_um

    stated = {pair["name"]: spacing_of(pair) for pair in find_pairs(data)}
    assert recorded() == tuple(np.median(list(stated.values()), axis=0))
    assert recorded(spacing_um=(2.0, 0.7, 0.7), max_steps=1) == (2.0, 0.7, 0.7)
    assert training_spacing([], config) is None  # simulated neurons alone: what the network said before


def test_a_neuron_that_validates_does_not_decide_at_which_spacing_is_trained(config, tmp_path):
    steps = {"um": 3.0, "voxel": 1.0}
    rows = [{**row(name, tmp_path), "spacing_um": (step, step, step)} for name, step in steps.items()]
    assert config.validate == ("um",)
    assert training_spacing(rows, config) == (1, 1, 1)


def test_a_network_that_sees_real_stacks_only_when_it_validates_keeps_the_spacing_that_it_knew(config, data):
    network = ViT3DConfig(**SIZES, **WINDOW, training_spacing_um=(5.0, 4.0, 4.0))
    tell_spacing(network, [row("um", data)], config)
    assert tuple(network.training_spacing_um) == (5.0, 4.0, 4.0)
    tell_spacing(network, [row("um", data), row("voxel", data)], config)
    assert network.training_spacing_um == read_volume(data / "voxel.tif").spacing_um


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


class Notebook(GeneralTracker):
    """A tracker of one's own, which Accelerate knows by name once it is registered."""

    name, requires_logging_directory, written = "notebook", False, []
    tracker = property(lambda self: self.written)

    def __init__(self, run_name: str, **_):
        super().__init__()
        self.written.append(run_name)

    def store_init_configuration(self, values: dict) -> None:
        self.written.append(values)

    def log(self, values: dict, step: int | None = None, **_) -> None:
        self.written.append((step, values))


def test_a_tracker_is_told_everything_that_is_logged(config, tmp_path, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    train(replace(config, log_with="notebook", log_every=1))
    name, facts, *told = Notebook.written
    assert (name, facts["max_steps"], facts["validate"]) == ("vit3d", "3", "('um',)")
    logged = [(line.pop("step"), line) for line in metrics(tmp_path / "run") if line.pop("seconds")]
    assert told == logged


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
    processor = ViT3DImageProcessor.from_config(CONFIG)
    volumes, shares = training_volumes(replace(config, validate=()), find_pairs(config.data), CONFIG, tmp_path)
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
        ("head_rate", float("inf"), "`head_rate` must be a number from 0 on, got inf"),
        ("layer_decay", 0.0, "`layer_decay` must be a number above 0, up to 1, got 0.0"),
        ("ema_decay", 1.0, "`ema_decay` must be a number from 0 to below 1, got 1.0"),
        ("simulated_share", 1.5, "`simulated_share` must be a number from 0 to 1, got 1.5"),
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
    assert done.stderr.count("Moved onto their images") <= 2  # of those that train and of those that validate
    assert "Grad strides" not in done.stderr
    assert json.loads((run / "training.json").read_text())["num_processes"] == 2
    assert [line["step"] for line in metrics(run)] == [1, 2, 2]  # one process writes
    # three neurons on two processes: each has its score once, and it is that of the checkpoint
    model, processor = load_checkpoint(str(run / "last"))
    for name in "abc":
        pair = read_pair(row(name, data))
        tree = reconstruct(model, pair.volume, processor=processor).tree.to("voxel", pair.volume.spacing_um)
        assert metrics(run)[-1][f"f1/{name}"] == pytest.approx(score_trees(tree, pair.gold)["f1"], abs=0.02)
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
    asked = replace(config, init=init, prediction="center_slice", max_steps=60, head_rate=0.01, log_every=1)
    best = train(asked)
    learned = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert np.mean(learned[-10:]) < 0.8 * np.mean(learned[:10])
    model, processor = load_checkpoint(str(best), device="cpu")
    assert model.config.prediction == "center_slice"
    volume = read_volume(Path(config.data) / "um.tif")
    result = reconstruct(model, volume, processor=processor)
    assert result.probability.shape == volume.shape
    assert len(result.tree) > 1
