"""One neuron with its annotation: from a row of `find_pairs` to a stack and what was drawn on it."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..model.intensity_vit3d import measure
from ..targets import labels_from_codes, labels_from_mask
from ..tree import NeuronTree, read_swc
from ..volume import Volume, open_volume, read_volume
from .file_facts import digest
from .gold import align_gold, check_bounds, check_place
from .pairs import is_mask


def examine(row: dict, *, align: bool = True, keep_misplaced: bool = False) -> dict:
    """The row with what its files say: spacing_um, shape, unit, polarity, shift_vox and the files' SHA-256.

    With `align`, `shift_vox` (z, y, x) is what moves the gold onto its image. The stack is decoded only where the
    gold is aligned or its place checked, and not kept. ValueError, FileNotFoundError, one sentence with the
    name: a file that cannot be read, an SWC outside its image's bounds, or one that does not lie on its image,
    with the likely cause; the last two not with `keep_misplaced`.
    """
    try:
        return _examined(row, align, keep_misplaced)
    except (ValueError, OSError) as error:
        if row["name"] in str(error):
            raise
        raise type(error)(said_of(row, error)) from None


def said_of(row: dict, error: Exception) -> str:
    """What the error says, with the row's name."""
    said = f"{error.filename}: {error.strerror}." if isinstance(error, OSError) and error.filename else str(error)
    return said if row["name"] in said else f"{row['name']}: {said}"


def _examined(row: dict, align: bool, keep_misplaced: bool) -> dict:
    shape, spacing_um = _header(row)
    sums = {"image_sha256": digest(row["image"]), "gold_sha256": digest(row["swc"] or row["label"])}
    facts = {**row, **sums, "spacing_um": spacing_um, "shape": shape, "shift_vox": (0.0, 0.0, 0.0)}
    if row["label"]:
        read_labels(row, shape)
        return {**facts, "unit": "voxel", "polarity": measure(read_stack(row).voxels).polarity}
    facts |= {"unit": read_swc(row["swc"]).unit or "voxel", "polarity": ""}
    tree = _in_voxels(row, spacing_um)
    if not keep_misplaced:
        check_bounds(tree, shape, row["name"])
    elif not align:
        return facts
    volume = read_stack(row)
    polarity = facts["polarity"] = measure(volume.voxels).polarity
    if align:
        facts["shift_vox"] = tuple(align_gold(tree, volume, polarity=polarity)[1].tolist())
    if not keep_misplaced:
        check_place(tree, volume, row["name"], polarity=polarity)
    return facts


def spacing_of(row: dict) -> tuple[float, ...] | None:
    """The voxel size (z, y, x) in um that a row or else its stack states."""
    silent = Path(row["image"]).suffix.lower() in (".v3draw", ".v3dpbd")  # and decoded as a whole
    return row.get("spacing_um") or (None if silent else _header(row)[1])


def _header(row: dict) -> tuple[tuple[int, int, int], tuple[float, ...] | None]:
    """Shape and spacing of a row's stack, which stays closed."""
    opened = read_stack(row, lazy=True)
    getattr(opened.voxels, "close", lambda: None)()
    return opened.shape, opened.spacing_um


def read_stack(row: dict, *, lazy: bool = False) -> Volume:
    """The stack of a row, in the row's channel and with its spacing where it has them; `lazy` leaves voxels on disk."""
    spacing_um = row.get("spacing_um")
    read = open_volume if lazy else read_volume
    return read(row["image"], spacing_um=tuple(spacing_um) if spacing_um else None, channel=row.get("channel"))


def read_gold(
    row: dict, volume: Volume | None = None, *, polarity: str | None = None, align: bool = True
) -> NeuronTree:
    """The gold of a row in voxels, on its image: moved by the row's `shift_vox`, else by what `volume` shows.

    ValueError: a row that was not examined, and no volume to align with.
    """
    spacing_um = row.get("spacing_um") or (volume.spacing_um if volume else None)
    tree = _in_voxels(row, tuple(spacing_um) if spacing_um else None)
    if not align:
        return tree
    if row.get("shift_vox") is not None:
        return tree.shifted(row["shift_vox"])
    if volume is None:
        raise ValueError(f"{row['name']} was not examined and is aligned with its volume; give it, or align=False.")
    return align_gold(tree, volume, polarity=polarity or measure(volume.voxels).polarity)[0]


def read_labels(row: dict, shape: tuple[int, int, int]) -> np.ndarray:
    """(Z, Y, X) int8 of a row with a label volume: 1 neurite, 0 background, -100 not annotated.

    ValueError: not the stack's shape, a code without a meaning, no neurite or no background.
    """
    codes = np.asarray(read_volume(row["label"]).voxels)
    if codes.shape != tuple(shape):
        raise ValueError(f"{row['label']} has the shape {codes.shape}, but its stack has {tuple(shape)}.")
    try:
        labels = labels_from_mask(codes) if is_mask(row["label"]) else labels_from_codes(codes)
    except ValueError as error:
        raise ValueError(f"{row['label']}: {error}") from None
    if not (labels == 1).any():
        named = "" if is_mask(row["label"]) else ", which is code 2; a mask of 0 and another value is named NAME_mask"
        raise ValueError(f"{row['label']} holds no neurite{named}.")
    if not (labels == 0).any():  # all that could be learned is that everything is neurite
        raise ValueError(f"{row['label']} holds no background, which is code 1; a whole mask is named NAME_mask.")
    return labels


def _in_voxels(row: dict, spacing_um) -> NeuronTree:
    """An SWC that says no unit is in voxels, as BigNeuron's and DIADEM's are."""
    tree = read_swc(row["swc"])
    tree = replace(tree, unit="voxel") if tree.unit is None else tree
    return tree.to("voxel", tree.spacing_um or spacing_um)
