"""What a network is trained on: pairs of stack and gold, made ready, and simulated neurons beside them."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import annotation
from .gold import align_gold, check_bounds, lies_on_image, likely_cause, untraced_structure
from .model.image_processing_vit3d import ViT3DImageProcessor
from .model.intensity_vit3d import measure
from .patches import TrainingVolume, prepared
from .simulate import random_neuron
from .targets import training_labels
from .training_config import TrainingConfig
from .tree import NeuronTree
from .volume import Volume

MIN_RADIUS_VOX = 1.5  # thinner than that a neurite has no inside for a network that paints patches
_SIMULATED_SEEDS = 10_000  # neurons of one training seed; nobody trains on the seeds below the first of them


def neuron_facts(rows: list[dict]) -> dict[str, list[int]]:
    """Name -> bytes of its files: what tells one data folder from another, wherever it lies."""
    files = ("image", "swc", "label")
    return {row["name"]: [Path(row[key]).stat().st_size for key in files if row.get(key)] for row in rows}


def refuse_unknown_names(config: TrainingConfig, rows: list[dict]) -> None:
    """ValueError: `validate` names what the folder does not hold, or what no tree can be scored against."""
    known = {row["name"]: row for row in rows}
    unknown = sorted(set(config.validate) - known.keys())
    if unknown:
        raise ValueError(f"--validate names {unknown}, which {config.data or 'an empty --data'} does not hold.")
    treeless = sorted(name for name in config.validate if not known[name]["swc"])
    if treeless:
        raise ValueError(f"--validate names {treeless}, which have no SWC to score a tree against.")


def training_volumes(
    config: TrainingConfig, rows: list[dict], processor: ViT3DImageProcessor, store: Path
) -> tuple[list[TrainingVolume], list[float]]:
    """Real and simulated volumes, memory-mapped from `store`, and the weight with which each is drawn.

    One volume at a time is in memory, and what `store` already holds is not made again. A pair whose gold does
    not lie on its image is left out, with a warning that says why. ValueError: a gold outside its image's bounds,
    or nothing is left to train on.
    """
    volumes, left_out = [], []
    for row in tqdm([row for row in rows if row["name"] not in config.validate], desc="read golds", disable=None):
        try:
            volumes.append(prepared(store, _key(row, config), lambda row=row: _made_ready(row, config, processor)))
        except MisplacedError as error:
            left_out.append(str(error))
    if left_out:
        warnings.warn(f"Left out of training: {' '.join(left_out)}", stacklevel=2)
    share = config.simulated_share if volumes else 1.0
    weights = [(1 - share) / max(1, len(volumes))] * len(volumes)
    for index in tqdm(range(config.simulated), desc="simulate", disable=None):
        seed = _SIMULATED_SEEDS * (config.seed + 1) + index
        volumes.append(prepared(store, f"simulated {seed}", lambda seed=seed: _simulated(seed, processor)))
        weights.append(share / config.simulated)
    if not volumes:
        raise ValueError("Nothing to train on: give --data a folder of pairs, or --simulated a number of neurons.")
    return volumes, weights


class MisplacedError(ValueError):
    """A gold that does not lie on its image."""


def read_pair(row: dict, spacing_um=None) -> tuple[Volume, NeuronTree, str]:
    """Stack, its gold in voxels moved onto it, and the stack's polarity, of a row that has an SWC.

    ValueError: the gold has nodes outside the stack. MisplacedError: it does not lie on what is bright there.
    """
    volume = _read_stack(row, spacing_um)
    polarity = measure(volume.voxels).polarity
    gold = annotation.read_gold(row, volume, align=False)
    check_bounds(gold, volume.shape, row["name"])
    if not lies_on_image(gold, volume, polarity=polarity):
        raise MisplacedError(f"{row['name']}: {likely_cause(gold, volume, polarity=polarity)}")
    return volume, align_gold(gold, volume, polarity=polarity)[0], polarity


def read_gold(path: str | Path, volume: Volume, processor: ViT3DImageProcessor) -> tuple[NeuronTree, str]:
    """The gold in voxels, aligned to its stack, and the stack's polarity. An SWC that says no unit is in voxels."""
    polarity = processor.measure(volume.voxels).polarity
    row = {"name": Path(path).stem, "swc": str(path)}
    return annotation.read_gold(row, volume, polarity=polarity), polarity


def _read_stack(row: dict, spacing_um) -> Volume:
    volume = annotation.read_stack({**row, "spacing_um": spacing_um or row.get("spacing_um")})
    return replace(volume, voxels=np.asarray(volume.voxels))


def _key(row: dict, config: TrainingConfig) -> str:
    """All that a row's volume depends on: its files as they are now, and the spacing."""
    files = [Path(row[key]).resolve() for key in ("image", "swc", "label") if row[key]]
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return repr((row["name"], facts, config.spacing_um or row.get("spacing_um")))


def _simulated(seed: int, processor: ViT3DImageProcessor) -> TrainingVolume:
    volume, tree = random_neuron(seed=seed)
    labels = training_labels(tree, volume.shape, min_radius_vox=MIN_RADIUS_VOX, ignore_vox=0.0)
    return TrainingVolume.prepare(f"simulated {seed}", volume.voxels, labels, processor)


def _made_ready(row: dict, config: TrainingConfig, processor: ViT3DImageProcessor) -> TrainingVolume:
    if row["swc"]:
        volume, gold, polarity = read_pair(row, config.spacing_um)
        untraced = untraced_structure(volume, gold, polarity=polarity)
        options = {"min_radius_vox": MIN_RADIUS_VOX, "ignore_vox": 0.0, "untraced": untraced}
        labels: np.ndarray = training_labels(gold, volume.shape, **options)
    else:
        volume = _read_stack(row, config.spacing_um)
        labels = annotation.read_labels(row, volume.shape)
    return TrainingVolume.prepare(row["name"], volume.voxels, labels, processor)
