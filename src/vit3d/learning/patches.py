"""Crops for training: where to cut, how to vary, which tokens to keep."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from ..model.image_processing_vit3d import ViT3DImageProcessor
from ..model.intensity_vit3d import FAINT_SHARE, IntensityStatistics
from ..targets import IGNORED
from .augmentation import DEFAULT, Augmentation, resample, vary_geometry, vary_intensity, vary_orientation

NEURITE_SHARE = 0.8  # of the crops are centred on a neurite, the rest on anything that looks like one
MAX_TOKENS = 256  # kept patches per window: a bound on the cost of a step, which pads all windows to the longest
_JITTER = 0.25  # a crop's centre lies off its voxel by up to this share of the window


@dataclass(frozen=True)
class TrainingVolume:
    """A stack with everything a crop needs, each (Z, Y, X): voxels, labels, and where neurites may be."""

    name: str
    voxels: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    statistics: IntensityStatistics
    neurite: np.ndarray  # (N,) flat indices of neurite voxels
    candidates: np.ndarray  # (M,) flat indices of a sample of `mask` where a label is known
    shift_vox: tuple[float, float, float] = (0.0, 0.0, 0.0)  # by which the gold was moved before it was painted
    folder: Path | None = None  # where its arrays are memory-mapped from

    @classmethod
    def prepare(cls, name: str, voxels: np.ndarray, labels: np.ndarray, processor, statistics=None):
        """Measure the volume once and remember where crops may be centred: where a label is known.

        `statistics` are those of the whole, where `voxels` are a part of it.
        """
        statistics = statistics or processor.measure(voxels)
        mask = processor.foreground(voxels, statistics)
        neurite = np.flatnonzero(labels == 1).astype(np.int64)
        if not len(neurite):
            raise ValueError(f"{name}: the gold paints no voxel of its stack {voxels.shape}; is it in voxels?")
        candidates = np.flatnonzero(mask & (labels != IGNORED))
        step = max(1, len(candidates) // 200_000)
        return cls(name, voxels, labels, mask, statistics, neurite, candidates[::step])

    def stored(self, folder: str | Path) -> "TrainingVolume":
        """The same volume as memory maps of files in `folder`, made for it; it appears there only when whole.

        Processes that open one folder share its pages, and the system drops them when memory runs short.
        """
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            for array in _ARRAYS:
                np.save(partial / f"{array}.npy", getattr(self, array), allow_pickle=False)
            facts = {"name": self.name, "statistics": self.statistics.to_dict(), "shift_vox": self.shift_vox}
            (partial / "facts.json").write_text(json.dumps(facts))
            if not folder.is_dir():
                partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return self.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> "TrainingVolume":
        """What `stored` left in `folder`."""
        folder = Path(folder)
        facts = json.loads((folder / "facts.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        statistics, shift_vox = IntensityStatistics(**facts["statistics"]), tuple(facts["shift_vox"])
        return cls(facts["name"], statistics=statistics, shift_vox=shift_vox, folder=folder, **arrays)

    def __reduce__(self):
        """A worker that is started anew gets the folder's name, not its voxels."""
        if self.folder is not None:
            return TrainingVolume.open, (self.folder,)
        return TrainingVolume, tuple(getattr(self, field.name) for field in fields(self))


_ARRAYS = ("voxels", "labels", "mask", "neurite", "candidates")


def prepared(folder: str | Path, key: str, make: Callable[[], TrainingVolume]) -> TrainingVolume:
    """The volume that `make()` gives, memory-mapped from `folder`; made only if none lies there under `key`.

    `key` says all that the volume depends on: files with their sizes and times, labelling. Thus at most one
    volume at a time is in memory, and the processes of a machine share what lies in one folder.
    """
    place = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:20]
    return TrainingVolume.open(place) if place.is_dir() else make().stored(place)


