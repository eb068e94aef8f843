"""Voxels that stay where they are stored and are read box by box; and whether what is read fits into memory."""

import ctypes
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np

Box = tuple[slice, slice, slice]

_PIECE = (32, 256, 512)  # read at once where a step leaves voxels out, at least
_LARGEST_VOXELS = 2**50  # a whole mouse brain at 50 nm has 2^42
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


class LazyVoxels:
    """Voxels (Z, Y, X): `voxels[box]` reads a box, `np.asarray(voxels)` everything, into a new array.

    shape; dtype, in the machine's byte order; chunks: what is stored together, and so read whole, or None.
    A box is given as numpy's: ints and slices with steps of 1 or more. Readers implement `_fetch`.
    """

    def __init__(self, shape: tuple[int, ...], dtype, chunks: tuple[int, ...] | None = None):
        self.shape = tuple(map(int, shape))
        self.dtype = np.dtype(dtype).newbyteorder("=")
        self.chunks = None if chunks is None else tuple(map(int, chunks))
        self._projections: dict[bool, list[np.ndarray]] = {}

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> np.ndarray:
        box, keep = _box_of(index, self.shape)
        if any(len(range(b.start, b.stop, b.step)) == 0 for b in box):
            return np.empty([len(range(b.start, b.stop, b.step)) for b in box], self.dtype)[keep]
        whole = all(b.step == 1 for b in box)
        return (self._read(box) if whole else self._read_thinned(box))[keep]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if copy is False:
            raise ValueError("Voxels that lie on disk cannot become an array without being read.")
        return np.asarray(self._read(tuple(slice(0, size, 1) for size in self.shape)), dtype)

    def projection(self, axis: int, dark: bool = False) -> np.ndarray:
        """The largest (`dark`: smallest) voxel along an axis, as `max(axis=...)` of an array; read in slabs, once."""
        if dark not in self._projections:
            self._projections[dark] = _projections(self, np.minimum if dark else np.maximum)
        return self._projections[dark][axis]

    def close(self) -> None:
        """Let go of the file; nothing can be read afterwards."""

    def _read(self, box: Box) -> np.ndarray:
        return np.ascontiguousarray(self._fetch(box), dtype=self.dtype)

    def _fetch(self, box: Box) -> np.ndarray:
        """The voxels of a box that lies inside and is not empty; its steps are 1."""
        raise NotImplementedError

    def _read_thinned(self, box: Box) -> np.ndarray:
        """Piece by piece, so that the memory is that of the result and one piece."""
        chunks = self.chunks or (1, 1, 1)
        edges = [chunk * max(1, piece // chunk) for chunk, piece in zip(chunks, _PIECE, strict=True)]
        result = np.empty([len(range(b.start, b.stop, b.step)) for b in box], self.dtype)
        for parts in product(*(_parts(b, edge) for b, edge in zip(box, edges, strict=True))):
            piece = self._read(tuple(slice(read.start, read.stop, 1) for read, _ in parts))
            result[tuple(place for _, place in parts)] = piece[tuple(slice(None, None, b.step) for b in box)]
        return result


class VoxelsWithin(LazyVoxels):
    """The part of a volume inside a box, without reading it."""

    def __init__(self, source, box: Box):
        self._source, self._start = source, [b.start for b in box]
        super().__init__([b.stop - b.start for b in box], source.dtype, getattr(source, "chunks", None))

    def _fetch(self, box: Box) -> np.ndarray:
        return self._source[tuple(slice(b.start + s, b.stop + s) for b, s in zip(box, self._start, strict=True))]


class ChangedVoxels(LazyVoxels):
    """A volume each box of which is `change(voxels of the box, box)`: as large; of the same type, or of `dtype`."""

    def __init__(self, source, change: Callable[[np.ndarray, Box], np.ndarray], dtype=None):
        self._source, self._change = source, change
        super().__init__(source.shape, dtype or source.dtype, getattr(source, "chunks", None))

    def _fetch(self, box: Box) -> np.ndarray:
        return self._change(np.asarray(self._source[box]), box)


class MappedVoxels(LazyVoxels):
    """Voxels that lie in a file as they are in memory; `index` picks the stack from an array of more axes.

    The file is mapped anew for each read: a map that stays counts as memory, page by page that was touched.
    """

    def __init__(self, path: Path, dtype, offset: int, shape: tuple[int, ...], index: tuple):
        self._map = {"filename": path, "dtype": np.dtype(dtype), "mode": "r", "offset": offset, "shape": shape}
        self._index = index
        super().__init__([n for n, part in zip(shape, index, strict=True) if isinstance(part, slice)], dtype)

    def _fetch(self, box: Box) -> np.ndarray:
        return np.array(np.memmap(**self._map)[self._index][box])


@contextmanager
def damage_reported(where) -> Iterator[None]:
    """Whatever a decoder raises on a damaged file becomes one sentence."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{where} is damaged ({type(error).__name__}: {error}); export it again.") from error


def check_memory(where, shape: tuple[int, ...], dtype: np.dtype, what: str = "voxels") -> None:
    """ValueError where an array of this shape does not fit into the memory that is free."""
    needed, free = math.prod(shape) * np.dtype(dtype).itemsize, free_bytes()
    if needed > free:
        raise ValueError(
            f"{where} declares {' x '.join(map(str, shape))} {what} of {np.dtype(dtype)}, {needed / 2**30:.1f} GiB, "
            f"but only {free / 2**30:.1f} GiB of memory are free; crop the stack or use a larger machine."
        )


def check_declared(where, shape: tuple[int, ...], dtype: np.dtype, chunks: tuple[int, ...]) -> None:
    """ValueError for sizes that no stack has, and for pieces that cannot even be read one by one."""
    if math.prod(shape) > _LARGEST_VOXELS:
        raise ValueError(
            f"{where} declares {' x '.join(map(str, shape))} voxels, more than any microscope makes; "
            "its metadata are damaged."
        )
    check_memory(where, chunks, dtype, "voxels per chunk")


def free_bytes() -> int:
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1))
    except (OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def give_back_freed() -> None:
    """Let glibc return freed arrays to the system, for the rest of the process; elsewhere does nothing.

    By itself it raises to 32 MiB what threads' heaps serve, and keeps what is freed between what is not: with boxes
    that come and go in several threads memory grows for minutes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**22)
        mallopt(_M_TRIM_THRESHOLD, 2**26)


def projection(voxels, axis: int, dark: bool = False) -> np.ndarray:
    """`voxels.max(axis=...)` (`dark`: min) of an array, and of voxels on disk without holding them."""
    if isinstance(voxels, LazyVoxels):
        return voxels.projection(axis, dark)
    voxels = np.asarray(voxels)
    return voxels.min(axis=axis) if dark else voxels.max(axis=axis)


def pieces(voxels, at_once: tuple[int, int, int] = (64, 512, 512)) -> Iterator[Box]:
    """Boxes of at least this size, whole chunks each, that cover a volume."""
    chunks = getattr(voxels, "chunks", None) or (1, 1, 1)
    edges = [chunk * max(1, edge // chunk) for chunk, edge in zip(chunks, at_once, strict=True)]
    for start in product(*(range(0, size, edge) for size, edge in zip(voxels.shape, edges, strict=True))):
        yield tuple(slice(s, min(s + edge, size)) for s, edge, size in zip(start, edges, voxels.shape, strict=True))


def _projections(voxels: LazyVoxels, larger: np.ufunc) -> list[np.ndarray]:
    result = [np.empty([n for a, n in enumerate(voxels.shape) if a != axis], voxels.dtype) for axis in range(3)]
    begun = [np.zeros(image.shape, bool) for image in result]
    for box in pieces(voxels):
        part = voxels[box]
        for axis, (image, old) in enumerate(zip(result, begun, strict=True)):
            place = tuple(b for a, b in enumerate(box) if a != axis)
            new = larger.reduce(part, axis=axis)
            image[place] = np.where(old[place], larger(image[place], new), new)
            old[place] = True
    return result


def _box_of(index, shape: tuple[int, ...]) -> tuple[Box, tuple]:
    """numpy's index -> (slices with start, stop and step inside the shape; what drops the axes of the ints)."""
    parts = index if isinstance(index, tuple) else (index,)
    if Ellipsis in [part if part is Ellipsis else None for part in parts]:
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts = (*parts[:at], *[slice(None)] * (len(shape) - len(parts) + 1), *parts[at + 1 :])
    parts = (*parts, *[slice(None)] * (len(shape) - len(parts)))
    if len(parts) != len(shape):
        raise IndexError(f"Voxels have {len(shape)} axes (Z, Y, X), the index {index} has {len(parts)}.")
    pairs = [_axis_of(part, size) for part, size in zip(parts, shape, strict=True)]
    return tuple(box for box, _ in pairs), tuple(keep for _, keep in pairs)


def _axis_of(part, size: int) -> tuple[slice, slice | int]:
    if isinstance(part, slice):
        start, stop, step = part.indices(size)
        if step < 1:
            raise IndexError(f"Voxels on disk are read forwards: steps of 1 or more, got {step}.")
        return slice(start, stop, step), slice(None)
    if not isinstance(part, int | np.integer) or not -size <= part < size:
        raise IndexError(f"Voxels on disk are addressed by slices and by numbers below {size}, got {part!r}.")
    part = int(part) % size
    return slice(part, part + 1, 1), 0


def _parts(axis: slice, edge: int) -> Iterator[tuple[slice, slice]]:
    """An axis with a step, cut at multiples of `edge`: (what to read, where its kept voxels go)."""
    for cut in range(axis.start - axis.start % edge, axis.stop, edge):
        before = len(range(axis.start, cut, axis.step))
        first, stop = axis.start + before * axis.step, min(cut + edge, axis.stop)
        count = len(range(first, stop, axis.step))
        if count:
            yield slice(first, stop), slice(before, before + count)
