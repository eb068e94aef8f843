"""What a network is trained on: pairs of stack and gold, made ready, and simulated neurons beside them."""

import math
import warnings
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..annotations import annotation
from ..annotations.file_facts import glance, size, stamp
from ..annotations.gold import align_gold, check_place, untraced_structure
from ..annotations.pairs import find_pairs, split_name, splits_of
from ..model.configuration_vit3d import ViT3DConfig
from ..model.image_processing_vit3d import ViT3DImageProcessor
from ..model.intensity_vit3d import measure
from ..regridding import as_trained
from ..simulate import random_neuron
from ..swc import review_of
from ..targets import radii_fit, training_labels
from ..tree import NeuronTree
from ..volume import Volume
from .patches import CropDataset, TrainingVolume, prepared
from .training_config import TrainingConfig

MIN_RADIUS_VOX = 1.5  # thinner than that a neurite has no inside for a network that paints patches
THICKEST_VOX = 8.0  # radius to which a simulated neurite is labelled: its radii are true, unlike many golds'
_SIMULATED_SEEDS = 10_000  # neurons of one training seed; nobody trains on the seeds below the first of them
_SIMULATION = 4  # goes up when neurons are simulated or cut otherwise: what a store holds is then old
_LABELLING = 2  # the same, when golds are
_LARGEST_SIMULATED = (128, 384, 384)  # voxels (z, y, x) kept of a simulated neuron: on finer ones all would fill a disk
_LARGEST_REFINED = 1 << 27  # voxels of a real stack on finer ones: what comes of it would fill memory


def chosen_neurons(config: TrainingConfig) -> tuple[list[dict], TrainingConfig]:
    """Rows of the neurons that take part, as `find_pairs` gives them, and the configuration with `validate` as names.

    Stacks without a gold are named in a warning. FileNotFoundError, ValueError: as `find_pairs` and
    `read_split_file`; `validate` names what the folder does not hold, or what no tree can be scored against.
    """
    rows = find_pairs(config.data, gold=config.gold, spacing_table=config.spacing_table) if config.data else []
    rows = [{**row, "channel": config.channel} for row in rows]
    splits = splits_of(rows, config.split_file)
    config = replace(config, validate=tuple(name if name in splits else split_name(name) for name in config.validate))
    named = set(config.validate) - splits.keys()
    known = {"train", "test", *splits.values()}
    if named - known:
        where = config.data or "an empty --data"
        raise ValueError(f"--validate names {sorted(named - known)}, which {where} does not hold.")
    treeless = sorted(row["name"] for row in rows if row["name"] in config.validate and not row["swc"])
    if treeless:
        raise ValueError(f"--validate names {treeless}, which have no SWC to score a tree against.")
    asked = {row["name"] for row in rows if row["swc"] and splits[row["name"]] in named} | set(config.validate) - named
    for split in sorted(named - {splits[name] for name in asked}):
        raise ValueError(f"--validate {split}: no neuron with an SWC is in that split; name neurons, or --split-file.")
    if named or config.split_file:
        rows = [row for row in rows if row["name"] in asked or splits[row["name"]] == "train"]
    if traced := [Path(row["swc"]).name for row in rows if row["swc"] and review_of(Path(row["swc"])).is_file()]:
        told = f"Taken for golds, though lists of places to review lie beside them: {', '.join(traced)}; proofread?"
        warnings.warn(told, stacklevel=2)
    seen = {row["image"] for row in rows if row["name"] in asked}
    beside = sorted(row["name"] for row in rows if row["image"] in seen and row["name"] not in asked)
    if beside:
        told = f"Not trained on, for a neuron of the same stack validates: {', '.join(beside)}."
        warnings.warn(told, stacklevel=2)
        rows = [row for row in rows if row["name"] not in beside]
    if config.data and all(row["name"] in asked for row in rows):
        if not config.simulated:
            raise ValueError(f"No neuron of {config.data} is left to train on: all validate, or are in another split.")
        told = f"No neuron of {config.data} is trained on, simulated ones alone: all validate, or are in another split."
        warnings.warn(told, stacklevel=2)
    return rows, replace(config, validate=tuple(row["name"] for row in rows if row["name"] in asked))


