"""What people type -> what the verbs take. Every ValueError names the flag or the file, and what came."""

import errno
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from .formats.lazy_voxels import pieces
from .tree import UNITS, NeuronTree, read_swc
from .volume import (
    SUFFIXES,
    Volume,
    box_in,
    is_stack,
    loaded,
    named_stacks,
    open_volume,
    read_volume,
    stack_name,
    swc_name,
)

SWC_SUFFIXES = (".swc", ".eswc")
Box = tuple[slice, slice, slice]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LARGE_UM = 100.0  # no light microscope samples a neuron this coarsely,
_SMALL_UM = 0.005  # or this finely
_SMALLEST_SHAPE = (8, 32, 32)


# --- files that are read ---


def read_stack(
    path: Path, spacing: str | None, channel: int | None = None, *, notice: bool = True, **reading
) -> Volume:
    """A stack; with `notice`, one warning when nobody has stated its voxel size, or when it is a strange one.

    `reading` goes to `read_volume`: level, missing_as_fill."""
    volume = read_volume(path, spacing_um=triple(spacing, "--spacing"), channel=channel, **reading)
    if notice:
        notice_spacing(path, volume)
    return volume


def open_stack(
    path: Path,
    spacing: str | None,
    channel: int | None,
    level: str | None,
    stays_on_disk: Callable[[Volume], bool],
    missing_as_fill: bool = False,
) -> Volume:
    """A stack, with the warnings of `read_stack`, in memory or with its voxels on disk."""
    reading = {"channel": channel, "level": level, "missing_as_fill": missing_as_fill}
    volume = open_volume(path, spacing_um=triple(spacing, "--spacing"), **reading)
    volume = volume if stays_on_disk(volume) else loaded(volume, path)
    notice_spacing(path, volume)
    return volume


def notice_spacing(path: Path, volume: Volume) -> None:
    if volume.spacing_um and max(volume.spacing_um) > _LARGE_UM:
        warnings.warn(f"{path.name} has voxels of {volume.spacing_um} um (z, y, x); are they nm?", stacklevel=3)
    elif volume.spacing_um and max(volume.spacing_um) < _SMALL_UM:
        warnings.warn(f"{path.name} has voxels of {volume.spacing_um} um (z, y, x); are they mm?", stacklevel=3)
    elif volume.spacing_um and volume.spacing_um[2] > volume.spacing_um[1] == volume.spacing_um[0]:
        warnings.warn(f"{path.name} has voxels of {volume.spacing_um} um; are these z, y and x?", stacklevel=3)
    if volume.spacing_um is None:
        warnings.warn(
            f"{path.name} states no voxel size: everything is in voxels; --spacing Z,Y,X gives um.",
            stacklevel=3,
        )


def open_mask(path: Path | None, missing_as_fill: bool = False):
    """The voxels of a mask, which stay on disk; a warning where it is 0 nowhere (ilastik counts from 1)."""
    if path is None:
        return None
    voxels = open_volume(path, missing_as_fill=missing_as_fill).voxels
    if all(np.asarray(voxels[piece]).all() for piece in pieces(voxels)):  # mostly the first one tells
        warnings.warn(
            f"{path.name} is 0 nowhere: it leaves nothing out. If it counts from 1, write its background as 0.",
            stacklevel=2,
        )
    return voxels


def read_trees(
    predicted: Path, gold: Path, predicted_unit, gold_unit, spacing: str | None, *, several: bool = False
) -> tuple[NeuronTree, ...]:
    """Both trees, with the voxel size that is given on the command line, else their own."""
    trees = (
        read_stating(predicted, unit_of(predicted_unit, "--predicted-unit"), several),
        read_stating(gold, unit_of(gold_unit, "--gold-unit"), several),
    )
    size = triple(spacing, "--spacing")
    return tuple(replace(tree, spacing_um=size or tree.spacing_um) for tree in trees)


