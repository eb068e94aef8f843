"""The folder of a run: what it is, how far it came, and the files that outlive a kill at any instant.

training.json   the configuration, from which on the folder holds a run
metrics.jsonl   one line per logged step; curve.png draws it
state/STEP      all that `--resume` needs
.volumes        while it runs: what crops are cut from
last, best      checkpoints: the newest, and the one that validated best
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from pathlib import Path

from accelerate import Accelerator

from ..formats.appearing import appearing
from ..model.image_processing_vit3d import ViT3DImageProcessor
from ..tables import json_lines
from .training_config import TrainingConfig

# what a resumed run may change: where its files are (what they say is in `neurons`, `files` and `validate`), and how
# often and with what it is watched
FREE = ("out", "data", "split_file", "spacing_table", "save_every", "log_every", "log_with", "num_workers", "device")
_DEFAULTS = {field.name: field.default for field in fields(TrainingConfig) if field.default is not MISSING}
_SHOWN = 80  # characters of a value in a sentence


class RunFolder:
    """Paths of a run, and who may use them."""

    def __init__(self, out: str | Path):
        self.path = Path(out)
        self.facts, self.metrics = self.path / "training.json", self.path / "metrics.jsonl"
        self.states, self.curve = self.path / "state", self.path / "curve.png"
        self.volumes = self.path / ".volumes"
        self.last, self.best = self.path / "last", self.path / "best"
        self.claim: int | None = None  # a lock, while it is this process's run

    def refuse_unless_free(self, facts: dict, resume: bool) -> None:
        """ValueError: the folder holds a run and `resume` is False, a run of another configuration, or other files that
        a run would replace."""
        if not self.facts.exists():
            files = (self.states, self.last, self.best, self.metrics, self.curve)
            theirs = ", ".join(path.name for path in files if path.exists() and not _is_empty(path))
            if theirs:
                raise ValueError(f"{self.path} holds {theirs}, but no run to which that belongs; choose another --out.")
            return
        if not resume:
            raise ValueError(f"{self.path} already holds a run; choose another --out, or go on with --resume.")
        before = _DEFAULTS | (self.begun_with() or {})  # a run may be older than a field
        before, now = (json.loads(json.dumps(values)) for values in (before, facts))
        seen, files = before.pop("files", {}), now.pop("files", {})  # a run may be older than these
        changed = [name for name in seen if seen[name] != files.get(name, seen[name])]
        if changed:
            raise ValueError(f"{self.path} cannot be resumed: the files of {', '.join(changed)} are others by now.")
        for name in sorted(before.keys() | now.keys()):
            if name not in FREE and before.get(name) != now.get(name):
                old, new = (str(values.get(name))[:_SHOWN] for values in (before, now))
                raise ValueError(
                    f"{self.path} cannot be resumed with another configuration: `{name}` was {old}, now it is {new}."
                )

    def begun_with(self) -> dict | None:
        """What the run in this folder was begun with, None where there is no run. ValueError: nobody can read it."""
        try:
            return json.loads(self.facts.read_text()) if self.facts.exists() else None
        except ValueError:
            raise ValueError(f"{self.facts} is no JSON: nobody knows what to resume; choose another --out.") from None

    @contextmanager
    def left_as_it_was(self) -> Iterator[None]:
        """An error inside leaves no trace of a run that never began."""
        is_new = not self.path.exists()
        try:
            yield
        except BaseException:
            if not self.facts.exists():
                shutil.rmtree(self.path if is_new else self.volumes, ignore_errors=True)
            raise

    @property
    def seen(self) -> tuple[dict | None, int]:
        """What `begin` must find unchanged."""
        return self.begun_with(), self.step

    def begin(self, facts: dict, seen: tuple[dict | None, int]) -> None:
        """Claim the folder for as long as this process lives, and forget whatever was logged or half-saved after the
        newest state. ValueError: another process has it, or had it since the folder was `seen` to be free."""
        self.states.mkdir(parents=True, exist_ok=True)
        self._claim()
        if self.seen != seen:
            raise ValueError(f"Another process trained in {self.path} meanwhile.")
        for leftover in self.states.glob("*.partial"):
            shutil.rmtree(leftover)
        for leftover in self.path.glob(".*.partial"):
            leftover.unlink()
        _write_text(self.facts, json.dumps(facts, indent=2))
        lines = [json.dumps(row) for row in self.rows() if row["step"] <= self.step]
        _write_text(self.metrics, "".join(line + "\n" for line in lines))

    def _claim(self) -> None:
        try:
            import fcntl

            self.claim = os.open(self.states, os.O_RDONLY)
            os.register_at_fork(after_in_child=self._close)  # or workers that outlive a killed trainer hold it
            fcntl.flock(self.claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another process is training in {self.path}.") from None
        except (ImportError, OSError):
            pass  # Windows, or a file system that knows no locks

    def release(self) -> None:
        """Let others train in the folder, also while workers that were just started live."""
        if self.claim is not None:
            with suppress(ImportError, OSError):
                import fcntl

                fcntl.flock(self.claim, fcntl.LOCK_UN)
        self._close()

    def _close(self) -> None:
        if self.claim is not None:
            os.close(self.claim)
            self.claim = None

    def rows(self) -> list[dict]:
        """The lines of `metrics.jsonl`, without one that a kill cut short."""
        return json_lines(self.metrics)

    @property
    def newest_state(self) -> Path | None:
        """The state to resume from. What is being written has another name until it is complete."""
        states = [path for path in self.states.glob("*") if path.name.isdigit() and self.facts.exists()]
        return max(states, key=lambda path: int(path.name), default=None)

    @property
    def step(self) -> int:
        """Steps done when the newest state was saved."""
        return int(self.newest_state.name) if self.newest_state else 0

    def save_state(self, accelerator: Accelerator, step: int, more: Callable[[Path], None]) -> None:
        """Every process calls this. `more(folder)` writes, on the main process, what Accelerate does not know."""
        partial, final = self.states / f"{step}.partial", self.states / str(step)
        accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            more(partial)
        accelerator.wait_for_everyone()  # each process writes its own random numbers
        if accelerator.is_main_process:
            partial.rename(final)
            for older in self.states.glob("*"):
                if older != final:
                    shutil.rmtree(older)
        accelerator.wait_for_everyone()


class Log:
    """One JSON line per call, with the seconds of work so far; a killed run keeps every line.

    Losses are written to the last bit: two runs can be compared.
    """

    def __init__(self, folder: RunFolder, accelerator: Accelerator):
        self.folder, self.accelerator = folder, accelerator
        done = folder.rows()
        self.start = time.monotonic() - (done[-1].get("seconds", 0.0) if done else 0.0)

    def __call__(self, step: int, **values: float) -> None:
        self.accelerator.log(values, step=step)
        if not self.accelerator.is_main_process:
            return
        line = {"step": step, **values, "seconds": round(time.monotonic() - self.start, 3)}
        with self.folder.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")


def save(model, processor: ViT3DImageProcessor, folder: Path, state_dict: dict | None = None) -> None:
    """Write a checkpoint; a kill while saving leaves the previous one."""

    def write(partial: Path) -> None:
        model.save_pretrained(partial, state_dict=state_dict)
        processor.save_pretrained(partial)

    replace_folder(folder, write)


def copy_checkpoint(source: Path, folder: Path) -> None:
    """`save`, from a checkpoint that is already written."""
    replace_folder(folder, lambda partial: shutil.copytree(source, partial))


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write(partial)` fill a folder beside its final name and swap it in."""
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)  # killed between the two renames below
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write(partial)
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_empty(path: Path) -> bool:
    """A folder that a kill left before anything was in it."""
    return path.is_dir() and not any(path.iterdir())


def _write_text(path: Path, text: str) -> None:
    with appearing(path) as hidden:
        hidden.write_text(text)