def neuron_facts(rows: list[dict]) -> dict[str, list[float]]:
    """Name -> bytes of its files and its voxel size: what tells one data folder from another, wherever it lies."""
    return {row["name"]: [*map(size, _files(row)), *(row["spacing_um"] or ())] for row in rows}


def glances(rows: list[dict]) -> dict[str, list[int]]:
    """Name -> a `glance` at each of its files: what tells them from others of the same sizes."""
    return {row["name"]: list(map(glance, _files(row))) for row in rows}


def _files(row: dict) -> list[str]:
    return [row[key] for key in ("image", "swc", "label") if row.get(key)]


def training_spacing(rows: list[dict], config: TrainingConfig) -> tuple[float, ...] | None:
    """Voxel size (z, y, x) in um of the stacks that are trained on: along each axis their median, None where none
    states one."""
    trained = [row for row in rows if row["name"] not in config.validate]
    stated = [config.spacing_um or _stated_spacing(row) for row in trained]
    stated = [spacing for spacing in stated if spacing]
    return tuple(np.median(stated, axis=0).tolist()) if stated else None


def _stated_spacing(row: dict) -> tuple[float, ...] | None:
    try:
        return annotation.spacing_of(row)
    except (ValueError, OSError):  # it is left out, and said why, when it is read
        return None


def tell_spacing(network: ViT3DConfig, rows: list[dict], config: TrainingConfig) -> None:
    """A network that is trained on real stacks knows their spacing; on simulated ones alone, what it knew."""
    if {row["name"] for row in rows} - set(config.validate):
        network.training_spacing_um = training_spacing(rows, config)


def training_volumes(
    config: TrainingConfig,
    rows: list[dict],
    network: ViT3DConfig,
    store: Path,
    processor: ViT3DImageProcessor | None = None,
) -> tuple[list[TrainingVolume], list[float]]:
    """Real and simulated volumes, memory-mapped from `store`, and the weight with which each is drawn.

    They lie on the grid on which `reconstruct` would show them to the network. One volume at a time is in
    memory, and what `store` already holds is not made again. A pair that cannot be read, or whose gold does not lie on
    its image, is left out, with a warning that says why; so are shifts reported. ValueError: no pair is left, or
    nothing at all.
    """
    volumes, left_out = [], []
    processor = processor or ViT3DImageProcessor.from_config(network)
    seen = f"seen at {network.training_spacing_um}"
    for row in tqdm([row for row in rows if row["name"] not in config.validate], desc="read golds", disable=None):
        others = [other for other in rows if other["image"] == row["image"] and other["swc"] and other != row]
        key = f"{_key([row, *others], config)}, {processor.polarity}, {seen}"
        try:
            ready = partial(_made_ready, row, others, config, network, processor)
            volumes.append(prepared(store, key, ready))
        except (ValueError, OSError, MemoryError) as error:
            left_out.append(annotation.said_of(row, error))
    if left_out and not volumes:
        raise ValueError(f"No pair of {config.data} can be trained on: {' '.join(left_out)}")
    if left_out:
        warnings.warn(f"Left out of training: {' '.join(left_out)}", stacklevel=2)
    warn_of_shifts({volume.name: volume.shift_vox for volume in volumes})
    share = config.simulated_share * (config.simulated > 0) if volumes else 1.0
    weights = [(1 - share) / max(1, len(volumes))] * len(volumes)
    for index in tqdm(range(config.simulated), desc="simulate", disable=None):
        seed = _SIMULATED_SEEDS * (config.seed + 1) + index
        key = f"simulated {seed} ({_SIMULATION}, {_LABELLING}), {seen}"
        volumes.append(prepared(store, key, partial(_simulated, seed, network, processor)))
        weights.append(share / config.simulated)
    if not volumes:
        raise ValueError("Nothing to train on: give --data a folder of pairs, or --simulated a number of neurons.")
    return volumes, weights


