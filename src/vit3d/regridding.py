"""A stack on finer voxels: a network knows the spacing that it was trained at, and coarser ones look strange to it."""

import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from .formats.lazy_voxels import Box, LazyVoxels
from .volume import Volume

COARSER = 1.25  # up to so many times the spacing of its training a network holds
MOST_COARSER = 4.0  # beyond it there is nothing to be gained, and memory to be lost
_READ_VOXELS, _MADE_VOXELS = 1 << 24, 1 << 21  # at once: chunks are decoded once, and memory is little


def as_trained(volume: Volume, config) -> Volume:
    """The volume as the network of `config` should see it: `regridded` to the spacing of its training along the axes
    where its own is more than a quarter coarser.

    Itself where none is, where one is more than four times as coarse, where nobody knows one of the two spacings, and
    without a `config`. Finer voxels stay: coarser ones would say less about where a neurite lies.
    """
    known = getattr(config, "training_spacing_um", None)
    if volume.spacing_um is None or known is None:
        return volume
    ratio = np.divide(volume.spacing_um, known)
    if (ratio <= COARSER).all() or (ratio > MOST_COARSER).any():
        return volume
    return regridded(volume, np.where(ratio > COARSER, known, volume.spacing_um).tolist())


def warn_of_coarse_voxels(volume: Volume, config) -> None:
    """For those who keep a stack's own grid all the same."""
    if as_trained(volume, config) is not volume:
        own, known = (" x ".join(f"{step:g}" for step in s) for s in (volume.spacing_um, config.training_spacing_um))
        warnings.warn(
            f"Voxels of {own} um are coarser than the {known} um (z, y, x) that the network was trained at: `vit3d "
            "reconstruct` works on voxels like those, `vit3d segment` on the stack's own.",
            stacklevel=2,
        )


def regridded(volume: Volume, spacing_um: Sequence[float]) -> Volume:
    """The volume every `spacing_um` (z, y, x) from the centre of its first voxel on, linear between voxels, of its own
    type; read box by box. ValueError: the volume has no spacing."""
    if volume.spacing_um is None:
        raise ValueError("A volume without a spacing cannot be put onto another grid.")
    steps = np.divide(spacing_um, volume.spacing_um)
    shape = [1 + math.ceil((size - 1) / step - 1e-6) for size, step in zip(volume.shape, steps, strict=True)]
    return Volume(RegriddedVoxels(volume.voxels, steps, shape), tuple(spacing_um))


def on_grid_of(volume: Volume, like: Volume) -> Volume:
    """The volume at the voxels of `like`, whose first has the same centre; beyond it its border is repeated.

    Itself, where it is on that grid.
    """
    if volume.shape == like.shape and (volume.spacing_um == like.spacing_um or _as_fine(volume, like)):
        return volume
    steps = np.divide(like.spacing_um, volume.spacing_um)
    return Volume(RegriddedVoxels(volume.voxels, steps, like.shape), like.spacing_um)


def _as_fine(volume: Volume, like: Volume) -> bool:
    """A store rounds a spacing to nine digits."""
    return None not in (volume.spacing_um, like.spacing_um) and np.allclose(volume.spacing_um, like.spacing_um, 1e-8, 0)


class RegriddedVoxels(LazyVoxels):
    """Voxels at every `steps` (z, y, x) of another volume's, interpolated when they are read."""

    def __init__(self, source, steps: Sequence[float], shape: Sequence[int]):
        chunks = getattr(source, "chunks", None)
        chunks = chunks and [max(1, round(chunk / step)) for chunk, step in zip(chunks, steps, strict=True)]
        super().__init__(shape, source.dtype, chunks)
        self._source = source
        self._places = [np.minimum(np.arange(n) * s, m - 1) for n, s, m in zip(shape, steps, source.shape, strict=True)]

    def _fetch(self, box: Box) -> np.ndarray:
        places = [axis[b] for axis, b in zip(self._places, box, strict=True)]
        made = np.empty([len(axis) for axis in places], self.dtype)
        wide = math.prod(part.stop - part.start for part in _around(places[1:]))
        for planes in _slabs(places[0], wide):
            here = [places[0][planes], *places[1:]]
            read = _around(here)
            part = np.asarray(self._source[read])
            deep = max(1, _MADE_VOXELS // max(made[0].size, part[0].size))
            for first in range(planes.start, planes.stop, deep):
                some = slice(first, min(first + deep, planes.stop))
                made[some] = self._made(part, read, [places[0][some], *places[1:]])
        return made

    def _made(self, part: np.ndarray, read: Box, places: list[np.ndarray]) -> np.ndarray:
        (planes, *_), exact = _around(places), self.dtype.kind in "iu" and self.dtype.itemsize > 2
        values = part[planes.start - read[0].start : planes.stop - read[0].start]
        values = values.astype(np.float64 if exact else np.float32)
        for axis, (place, start) in enumerate(zip(places, (planes, *read[1:]), strict=True)):
            values = _interpolated(values, axis, place - start.start)
        if self.dtype.kind in "iu":
            return np.rint(values)
        return values >= 0.5 if self.dtype.kind == "b" else values


def _around(places: list[np.ndarray]) -> Box:
    """The voxels that lie around these places, per axis."""
    return tuple(slice(int(axis[0]), math.ceil(axis[-1]) + 1) for axis in places)


def _slabs(places: np.ndarray, wide: int) -> Iterator[slice]:
    """Parts of these places for which so many planes of `wide` voxels are to be read that memory is little."""
    first, most = 0, max(1, _READ_VOXELS // wide)
    while first < len(places):
        last = max(first + 1, int(np.searchsorted(places, places[first] + most - 1)))
        yield slice(first, last)
        first = last


def _interpolated(values: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    before = np.floor(places).astype(np.intp)
    rest = (places - before).astype(values.dtype)
    if not rest.any():
        return values.take(before, axis)
    rest = rest.reshape([-1 if a == axis else 1 for a in range(3)])
    after = np.minimum(before + 1, values.shape[axis] - 1)
    return values.take(before, axis) * (1 - rest) + values.take(after, axis) * rest
