"""Foreground: the voxels of a volume that are neuron, kept sparse, so that cost follows the neuron, not the box."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.ndimage import gaussian_filter

from vit3d.volume import Volume
from vit3d.voxel_graph import FORWARD, OFFSETS, distance_to_background, find_neighbours, label_components

_NOISE_LEVELS = 5.0  # standard deviations of the background that no neurite hides in
_SLAB_VOXELS = 1 << 18
_BLUR_VOXELS = 0.7  # along the finest axis: removes shot noise, leaves neurites of a voxel's width


@dataclass(frozen=True, eq=False)
class Foreground:
    """N foreground voxels, in a pose of their own: axes permuted and flipped by the shape they form.

    So ties between equal paths are broken alike however the volume lies, and its flips give flipped trees.

    linear: (N,) int64, flat index of each voxel in a volume of this `shape`, ascending.
    probability: (N,) float32 in (0, 1].
    shape, step: size of the volume in voxels and of a voxel in um (or voxels), axes as posed.
    axes, flips: posed axis a is axis `axes[a]` of the volume, counted from its end where `flips[a]`.
    """

    linear: np.ndarray
    probability: np.ndarray
    shape: tuple[int, ...]
    step: np.ndarray
    axes: np.ndarray
    flips: np.ndarray

    @classmethod
    def posed(cls, linear: np.ndarray, probability: np.ndarray, volume: Volume) -> "Foreground":
        """From flat indices into the volume: longest axis first, the long tail of each axis at its end."""
        shape, step = np.array(volume.shape), np.array(volume.spacing_um or (1.0, 1.0, 1.0))
        index = np.stack(np.unravel_index(linear, volume.shape))
        centred = index - index.mean(1, keepdims=True)
        axes = np.argsort(-np.round((centred**2).mean(1), 6), kind="stable")
        flips = ((centred**3).mean(1) < -1e-6)[axes]
        shape, index = shape[axes], index[axes]
        index[flips] = shape[flips, None] - 1 - index[flips]
        linear = np.ravel_multi_index(tuple(index), tuple(shape))
        order = np.argsort(linear)
        return cls(linear[order], probability[order], tuple(shape.tolist()), step[axes], axes, flips)

    def __len__(self) -> int:
        return len(self.linear)

    @cached_property
    def index(self) -> np.ndarray:
        """(N, 3) int32 voxel index, axes as posed."""
        return np.stack(np.unravel_index(self.linear, self.shape), axis=1).astype(np.int32)

    @property
    def points(self) -> np.ndarray:
        """(N, 3) float64 centres of the voxels in the volume (z, y, x), in um (or voxels)."""
        return self.in_volume(self.index)

    def in_volume(self, index: np.ndarray) -> np.ndarray:
        """Points (M, 3) from voxel coordinates as posed to (z, y, x) of the volume, in um (or voxels)."""
        points = np.empty((len(index), 3))
        points[:, self.axes] = np.where(self.flips, np.array(self.shape) - 1 - index, index) * self.step
        return points

    @cached_property
    def neighbours(self) -> np.ndarray:
        """(N, 26) int32 row of each neighbour, -1 where that is background; opposite columns add up to 25."""
        return find_neighbours(self.linear, self.index, self.shape)

    @cached_property
    def round_step(self) -> np.ndarray:
        """(3,) size of a voxel in the metric in which neurites are round, the finest axis at its true size.

        Microscopes stretch neurites along their coarse axis. The stretch is read off the voxels: runs along a
        coarse axis against runs along the finest. Never beyond cubic voxels, and never less than `step`.
        """
        step = self.step.copy()
        finest = step.min()
        across = 1 / np.minimum.reduce([self._runs(axis) for axis in np.flatnonzero(step <= 1.2 * finest)])
        for axis in np.flatnonzero(step > 1.2 * finest):
            stretch = across.mean() / (1 / self._runs(axis)).mean()
            step[axis] = np.clip(finest / stretch, finest, step[axis])
        return step

    def _runs(self, axis: int) -> np.ndarray:
        """Length in voxels (32 at most, each way) of the foreground run along an axis through a sample of voxels."""
        rows = np.arange(0, len(self), max(1, len(self) // 50_000))
        length = np.ones(len(rows))
        for column in (FORWARD[axis], 25 - FORWARD[axis]):
            at, alive = self.neighbours[rows, column], np.arange(len(rows))
            for _ in range(32):
                alive, at = alive[at >= 0], at[at >= 0]
                if not len(at):
                    break
                length[alive] += 1
                at = self.neighbours[at, column]
        return length

    @cached_property
    def depth(self) -> np.ndarray:
        """(N,) float32 distance to the centre of the nearest background voxel in units of `round_step`, exact.

        Outside the volume is unknown, not background: a neurite does not get thinner where it leaves.
        """
        return distance_to_background(self.index, self.neighbours, self.shape, self.round_step)

    @cached_property
    def neighbour_step(self) -> np.ndarray:
        """(26,) length of the step to each neighbour in units of `round_step`."""
        return np.linalg.norm(OFFSETS * self.round_step, axis=1)

    def select(self, keep: np.ndarray) -> "Foreground":
        """Only the voxels where `keep` (N,) is true."""
        return replace(self, linear=self.linear[keep], probability=self.probability[keep])

    def components(self) -> np.ndarray:
        """(N,) int32 number of the 26-connected component of each voxel, counted from 0."""
        return self._labelled[0]

    @property
    def ends(self) -> np.ndarray:
        """(C,) row of a voxel at an end of each component."""
        return self._labelled[1]

    @cached_property
    def _labelled(self) -> tuple[np.ndarray, np.ndarray]:
        return label_components(self.neighbours)


@dataclass(frozen=True)
class Level:
    """What counts as foreground: voxels above `threshold`; and what a voxel's value says about being neuron."""

    threshold: float
    is_probability: bool

    def probability(self, values: np.ndarray) -> np.ndarray:
        """float32 in [0, 1]: the value itself, or i / (i + threshold) of an intensity i."""
        values = np.asarray(values, np.float32)
        if self.is_probability:
            return values
        values = np.maximum(values, 0)
        return values / (values + np.float32(self.threshold))


