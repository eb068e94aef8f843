"""A training that is stopped, at any instant and by any means, goes on as if it never had been."""

import json
import multiprocessing
import os
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from runs import equal, launch, losses, make_checkpoint, make_pairs, metrics, weights
from vit3d.checkpoint import load_checkpoint
from vit3d.cli import main
from vit3d.learning.run_folder import Log, RunFolder, replace_folder
from vit3d.training import TrainingConfig, train


@pytest.fixture(scope="session")
def forgetful(tmp_path_factory) -> str:
    """A network with dropout: it learns the same only with the same random numbers."""
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return make_checkpoint(tmp_path_factory.mktemp("forgetful"), **dropout)


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pair"), {"one": "um"})


@pytest.fixture(scope="session")
def base(forgetful, pair) -> TrainingConfig:
    often = {"save_every": 3, "log_every": 1, "validate_every": 100}
    few = {"simulated": 0, "max_steps": 8, "batch_size": 2, "warmup_steps": 2, "num_workers": 0}
    return TrainingConfig(str(pair), forgetful, "", **few, **often)


@pytest.fixture(scope="session")
def whole(base, tmp_path_factory) -> Path:
    """The run that was never stopped."""
    return train(replace(base, out=str(tmp_path_factory.mktemp("whole") / "run"))).parent


