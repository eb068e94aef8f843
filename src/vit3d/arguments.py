"""What people type -> what the verbs take. Every ValueError names the flag and what came."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

from .tree import NeuronTree, read_swc
from .volume import Volume, read_volume

Box = tuple[slice, slice, slice]


def read_stack(path: Path, spacing: str | None, channel: int | None) -> Volume:
    """A stack, with one warning when nobody has stated its voxel size."""
    volume = read_volume(path, spacing_um=triple(spacing, "--spacing"), channel=channel)
    if volume.spacing_um is None:
        warnings.warn(
            f"{path.name} states no voxel size: everything is in voxels; --spacing Z,Y,X gives um.",
            stacklevel=2,
        )
    return volume


def read_mask(path: Path | None) -> np.ndarray | None:
    return None if path is None else read_volume(path).voxels


def read_trees(predicted: Path, gold: Path, predicted_unit, gold_unit, spacing: str | None) -> tuple[NeuronTree, ...]:
    """Both trees; a voxel size given on the command line goes to those that do not know theirs."""
    trees = read_swc(predicted, unit=predicted_unit), read_swc(gold, unit=gold_unit)
    size = triple(spacing, "--spacing")
    return tuple(replace(tree, spacing_um=tree.spacing_um or size) for tree in trees)


def pairs(predicted: Path, gold: Path) -> list[tuple[str, Path, Path]]:
    """(name, predicted, gold); folders are paired by file name without suffix."""
    if not predicted.is_dir():
        return [(predicted.stem, predicted, gold)]
    if not gold.is_dir():
        raise ValueError(f"{predicted} is a folder, {gold} is none; folders are scored against folders.")
    golds, swcs = ({p.stem: p for p in sorted(folder.glob("*.swc"))} for folder in (gold, predicted))
    found = [(name, path, golds[name]) for name, path in swcs.items() if name in golds]
    if not found:
        raise FileNotFoundError(f"No SWC in {predicted} has the name of one in {gold}.")
    return found


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


def number(text: str):
    """A number, or "auto"."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"A number or 'auto' is expected, got {text!r}.") from None


def box_of(text: str | None, shape: tuple[int, ...]) -> Box:
    """`z0:z1,y0:y1,x0:x1` -> slices inside `shape`; an empty end means the volume's."""
    if text is None:
        return tuple(slice(0, size) for size in shape)
    try:
        ends = [[int(end) if end else None for end in part.split(":")] for part in text.split(",")]
        box = tuple(
            slice(*slice(start, stop).indices(size)[:2]) for (start, stop), size in zip(ends, shape, strict=True)
        )
    except ValueError:
        raise ValueError(f"--crop takes z0:z1,y0:y1,x0:x1 in voxels, got {text!r}.") from None
    if any(axis.stop <= axis.start for axis in box):
        raise ValueError(f"--crop {text} is empty in a stack of {shape} voxels (Z, Y, X).")
    return box


def root_of(text: str | None, box, spacing_um) -> tuple[float, ...] | None:
    """X,Y,Z in voxels from 0, or a .marker file, which counts from 1 -> (z, y, x) in the box, in the tree's unit."""
    if text is None:
        return None
    try:
        if text.endswith(".marker"):
            lines = [line for line in Path(text).read_text().splitlines() if line.strip() and line[0] != "#"]
            x, y, z = (float(part) - 1 for part in lines[0].split(",")[:3])
        else:
            x, y, z = (float(part) for part in text.split(","))
    except (ValueError, IndexError):
        raise ValueError(f"--root takes X,Y,Z in voxels or a .marker file, got {text!r}.") from None
    size = spacing_um or (1.0, 1.0, 1.0)
    return tuple((value - axis.start) * step for value, axis, step in zip((z, y, x), box, size, strict=True))


def flip_of(text: str) -> tuple[int, float]:
    axis, _, last = text.partition(":")
    if axis not in ("x", "y", "z") or not last.replace(".", "", 1).isdigit():
        raise ValueError(f"--flip takes AXIS:LAST such as y:511, got {text!r}.")
    return "zyx".index(axis), float(last)