def read_stating(path: Path, unit: str | None, several: bool) -> NeuronTree:
    """An SWC in the unit that it says, or else in `unit`; one of `several` files may say another one."""
    if not several:
        return read_swc(path, unit=unit)
    tree = read_swc(path)
    return replace(tree, unit=tree.unit or unit)


def refuse_mixed_units(trees: dict[Path, NeuronTree]) -> None:
    """ValueError unless all trees are in one unit: a column of a table has one."""
    units = {tree.unit for tree in trees.values()}
    if len(units) > 1:
        said = ", ".join(f"{path.name} {tree.unit or 'unstated'}" for path, tree in trees.items())
        raise ValueError(
            f"The files are in different units ({said}): bring them to one with `vit3d convert --swc-unit`"
            f"{', or state what they do not say with --unit' * (None in units)}."
        )


def is_swc(path: Path) -> bool:
    return path.suffix.lower() in SWC_SUFFIXES


def is_folder(path: Path) -> bool:
    """Whether a path holds several files to work on; a Zarr store and a folder of z-slices are one stack."""
    return path.is_dir() and not is_stack(path)


def pairs(predicted: Path, gold: Path) -> list[tuple[str, Path, Path]]:
    """(name, predicted, gold); folders are paired by file name without suffix, SWCs before masks.

    What has no partner is named in a warning, so that nobody takes the mean of some for the mean of all.
    """
    if not is_folder(predicted):
        return [(swc_name(predicted) if is_swc(predicted) else stack_name(predicted), predicted, gold)]
    if not is_folder(gold):
        raise ValueError(f"{predicted} is a folder, {gold} is none; folders are scored against folders.")
    for suffixes in (SWC_SUFFIXES, SUFFIXES):
        first, second = (by_name(folder, suffixes) for folder in (predicted, gold))
        if common := sorted(first.keys() & second.keys()):
            if alone := sorted(first.keys() ^ second.keys()):
                warnings.warn(f"Not scored, for want of a partner: {', '.join(alone)}.", stacklevel=2)
            return [(name, first[name], second[name]) for name in common]
    raise FileNotFoundError(f"No SWC or mask in {predicted} has the name of one in {gold}.")