@pytest.fixture(scope="session")
def stopped_once(base, tmp_path_factory) -> Path:
    """The same run, stopped after five steps, two of them not saved."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    stop_at(replace(base, out=str(out)), 5)
    return out


@pytest.fixture
def config(base, stopped_once, tmp_path) -> TrainingConfig:
    """A copy of the stopped run."""
    return replace(base, out=str(shutil.copytree(stopped_once, tmp_path / "stopped")))


class StoppedError(Exception):
    """The plug is pulled."""


def stop_at(config: TrainingConfig, step: int) -> None:
    """Train until the loss of a step is logged, and not a moment longer."""
    log = Log.__call__

    def pull(self, at, **values):
        log(self, at, **values)
        if at == step:
            raise StoppedError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Log, "__call__", pull)
        with pytest.raises(StoppedError):
            train(config, resume=True)


# ------------------------------------------------------------ the same run


def test_a_resumed_run_equals_the_one_never_stopped_to_the_last_bit(config, whole):
    out = Path(config.out)
    before = metrics(out)
    assert [row["step"] for row in before] == [1, 2, 3, 4, 5]
    train(config, resume=True)
    assert losses(out) == losses(whole)
    assert [step for step, _ in losses(out)] == list(range(1, 9))
    assert len({loss for _, loss in losses(out)}) == 8
    assert [row["rate"] for row in metrics(out)] == [row["rate"] for row in metrics(whole)]
    assert equal(weights(out / "last"), weights(whole / "last"))
    seconds = [row["seconds"] for row in metrics(out)]
    assert seconds[:3] == [row["seconds"] for row in before[:3]]
    assert seconds == sorted(seconds)


def test_a_run_from_before_a_setting_was_there_goes_on_unless_it_is_asked_for(config, whole):
    facts = Path(config.out) / "training.json"
    before = json.loads(facts.read_text())
    del before["consistency_weight"], before["files"]
    facts.write_text(json.dumps(before))
    with pytest.raises(ValueError, match=r"`consistency_weight` was 0\.0, now it is 1\.0"):
        train(replace(config, consistency_weight=1.0), resume=True)
    train(config, resume=True)
    assert losses(Path(config.out)) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"accumulation": 2, "cldice_weight": 0.5, "layer_decay": 0.5, "gradient_checkpointing": True},
        {"num_workers": 1, "ema_decay": 0.0, "seed": 3, "consistency_weight": 1.0},
    ],
    ids=["accumulated", "with a worker"],
)
def test_so_it_does_with_everything_else_switched_on(base, tmp_path, change):
    stopped, other = (replace(base, **change, out=str(tmp_path / name)) for name in ("stopped", "whole"))
    for step in (2, 5, 6):  # nothing saved yet; between two states; logged, but its state not saved
        stop_at(stopped, step)
        assert [at for at, _ in losses(Path(stopped.out))] == list(range(1, step + 1))
    train(stopped, resume=True)
    train(other)
    assert losses(Path(stopped.out)) == losses(Path(other.out))
    assert equal(weights(Path(stopped.out) / "last"), weights(Path(other.out) / "last"))


@pytest.mark.slow
def test_the_best_score_is_remembered(base, tmp_path):
    """Validation after the resume does not take the place of a better one before it."""
    data = make_pairs(tmp_path / "data", {"one": "um", "two": "um"})
    often = {"validate": ("two",), "validate_every": 2, "save_every": 2}
    config = replace(base, data=str(data), out=str(tmp_path / "run"), **often)
    stop_at(config, 5)
    state = RunFolder(config.out).newest_state
    rest = torch.load(state / "run.pt", weights_only=True)
    assert rest["score"] == max(row["f1"] for row in metrics(Path(config.out)) if "f1" in row)
    torch.save({**rest, "score": 2.0}, state / "run.pt")  # a score that nothing can beat
    shutil.rmtree(Path(config.out) / "best")
    train(config, resume=True)
    assert not (Path(config.out) / "best").exists()


@pytest.mark.slow
def test_resuming_a_folder_without_a_run_begins_one(base, whole, tmp_path):
    assert train(replace(base, out=str(tmp_path / "new")), resume=True) == tmp_path / "new" / "last"
    assert losses(tmp_path / "new") == losses(whole)


def test_resuming_a_finished_run_changes_nothing(base, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "finished")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}, losses(out)
    (out / ".volumes" / "crops").mkdir(parents=True)  # stopped after its last step, before it cleared away
    train(replace(base, out=str(out)), resume=True)
    assert before == ({path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}, losses(out))
    assert not (out / ".volumes").exists()


def test_what_a_kill_leaves_half_written_is_not_read(config, whole):
    out = Path(config.out)
    shutil.copytree(out / "state" / "3", out / "state" / "6.partial")
    (out / "state" / "6.partial" / "optimizer.bin").write_bytes(b"half")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    (out / ".training.json.5f2a.partial").write_text("{")
    train(config, resume=True)
    assert losses(out) == losses(whole)
    assert [path.name for path in (out / "state").iterdir()] == ["8"]
    assert not list(out.rglob("*.partial"))


def test_a_run_goes_on_in_another_place_with_another_rhythm(config, whole, pair, tmp_path):
    out, data = tmp_path / "there", tmp_path / "data"
    shutil.move(config.out, out)
    shutil.copytree(pair, data)
    train(replace(config, out=str(out), data=str(data), save_every=2), resume=True)
    assert losses(out) == losses(whole)


# ------------------------------------------------------------ another run


@pytest.mark.parametrize(
    "change",
    [{"max_steps": 9}, {"seed": 1}, {"head_rate": 2e-3}, {"validate_every": 4}, {"spacing_um": (1.0, 0.3, 0.3)}],
    ids=lambda change: next(iter(change)),
)
def test_another_configuration_is_refused_and_the_field_named(config, change):
    out = Path(config.out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"`{next(iter(change))}` was .*, now it is"):
        train(replace(config, **change), resume=True)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_other_neurons_and_another_number_of_processes_are_refused(config, pair, tmp_path):
    facts = Path(config.out) / "training.json"
    told = json.loads(facts.read_text())
    facts.write_text(json.dumps({**told, "num_processes": 2}))
    with pytest.raises(ValueError, match="`num_processes` was 2, now it is 1"):
        train(config, resume=True)
    facts.write_text(json.dumps(told))
    moved = make_pairs(shutil.copytree(pair, tmp_path / "moved"), {"one": "um", "another": "um"})
    with pytest.raises(ValueError, match="`neurons` was"):
        train(replace(config, data=str(moved)), resume=True)
    facts.write_text("{")
    with pytest.raises(ValueError, match=r"training\.json is no JSON"):
        train(config, resume=True)


@pytest.mark.parametrize("suffix", [".swc", ".tif"])
def test_another_file_of_the_same_size_is_refused(config, pair, tmp_path, suffix):
    changed = shutil.copytree(pair, tmp_path / "changed") / f"one{suffix}"
    content = bytearray(changed.read_bytes())
    content[len(content) // 2] ^= 1
    changed.write_bytes(content)
    with pytest.raises(ValueError, match="the files of one are others by now"):
        train(replace(config, data=str(changed.parent)), resume=True)


def test_the_command_resumes(config, capsys):
    flags = "--simulated 0 --max-steps 8 --batch-size 2 --warmup-steps 2 --validate-every 100 --log-every 1"
    words = ["train", "--data", config.data, "--init", config.init, "--out", config.out, *flags.split()]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "already holds a run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--resume"])
    assert not stopped.value.code
    assert f"last checkpoint: {config.out}/last" in capsys.readouterr().out
    assert len(losses(Path(config.out))) == 8


# ------------------------------------------------------------ real processes


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_to_the_last_bit(base, tmp_path):
    flags = f"--data {base.data} --init {base.init} --simulated 0 --max-steps 24 --batch-size 2 --log-every 1"
    flags += " --save-every 3 --warmup-steps 2 --resume --out "

    def start(out: Path, port: int) -> subprocess.Popen:
        command, environment = launch(2, port, *flags.split(), str(out))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environment, **pipes)

    def finish(out: Path, port: int) -> None:
        process = start(out, port)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said[-3000:]

    stopped, other = tmp_path / "stopped", tmp_path / "whole"
    process = start(stopped, 29641)
    wait_until(lambda: lines(stopped) >= 5, process, 200)
    for each in (*psutil.Process(process.pid).children(recursive=True), process):  # the launcher's are no group
        each.kill()
    process.communicate()
    assert 5 <= lines(stopped) < 24
    assert 3 <= RunFolder(stopped).step < 24
    finish(stopped, 29642)
    finish(other, 29643)
    assert json.loads((stopped / "training.json").read_text())["num_processes"] == 2
    assert losses(stopped) == losses(other)
    assert [step for step, _ in losses(stopped)] == list(range(1, 25))
    assert equal(weights(stopped / "last"), weights(other / "last"))


KILLS = 20


@pytest.mark.slow
def test_twenty_kills_at_random_instants_change_nothing(base, tmp_path, monkeypatch):
    """At least five while a state is being written, which the half-written folder they leave behind shows."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    context = multiprocessing.get_context("forkserver")  # every run is a process of its own; the imports are shared
    context.set_forkserver_preload(["vit3d.training", "vit3d.learning.validation", "vit3d.learning.curve"])
    config = replace(base, out=str(tmp_path / "stopped"), max_steps=8 * KILLS, save_every=2)
    out, rng = Path(config.out), np.random.default_rng(0)
    while_saving = 0
    for kill in range(KILLS):
        process = context.Process(target=train, args=(config, True))
        before = lines(out)
        process.start()
        if kill % 2:
            wait_until(lambda: any((out / "state").glob("*.partial")), process)
        elif kill % 6 == 0:
            time.sleep(rng.uniform(0, 0.3))  # before the first step, too
        else:
            wanted = before - 1 + rng.integers(0, 8)
            wait_until(lambda wanted=wanted: lines(out) >= wanted, process)
            time.sleep(rng.uniform(0, 0.02))
        assert process.is_alive()
        process.kill()
        process.join()
        while_saving += any((out / "state").glob("*.partial"))
    assert while_saving >= 5
    process = context.Process(target=train, args=(config, True))
    process.start()
    process.join()
    assert process.exitcode == 0
    other = context.Process(target=train, args=(replace(config, out=str(tmp_path / "whole")),))
    other.start()
    other.join()
    assert losses(out) == losses(tmp_path / "whole")
    assert [step for step, _ in losses(out)] == list(range(1, config.max_steps + 1))
    assert equal(weights(out / "last"), weights(tmp_path / "whole" / "last"))


