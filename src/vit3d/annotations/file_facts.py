"""What tells a file, or a folder such as a Zarr store, from another one, or from itself after a change."""

import hashlib
import os
from pathlib import Path


def digest(path: str | Path) -> str:
    """SHA-256 of a file; of a folder that of its files' names and sums."""
    if not Path(path).is_dir():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    sums = [(file.relative_to(path).as_posix(), digest(file)) for file in files_of(path)]
    return hashlib.sha256(repr(sums).encode()).hexdigest()


def size(path: str | Path) -> int:
    """Bytes, of a folder those of all its files."""
    return sum(_stat(file).st_size for file in files_of(path))


def stamp(path: str | Path) -> list[tuple[str, int, int]]:
    """(Place, bytes, time of the last change in ns) of each file: cheap, and another one once one was written again."""
    return [(str(file.resolve()), _stat(file).st_size, _stat(file).st_mtime_ns) for file in files_of(path)]


def _stat(file: Path) -> os.stat_result:
    """Of a link that leads nowhere its own: whoever reads it finds out."""
    return file.stat() if file.exists() else file.lstat()


def files_of(path: str | Path) -> list[Path]:
    """The file itself, or all files below a folder, sorted."""
    path = Path(path)
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
