"""What a stack's grey levels mean: background, noise, polarity, and the voxels that were never imaged.

Numpy only. Everything is measured once per volume and then applied to any box of it: statistics taken per
block would draw seams. Arrays are (depth, height, width).
"""

import math
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from .ground_vit3d import CELL, along, blur, cell_means, ground_of_cells, repeated

NOISE_FACTOR = 6.0  # a patch may hold a neurite where the blurred stack exceeds the ground around it by 6 noises,
FAINT_SHARE = 0.15  # or, in a noisy stack, by this share of the contrast,
LEAST_FACTOR = 3.5  # but never by less than this many noises;
DISPLAY_GAMMA = 1 / 2.2  # photographs are gamma-encoded, microscope stacks are linear in light
_SAMPLE_VOXELS = 12_000_000  # statistics of a larger volume come from groups of slices that hold about so many
_MEASURED_VOXELS = 1_000_000  # of them, after the blur
_MIN_GROUPS = 4
_PROBES, _PROBE = 128, (12, 96, 96)  # where a few slices alone would be too many voxels: boxes all over the volume
_FEWEST_LEVELS = 20  # a stack of fewer grey levels has finer noise than one
_BLURRED_ROUNDING = 0.1  # grey levels: twice what rounding voxel by voxel leaves after the blur
_FILL_SAMPLE = 1_000_000  # voxels
_LEAST_FILL, _MOST_FILL = 5e-4, 0.95  # shares of all voxels
_MOST_BETWEEN = 0.1  # share of those that were never imaged
_UNEVEN_TAILS = 1.3  # a tail so many times the other one is no noise
_MIN_CONTRAST = 3.0  # upper bound at least this many noises above the background


@dataclass(frozen=True)
class IntensityStatistics:
    """Grey levels of one volume, in its own units.

    `background` is the median of the lightly blurred volume, `noise` the scaled MAD of what is left of it without
    its local ground (floored at one grey level), `bright` the level at which a neurite counts as fully bright, on
    the side that `polarity` names: above the background ("bright", fluorescence) or below it ("dark",
    brightfield). `sure` is False when the volume does not show which side holds the neurites, or when brightness
    alone cannot tell them from its noise; everything is then computed. `ceiling` is the level beyond which nothing
    passes for ground (see `ground_of_cells`); None takes it from the voxels at hand. `fill` is the level of voxels
    that were never imaged (a band, a corner, a slice of zeros below everything else); they count as background.
    """

    background: float
    noise: float
    bright: float
    polarity: str = "bright"
    sure: bool = True
    ceiling: float | None = None
    fill: float | None = None

    @property
    def sign(self) -> float:
        return -1.0 if self.polarity == "dark" else 1.0

    @property
    def threshold(self) -> float:
        """Grey levels away from the ground around it beyond which a blurred voxel may belong to a neurite."""
        return min(NOISE_FACTOR * self.noise, max(LEAST_FACTOR * self.noise, FAINT_SHARE * self.contrast))

    @property
    def contrast(self) -> float:
        """Grey levels from the background to a fully bright neurite."""
        return abs(self.bright - self.background)

    def to_dict(self) -> dict:
        return asdict(self)


