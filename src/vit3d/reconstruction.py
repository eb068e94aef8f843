"""The main job, composed of the verbs: stack -> probability -> tree, and the files a person wants of it."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from .tracing import Review, trace_with_review
from .tree import NeuronTree, write_swc
from .volume import SUFFIXES, Volume, write_volume

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Reconstruction:
    """What came of one stack or of a box of it. The tree is in full-stack coordinates, volumes are the box."""

    volume: Volume
    probability: Volume
    tree: NeuronTree
    reviews: list[Review]
    polarity: str
    box: Box

    def write(self, out: Path, name: str, swc_unit: str | None = None) -> None:
        """`NAME.swc`, `NAME_probability.tif`, `NAME_review.csv` and `NAME.png` into the folder `out`: all or none.

        `swc_unit`, "um" or "voxel", is the SWC's; default is the tree's own.
        """
        from .plot import plot_reconstruction

        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{name}.", suffix=".partial", dir=out) as folder:
            whole = Path(folder)
            write_swc(self.tree, whole / f"{name}.swc", unit=swc_unit)
            write_review(self.reviews, whole / f"{name}_review.csv", self.tree.unit)
            write_volume(self.probability, whole / f"{name}_probability.tif")
            here, picture = place(self.tree, self.box, -1), whole / f"{name}.png"
            plot_reconstruction(self.volume, here, picture, probability=self.probability, polarity=self.polarity)
            for path in sorted(whole.iterdir()):
                os.replace(path, out / path.name)


def reconstruct(
    model,
    volume: Volume,
    *,
    processor=None,
    box: Box | None = None,
    mask: np.ndarray | None = None,
    select: bool = True,
    **tracing,
) -> Reconstruction:
    """Segment and trace a stack, or the part of it inside `box`; `tracing` goes to `trace`.

    `mask` (Z, Y, X), as large as the stack: nothing is traced where it is 0. Intensities are measured on the
    whole stack, so a box is segmented as it would be in the full run.
    """
    from .model.image_processing_vit3d import ViT3DImageProcessor
    from .segmentation import segment  # torch is loaded only here: tracing a mask needs none

    if mask is not None:
        _check_mask(mask, volume)  # before the long part
    processor = processor or ViT3DImageProcessor.from_config(model.config)
    statistics = processor.measure(volume.voxels)
    box = box or tuple(slice(0, size) for size in volume.shape)
    part = volume.crop(box)
    probability = segment(model, part, processor=processor, statistics=statistics, select=select)
    if mask is not None:
        probability = masked(probability, mask[box])
    tree, reviews = trace_with_review(probability, **tracing)
    return Reconstruction(
        part, probability, place(tree, box), placed_reviews(reviews, tree, box), statistics.polarity, box
    )


def masked(volume: Volume, mask: np.ndarray) -> Volume:
    """The volume with zeros where `mask`, of the same shape, is 0."""
    _check_mask(mask, volume)
    return Volume(np.where(mask != 0, volume.voxels, volume.voxels.dtype.type(0)), volume.spacing_um)


def inverted(volume: Volume) -> Volume:
    """Dark neurites on a bright ground made bright ones on a dark ground; the brightest voxel becomes 0."""
    voxels = volume.voxels.astype(np.int64) if volume.voxels.dtype.kind == "i" else volume.voxels
    return Volume(~voxels if voxels.dtype == bool else voxels.max() - voxels, volume.spacing_um)


def place(tree: NeuronTree, box: Box, direction: int = 1) -> NeuronTree:
    """A tree of a box in the coordinates of the full stack (or back, with `direction=-1`)."""
    return tree.shifted(direction * _offset(tree, box))


def placed_reviews(reviews: list[Review], tree: NeuronTree, box: Box) -> list[Review]:
    """The same for the places to review."""
    offset = _offset(tree, box)
    return [Review(r.kind, tuple(np.add(r.point, offset).tolist()), r.length, r.confidence) for r in reviews]


def write_review(reviews: list[Review], path: Path, unit: str | None) -> None:
    """One row per place to look at, least confident first: kind, x, y, z, length (in the tree's unit), confidence."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", *(f"{axis}_{unit}" for axis in "xyz"), f"length_{unit}", "confidence"])
        for review in reviews:
            z, y, x = review.point
            writer.writerow([review.kind, *(f"{v:.2f}" for v in (x, y, z, review.length)), f"{review.confidence:.3f}"])
    os.replace(temporary, path)


def find_stacks(path: Path) -> dict[str, Path]:
    """The stack itself, or the stacks of a folder, by the name of what comes of them.

    Hidden files and the tool's own probabilities are passed over. Stacks that differ only in their suffix keep
    it in the name. FileNotFoundError: nothing there, or no stack in the folder.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if not path.is_dir():
        return {path.stem: path}
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    stacks = [p for p in files if not p.stem.endswith("_probability")]
    if not stacks:
        raise FileNotFoundError(f"{path} holds no stack; {', '.join(SUFFIXES)} are read.")
    stems = [p.stem for p in stacks]
    return {p.stem if stems.count(p.stem) == 1 else p.name: p for p in stacks}


def _check_mask(mask: np.ndarray, volume: Volume) -> None:
    if mask.shape != volume.shape:
        raise ValueError(f"The mask has shape {mask.shape}, the stack {volume.shape}; they must be equal (Z, Y, X).")


def _offset(tree: NeuronTree, box: Box) -> np.ndarray:
    start = np.array([axis.start or 0 for axis in box], dtype=float)
    return start * np.array(tree.spacing_um) if tree.unit == "um" else start
