"""Foreground: the voxels of a volume that are neuron, kept sparse, so that cost follows the neuron, not the box."""

import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.ndimage import gaussian_filter

from vit3d.centerlines.voxel_graph import FORWARD, OFFSETS, distance_to_background, link_voxels
from vit3d.formats.lazy_voxels import LazyVoxels, pieces
from vit3d.volume import Volume

LIKELY = 0.5  # foreground of a probability lies above it
_NOISE_LEVELS = 5.0  # standard deviations of the background that no neurite hides in
_SLAB_VOXELS = 1 << 18
_PIECE = (64, 256, 256)  # read at once from disk; reading and blurring repeat work at the edges of pieces
_SAMPLE_VOXELS = 1 << 22
_PLANES, _ALIKE = 16, 0.96  # looked at for ids, and share of neighbours that are then the same
_SURE = 0.25  # share of the voxels above 0.1 of a probability that lies above 0.5, at least
_BLUR_VOXELS = 0.7  # along the finest axis: removes shot noise, leaves neurites of a voxel's width
_TRUNCATE = 3.0
_CAVITY_VOXELS = 32  # across: of a nucleus that no label enters


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
        """(N, 3) float64 centres of the voxels in the volume (z, y, x), in um (or voxels)."""
        return self.in_volume(self.index)

    def in_volume(self, index: np.ndarray) -> np.ndarray:
        """Points (M, 3) from voxel coordinates as posed to (z, y, x) of the volume, in um (or voxels)."""
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


@dataclass(frozen=True)
class Level:
    """What counts as foreground: voxels above `threshold`; and what a voxel's value says about being neuron."""

    threshold: float
    is_probability: bool
    dark: float = 0.0  # intensities count from here: below 0 where a stack goes there

    def probability(self, values: np.ndarray) -> np.ndarray:
        """float32 in [0, 1]: the value itself, or i / (i + threshold) of an intensity i."""
        values = np.asarray(values, np.float32)
        if self.is_probability:
            return values
        values = np.maximum(values - np.float32(self.dark), 0)
        return values / (values + np.float32(self.threshold - self.dark))


def find_level(voxels: np.ndarray, threshold: float | str | Level = "auto") -> Level:
    """The level for `threshold`; "auto": 0.5 of a probability (all in [0, 1]), 0 of a mask, else found; "intensity":
    found; a level stays.

    Raises ValueError for NaN or infinite voxels.
    """
    if isinstance(threshold, Level):
        return threshold
    low, high = _value_range(voxels)
    is_probability = low >= 0 and high <= 1 and threshold != "intensity"
    if threshold not in ("auto", "intensity"):
        return Level(float(threshold), is_probability, min(low, 0.0))
    return Level(LIKELY, True) if is_probability else Level(intensity_threshold(voxels), False, min(low, 0.0))


def find_foreground(volume: Volume, level: Level) -> Foreground:
    """The voxels above the level, in one linear scan. Raises ValueError where that is all of the volume."""
    linear, values = _scan(volume.voxels, level.threshold)
    if len(linear) == math.prod(volume.shape):
        raise ValueError(
            f"All of the volume (fraction 1.0) lies above the threshold {level.threshold:g}: "
            "give a mask or probability with background, or a higher `threshold`."
        )
    if len(linear) > math.prod(volume.shape) / 2:
        share = f"{len(linear) / math.prod(volume.shape):.0%}"
        warnings.warn(
            f"{share} of the volume lies above the threshold {level.threshold:g}: is the mask, or the stack, inverted?",
            stacklevel=4,
        )
    if not len(linear):
        return Foreground(linear, values, volume.shape, np.ones(3), np.arange(3), np.zeros(3, bool))
    return Foreground.posed(linear, level.probability(values), volume).without_cavities()