def measure(voxels, polarity: str = "auto") -> IntensityStatistics:
    """Statistics of a whole volume, from evenly spaced groups of slices when it is deep.

    Many stacks have a cleaned background (median, MAD, even the 99th percentile are 0), so the bright level is
    taken from the voxels that leave the background, and never equals it. Voxels that were never imaged are left out.
    ValueError: a polarity that there is not, or as `check_finite` among the voxels that are looked at.
    """
    check_polarity(polarity)
    slabs = sampled(voxels)
    for slab in slabs:
        check_finite(slab)
    fill, middle = _fill(slabs)
    # blurred neighbours say the same, and a million voxels all; one in so many, other columns in each row and slice
    thin = 1 + sum(slab.size for slab in slabs) // _MEASURED_VOXELS
    while math.gcd(thin, slabs[0][0].size) > 1:
        thin += 1
    imaged = slice(None)  # of the sample
    if fill is not None:
        filled = [_filled(slab, fill) for slab in slabs]
        imaged = ~np.concatenate([part.reshape(-1)[::thin] for part in filled])
        imaged = imaged if imaged.any() else slice(None)
        slabs = [np.where(f, slab.dtype.type(middle), slab) for f, slab in zip(filled, slabs, strict=True)]
    blurred = [blur(slab) for slab in slabs]
    means = [cell_means(slab) for slab in slabs]
    sample = np.concatenate([part.reshape(-1)[::thin] for part in blurred])[imaged]
    background = _median(sample)
    sample -= background
    spread = _spread(sample)
    floor = _grey_level(slabs, sample, background, spread)
    sure = True
    if polarity == "auto":
        # uneven light has tails of its own, so the stack without it is asked first
        level = _without(blurred, [_level(part) for part in means], thin)[imaged]
        polarity, sure = _polarity(level, max(_spread(level), floor))
        if not sure:
            polarity, sure = _polarity(sample, max(spread, floor))
    sign = -1.0 if polarity == "dark" else 1.0
    sample *= sign
    signal = sample[sample > NOISE_FACTOR * max(spread, floor)]
    contrast = float(np.percentile(signal, 80)) if signal.size else 0.0
    contrast = max(contrast, _MIN_CONTRAST * max(spread, floor))
    cells = [ground_of_cells(part, sign, np.inf * sign) for part in means]
    ceiling = float(np.percentile(np.concatenate([part.reshape(-1) for part in cells]) * sign, 98)) * sign
    raised = _without(blurred, [sign * np.minimum(part * sign, ceiling * sign) for part in cells], thin)[imaged]
    noise = max(_spread(raised), floor)
    too_noisy = noise > floor and LEAST_FACTOR * noise > 2 * FAINT_SHARE * contrast
    sure = sure and not too_noisy
    return IntensityStatistics(background, noise, background + sign * contrast, polarity, sure, ceiling, fill)


def fill_level(voxels) -> float | None:
    """The level of the voxels of a volume that were never imaged, as `IntensityStatistics.fill`."""
    return _fill(sampled(voxels))[0]


def check_polarity(polarity: str) -> None:
    """ValueError: there is no such polarity."""
    if polarity not in ("auto", "bright", "dark"):
        raise ValueError(f"`polarity` must be 'auto', 'bright' or 'dark', got {polarity!r}.")


def check_finite(voxels, what: str = "The volume", where: str = "") -> None:
    """Voxels of any kind, read slice by slice. ValueError, one sentence about `what`, and `where` it is: they hold NaN
    or infinities, or values that float32, in which everything is computed, does not."""
    if voxels.dtype.kind != "f":
        return
    with np.errstate(over="ignore"):
        planes = (np.asarray(voxels[z]) for z in range(voxels.shape[0]))
        bad = next((plane for plane in planes if not np.isfinite(plane.astype(np.float32, copy=False)).all()), None)
    if bad is not None:
        found = f"voxels beyond {np.finfo(np.float32).max:.1e}" if np.isfinite(bad).all() else "NaN or infinite voxels"
        raise ValueError(f"{what} holds {found}{where}; replace them before use.")