def crop_dataset(data: str | Path, network: ViT3DConfig, length: int, store: str | Path, **options) -> CropDataset:
    """`length` crops of a folder's neurons as `train` cuts them, for other people's loops: transformers' Trainer, PEFT.

    network: the config of the network that learns from them; it is told the spacing of what it learns on. store: folder
    in which the volumes lie while crops are cut. options: of `TrainingConfig`: seed, split_file, validate (left out
    here), align, simulated (0 by default), ...; with a `consistency_weight` crops are `paired`.
    """
    asked = TrainingConfig(str(data), "", "", **{"simulated": 0, **options})
    rows, asked = chosen_neurons(asked)
    tell_spacing(network, rows, asked)
    volumes, weights = training_volumes(asked, rows, network, Path(store))
    processor, paired = ViT3DImageProcessor.from_config(network), asked.consistency_weight > 0
    return CropDataset(volumes, weights, processor, length, asked.seed, network, paired=paired)


def warn_of_shifts(shifts: dict[str, tuple[float, ...]]) -> None:
    """Say which golds are moved onto their images, by how many voxels (z, y, x)."""
    moved = [f"{name} ({', '.join(f'{step:g}' for step in shift)})" for name, shift in shifts.items() if any(shift)]
    if moved:
        warnings.warn(f"Moved onto their images, by voxels (z, y, x): {', '.join(moved)}.", stacklevel=3)


@dataclass(frozen=True)
class Pair:
    """A stack and its gold in voxels, moved onto it by `shift_vox` (z, y, x); and whether neurites are bright."""

    volume: Volume
    gold: NeuronTree
    polarity: str
    shift_vox: tuple[float, float, float]


def read_pair(row: dict, spacing_um=None, *, align: bool = True, keep_misplaced: bool = False) -> Pair:
    """The pair of a row that has an SWC.

    ValueError: as `check_place`, but not with `keep_misplaced`.
    """
    volume = read_stack(row, spacing_um)
    polarity = measure(volume.voxels).polarity
    gold = annotation.read_gold(row, volume, align=False)
    if not keep_misplaced:
        check_place(gold, volume, row["name"], polarity=polarity)
    gold, shift_vox = align_gold(gold, volume, polarity=polarity) if align else (gold, np.zeros(3))
    return Pair(volume, gold, polarity, tuple(shift_vox.tolist()))


def read_stack(row: dict, spacing_um=None) -> Volume:
    """The stack of a row in memory; `spacing_um` overrides the row's, and that the file's own."""
    volume = annotation.read_stack({**row, "spacing_um": spacing_um or row.get("spacing_um")})
    return replace(volume, voxels=np.asarray(volume.voxels))


def _key(rows: list[dict], config: TrainingConfig) -> str:
    """All that the volume of the first row depends on, the others being of the same stack: files as they are now, the
    spacing, and how golds are taken."""
    facts = [fact for row in rows for file in _files(row) for fact in stamp(file)]
    row, how = rows[0], (config.align, config.keep_misplaced, _LABELLING)
    return repr((row["name"], facts, row.get("channel"), config.spacing_um or row.get("spacing_um"), *how))


def _simulated(seed: int, network: ViT3DConfig, processor: ViT3DImageProcessor) -> TrainingVolume:
    """Its polarity is its own, whatever the processor takes stacks for."""
    volume, tree = random_neuron(seed=seed)
    processor = copy(processor)
    processor.polarity = "auto"
    seen = as_trained(volume, network)
    tree = tree.to("voxel", seen.spacing_um)
    point = tree.points[np.random.default_rng([seed, 2]).integers(len(tree))]
    return _part(f"simulated {seed}", seen, tree, _box_around(point, seen.shape), processor)


