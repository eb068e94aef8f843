"""Crops for training: where to cut, how to vary, which tokens to keep."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from .model.image_processing_vit3d import ViT3DImageProcessor
from .model.intensity_vit3d import IntensityStatistics
from .targets import IGNORED

NEURITE_SHARE = 0.8  # of the crops are centred on a neurite, the rest on anything that looks like one
MAX_TOKENS = 192  # kept patches per crop: a bound on the cost of a step
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
    candidates: np.ndarray  # (M,) flat indices of a sample of `mask`

    @classmethod
    def prepare(cls, name: str, voxels: np.ndarray, labels: np.ndarray, processor: ViT3DImageProcessor):
        """Measure the volume once and remember where crops may be centred."""
        statistics = processor.measure(voxels)
        mask = processor.foreground(voxels, statistics)
        neurite = np.flatnonzero(labels == 1).astype(np.int64)
        if not len(neurite):
            raise ValueError(f"{name}: the gold paints no voxel of its stack {voxels.shape}; is it in voxels?")
        candidates = np.flatnonzero(mask)
        step = max(1, len(candidates) // 200_000)
        return cls(name, voxels, labels, mask, statistics, neurite, candidates[::step])


class CropDataset(torch.utils.data.Dataset):
    """Crop number i is a function of (seed, i) alone: any worker count and any restart gives the same crops.

    Items: `pixel_values` (1, Z, Y, X) float32, `labels` (Z, Y, X) int64 (one slice with `center_slice`),
    `token_mask` (grid) bool.
    """

    def __init__(self, volumes, weights, processor: ViT3DImageProcessor, length: int, seed: int, config):
        self.volumes, self.processor, self.length, self.seed, self.config = (
            volumes,
            processor,
            length,
            seed,
            config,
        )
        self.shares = np.asarray(weights, dtype=float) / np.sum(weights)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, index])
        volume = self.volumes[rng.choice(len(self.volumes), p=self.shares)]
        start = self._choose_start(volume, rng)
        window = self.config.volume_size
        voxels, labels, mask = (
            _cut(array, start, window, fill)
            for array, fill in ((volume.voxels, None), (volume.labels, IGNORED), (volume.mask, False))
        )
        pixel_values = self.processor.pixel_values(*vary_intensity(voxels, volume.statistics, rng))
        pixel_values, labels, mask = vary_orientation((pixel_values, labels, mask), rng)
        keep = choose_tokens(self.processor.token_mask(mask), rng)
        labels = labels.astype(np.int64)
        left_out = np.kron(~keep, np.ones(self.config.patch_size, dtype=bool))
        labels[left_out] = IGNORED  # a patch left out is painted by nobody: nothing to learn there
        if self.config.prediction == "center_slice":
            labels = labels[window[0] // 2][None]
        return {
            "pixel_values": torch.from_numpy(np.ascontiguousarray(pixel_values)[None]),
            "labels": torch.from_numpy(np.ascontiguousarray(labels)),
            "token_mask": torch.from_numpy(keep),
        }

    def _choose_start(self, volume: TrainingVolume, rng: np.random.Generator) -> tuple[int, ...]:
        wanted = volume.neurite if rng.random() < NEURITE_SHARE or not len(volume.candidates) else volume.candidates
        centre = np.unravel_index(wanted[rng.integers(len(wanted))], volume.voxels.shape)
        window = np.array(self.config.volume_size)
        jitter = rng.uniform(-_JITTER, _JITTER, 3) * window
        start = np.round(np.array(centre) + jitter - window / 2).astype(int)
        last = np.array(volume.voxels.shape) - window
        return tuple(int(np.clip(s, min(0, m), max(0, m))) for s, m in zip(start, last, strict=True))


def vary_intensity(
    voxels: np.ndarray, statistics: IntensityStatistics, rng: np.random.Generator
) -> tuple[np.ndarray, IntensityStatistics]:
    """Another exposure of the same crop: brighter or dimmer, a raised or lowered black level, more noise."""
    contrast = statistics.bright - statistics.background
    voxels = voxels.astype(np.float32)
    if rng.random() < 0.5:
        voxels = voxels + rng.normal(0, abs(contrast) * rng.uniform(0, 0.06), voxels.shape).astype(np.float32)
    background = statistics.background + contrast * rng.uniform(-0.03, 0.03)
    return voxels, replace(
        statistics, background=background, bright=background + contrast * np.exp(rng.uniform(-0.7, 0.7))
    )


def vary_orientation(arrays: tuple[np.ndarray, ...], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Flips along each axis and the in-plane transposition, the same for all arrays (Z, Y, X)."""
    for axis in range(3):
        if rng.random() < 0.5:
            arrays = tuple(np.flip(array, axis) for array in arrays)
    if arrays[0].shape[1] == arrays[0].shape[2] and rng.random() < 0.5:
        arrays = tuple(array.transpose(0, 2, 1) for array in arrays)
    return arrays


def choose_tokens(selected: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The processor's selection with some patches dropped and others added, at most `MAX_TOKENS`.

    Other stacks select other shares of their patches: a network that always saw the same share would depend on it.
    """
    keep = selected & (rng.random(selected.shape) >= rng.choice([0.0, 0.0, 0.1]))
    keep |= rng.random(selected.shape) < rng.choice([0.0, 0.02, 0.1, 0.3])
    surplus = int(keep.sum()) - MAX_TOKENS
    if surplus > 0:
        keep.reshape(-1)[rng.choice(np.flatnonzero(keep), surplus, replace=False)] = False
    return keep


def _cut(array: np.ndarray, start, window, fill) -> np.ndarray:
    """A window of `array`; outside it the border is repeated, or `fill` where that is not None."""
    box = tuple(slice(max(s, 0), s + n) for s, n in zip(start, window, strict=True))
    part = array[box]
    pads = [(max(-s, 0), n - max(-s, 0) - p) for s, n, p in zip(start, window, part.shape, strict=True)]
    if not any(map(any, pads)):
        return part
    return np.pad(part, pads, mode="edge") if fill is None else np.pad(part, pads, constant_values=fill)