def normalize(voxels, statistics: IntensityStatistics, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    """Grey levels -> [0, 1] as a photograph would show them: background near 0, neurites bright, gamma-encoded.

    Then less `mean` and divided by `std`; float32.
    """
    voxels = np.asarray(voxels)
    if voxels.dtype not in (np.uint8, np.uint16):
        return _normalize(voxels, statistics, mean, std)
    out = np.empty(voxels.shape, dtype=np.float32)
    levels = _normalized_levels(statistics, voxels.dtype, mean, std)  # few grey levels: each is looked up,
    planes = (-1, *(voxels.shape[-2:] or (1,)))  # plane by plane: in the cache
    for plane, filled in zip(voxels.reshape(planes), out.reshape(planes), strict=True):
        levels.take(plane, out=filled, mode="clip")
    return out


def _spread(values: np.ndarray) -> float:
    """Scaled median absolute deviation from the median: the standard deviation of normal noise."""
    away = values - np.float32(_median(values))
    return 1.4826 * _median(np.abs(away, out=away))


def _median(values: np.ndarray) -> float:
    """`np.median` of float32, exactly; what a sample shows to lie far from it is counted and not sorted."""
    middle = [(values.size - 1) // 2, values.size // 2]
    few = np.sort(values[:: 1 + values.size // 2**16])
    low, high = few[len(few) * 48 // 100], few[len(few) * 52 // 100]
    below, upto = values < low, values <= high
    num_below = np.count_nonzero(below)
    if not num_below <= middle[0] <= middle[1] < np.count_nonzero(upto):
        return float(np.median(values))
    if low == high:
        return float(low)
    near = values[below ^ upto]
    ranks = [rank - num_below for rank in middle]
    return float(np.partition(near, ranks)[ranks].mean())


def _polarity(deviation: np.ndarray, noise: float) -> tuple[str, bool]:
    """The side with the stronger tail. Unsure when both tails leave the noise and neither clearly wins.

    Where neurites fill much of the stack they pass for its noise; a tail that noise alone does not have tells them.
    """
    low, high = np.percentile(deviation, [0.1, 99.9])
    bright, dark = high, -low
    if max(bright, dark) < NOISE_FACTOR * noise:
        return ("dark", False) if dark > _UNEVEN_TAILS * bright else ("bright", bool(bright >= dark))
    if dark > bright:
        return "dark", bool(dark > 2 * bright)
    return "bright", bool(bright > 1.5 * dark)


def _level(means: np.ndarray) -> np.ndarray:
    """The ground of a stack whose polarity nobody knows yet: midway between the grounds of both."""
    return sum(ground_of_cells(means, sign, np.inf * sign) for sign in (1.0, -1.0)) / np.float32(2)


def _without(blurred: list[np.ndarray], grounds: list[np.ndarray], thin: int) -> np.ndarray:
    """One in `thin` of the voxels of each slab, flat, as they stand out from the ground of their cells."""
    parts = []
    for part, ground in zip(blurred, grounds, strict=True):
        for z, level in zip(range(0, len(part), CELL[0]), ground, strict=True):
            raised = (part[z : z + CELL[0]] - repeated(level, CELL[1:], part.shape[1:])).reshape(-1)
            parts.append(raised[-z * part[0].size % thin :: thin].copy())
    return np.concatenate(parts)


def _grey_level(slabs: list[np.ndarray], sample: np.ndarray, background: float, spread: float) -> float:
    """The least noise a stack can have: a 255th of its range, or 1 in integers whose noise may hide below a level.

    An 8-bit picture stored in 16 bits still has 8-bit grey levels; a 16-bit one with noise of its own keeps the
    faint neurites that lie below an 8-bit level. Where noise lifts many voxels of the ground from one level to the
    next, their mean over the blur tells finer steps than one level.
    """
    rounding = 1e-5 * float(np.abs(sample + background).max())  # of the blur's float32: no noise lies below it
    level = max(float(np.ptp(sample)) / 255, rounding, 1e-12)
    if not _is_integer(slabs[0]):
        return level
    levels = slabs[len(slabs) // 2].reshape(-1)
    levels = levels[:: 1 + levels.size // 2**20]
    some = np.sort(levels[:: 1 + levels.size // 2**16])
    levels = np.flatnonzero(np.bincount(levels)) if levels.dtype in (np.uint8, np.uint16) else np.unique(levels)
    step = np.diff(levels.astype(float)).min(initial=np.inf)
    is_mask = 10 * step > float(levels[-1]) - float(levels[0])
    wavers = not is_mask and some[len(some) // 4] != some[3 * len(some) // 4]
    few = min(1.0, float(np.ptp(sample)) / _FEWEST_LEVELS)  # in a mask of 0 and 1 a whole level would hide everything
    if spread >= step:
        return few
    return max(_BLURRED_ROUNDING * step if wavers else few, level)


def _fill(slabs: list[np.ndarray]) -> tuple[float | None, float]:
    """The level of voxels that were never imaged, None where there are none, and the median of the others.

    It is the lowest one, where many voxels have it exactly, and next to none lie in the lower half of what is between
    it and the noise of the others. Where most have it, as in a cleaned stack, the others must lie in one piece.
    """
    every = 1 + sum(slab.size for slab in slabs) // _FILL_SAMPLE
    values = np.concatenate([slab.reshape(-1)[::every] for slab in slabs])
    lowest = values.min()
    rest = values[values != lowest]
    filled = values.size - rest.size
    if not _LEAST_FILL * values.size <= filled <= _MOST_FILL * values.size:
        return None, 0.0
    rest = rest.astype(np.float32)
    middle = _median(rest)
    levels = np.unique(rest)
    least = max(float(np.ptp(levels)) / 255, float(np.diff(levels).min(initial=np.inf)) / 2)  # noise that may not show
    limit = middle - NOISE_FACTOR * max(_spread(rest), least)
    few = len(levels) < _FEWEST_LEVELS  # what is no mask has noise
    between = (rest < (lowest + limit) / 2).sum()  # dark neurites lie above that
    is_fill = not few and lowest < limit and between <= _MOST_BETWEEN * filled
    is_fill = is_fill and (2 * filled <= values.size or _in_one_piece(slabs, lowest))
    return float(lowest) if is_fill else None, middle


def _in_one_piece(slabs: list[np.ndarray], lowest) -> bool:
    """Four in five cells with a voxel above the lowest level hold no other: on a cleaned ground even somata do not."""
    some = whole = 0
    for slab in slabs:
        above = slab[:: CELL[0]] != lowest
        above = above[:, : above.shape[1] // CELL[1] * CELL[1], : above.shape[2] // CELL[2] * CELL[2]]
        cells = above.reshape(len(above), -1, CELL[1], above.shape[2] // CELL[2], CELL[2])
        some += np.count_nonzero(cells.any(axis=(2, 4)))
        whole += np.count_nonzero(cells.all(axis=(2, 4)))
    return whole > 0.8 * some


def _filled(slab: np.ndarray, fill: float) -> np.ndarray:
    """Where a slab was never imaged, and within two voxels of that, which resampling mixed."""
    filled = slab == fill
    for axis in range(3):
        wide = np.pad(filled, [(2, 2) if a == axis else (0, 0) for a in range(3)])
        shifted = (along(wide, axis, shift, shift + slab.shape[axis]) for shift in range(5))
        filled = np.logical_or.reduce(list(shifted))
    return filled


def sampled(voxels) -> list[np.ndarray]:
    """What statistics are taken from: the whole volume when small, else evenly spaced groups of five slices: the blur
    sees real neighbours.

    Where the slices themselves are large, small boxes spread over the volume: memory must not follow its size.
    """
    depth, height, width = voxels.shape
    if min(depth, 5 * _MIN_GROUPS) * height * width > 2 * _SAMPLE_VOXELS:
        return [np.asarray(voxels[probe]) for probe in _probes(voxels.shape)]
    groups = max(_MIN_GROUPS, _SAMPLE_VOXELS // (5 * height * width))
    if depth <= 5 * groups:
        return [np.asarray(voxels[:depth])]
    starts = np.linspace(0, depth - 5, groups).astype(int)
    return [np.asarray(voxels[start : start + 5]) for start in starts]


def _probes(shape: tuple[int, int, int]):
    """Boxes that fill a volume evenly whatever their number: each axis steps by a power of one irrational number."""
    golden = 1.2207440846057596  # the root of x^4 = x + 1: for three axes what the golden ratio is for one
    for count in range(1, _PROBES + 1):
        places = ((0.5 + count / golden ** (axis + 1)) % 1 for axis in range(3))
        starts = [int(p * (max(n - edge, 0) + 1)) for p, n, edge in zip(places, shape, _PROBE, strict=True)]
        yield tuple(slice(start, start + edge) for start, edge in zip(starts, _PROBE, strict=True))


def _is_integer(voxels) -> bool:
    return np.issubdtype(np.dtype(voxels.dtype), np.integer) or np.dtype(voxels.dtype) == bool


@lru_cache(maxsize=8)
def _normalized_levels(statistics: IntensityStatistics, dtype: np.dtype, mean: float, std: float) -> np.ndarray:
    return _normalize(np.arange(np.iinfo(dtype).max + 1), statistics, mean, std)


def _normalize(voxels, statistics: IntensityStatistics, mean: float, std: float) -> np.ndarray:
    scale = np.float32(statistics.sign / abs(statistics.bright - statistics.background))
    values = (np.asarray(voxels, dtype=np.float32) - np.float32(statistics.background)) * scale
    if statistics.fill is not None:
        values = np.where(voxels == statistics.fill, np.float32(0), values)
    return (np.clip(values, 0.0, 1.0) ** np.float32(DISPLAY_GAMMA) - np.float32(mean)) / np.float32(std)
