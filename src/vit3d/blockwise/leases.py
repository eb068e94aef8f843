"""Leases: who is working on what, said by files in a folder that all processes see. No server, no process group.

A lease is a file made by exclusive creation; its modification time is the holder's heartbeat. A lease whose holder is
known to be dead, or has been silent for too long, is taken over. Two holders of one lease are possible (a process
that slept through its own expiry), so what a lease guards must be harmless to do twice.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

EXPIRY_S = 60.0


class Leases:
    """The leases of one folder, as seen and held by this process. Use as a context: leaving it releases all."""

    def __init__(self, folder: Path, expiry_s: float = EXPIRY_S):
        self.folder, self.expiry_s = folder, expiry_s
        self._owner = json.dumps({**this_process(), "token": uuid.uuid4().hex})
        self._held: set[str] = set()
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> "Leases":
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for name in list(self._held):
            self.release(name)

    def claim(self, name: str) -> bool:
        """True when this process now holds the lease `name`; False while another, live one does."""
        if name in self._held:
            return False
        path = self.folder / name
        if self._create(path):
            return True
        if not self._abandoned(path) or not self._remove_abandoned(path):
            return False
        return self._create(path)

    def wait_for(self, name: str, poll_s: float) -> None:
        """Claim the lease as soon as it is free."""
        while not self.claim(name):
            time.sleep(poll_s)

    def is_held_by_sibling(self, name: str) -> bool:
        """Whether a process that was launched here together with this one holds the lease, and is known to live."""
        try:
            owner = json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return False
        together = (owner.get("machine"), owner.get("launcher")) == (_machine(), os.getppid())
        return together and not is_dead(owner)

    def release(self, name: str) -> None:
        with self._lock:
            self._held.discard(name)
            with suppress(OSError):
                if (self.folder / name).read_text() == self._owner:
                    (self.folder / name).unlink()

    @contextmanager
    def holding(self, name: str) -> Iterator[bool]:
        """Whether the lease was free; it is given back at the end."""
        held = self.claim(name)
        try:
            yield held
        finally:
            if held:
                self.release(name)

    def _create(self, path: Path) -> bool:
        """Written elsewhere and then linked: a lease never lacks its owner, whenever its maker dies."""
        draft = self.folder / f".{uuid.uuid4().hex}"
        with self._lock:
            try:
                draft.write_text(self._owner)
                os.link(draft, path)
            except FileExistsError:
                return False
            finally:
                draft.unlink(missing_ok=True)
            self._held.add(path.name)
            return True

    def _abandoned(self, path: Path) -> bool:
        try:
            silent_s = self._clock() - path.stat().st_mtime
            owner = json.loads(path.read_text())
        except FileNotFoundError:
            return True
        except ValueError:
            owner = {}
        return silent_s > self.expiry_s or is_dead(owner)

    def _remove_abandoned(self, path: Path) -> bool:
        """Move it aside; should that have been a new, live one instead, move it back."""
        aside = self.folder / f".{uuid.uuid4().hex}"
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return True
        abandoned = self._abandoned(aside)
        if not abandoned:
            with suppress(OSError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)
        return abandoned

    def _clock(self) -> float:
        """The time where the files are: the clocks of machines differ."""
        path = self.folder / f".{uuid.uuid4().hex}"
        path.touch()
        try:
            return path.stat().st_mtime
        finally:
            path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(self.expiry_s / 6):
            with self._lock:
                for name in self._held:
                    with suppress(OSError):
                        os.utime(self.folder / name)


def this_process() -> dict:
    """This process, so that another one on the same machine can tell whether it still lives."""
    own = {"pid": os.getpid(), "started": _started(os.getpid()), "launcher": os.getppid()}
    return {"machine": _machine(), **own}


def _machine() -> str:
    """The running machine, and what of it can see this process's number; the host alone where Linux is not."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname() + f" {time.time_ns()}"  # nobody else's: only silence tells


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks: numbers of dead processes are given out again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def is_dead(owner: dict) -> bool:
    """Whether a process that said itself who it is is known to have ended; of another machine's nothing is known."""
    if owner.get("machine") != _machine():
        return False
    return _started(owner["pid"]) != owner["started"]