class CropDataset(torch.utils.data.Dataset):
    """Crop number i is a function of (seed, i) alone: any worker count and any restart gives the same crops.

    Items: `pixel_values` (1, Z, Y, X) float32, `labels` (Z, Y, X) int64 (one slice with `center_slice`),
    `token_mask` (grid) bool. With `paired` a crop is larger than a window, and an item is two windows of it, cut into
    the same patches: each tensor begins with a 2, and `places` (2, 3) says at which patch of the crop they begin. The
    crop is then centred on a neurite, where windows would be; one of the two may hold none.
    """

    def __init__(
        self, volumes, weights, processor, length: int, seed: int, config, *, augmentation=DEFAULT, paired=False
    ):
        self.volumes: list[TrainingVolume] = volumes
        self.processor: ViT3DImageProcessor = processor
        self.length, self.seed, self.config, self.paired = length, seed, config, paired
        self.augmentation: Augmentation = augmentation
        self.shares = np.asarray(weights, dtype=float) / np.sum(weights)
        if paired and not self._room.any():
            raise ValueError("No two windows of a crop can be told apart: the network's window is a single patch.")

    def __len__(self) -> int:
        return self.length

    def name_of(self, index: int) -> str:
        """The volume that crop `index` is cut from."""
        rng = self._generator(index)
        return self.volumes[rng.choice(len(self.volumes), p=self.shares)].name

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Counted from the end where `index` is negative. IndexError: there are not so many, which ends a `for`."""
        rng = self._generator(index)
        volume = self.volumes[rng.choice(len(self.volumes), p=self.shares)]
        window = tuple(self._crop_size)
        matrix, read = vary_geometry(window, rng, self.augmentation)
        start = self._choose_start(volume, rng) - (np.array(read) - window) // 2
        voxels, labels, mask = (
            _cut(array, start, read, fill)
            for array, fill in ((volume.voxels, None), (volume.labels, IGNORED), (volume.mask, False))
        )
        if matrix is not None:
            voxels = resample(voxels, matrix, window, smooth=True)
            labels, mask = (resample(array, matrix, window, smooth=False) for array in (labels, mask))
        lit = self._lit(voxels, volume.statistics)
        voxels, statistics = vary_intensity(voxels, volume.statistics, rng, self.augmentation)
        mask = mask | (self._lit(voxels, statistics) & ~lit)
        pixel_values = self.processor.pixel_values(voxels, statistics)
        pixel_values, labels, mask = vary_orientation((pixel_values, labels, mask), rng, self.augmentation)
        selected = self.processor.token_mask(mask)
        keep = choose_tokens(selected, rng)
        places = self._two_places(rng) if self.paired else np.zeros((1, 3), dtype=int)
        for place in places:
            leave_out_surplus(keep[self._tokens_at(place)], rng)
        labels = labels.astype(np.int64)
        left_out = np.kron(~keep, np.ones(self.config.patch_size, dtype=bool))
        labels[left_out] = IGNORED  # a patch left out is painted by nobody: nothing to learn there
        windows = [self._window(pixel_values, labels, keep, place) for place in places]
        if not self.paired:
            return windows[0]
        stacked = {name: torch.stack([window[name] for window in windows]) for name in windows[0]}
        return {**stacked, "places": torch.from_numpy(places)}

    def _lit(self, voxels: np.ndarray, statistics) -> np.ndarray:
        """Voxels of the bright patches. Those that a variation makes bright no mask holds, and a network that never saw
        such light would take it for neurites."""
        patch = self.config.patch_size
        blocks = [n for pair in zip(self._crop_size // patch, patch, strict=True) for n in pair]
        mean = voxels.reshape(blocks).mean(axis=(1, 3, 5))
        lit = (mean - statistics.background) * statistics.sign > FAINT_SHARE * statistics.contrast
        return np.kron(lit, np.ones(patch, dtype=bool))

    @property
    def _crop_size(self) -> np.ndarray:
        """Voxels (z, y, x): a window, and with `paired` room for another one beside it."""
        return np.array(self.config.volume_size) + self.paired * self._room * self.config.patch_size

    @property
    def _room(self) -> np.ndarray:
        """Patches (z, y, x) by which two windows may lie apart: at least a layer and half the plane is shared."""
        depth, height, width = self.config.grid_size
        return np.array([depth - 1, height // 2, width // 2])

    def _two_places(self, rng: np.random.Generator) -> np.ndarray:
        """(2, 3): two patches of a crop at which windows can begin, not the same one."""
        choices = np.argwhere(np.ones(self._room + 1, dtype=bool))
        return choices[rng.choice(len(choices), 2, replace=False)]

    def _window(self, pixel_values, labels, keep, place: np.ndarray) -> dict[str, torch.Tensor]:
        """What the network gets of the window that begins at a patch of the crop."""
        start = place * self.config.patch_size
        voxels = tuple(map(slice, start, start + self.config.volume_size))
        labels = labels[voxels]
        if self.config.prediction == "center_slice":
            labels = labels[len(labels) // 2][None]
        return {
            "pixel_values": torch.from_numpy(pixel_values[voxels].copy()[None]),
            "labels": torch.from_numpy(labels.copy()),
            "token_mask": torch.from_numpy(keep[self._tokens_at(place)].copy()),
        }

    def _tokens_at(self, place: np.ndarray) -> tuple[slice, ...]:
        """The patches of the window that begins at a patch of the crop."""
        return tuple(map(slice, place, place + self.config.grid_size))

    def _generator(self, index: int) -> np.random.Generator:
        """All the chance that crop `index` depends on."""
        if not -self.length <= index < self.length:
            raise IndexError(f"There are {self.length} crops, and none has the number {index}.")
        return np.random.default_rng([self.seed, index % self.length])

    def _choose_start(self, volume: TrainingVolume, rng: np.random.Generator) -> np.ndarray:
        wanted = volume.neurite if rng.random() < NEURITE_SHARE or not len(volume.candidates) else volume.candidates
        centre = np.unravel_index(wanted[rng.integers(len(wanted))], volume.voxels.shape)
        window = self._crop_size
        jitter = rng.uniform(-_JITTER, _JITTER, 3) * window
        start = np.round(np.array(centre) + jitter - window / 2).astype(int)
        last = np.array(volume.voxels.shape) - window
        return np.clip(start, np.minimum(0, last), np.maximum(0, last))


def choose_tokens(selected: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The processor's selection with some patches dropped and others added.

    Other stacks select other shares of their patches: a network that always saw the same share would depend on it.
    """
    keep = selected & (rng.random(selected.shape) >= rng.choice([0.0, 0.0, 0.1]))
    keep |= rng.random(selected.shape) < rng.choice([0.0, 0.02, 0.1, 0.3])
    return keep


def leave_out_surplus(keep: np.ndarray, rng: np.random.Generator, most: int = MAX_TOKENS) -> None:
    """Drop some of the patches that a window keeps where they are more than `most`."""
    kept = np.argwhere(keep)
    if len(kept) > most:
        keep[tuple(rng.choice(kept, len(kept) - most, replace=False).T)] = False


def _cut(array: np.ndarray, start, window, fill) -> np.ndarray:
    """A window of `array`; outside it the border is repeated, or `fill` where that is not None."""
    box = tuple(slice(max(s, 0), s + n) for s, n in zip(start, window, strict=True))
    part = np.asarray(array[box])
    pads = [(max(-s, 0), n - max(-s, 0) - p) for s, n, p in zip(start, window, part.shape, strict=True)]
    if not any(map(any, pads)):
        return part
    return np.pad(part, pads, mode="edge") if fill is None else np.pad(part, pads, constant_values=fill)