def by_name(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The folder's files of these types by their name without suffix; hidden ones are passed over, and so is, with a
    warning, an ESWC beside an SWC of its name."""
    files = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in suffixes and not p.name.startswith(".")]
    if suffixes is not SWC_SUFFIXES:
        return named_stacks(files)
    names = [swc_name(path) for path in files]  # as their stacks, but where two would have one name
    found = {name if names.count(name) == 1 else path.stem: path for name, path in zip(names, files, strict=True)}
    if beside := sorted({path.name for path in files} - {path.name for path in found.values()}):
        warnings.warn(f"Passed over, beside an SWC of the same name: {', '.join(beside)}.", stacklevel=2)
    return found


def stack_named(place: Path | None, name: str) -> Path | None:
    """The stack itself, or the one of this name in a folder."""
    if place is None or not is_folder(place):
        return place
    stacks = by_name(place, SUFFIXES)
    if name not in stacks:
        raise FileNotFoundError(f"{place} holds no stack named {name}.")
    return stacks[name]


# --- files that are written: refused before hours of work, not after ---


def new_file(path: Path, *suffixes: str, source: str | Path | None = None) -> Path:
    """`path`, if a file of these types can be written there; never over what is read, the `source`, nor into it."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"The name of what is written must end in {' or '.join(suffixes)}, got {path}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file.")
    new_folder(path.parent)
    return path if source is None else _apart(path, source)


def make_room(path: Path) -> Path:
    """`path`, its folder made: after the work, so that a command that fails leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def new_folder(path: Path, source: str | Path | None = None) -> Path:
    """`path`, if a folder is there or can be made there; neither the `source`, which is read, nor a place in it."""
    nearest = next((place for place in (path, *path.parents) if place.exists()), path)
    if nearest.exists() and not nearest.is_dir():
        raise ValueError(f"{path} cannot be a folder: {nearest} is a file.")
    if nearest.exists() and not os.access(nearest, os.W_OK):
        raise PermissionError(f"Nothing can be written to {nearest}: it is read-only for you.")
    return path if source is None else _apart(path, source)


def _apart(path: Path, source: str | Path) -> Path:
    places = [place for place in (path.resolve(), *path.resolve().parents) if place.exists()]
    if Path(source).exists() and any(place.samefile(source) for place in places):
        raise ValueError(f"What is written as {path} would lie over the input, or in it; choose another place.")
    return path


# --- numbers and words ---


def sentence(error: Exception) -> str:
    """What the error says, on one line."""
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({error}); crop the stack or use a larger machine."
    if isinstance(error, OSError) and error.errno in _FULL:
        place = f" on the disk of {error.filename}" if error.filename else ""
        return f"There is no room left{place} for what is written ({error.strerror}): free some, or choose another."
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}."
    return " ".join(str(error).split())


def shape_of(text: str) -> tuple[int, int, int]:
    """Z,Y,X in whole voxels, large enough to hold a neuron."""
    size = triple(text, "--shape")
    if any(value != int(value) for value in size) or any(
        value < least for value, least in zip(size, _SMALLEST_SHAPE, strict=True)
    ):
        least = ",".join(map(str, _SMALLEST_SHAPE))
        raise ValueError(f"--shape takes whole voxels Z,Y,X, at least {least} to hold a neuron, got {text!r}.")
    return tuple(int(value) for value in size)


def triple(text: str | None, flag: str) -> tuple[float, float, float] | None:
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"{flag} takes three positive numbers Z,Y,X, got {text!r}.")
    return values


def number(text: str, flag: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{flag} takes a number, got {text!r}.")
    return value


def bytes_of(gib: float) -> int:
    if not (math.isfinite(gib) and gib > 0):
        raise ValueError(f"--memory-budget takes GiB, a number above 0, got {gib}.")
    return int(gib * 2**30)


def threshold_of(text: str, *names: str, of_probability: bool = False) -> float | str:
    """A number, "auto", or another of the `names`; of a probability from 0 to less than 1."""
    if text in ("auto", *names):
        return text
    threshold = number(text, "--threshold")
    if of_probability and not 0 <= threshold < 1:
        raise ValueError(f"--threshold is of a probability here, from 0 to less than 1, got {text}.")
    return threshold


def factors_of(text: str) -> float | tuple[float, float, float]:
    return triple(text, "--scale") if "," in text else number(text, "--scale")


def unit_of(text: str | None, flag: str, spacing_um=(1.0, 1.0, 1.0)) -> str | None:
    """ "um", "voxel" or None; um needs a voxel size."""
    if text not in (*UNITS, None):
        raise ValueError(f"{flag} takes um or voxel, got {text!r}.")
    if text == "um" and spacing_um is None:
        raise ValueError(f"{flag} um needs the voxel size: add --spacing Z,Y,X.")
    return text


def to_unit(tree: NeuronTree, unit: str | None, spacing: str | None) -> NeuronTree:
    """The tree in the unit that `--swc-unit` names, knowing the voxel size that `--spacing` states."""
    unit, size = unit_of(unit, "--swc-unit"), triple(spacing, "--spacing")
    if unit is None and size is None:
        return tree
    if tree.unit is None:
        raise ValueError("The SWC does not say its unit: add --unit um or --unit voxel.")
    if unit not in (tree.unit, None) and not (size or tree.spacing_um):
        raise ValueError(f"From {tree.unit} to {unit} it takes the voxel size: add --spacing Z,Y,X.")
    other = size and tree.spacing_um and not all(map(partial(math.isclose, rel_tol=1e-3), size, tree.spacing_um))
    if other and tree.unit == "um" and unit in ("um", None):
        raise ValueError(
            f"The SWC is in um and states voxels of {tree.spacing_um} um (z, y, x), not {size}. If those were wrong, "
            "write it in voxels first (--swc-unit voxel), then in um with --spacing."
        )
    return tree.to(unit or tree.unit, size)


def box_of(text: str | None, shape: tuple[int, ...]) -> Box:
    """`z0:z1,y0:y1,x0:x1` -> slices inside `shape`; an empty end means the volume's."""
    if text is None:
        return box_in(None, shape)
    try:
        ends = [[int(end) if end else None for end in part.split(":")] for part in text.split(",")]
        wanted = tuple(slice(start, stop) for (start, stop), _ in zip(ends, shape, strict=True))
    except ValueError:
        raise ValueError(f"--crop takes z0:z1,y0:y1,x0:x1 in voxels, got {text!r}.") from None
    try:
        box = box_in(wanted, shape)
    except ValueError:
        raise ValueError(f"--crop {text} is empty in a stack of {shape} voxels (Z, Y, X).") from None
    if any(stop is not None and stop > size for (_, stop), size in zip(ends, shape, strict=True)):
        warnings.warn(f"--crop {text} ends beyond the stack of {shape} voxels (Z, Y, X): cut there.", stacklevel=2)
    return box


def root_of(text: str | None, box, spacing_um) -> tuple[float, ...] | None:
    """X,Y,Z in voxels from 0, or a .marker file, which counts from 1 -> (z, y, x) in the box, in the tree's unit."""
    if text is None:
        return None
    try:
        if text.lower().endswith(".marker"):
            lines = [line for line in Path(text).read_text("utf-8-sig").splitlines() if line.strip() and line[0] != "#"]
            x, y, z = (float(part) - 1 for part in lines[0].split(",")[:3])
        else:
            x, y, z = (float(part) for part in text.split(","))
    except (ValueError, IndexError):
        raise ValueError(f"--root takes X,Y,Z in voxels or a .marker file, got {text!r}.") from None
    place = (z, y, x)
    if not all(axis.start - 0.5 <= value <= axis.stop - 0.5 for value, axis in zip(place, box, strict=True)):
        spans = ", ".join(f"{name} {axis.start} to {axis.stop - 1}" for name, axis in zip("zyx", box, strict=True))
        raise ValueError(f"--root {text} lies outside the stack or its crop: {spans}.")
    size = spacing_um or (1.0, 1.0, 1.0)
    return tuple((value - axis.start) * step for value, axis, step in zip(place, box, size, strict=True))


def flip_of(text: str) -> tuple[int, float]:
    axis, _, last = text.partition(":")
    if axis not in ("x", "y", "z") or not last:
        raise ValueError(f"--flip takes AXIS:LAST such as y:511, got {text!r}.")
    return "zyx".index(axis), number(last, "--flip AXIS:LAST")


def write_box_of(text: str | None) -> tuple[int, int, int] | None:
    """Z,Y,X in whole chunks of a store."""
    size = triple(text, "--box")
    if size is not None and any(value % 64 for value in size):
        raise ValueError(f"--box takes multiples of 64 voxels Z,Y,X, got {text!r}.")
    return None if size is None else tuple(int(value) for value in size)


def launched(environment) -> dict[str, int]:
    """Which of how many processes this is, as torchrun, Accelerate or srun say it; alone where nobody does.

    Of SLURM's numbers those of the step: a batch script without srun is one process, however many tasks it has.
    """
    names = (("rank", "RANK", "SLURM_PROCID"), ("ranks", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    names += (("local_rank", "LOCAL_RANK", "SLURM_LOCALID"),)
    alone = {"rank": 0, "ranks": 1, "local_rank": 0}
    return {key: int(environment.get(own) or environment.get(slurm) or alone[key]) for key, own, slurm in names}
