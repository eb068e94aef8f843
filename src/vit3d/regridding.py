"""A stack on another voxel grid: networks know the spacing that they were trained at, and little beyond it."""

import math
import warnings
from collections.abc import Sequence

import numpy as np

from .formats.lazy_voxels import Box, LazyVoxels
from .volume import Volume

HOLDS = 1.25  # a network holds where voxels are up to so many times finer or coarser than those of its training
_SLAB = 16  # planes made at once


def as_trained(volume: Volume, config) -> Volume:
    """The volume on a grid that the network of `config` knows: itself, where its voxels are much like those of the
    training or nobody knows one of the two; else `regridded` along the axes where they are not."""
    known = getattr(config, "training_spacing_um", None)
    if volume.spacing_um is None or known is None:
        return volume
    ratio = np.divide(volume.spacing_um, known)
    alike = (ratio <= HOLDS) & (ratio >= 1 / HOLDS)
    return volume if alike.all() else regridded(volume, np.where(alike, volume.spacing_um, known).tolist())


def warn_of_unlike_voxels(volume: Volume, config) -> None:
    """For those who keep a stack's own grid all the same."""
    if as_trained(volume, config) is not volume:
        own, known = (" x ".join(f"{step:g}" for step in s) for s in (volume.spacing_um, config.training_spacing_um))
        warnings.warn(
            f"Voxels of {own} um are unlike the {known} um (z, y, x) that the network was trained at: `vit3d "
            "reconstruct` works on voxels like those, `vit3d segment` on the stack's own.",
            stacklevel=2,
        )


def regridded(volume: Volume, spacing_um: Sequence[float]) -> Volume:
    """The volume sampled every `spacing_um` (z, y, x) from the centre of its first voxel on; read box by box.

    Linear between voxels; where the new grid is coarser, a mean weighted by a tent as wide as its voxels. Of the
    volume's own type. ValueError: the volume has no spacing.
    """
    if volume.spacing_um is None:
        raise ValueError("A volume without a spacing cannot be put onto another grid.")
    steps = np.divide(spacing_um, volume.spacing_um)
    shape = [1 + math.floor((size - 1) / step + 1e-6) for size, step in zip(volume.shape, steps, strict=True)]
    return Volume(RegriddedVoxels(volume.voxels, steps, shape), tuple(spacing_um))


def on_grid_of(volume: Volume, like: Volume) -> Volume:
    """The volume on the grid of `like`, whose first voxel has the same centre; beyond it its border is repeated.

    Itself, where it is on that grid.
    """
    if volume.shape == like.shape and volume.spacing_um == like.spacing_um:
        return volume
    steps = np.divide(like.spacing_um, volume.spacing_um)
    return Volume(RegriddedVoxels(volume.voxels, steps, like.shape), like.spacing_um)


class RegriddedVoxels(LazyVoxels):
    """Voxels at every `steps` (z, y, x) of another volume's, made when they are read."""

    def __init__(self, source, steps: Sequence[float], shape: Sequence[int]):
        super().__init__(shape, source.dtype)
        self._source = source
        self._taps = [_taps(*axis) for axis in zip(self.shape, source.shape, steps, strict=True)]

    def _fetch(self, box: Box) -> np.ndarray:
        made = np.empty([b.stop - b.start for b in box], self.dtype)
        for start in range(0, len(made), _SLAB):
            planes = slice(box[0].start + start, min(box[0].start + start + _SLAB, box[0].stop))
            made[start : start + _SLAB] = self._slab((planes, *box[1:]))
        return made

    def _slab(self, box: Box) -> np.ndarray:
        taps = [(places[b], weights[b]) for (places, weights), b in zip(self._taps, box, strict=True)]
        read = tuple(slice(int(places.min()), int(places.max()) + 1) for places, _ in taps)
        values = np.asarray(self._source[read], np.float32)
        for axis, ((places, weights), start) in enumerate(zip(taps, read, strict=True)):
            values = _weighted_sum(values, axis, places - start.start, weights)
        if self.dtype.kind in "iu":
            return np.rint(values)
        return values >= 0.5 if self.dtype.kind == "b" else values


def _taps(count: int, size: int, step: float) -> tuple[np.ndarray, np.ndarray]:
    """(count, K) places in a row of `size` voxels and their weights, for each voxel of a row `step` voxels apart."""
    centre, reach = np.minimum(np.arange(count) * step, size - 1), max(1.0, step)
    places = np.floor(centre)[:, None] + np.arange(1 - math.ceil(reach), math.ceil(reach) + 1)
    weights = np.maximum(1 - np.abs(places - centre[:, None]) / reach, 0)
    weights[(places < 0) | (places >= size)] = 0
    weights /= weights.sum(1, keepdims=True)
    return np.clip(places, 0, size - 1).astype(np.intp), weights.astype(np.float32)


def _weighted_sum(values: np.ndarray, axis: int, places: np.ndarray, weights: np.ndarray) -> np.ndarray:
    if len(values) and np.array_equal(weights.max(1), np.ones(len(weights))):  # every voxel is one of the others
        return values.take(places[np.arange(len(places)), weights.argmax(1)], axis)
    total, along = 0.0, [-1 if a == axis else 1 for a in range(3)]
    for place, weight in zip(places.T, weights.T, strict=True):
        total = total + values.take(place, axis) * weight.reshape(along)
    return total