def _box_around(point: np.ndarray, shape: tuple[int, int, int]) -> tuple[slice, slice, slice]:
    """A box of `_LARGEST_SIMULATED` voxels, or of as many as there are, with the point as near its middle as may be."""
    size = np.minimum(shape, _LARGEST_SIMULATED)
    start = np.clip(np.rint(point - size / 2), 0, np.subtract(shape, size)).astype(int)
    return tuple(map(slice, start, start + size))


def _part(name: str, volume: Volume, tree: NeuronTree, box, processor: ViT3DImageProcessor) -> TrainingVolume:
    """A box of a volume with the tree, in its voxels, painted into it; grey levels are the whole volume's."""
    voxels, statistics = np.asarray(volume.voxels[box]), processor.measure(volume.voxels)
    tree = tree.shifted([-part.start for part in box])
    radii = {"min_radius_vox": MIN_RADIUS_VOX, "max_radius_vox": THICKEST_VOX}
    labels = training_labels(tree, voxels.shape, **radii)
    return TrainingVolume.prepare(name, voxels, labels, processor, statistics)


def _made_ready(
    row: dict, others: list[dict], config: TrainingConfig, network: ViT3DConfig, processor: ViT3DImageProcessor
) -> TrainingVolume:
    """The volume of a row; what the golds of `others` cover, neurons of the same stack, is theirs to teach."""
    if not row["swc"]:
        volume = read_stack(row, config.spacing_um)
        labels = annotation.read_labels(row, volume.shape)
        seen = _refined(volume, network, row["name"])
        return TrainingVolume.prepare(row["name"], np.asarray(seen.voxels), _labels_on(seen, volume, labels), processor)
    pair = read_pair(row, config.spacing_um, align=config.align, keep_misplaced=config.keep_misplaced)
    seen = _refined(pair.volume, network, row["name"])
    seen = replace(seen, voxels=np.asarray(seen.voxels))
    gold = _tree_on(seen, pair.volume, pair.gold)
    if not radii_fit(gold, seen.shape):
        warnings.warn(f"{row['name']}: by its radii the gold fills its stack; they are not used.", stacklevel=2)
    unknown = untraced_structure(gold, seen, polarity=pair.polarity)
    for other in others:
        with suppress(ValueError, OSError):  # which its own row says
            tree = annotation.read_gold(other, pair.volume, polarity=pair.polarity, align=config.align)
            tree = _tree_on(seen, pair.volume, tree)
            unknown |= training_labels(tree, seen.shape, min_radius_vox=MIN_RADIUS_VOX) != 0
    labels = training_labels(gold, seen.shape, min_radius_vox=MIN_RADIUS_VOX, untraced=unknown)
    return replace(TrainingVolume.prepare(row["name"], seen.voxels, labels, processor), shift_vox=pair.shift_vox)


def _refined(volume: Volume, network: ViT3DConfig, name: str) -> Volume:
    """`as_trained`, or with a warning the stack itself, where that would be too large."""
    seen = as_trained(volume, network)
    if seen is volume or math.prod(seen.shape) <= _LARGEST_REFINED:
        return seen
    warnings.warn(f"{name} is learned on its own voxels: on finer ones it would have {seen.shape}.", stacklevel=2)
    return volume


def _tree_on(seen: Volume, volume: Volume, tree: NeuronTree) -> NeuronTree:
    """A tree in voxels of `volume`, in those of `seen`: the same stack, `as_trained`."""
    if seen.spacing_um == volume.spacing_um:
        return tree
    return tree.scaled(np.divide(volume.spacing_um, seen.spacing_um))


def _labels_on(seen: Volume, volume: Volume, labels: np.ndarray) -> np.ndarray:
    """The label of the voxel of `volume` that is nearest to each voxel of `seen`."""
    if seen.spacing_um == volume.spacing_um:
        return labels
    steps = np.divide(seen.spacing_um, volume.spacing_um)
    places = [np.rint(np.arange(n) * step).astype(int) for n, step in zip(seen.shape, steps, strict=True)]
    return labels[np.ix_(*(np.minimum(p, n - 1) for p, n in zip(places, labels.shape, strict=True)))]