class _Smoothed(LazyVoxels):
    """Voxels as float32, blurred when they are read: box by box, so that they are never held as a whole."""

    def __init__(self, voxels, sigma: np.ndarray):
        super().__init__(voxels.shape, np.float32, getattr(voxels, "chunks", None))
        self._voxels, self._sigma = voxels, sigma
        self._halo = np.array([int(_TRUNCATE * s + 0.5) for s in sigma])

    def _fetch(self, box) -> np.ndarray:
        start = np.array([part.start for part in box])
        low = np.maximum(start - self._halo, 0)
        high = np.minimum([part.stop for part in box] + self._halo, self.shape)
        around = self._voxels[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        blurred = gaussian_filter(np.asarray(around, np.float32), self._sigma, truncate=_TRUNCATE)
        inside = zip(start - low, [part.stop - part.start for part in box], strict=True)
        return blurred[tuple(slice(a, a + size) for a, size in inside)]


def smoothed(volume: Volume) -> Volume:
    """float32, blurred by less than a voxel, least along coarse axes: single bright voxels are noise.

    Blurred as it is read. A volume of two values, a mask, comes back as it is.
    """
    values = _sample(volume.voxels)
    if ((values == values.min()) | (values == values.max())).all():
        return volume
    step = np.array(volume.spacing_um or (1.0, 1.0, 1.0))
    return replace(volume, voxels=_Smoothed(volume.voxels, _BLUR_VOXELS * np.sqrt(step.min() / step)))


def intensity_threshold(voxels: np.ndarray) -> float:
    """A level halfway, in log intensity, between the background's noise and the neurites' brightness.

    Noise is floored at one grey level (stacks with a cleaned background have a median and MAD of 0); brightness is
    the 90th percentile of what lies above the noise. A mask of 0 and one other value gets half that value. Read off
    a sample of some million voxels.
    """
    values = _sample(voxels)
    low, high = float(values.min()), float(values.max())
    if ((values == low) | (values == high)).all():
        return (min(low, 0.0) if low == high else low) / 2 + high / 2
    grey = 1.0 if voxels.dtype.kind in "ui" else (high - low) / 255
    median = float(np.median(values))
    noise = _NOISE_LEVELS * max(1.4826 * float(np.median(np.abs(values - median))), grey)
    above = values[values > median + noise]
    brightness = float(np.percentile(above, 90)) - median if len(above) else noise
    return median + math.sqrt(noise * brightness)


def seems_intensity(voxels: np.ndarray) -> bool:
    """Whether voxels from 0 to 1 look like a stack that was scaled: a network, or a classifier, is mostly sure of what
    it finds. Read off a sample of some million voxels; integers are a mask, and what lies on disk is not read for it.
    """
    if voxels.dtype.kind != "f" or isinstance(voxels, LazyVoxels):
        return False
    values = _sample(voxels)
    return bool((values > 0.5).sum() < _SURE * (values > 0.1).sum())


def seems_labels(voxels: np.ndarray) -> bool:
    """Whether integers look like ids of neurons on a background of 0: side by side, hardly two of them differ.

    What lies on disk is not read for it.
    """
    if voxels.dtype.kind not in "ui" or isinstance(voxels, LazyVoxels):
        return False
    planes = np.asarray(voxels[:: max(1, voxels.shape[0] // _PLANES)])
    both = (planes[..., :-1] > 0) & (planes[..., 1:] > 0)
    ids = planes[..., :-1][both]
    if np.count_nonzero(planes) > planes.size / 2 or not len(ids) or ids.min() == ids.max():
        return False
    return bool((ids == planes[..., 1:][both]).mean() > _ALIKE)


def _sample(voxels) -> np.ndarray:
    """Every so many voxels along each axis, some million in all."""
    every = max(1, math.ceil((math.prod(voxels.shape) / _SAMPLE_VOXELS) ** (1 / 3)))
    return np.asarray(voxels[::every, ::every, ::every])


def _parts(voxels):
    """The volume part by part: (z, y, x) where it starts, voxels. On disk these are boxes of whole chunks (a slab of
    them would grow with the plane), in memory slabs."""
    if isinstance(voxels, LazyVoxels):
        for box in pieces(voxels, _PIECE):
            yield tuple(part.start for part in box), voxels[box]
        return
    deep = max(1, _SLAB_VOXELS // math.prod(voxels.shape[1:]))
    for z in range(0, voxels.shape[0], deep):
        yield (z, 0, 0), np.asarray(voxels[z : z + deep])


def _value_range(voxels) -> tuple[float, float]:
    low, high = np.inf, -np.inf
    for _, part in _parts(voxels):
        low, high = min(low, float(part.min())), max(high, float(part.max()))
        if not np.isfinite(low + high):
            raise ValueError("The volume holds NaN or infinite voxels: replace them before tracing.")
    return low, high


def _scan(voxels, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices (int64, ascending) and float32 values of the voxels above the threshold."""
    linear, values = [], []
    _, height, width = voxels.shape
    for (z, y, x), part in _parts(voxels):
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
