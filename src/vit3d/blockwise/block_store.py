"""BlockStore: an OME-Zarr array that many processes fill box by box, any of which may die at any moment.

The store grows as `OUT.zarr.partial` and gets its name when every box is there and verified. One write box is one
shard, so one file, written beside its name, flushed and renamed; a box that holds nothing is a shard that says so,
hence a missing file is always damage. A done-record per box names the file, its size and its SHA-256; inside, every
chunk carries a crc32c. Records and leases lie in `0/.vit3d`, where no reader of Zarr looks.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import google_crc32c
import numpy as np
import zarr
from numcodecs import Zstd
from zarr.codecs import Crc32cCodec, ZstdCodec

from ..formats.appearing import appearing
from ..formats.lazy_voxels import Box
from ..formats.ngff import ome_attributes

Index = tuple[int, int, int]  # of a write box, in the grid of boxes

CHUNK = (64, 64, 64)
LEVELS = 2048  # to which probabilities are rounded: above 0.5 as fine as float16, and they compress twice as well
_ZSTD_LEVEL = 1
_ARRAY = "0"
_HOME = f"{_ARRAY}/.vit3d"


@dataclass(frozen=True)
class Layout:
    """Shape of the volume, of a write box (= shard) and of a chunk, in voxels (Z, Y, X), and the spacing."""

    shape: tuple[int, int, int]
    box: tuple[int, int, int]
    spacing_um: tuple[float, float, float] | None = None
    chunk: tuple[int, int, int] = CHUNK

    def __post_init__(self):
        for name in ("shape", "box", "chunk", "spacing_um"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))  # JSON has no tuples
        if any(b < 1 or b % c for b, c in zip(self.box, self.chunk, strict=True)):
            raise ValueError(f"A write box of {self.box} voxels is no multiple of the chunk {self.chunk} (Z, Y, X).")

    @property
    def grid(self) -> Index:
        return tuple(-(-n // b) for n, b in zip(self.shape, self.box, strict=True))

    def indices(self) -> Iterator[Index]:
        return np.ndindex(self.grid)

    def box_of(self, index: Index) -> Box:
        """The voxels of a write box, cut at the volume's end."""
        axes = zip(index, self.box, self.shape, strict=True)
        return tuple(slice(i * b, min((i + 1) * b, n)) for i, b, n in axes)


