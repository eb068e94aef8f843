"""Foreground: the voxels of a volume that are neuron, kept sparse, so that cost follows the neuron, not the box."""

import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from vit3d.centerlines.threshold import Threshold, slabs
from vit3d.centerlines.voxel_graph import FORWARD, OFFSETS, distance_to_background, link_voxels
from vit3d.volume import Volume

_CAVITY_VOXELS = 32  # across: of a nucleus that no label enters


@dataclass(frozen=True, eq=False)
class Foreground:
    """N foreground voxels, in a pose of their own: axes permuted and flipped by the shape they form.

    So ties between equal paths are broken alike however the volume lies, and its flips give flipped trees. Lengths are
    in units of the finest axis of a voxel, so that they are alike in whatever unit the spacing is stated.

    linear: (N,) int64, flat index of each voxel in a volume of this `shape`, ascending.
    probability: (N,) float32 in (0, 1].
    shape, step: size of the volume in voxels and of a voxel, 1 along its finest axis; axes as posed.
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
        shape, (_, step) = np.array(volume.shape), voxel_of(volume)
        index = _unravelled(linear, volume.shape)
        spread, skew = np.array([_spread_and_skew(index[:, axis], shape[axis]) for axis in range(3)]).T
        axes = np.argsort(-np.round(spread, 6), kind="stable")
        flips = (skew < -1e-6)[axes]
        stride = np.append(np.cumprod(shape[axes][:0:-1])[::-1], 1)
        linear = np.zeros(len(linear), np.int64)
        for axis, flip, jump in zip(axes, flips, stride, strict=True):
            linear += (shape[axis] - 1 - index[:, axis] if flip else index[:, axis]) * jump
        del index
        order = np.argsort(linear)
        return cls(linear[order], probability[order], tuple(shape[axes].tolist()), step[axes], axes, flips)

    def __len__(self) -> int:
        return len(self.linear)

    @cached_property
    def index(self) -> np.ndarray:
        """(N, 3) int32 voxel index, axes as posed."""
        return _unravelled(self.linear, self.shape)

    @property
    def points(self) -> np.ndarray:
        """(N, 3) float64 centres of the voxels in the volume (z, y, x)."""
        return self.in_volume(self.index)

    def in_volume(self, index: np.ndarray) -> np.ndarray:
        """Points (M, 3) from voxel coordinates as posed to (z, y, x) of the volume."""
        points = np.empty((len(index), 3))
        points[:, self.axes] = np.where(self.flips, np.array(self.shape) - 1 - index, index) * self.step
        return points

    @property
    def neighbours(self) -> np.ndarray:
        """(N, 26) int32 row of each neighbour, -1 where that is background; opposite columns add up to 25."""
        return self._links[0]

    @cached_property
    def round_step(self) -> np.ndarray:
        """(3,) size of a voxel in the metric in which neurites are round, the finest axis at its true size.

        Microscopes stretch neurites along their coarse axis. The stretch is read off the voxels: runs along a
        coarse axis against runs along the finest. Never beyond cubic voxels, and never less than `step`.
        """
        step = self.step.copy()
        finest = step.min()
        if (step <= 1.2 * finest).all():
            return step
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
    def true_depth(self) -> np.ndarray:
        """The same in units of `step`: for what is so thick that a microscope hardly stretches it."""
        if (self.step == self.round_step).all():
            return self.depth
        return distance_to_background(self.index, self.neighbours, self.shape, self.step)

    def nearest(self, points: np.ndarray) -> np.ndarray:
        """(M,) row of the voxel that holds each point (M, 3), as `in_volume` gives them; -1 out of the foreground."""
        place = np.rint(points[:, self.axes] / self.step).astype(np.int64)
        place = np.where(self.flips, np.array(self.shape) - 1 - place, place)
        inside = ((place >= 0) & (place < self.shape)).all(1)
        linear = (place[:, 0] * self.shape[1] + place[:, 1]) * self.shape[2] + place[:, 2]
        row = np.minimum(np.searchsorted(self.linear, linear), len(self) - 1)
        return np.where(inside & (self.linear[row] == linear), row, -1)

    @cached_property
    def neighbour_step(self) -> np.ndarray:
        """(26,) length of the step to each neighbour in units of `round_step`."""
        return np.linalg.norm(OFFSETS * self.round_step, axis=1)

    def select(self, keep: np.ndarray) -> "Foreground":
        """Only the voxels where `keep` (N,) is true."""
        return replace(self, linear=self.linear[keep], probability=self.probability[keep])

    def without_cavities(self) -> "Foreground":
        """With the background that neuron encloses on all sides: an unlabelled nucleus, holes where it is dim.

        Only what is at most `_CAVITY_VOXELS` wide along the last axis: gaps in its rows are looked at, no other voxel.
        """
        gap = np.diff(self.linear) - 1
        before = np.flatnonzero((gap > 0) & (gap <= min(_CAVITY_VOXELS, self.shape[2] - 2)))
        before = before[self._closed(before, self.linear[before] + (gap[before] + 1) // 2)]
        if not len(before):
            return self
        sizes = gap[before]
        run = np.repeat(np.arange(len(before)), sizes)
        cavity = self.linear[before][run] + 1 + np.arange(len(run)) - (np.cumsum(sizes) - sizes)[run]
        enclosed = _enclosed(cavity, self.linear, self.shape)
        cavity, ends = cavity[enclosed], before[run[enclosed]]
        around = (self.probability[ends] + self.probability[ends + 1]) / 2
        filled = np.insert(self.linear, ends + 1, cavity), np.insert(self.probability, ends + 1, around)
        return replace(self, linear=filled[0], probability=filled[1])

    def _closed(self, before: np.ndarray, middle: np.ndarray) -> np.ndarray:
        """Which gaps may be enclosed: beside their `middle`, in all four rows, is neuron or a gap of which the same is
        true. Few are left to be looked at as a whole. `before`: row of the voxel before each gap."""
        neuron, open_ = len(self), len(self) + 1
        beside = []
        for neighbour, inside in _beside(middle, self.shape, (0, 1)):
            row = np.minimum(np.searchsorted(self.linear, neighbour), len(self) - 1)
            beside.append(np.where(inside, np.where(self.linear[row] == neighbour, neuron, row - 1), open_))
        closed = np.zeros(len(self) + 2, bool)
        closed[neuron] = closed[before] = True
        while True:
            stay = closed[before] & np.all([closed[gap] for gap in beside], axis=0)
            if (stay == closed[before]).all():
                return stay
            closed[before] = stay

    def components(self) -> np.ndarray:
        """(N,) int32 number of the 26-connected component of each voxel, counted from 0."""
        return self._links[1]

    @property
    def ends(self) -> np.ndarray:
        """(C,) row of a voxel at an end of each component."""
        return self._links[2]

    @cached_property
    def _links(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return link_voxels(self.linear, self.index, self.shape)


def _unravelled(linear: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(N, 3) int32 from flat indices."""
    index = np.empty((len(linear), 3), np.int32)
    plane = linear // (shape[1] * shape[2])
    index[:, 0] = plane
    rest = (linear - plane * (shape[1] * shape[2])).astype(np.int32 if shape[1] * shape[2] < 2**31 else np.int64)
    index[:, 1] = rest // shape[2]
    index[:, 2] = rest - index[:, 1] * shape[2]
    return index