def lines(out: Path) -> int:
    with suppress(FileNotFoundError):
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def wait_until(happened, process, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        alive = process.is_alive() if hasattr(process, "is_alive") else process.poll() is None
        assert alive, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.001)


# --- whose folder it is ---


@pytest.mark.parametrize("theirs", ["state", "last", "best", "volumes"])
def test_a_folder_of_the_users_own_is_never_deleted(base, tmp_path, theirs):
    mine = tmp_path / theirs / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    here = replace(base, out=str(tmp_path), max_steps=1)
    if theirs == "volumes":  # no name of the run's
        train(here)
    else:
        with pytest.raises(ValueError, match=f"holds {theirs}, but no run to which that belongs; choose another --out"):
            train(here)
    assert mine.read_text() == "years of work"


def test_nor_is_the_data_where_the_run_never_began(base, pair, tmp_path):
    data = shutil.copytree(pair, tmp_path / "volumes")
    for gold in data.glob("*.swc"):
        gold.write_text(gold.read_text().replace("1 0 ", "1 0 9", 1))
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    with pytest.raises(ValueError, match=r"outside|lie"):
        train(replace(base, data=str(data), out=str(tmp_path)))
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["volumes"]


def test_a_checkpoint_that_cannot_be_put_in_place_leaves_the_one_before(tmp_path):
    (tmp_path / "last").mkdir()
    (tmp_path / "last/before").touch()
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "last", lambda partial: None)  # writes nothing
    assert [path.name for path in tmp_path.rglob("*")] == ["last", "before"]
    (tmp_path / "last").rename(tmp_path / "last.old")  # as a kill in the middle leaves it
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "last", lambda partial: None)
    assert [path.name for path in tmp_path.rglob("*")] == ["last", "before"]