def find_level(voxels: np.ndarray, threshold: float | str = "auto") -> Level:
    """The level for `threshold`; "auto": 0.5 of a probability (all in [0, 1]), 0 of a mask, else found.

    Raises ValueError for NaN or infinite voxels.
    """
    low, high = _value_range(voxels)
    is_probability = low >= 0 and high <= 1
    if threshold != "auto":
        return Level(float(threshold), is_probability)
    return Level(0.5, True) if is_probability else Level(intensity_threshold(voxels), False)


def find_foreground(volume: Volume, level: Level) -> Foreground:
    """The voxels above the level, in one linear scan. Raises ValueError where that is all of the volume."""
    linear, values = _scan(volume.voxels, level.threshold)
    if len(linear) == math.prod(volume.shape):
        raise ValueError(
            f"All of the volume (fraction 1.0) lies above the threshold {level.threshold:g}: "
            "give a mask or probability with background, or a higher `threshold`."
        )
    if not len(linear):
        return Foreground(linear, values, volume.shape, np.ones(3), np.arange(3), np.zeros(3, bool))
    return Foreground.posed(linear, level.probability(values), volume)


def smoothed(volume: Volume) -> Volume:
    """float32, blurred by less than a voxel, least along coarse axes: single bright voxels are noise.

    A volume of two values, a mask, comes back as it is.
    """
    values = np.unique(np.asarray(volume.voxels[tuple(slice(None, None, 1 + (n > 64)) for n in volume.shape)]))
    if len(values) <= 2:
        return volume
    step = np.array(volume.spacing_um or (1.0, 1.0, 1.0))
    voxels = np.asarray(volume.voxels, np.float32)
    return replace(volume, voxels=gaussian_filter(voxels, _BLUR_VOXELS * np.sqrt(step.min() / step), truncate=3))


def intensity_threshold(voxels: np.ndarray) -> float:
    """A level halfway, in log intensity, between the background's noise and the neurites' brightness.

    Noise is floored at one grey level (stacks with a cleaned background have a median and MAD of 0); brightness is
    the 90th percentile of what lies above the noise. A mask of 0 and one other value gets half that value.
    """
    values = np.asarray(voxels[tuple(slice(None, None, 1 + (size > 512)) for size in voxels.shape)])
    low, high = float(values.min()), float(values.max())
    if ((values == low) | (values == high)).all():
        return (low + high) / 2
    grey = 1.0 if values.dtype.kind in "ui" else (high - low) / 255
    median = float(np.median(values))
    noise = _NOISE_LEVELS * max(1.4826 * float(np.median(np.abs(values - median))), grey)
    above = values[values > median + noise]
    brightness = float(np.percentile(above, 90)) - median if len(above) else noise
    return median + math.sqrt(noise * brightness)


def _slabs(voxels: np.ndarray):
    """The volume in pieces of a few million voxels, with the flat index at which each starts."""
    plane = int(np.prod(voxels.shape[1:]))
    deep = max(1, _SLAB_VOXELS // plane)
    for z in range(0, voxels.shape[0], deep):
        yield z * plane, np.asarray(voxels[z : z + deep])


def _value_range(voxels: np.ndarray) -> tuple[float, float]:
    low, high = np.inf, -np.inf
    for _, slab in _slabs(voxels):
        low, high = min(low, float(slab.min())), max(high, float(slab.max()))
        if not np.isfinite(low + high):
            raise ValueError("The volume holds NaN or infinite voxels: replace them before tracing.")
    return low, high


def _scan(voxels: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices (int64, ascending) and float32 values of the voxels above the threshold."""
    linear, values = [], []
    for start, slab in _slabs(voxels):
        flat = slab.reshape(-1)
        here = np.flatnonzero(flat > threshold)
        linear.append(here + start)
        values.append(flat[here].astype(np.float32))
    return np.concatenate(linear), np.concatenate(values)
