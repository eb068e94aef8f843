"""A folder of z-slices: one 2D image per file, in the order of the numbers in their names."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from .axes import stack_index
from .lazy_voxels import Box, LazyVoxels, check_declared, damage_reported

_PROJECTIONS = ("MAX_", "MIN_", "AVG_", "SUM_", "STD_", "MED_")  # as Fiji names what it makes of a stack
_WHOLE, _DECIMAL = r"(\d+)", r"(\d+(?:\.\d+)?)"  # numbers in names
_SUFFIXES = (".tif", ".tiff", ".png")
_NO_COMPANY = (".swc", ".eswc", ".zarr", ".v3draw", ".v3dpbd", ".lsm", ".btf", ".tf8")


class SliceVoxels(LazyVoxels):
    """Slices that lie in a file each; only those that meet the box are read."""

    def __init__(self, files: list[Path], shape: tuple[int, ...], dtype: np.dtype, index: tuple):
        self._files, self._page, self._index = files, shape[1:], index
        super().__init__((len(files), *shape[1:3]), dtype, (1, *shape[1:3]))

    def _fetch(self, box: Box) -> np.ndarray:
        result = np.empty([b.stop - b.start for b in box], self.dtype)
        for out, file in zip(result, self._files[box[0]], strict=True):
            with damage_reported(file):
                page = _pixels(file)
            if page.shape != self._page:
                raise ValueError(f"{file} has changed: {page.shape} pixels instead of {self._page}.")
            out[:] = page[self._index[1:]][box[1:]]
        return result


def holds_slices(folder: Path) -> bool:
    """Whether a folder's images are 2D, by the first and the last of them; more than one is needed.

    Beside stacks of another kind or SWCs, images are pictures.
    """
    files = _images(folder)
    if len(files) < 2 or any(path.suffix.lower() in _NO_COMPANY for path in folder.iterdir()):
        return False
    try:
        return all(len(_header(file)[0]) in (2, 3) and _pages(file) == 1 for file in (files[0], files[-1]))
    except ValueError:
        return False


def open_slices(folder: Path, channel: int | None = None) -> tuple[SliceVoxels, None]:
    """The stack of a folder's slices, lazily; no spacing, for slices do not state their distance.

    ValueError, in one sentence, for slices of different types, shapes or depths, and for a number that is left out.
    """
    files = _images(folder)
    kinds = Counter(file.suffix.lower() for file in files)
    if len(kinds) > 1:
        said = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise ValueError(f"{folder} mixes images of several types ({said}); keep the slices of one stack alone in it.")
    _check_numbers(files)
    shape, dtype = _header(files[0])
    for file in files[1:]:
        if _header(file) != (shape, dtype) or _pages(file) != 1:
            raise ValueError(
                f"{folder} is no stack: {file.name} is {_said(*_header(file))}, but {files[0].name} is "
                f"{_said(shape, dtype)}; slices must be equal."
            )
    check_declared(folder, (len(files), *shape), dtype, shape)
    index = stack_index("ZYXS"[: 1 + len(shape)], (len(files), *shape), folder, channel)
    return SliceVoxels(files, (len(files), *shape), dtype, index), None


def _images(folder: Path) -> list[Path]:
    """The folder's images in natural order: slice 10 after slice 9, and 0.5 after 0.25."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.name[0] != "."]
    files.sort(key=lambda path: (_words(path, _WHOLE), path.name))
    return files if _are_counted(files) else sorted(files, key=lambda path: (_words(path, _DECIMAL), path.name))


def _words(file: Path, number: str) -> list[str | float]:
    """What a name consists of: texts in the even places, and the numbers between them."""
    return [float(word) if at % 2 else word for at, word in enumerate(re.split(number, file.stem))]


def _are_counted(files: list[Path]) -> bool:
    """Whether a whole number in their names rises evenly from slice to slice: a dot is then no decimal point."""
    fields = zip(*(_words(file, _WHOLE)[1::2] for file in files))  # noqa: B905 (those that all have)
    steps = [np.diff(field) for field in fields]
    return len(files) > 2 and any(step.min() > 0 and np.ptp(step) == 0 for step in steps)