def partial_path(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def create(out: Path, layout: Layout, manifest: dict) -> "BlockStore":
    """An empty `OUT.zarr.partial`, there as a whole or not at all; one that is there already stays.

    One process at a time may do this: what others left half-made when they died is cleared.
    """
    final, folder = partial_path(out), out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    for stray in out.parent.glob(f".{out.name}.*"):
        if stray.is_dir():
            shutil.rmtree(stray, ignore_errors=True)
    try:
        group = zarr.create_group(folder, attributes={"ome": ome_attributes(out.stem, layout.spacing_um, [(1, 1, 1)])})
        _create_array(group, layout)
        for name in ("done", "leases"):
            (folder / _HOME / name).mkdir(parents=True)
        metadata = (folder / _ARRAY / "zarr.json").read_text()
        text = json.dumps({"layout": asdict(layout), **manifest, "array": metadata}, indent=2)
        (folder / _HOME / "manifest.json").write_text(text)
        if not final.exists():
            os.rename(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return BlockStore(final)


class BlockStore:
    """The store in a folder: `OUT.zarr.partial`, or the finished `OUT.zarr`."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.manifest = json.loads((folder / _HOME / "manifest.json").read_text())
            self.layout = Layout(**self.manifest["layout"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder} is no store that `vit3d segment` wrote (its record cannot be read: {error}); "
                "choose another name."
            ) from error

    @property
    def lease_folder(self) -> Path:
        return self.folder / _HOME / "leases"

    def file_of(self, index: Index) -> str:
        """The file of a write box, from the store's folder."""
        return "/".join([_ARRAY, "c", *map(str, index)])

    def record_of(self, index: Index) -> dict | None:
        """The done-record of a box; None where there is none or it cannot be read."""
        try:
            record = json.loads(self._record_path(index).read_text())
            return record if {"bytes", "sha256"} <= record.keys() else None
        except (FileNotFoundError, ValueError, AttributeError):
            return None

    def is_done(self, index: Index) -> bool:
        return self._record_path(index).exists()

    def num_done(self) -> int:
        with os.scandir(self.folder / _HOME / "done") as entries:
            return sum(entry.name.endswith(".json") for entry in entries)

    def write(self, index: Index, voxels: np.ndarray | None, **facts) -> None:
        """Store a box, float32 rounded to whole 2048ths; None is a box of zeros. Flushed to disk on return.

        `facts` go into the done-record. A second write of the same voxels changes no byte.
        """
        data = _shard(self.layout, voxels)
        path = self.folder / self.file_of(index)
        for depth in (3, 2, 1):  # never the store's own folder: it may have got its name by now
            path.parents[depth - 1].mkdir(exist_ok=True)
        _write_file(path, data)
        record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **facts}
        _write_file(self._record_path(index), json.dumps(record).encode())

    def damage_of(self, index: Index) -> str | None:
        """What is wrong with a box on disk; None when it is what was written."""
        record = self.record_of(index)
        if record is None:
            return "has no done-record"
        path = self.folder / self.file_of(index)
        try:
            size = path.stat().st_size
            if size != record["bytes"]:
                return f"holds {size} bytes instead of {record['bytes']}"
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return None if digest == record["sha256"] else "holds other bytes than were written"

    def verify(self) -> Iterator[tuple[Index, str | None]]:
        """(box, its damage or None) for every write box."""
        for index in self.layout.indices():
            yield index, self.damage_of(index)

    def metadata_damage(self) -> str | None:
        path = self.folder / _ARRAY / "zarr.json"
        try:
            whole = path.read_text(errors="replace") == self.manifest["array"]
        except FileNotFoundError:
            return "is missing"
        return None if whole else "holds other bytes than were written"

    def repair_metadata(self) -> None:
        if self.metadata_damage():
            _write_file(self.folder / _ARRAY / "zarr.json", self.manifest["array"].encode())

    def forget(self, index: Index) -> None:
        """Take the done-record away, so that the box is computed again."""
        self._record_path(index).unlink(missing_ok=True)

    def trace_mark(self) -> str | None:
        """What tells the last time that the store was traced from others; None where it never was."""
        with suppress(FileNotFoundError):
            return (self.folder / _HOME / "traced").read_text()
        return None

    def mark_traced(self) -> None:
        with suppress(OSError):  # the tree is written: without a mark a process that waits for it writes it again
            _write_file(self.folder / _HOME / "traced", uuid.uuid4().hex.encode())

    def finish(self, out: Path) -> None:
        """Clear what dead processes left and give the store its name. The caller has verified it."""
        for stray in (*self.folder.glob(f"{_ARRAY}/c/**/.*"), *(self.folder / _HOME / "done").glob(".*")):
            stray.unlink(missing_ok=True)
        os.rename(self.folder, out)
        for stray in (out / _HOME / "leases").iterdir():
            stray.unlink(missing_ok=True)

    def _record_path(self, index: Index) -> Path:
        return self.folder / _HOME / "done" / f"{'.'.join(map(str, index))}.json"


def differences(recorded: dict, wanted: dict, prefix: str = "") -> list[str]:
    """'key: recorded, wanted' of what differs, both values named; keys of nested records are joined by dots."""
    found = []
    for key in sorted({*recorded, *wanted}):
        old, new = recorded.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif json.loads(json.dumps(old)) != json.loads(json.dumps(new)):
            found.append(f"{prefix}{key} was {old} and is now {new}")
    return found


def _create_array(group: zarr.Group, layout: Layout) -> None:
    group.create_array(
        _ARRAY,
        shape=layout.shape,
        dtype="float32",
        chunks=layout.chunk,
        shards=layout.box,
        compressors=[ZstdCodec(level=_ZSTD_LEVEL), Crc32cCodec()],
        fill_value=0.0,
        dimension_names=["z", "y", "x"],
    )


def _shard(layout: Layout, voxels: np.ndarray | None) -> bytes:
    """A shard as Zarr writes it: the chunks that hold something, then where each of all lies, with a checksum."""
    starts = product(*(range(0, b, c) for b, c in zip(layout.box, layout.chunk, strict=True)))
    chunks, places, end = [], [], 0
    for start in starts:
        part = None if voxels is None else voxels[tuple(map(slice, start, np.add(start, layout.chunk)))]
        if part is None or not part.size or part.max() * LEVELS <= 0.5:
            places.append((2**64 - 1, 2**64 - 1))  # rounded it is all zeros, and left out
            continue
        chunks.append(_chunk(part, layout.chunk))
        places.append((end, len(chunks[-1])))
        end += len(chunks[-1])
    return b"".join([*chunks, _checked(np.array(places, dtype="<u8").tobytes())])


def _chunk(voxels: np.ndarray, shape: tuple[int, int, int]) -> bytes:
    """Rounded and compressed, with a checksum; filled with zeros where the volume ends."""
    levels = voxels * np.float32(LEVELS)
    np.rint(levels, out=levels)
    levels *= np.float32(1 / LEVELS)
    if levels.shape != shape:
        levels = np.pad(levels, [(0, n - size) for n, size in zip(shape, levels.shape, strict=True)])
    return _checked(Zstd(level=_ZSTD_LEVEL).encode(levels))


def _checked(data: bytes) -> bytes:
    return data + google_crc32c.value(data).to_bytes(4, "little")


def _write_file(path: Path, data: bytes) -> None:
    """There as a whole and on disk, or not at all."""
    with appearing(path) as hidden, hidden.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