def _beside(linear: np.ndarray, shape: tuple[int, ...], axes):
    """The neighbours on both sides along each of the axes, as flat indices, and whether they lie in the volume."""
    for axis in axes:
        jump = math.prod(shape[axis + 1 :])
        place = linear // jump % shape[axis]
        yield linear - jump, place > 0
        yield linear + jump, place < shape[axis] - 1


def _enclosed(cavity: np.ndarray, neuron: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Which voxels of `cavity` have no way out of it but into `neuron`; flat indices, both ascending."""
    closed, others = [], []
    for neighbour, inside in _beside(cavity, shape, (0, 1, 2)):
        row, other = (np.minimum(np.searchsorted(a, neighbour), len(a) - 1) for a in (neuron, cavity))
        closed.append(inside & (neuron[row] == neighbour))
        others.append(np.where(inside & (cavity[other] == neighbour), other, -1))
    enclosed = np.ones(len(cavity) + 1, bool)
    enclosed[-1] = False  # of the neighbours that are none
    while True:
        stay = enclosed[:-1] & np.all(
            [own | enclosed[other] for own, other in zip(closed, others, strict=True)], axis=0
        )
        if (stay == enclosed[:-1]).all():
            return stay
        enclosed[:-1] = stay


def _spread_and_skew(place: np.ndarray, size: int) -> tuple[float, float]:
    """Second and third central moment of places 0 .. size - 1, from their histogram."""
    count = np.bincount(place, minlength=size)
    away = np.arange(size) - place.mean()
    return (count * away**2).sum() / len(place), (count * away**3).sum() / len(place)


def voxel_of(volume: Volume) -> tuple[float, np.ndarray]:
    """The finest axis of a voxel in um (or voxels), and a voxel (z, y, x) in units of that, without its last digits.

    Where two ways are as long, or two voxels as near, rounding decides, and that differs from unit to unit.
    """
    step = np.array(volume.spacing_um or (1.0, 1.0, 1.0))
    return float(step.min()), np.round(step / step.min(), 9)


def find_foreground(volume: Volume, threshold: Threshold) -> Foreground:
    """The voxels above the threshold, in one linear scan. Raises ValueError where that is all of the volume."""
    linear, values = _scan(volume.voxels, threshold.value)
    if len(linear) == math.prod(volume.shape):
        raise ValueError(
            f"All of the volume (fraction 1.0) lies above the threshold {threshold.value:g}: "
            "give a mask or probability with background, or a higher threshold."
        )
    if not len(linear):
        return Foreground(linear, values, volume.shape, np.ones(3), np.arange(3), np.zeros(3, bool))
    foreground = Foreground.posed(linear, threshold.probability(values), volume).without_cavities()
    if len(foreground) == math.prod(volume.shape):
        raise ValueError(
            f"All of the volume lies above the threshold {threshold.value:g}, or is enclosed by what does: "
            "the mask, or the stack, seems inverted (--polarity dark)."
        )
    if len(linear) > math.prod(volume.shape) / 2:
        share = f"{len(linear) / math.prod(volume.shape):.0%}"
        warnings.warn(
            f"{share} of the volume lies above the threshold {threshold.value:g}: is the mask, or the stack, inverted?",
            stacklevel=4,
        )
    return foreground


def _scan(voxels, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices (int64, ascending) and float32 values of the voxels above the threshold."""
    linear, values = [], []
    _, height, width = voxels.shape
    for (z, y, x), part in slabs(voxels):
        flat = part.reshape(-1)
        here = np.flatnonzero(flat > threshold)
        values.append(flat[here].astype(np.float32))
        if part.shape[1:] == (height, width):
            linear.append(here + z * height * width)
            continue
        rows, columns = np.divmod(here, part.shape[2])
        planes, rows = np.divmod(rows, part.shape[1])
        linear.append(((planes + z) * height + rows + y) * width + columns + x)
    linear, values = np.concatenate(linear), np.concatenate(values)
    order = np.argsort(linear, kind="stable")  # boxes come one after the other
    return linear[order], values[order]