def _check_numbers(files: list[Path]) -> None:
    """ValueError where the slices' names show that they are no stack.

    A projection lies among them, or another image, which lacks the number that the others have; all numbers in which
    they differ repeat, as those of slices of several channels, times or neurons do; or a number leaves a gap.
    """
    projected = [file for file in files if file.name.startswith(_PROJECTIONS)]
    if 0 < len(projected) < len(files):
        raise _several(projected[0], next(file for file in files if file not in projected))
    number = _WHOLE if _are_counted(files) else _DECIMAL
    names = [_words(file, number) for file in files]
    numbers = [words[1::2] for words in names]
    fields = [list(field) for field in zip(*numbers) if len(set(field)) > 1]  # noqa: B905 (those that all have)
    counts = [len(found) for found in numbers]
    if not fields and min(counts) < max(counts):
        raise _several(files[counts.index(min(counts))], files[counts.index(max(counts))])
    if fields and all(len(set(numbers)) < len(numbers) for numbers in fields):
        numbers = max(fields, key=lambda numbers: len(set(numbers)))  # that of the slice
        again = next(at for at in range(1, len(files)) if numbers[at] in numbers[:at])
        raise _several(files[numbers.index(numbers[again])], files[again])
    alone = len(fields) == 1 and len({tuple(words[::2]) for words in names}) == 1
    at = _gap(np.diff(fields), alone) if fields else None
    if at is not None:
        raise ValueError(
            f"{files[0].parent} lacks slices: after {files[at].name} comes {files[at + 1].name}; "
            "restore or rename them."
        )


def _gap(steps: np.ndarray, alone: bool) -> int | None:
    """After which slice another one lacks, by the steps (number, slice) of all numbers that differ; None for none.

    A number that is alone must rise evenly. Of several, one that does shows that no slice lacks, for the others may be
    times, which come late; without such a one those count that rise by one step mostly, and by multiples of it.
    """
    smallest = steps.min(axis=1, keepdims=True)
    even = np.isclose(steps, smallest, rtol=0.01)
    if alone:
        return None if even.all() else int(even[0].argmin())
    rising = smallest[:, 0] > 0
    if even[rising].all(axis=1).any():
        return None
    multiples = steps[rising] / smallest[rising]
    whole = np.isclose(multiples, np.round(multiples), rtol=0.01).all(axis=1)
    counted = even[rising][whole & (even[rising].mean(axis=1) > 0.5)]
    return int(counted[0].argmin()) if len(counted) else None


def _several(one: Path, other: Path) -> ValueError:
    return ValueError(
        f"{one.parent} is no stack: by their names {one.name} and {other.name} are not two slices of one; keep the "
        "slices of one channel, time point and neuron in a folder."
    )


def _header(file: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and depth of a slice, from its header alone."""
    with damage_reported(file):
        if file.suffix.lower() == ".png":
            with Image.open(file) as image:
                mode, (width, height) = _mode(image), image.size
                bands = Image.getmodebands(mode)
                dtype = np.dtype({"1": bool, "I;16": "u2", "I;16B": "u2", "I": "i4"}.get(mode, "u1"))
                return (height, width) + (bands,) * (bands > 1), dtype
        with tifffile.TiffFile(file) as tiff:
            page = tiff.pages.first
            if not page.dataoffsets or sum(page.databytecounts) > file.stat().st_size:
                raise ValueError("its pixels are missing")
            return page.shape, np.dtype(page.dtype)


def _mode(image: Image.Image) -> str:
    """The mode of an image's grey values or colours; with a palette, of those that its pixels stand for."""
    if image.mode != "P":
        return image.mode
    image.info.pop("transparency", None)  # of which Pillow warns, and which slices of one stack need not share
    palette = np.frombuffer(image.palette.palette, np.uint8).reshape(-1, 3)
    return "RGB" if np.ptp(palette, axis=1).any() else "L"  # used or not: a blank slice fits those that use it


def _pages(file: Path) -> int:
    if file.suffix.lower() == ".png":
        return 1
    with damage_reported(file), tifffile.TiffFile(file) as tiff:
        return len(tiff.pages)


def _pixels(file: Path) -> np.ndarray:
    if file.suffix.lower() == ".png":
        with Image.open(file) as image:
            return np.asarray(image.convert(_mode(image)))
    with tifffile.TiffFile(file) as tiff:
        return tiff.pages.first.asarray()


def _said(shape: tuple[int, ...], dtype: np.dtype) -> str:
    return f"{' x '.join(map(str, shape))} of {dtype}"