def test_the_newest_state_is_the_one_of_most_steps(tmp_path):
    folder = RunFolder(tmp_path)
    for step in ("950", "1000", "2000.partial"):
        (folder.states / step).mkdir(parents=True)
    assert folder.step == 0  # of no run
    folder.facts.write_text("{}")
    assert folder.step == 1000


def test_what_a_kill_left_of_a_checkpoint_is_in_none_of_the_next(tmp_path):
    (tmp_path / "last.partial").mkdir()
    (tmp_path / "last.partial/half").touch()
    replace_folder(tmp_path / "last", lambda partial: (partial.mkdir(exist_ok=True), (partial / "whole").touch()))
    assert [path.name for path in tmp_path.rglob("*")] == ["last", "whole"]


def test_two_cannot_train_in_one_folder(config):
    holder = RunFolder(config.out)
    holder.begin(holder.begun_with(), holder.seen)
    before = {path: path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="Another process is training in"):
        train(config, resume=True)
    assert {path: path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()} == before
    holder.release()
    train(config, resume=True)


def test_a_run_that_began_in_the_folder_meanwhile_is_not_mixed_with(base, tmp_path):
    other = RunFolder(tmp_path)
    seen = other.seen
    train(replace(base, out=str(tmp_path), max_steps=1))
    before = (tmp_path / "training.json").read_bytes()
    with pytest.raises(ValueError, match=r"Another process trained in .* meanwhile"):
        other.begin({"seed": 7}, seen)
    other.release()
    assert (tmp_path / "training.json").read_bytes() == before


def test_a_kill_before_the_run_began_leaves_a_folder_that_can_be_used(base, tmp_path):
    (tmp_path / "run" / "state").mkdir(parents=True)
    train(replace(base, out=str(tmp_path / "run"), max_steps=1))


def test_workers_that_outlive_a_killed_trainer_do_not_hold_its_folder(config):
    holder = RunFolder(config.out)
    holder.begin(holder.begun_with(), holder.seen)
    fork = multiprocessing.get_context("fork")
    lives = fork.Event()
    worker = fork.Process(target=lambda: (lives.set(), time.sleep(60)))
    worker.start()
    assert lives.wait(30)
    os.close(holder.claim)  # as a kill does
    holder.claim = None
    try:
        other = RunFolder(config.out)
        other.begin(other.begun_with(), other.seen)
        other.release()
    finally:
        worker.kill()
        worker.join()


# --- what a checkpoint keeps of its own ---


def test_going_on_from_a_checkpoint_keeps_its_processor(base, forgetful, tmp_path):
    init = shutil.copytree(forgetful, tmp_path / "init")
    processor = load_checkpoint(str(init))[1]
    processor.image_mean = 0.3
    processor.save_pretrained(init)
    out = tmp_path / "run"
    train(replace(base, init=str(init), out=str(out), max_steps=1))
    assert load_checkpoint(str(out / "last"))[1].image_mean == 0.3
    stop_at(replace(base, init=str(init), out=str(tmp_path / "stopped")), 4)
    train(replace(base, init=str(init), out=str(tmp_path / "stopped")), resume=True)
    assert load_checkpoint(str(tmp_path / "stopped" / "last"))[1].image_mean == 0.3


def test_going_on_from_a_checkpoint_records_what_it_does(config, whole, tmp_path):
    slices = {"prediction": "center_slice", "patch_size": (5, 8, 8), "volume_size": (5, 32, 32)}
    init = make_checkpoint(tmp_path / "slices", **slices)
    out = tmp_path / "run"
    train(replace(config, init=init, out=str(out), max_steps=1))
    facts = json.loads((out / "training.json").read_text())
    assert (facts["prediction"], facts["strategy"]) == ("center_slice", None)
    train(replace(config, init=init, out=str(out), max_steps=1), resume=True)


@pytest.mark.parametrize(
    "asked, sentence",
    [
        ({"prediction": "center_slice"}, "predicts by `volume`, which no training changes"),
        ({"strategy": "average"}, "--strategy says how a 2D ViT becomes 3D, and --init .* is 3D already"),
    ],
)
def test_what_a_checkpoint_cannot_be_made_to_is_refused(base, tmp_path, asked, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(replace(base, out=str(tmp_path / "run"), **asked))
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_readable_config_is_not_said_to_be_none(base, tmp_path):
    (tmp_path / "config.json").write_text("{half")
    with pytest.raises(ValueError, match=r"holds no config\.json that says what model it is"):
        train(replace(base, init=str(tmp_path), out=str(tmp_path / "run")))
