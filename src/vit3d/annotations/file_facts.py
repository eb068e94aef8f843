"""What tells a file, or a folder such as a Zarr store, from another one, or from itself after a change."""

import hashlib
import os
import zlib
from pathlib import Path

_PLACES, _PLACE_BYTES = 16, 1 << 16


def digest(path: str | Path) -> str:
    """SHA-256 of a file; of a folder that of its files' names and sums."""
    if not Path(path).is_dir():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    sums = [(file.relative_to(path).as_posix(), digest(file)) for file in files_of(path)]
    return hashlib.sha256(repr(sums).encode()).hexdigest()


def glance(path: str | Path) -> int:
    """A sum over some places of a file, spread evenly, and over as many files of a folder: soon read, however large.

    With `size` it tells files that differ throughout, wherever they lie; what differs in one slice it may miss.
    """
    files, total = files_of(path), 0
    for file in files[:: max(1, -(-len(files) // _PLACES))]:
        if file.exists():
            last = max(_stat(file).st_size - _PLACE_BYTES, 0)
            with open(file, "rb") as opened:
                for place in sorted({last * n // (_PLACES - 1) for n in range(_PLACES)}):
                    opened.seek(place)
                    total = zlib.crc32(opened.read(_PLACE_BYTES), total)
    return total


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
