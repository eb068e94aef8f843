"""What a stack's grey levels mean: background, noise, polarity, and where neurites may be.

Numpy only. Everything is measured once per volume and then applied to any box of it: statistics taken per
block would draw seams. Arrays are (depth, height, width).
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product

import numpy as np

BLUR_VOX = (0.7, 1.0, 1.0)  # below the width of a neurite, enough to tell one from single-voxel noise
NOISE_FACTOR = 6.0  # a patch may hold a neurite where the blurred stack exceeds the ground around it by 6 noises,
FAINT_SHARE = 0.15  # or, in a noisy stack, by this share of the contrast,
LEAST_FACTOR = 3.5  # but never by less than this many noises;
BESIDE_FACTOR = 2.5  # by so many noises where something beside it does: dim branches go on from bright ones
_BESIDE = (4, 8, 8)  # blocks of voxels in which "beside" is told
DISPLAY_GAMMA = 1 / 2.2  # photographs are gamma-encoded, microscope stacks are linear in light
_SAMPLE_VOXELS = 12_000_000  # statistics of a larger volume come from groups of slices that hold about so many
_MIN_GROUPS = 4
_PROBES, _PROBE = 128, (12, 96, 96)  # where a few slices alone would be too many voxels: boxes all over the volume
_TILE = (16, 64, 64)
_CELL = (4, 16, 16)  # voxels over which the ground is averaged; whole cells make a tile
_MIN_CONTRAST = 3.0  # upper bound at least this many noises above the background


@dataclass(frozen=True)
class IntensityStatistics:
    """Grey levels of one volume, in its own units.

    `background` is the median of the lightly blurred volume, `noise` the scaled MAD of what is left of it without
    its local ground (floored at one grey level), `bright` the level at which a neurite counts as fully bright, on
    the side that `polarity` names: above the background ("bright", fluorescence) or below it ("dark",
    brightfield). `sure` is False when the volume does not show which side holds the neurites, or when brightness
    alone cannot tell them from its noise; everything is then computed. `ceiling` is the level beyond which nothing
    passes for ground (see `local_background`); None takes it from the voxels at hand.
    """

    background: float
    noise: float
    bright: float
    polarity: str = "bright"
    sure: bool = True
    ceiling: float | None = None

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


def blur(voxels: np.ndarray, sigma: tuple[float, float, float] = BLUR_VOX) -> np.ndarray:
    """Separable Gaussian, truncated at three sigma, borders replicated; float32 out."""
    result = np.asarray(voxels, dtype=np.float32)
    for axis, width in enumerate(sigma):
        radius = int(np.ceil(3 * width))
        kernel = np.exp(-0.5 * (np.arange(radius + 1) / width) ** 2)
        kernel = (kernel / (2 * kernel.sum() - kernel[0])).astype(np.float32)
        length = result.shape[axis]
        padded = np.pad(result, [(radius, radius) if a == axis else (0, 0) for a in range(3)], mode="edge")
        result = result * kernel[0]
        for distance in range(1, radius + 1):
            pair = _along(padded, axis, radius - distance, radius - distance + length)
            pair = pair + _along(padded, axis, radius + distance, radius + distance + length)
            pair *= kernel[distance]
            result += pair
    return result


def blur_halo() -> tuple[int, int, int]:
    """How far a blurred voxel looks, per axis."""
    return tuple(int(np.ceil(3 * width)) for width in BLUR_VOX)


def measure(voxels, polarity: str = "auto") -> IntensityStatistics:
    """Statistics of a whole volume, from evenly spaced groups of slices when it is deep.

    Many stacks have a cleaned background (median, MAD, even the 99th percentile are 0), so the bright level is
    taken from the voxels that leave the background, and never equals it.
    """
    if polarity not in ("auto", "bright", "dark"):
        raise ValueError(f"`polarity` must be 'auto', 'bright' or 'dark', got {polarity!r}.")
    slabs = _sample(voxels)
    thin = 1 if slabs[0].size < _SAMPLE_VOXELS // 8 else 3  # blurred neighbours say the same: one in three will do
    blurred = [blur(slab) for slab in slabs]
    sample = np.concatenate([part.reshape(-1)[::thin] for part in blurred])
    background = float(np.median(sample))
    sample -= background
    spread = _spread(sample)
    floor = _grey_level(slabs, sample, background, spread)
    sure = True
    if polarity == "auto":
        # uneven light has tails of its own, so the stack without it is asked first
        level = np.concatenate([(b - _level(s)).reshape(-1)[::thin] for b, s in zip(blurred, slabs, strict=True)])
        polarity, sure = _polarity(level, max(_spread(level), floor))
        if not sure:
            polarity, sure = _polarity(sample, max(spread, floor))
    sign = -1.0 if polarity == "dark" else 1.0
    sample *= sign
    signal = sample[sample > NOISE_FACTOR * max(spread, floor)]
    contrast = float(np.percentile(signal, 80)) if signal.size else 0.0
    contrast = max(contrast, _MIN_CONTRAST * max(spread, floor))
    cells = [local_background(slab, sign, np.inf * sign) for slab in slabs]
    ceiling = float(np.percentile(np.concatenate([part.reshape(-1) for part in cells]) * sign, 98)) * sign
    grounds = [
        _spread_out(sign * np.minimum(c * sign, ceiling * sign), s.shape) for c, s in zip(cells, slabs, strict=True)
    ]
    raised = np.concatenate([(b - g).reshape(-1)[::thin] for b, g in zip(blurred, grounds, strict=True)])
    noise = max(_spread(raised), floor)
    too_noisy = noise > floor and LEAST_FACTOR * noise > 2 * FAINT_SHARE * contrast
    sure = sure and not too_noisy
    return IntensityStatistics(background, noise, background + sign * contrast, polarity, sure, ceiling)


def normalize(voxels, statistics: IntensityStatistics) -> np.ndarray:
    """Grey levels -> [0, 1] as a photograph would show them: background near 0, neurites bright, gamma-encoded."""
    voxels = np.asarray(voxels)
    if voxels.dtype in (np.uint8, np.uint16):  # few grey levels: each is looked up, five times as fast
        return np.take(_normalized_levels(statistics, voxels.dtype), voxels)
    return _normalize(voxels, statistics)


def foreground(voxels, statistics: IntensityStatistics) -> np.ndarray:
    """Where a neurite may be: bool, same shape. Everything, when the statistics are unsure.

    The rule: a blurred voxel that exceeds the ground around it (which haze and uneven light may have raised) by
    `statistics.threshold`, 3.5 to 6 noises, may belong to a neurite. In the same block of 4 x 8 x 8 voxels as such a
    one, or in one that touches that block, 2.5 noises suffice.
    """
    if not statistics.sure:
        return np.ones(np.shape(voxels), dtype=bool)
    clear = _above_ground(voxels, statistics, statistics.threshold)
    beside = _beside(clear)
    clear |= beside & _above_ground(voxels, statistics, BESIDE_FACTOR * statistics.noise, beside)
    return clear


def _above_ground(voxels, statistics: IntensityStatistics, threshold: float, where=None) -> np.ndarray:
    """Blurred voxels that exceed the ground around them by a threshold; of tiles without True in `where` none.

    Works tile by tile, and only where some voxel stands out before the blur, which never raises the largest: the
    cost follows the neuron, and no float copy of the volume is made.
    """
    shape = np.shape(voxels)
    mask = np.zeros(shape, dtype=bool)
    sign, cells = statistics.sign, local_background(voxels, statistics.sign, statistics.ceiling)
    for tile, read, crop in _tiles(shape):
        if where is not None and not where[tile].any():
            continue
        ground = cells[tuple(slice(t.start // c, -(-t.stop // c)) for t, c in zip(tile, _CELL, strict=True))]
        part = np.asarray(voxels[read])
        extreme = float(part.min() if sign < 0 else part.max())
        if (extreme - (ground.min() if sign > 0 else ground.max())) * sign > threshold:
            raised = blur(part)[crop]
            mask[tile] = (raised - _spread_out(ground, raised.shape)) * sign > threshold
    return mask


def _beside(mask: np.ndarray) -> np.ndarray:
    """The blocks of `_BESIDE` voxels that hold a True voxel or touch one that does, by a face, edge or corner."""
    blocks = occupied_patches(np.pad(mask, [(0, -n % b) for n, b in zip(mask.shape, _BESIDE, strict=True)]), _BESIDE)
    for axis, (size, block) in enumerate(zip(mask.shape, _BESIDE, strict=True)):
        padded = np.pad(blocks, [(1, 1) if a == axis else (0, 0) for a in range(3)])
        count = blocks.shape[axis]
        blocks = np.logical_or.reduce([_along(padded, axis, shift, shift + count) for shift in range(3)])
        blocks = _along(np.repeat(blocks, block, axis=axis), axis, 0, size)
    return blocks


def foreground_reach(box: tuple[slice, ...], shape: tuple[int, int, int]) -> tuple[slice, ...]:
    """The part of a volume of this shape that decides `foreground` inside `box`: whole cells, and three more around.

    One for what lies beside a voxel, and two for the ground there.

    With statistics that hold a `ceiling`, `foreground` of that part is, inside the box, that of the whole volume.
    """
    axes = zip(box, _CELL, shape, strict=True)
    return tuple(
        slice(max(b.start // cell - 3, 0) * cell, min((-(-b.stop // cell) + 3) * cell, size)) for b, cell, size in axes
    )


def local_background(voxels, sign: float, ceiling: float | None = None) -> np.ndarray:
    """Ground level around each cell of 4 x 16 x 16 voxels, float32, one number per cell.

    The 30th percentile (counted from the ground's side, `sign` 1 for bright neurites) of the mean grey levels of
    5 x 5 x 5 cells: neurites fill few of them. A soma larger than that is kept from passing for ground by a
    ceiling, by default the 98th percentile over all cells.
    """
    pads = [(0, -size % cell) for size, cell in zip(np.shape(voxels), _CELL, strict=True)]
    slabs = range(0, np.shape(voxels)[0], _CELL[0])
    means = np.concatenate([_cell_means(np.asarray(voxels[z : z + _CELL[0]]), pads) for z in slabs]) * np.float32(sign)
    padded = np.pad(means, 2, mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, (5, 5, 5)).reshape(*means.shape, 125)
    rank = int(0.3 * 125)
    ground = np.stack([np.partition(plane, rank, axis=-1)[..., rank] for plane in around])
    highest = np.percentile(ground, 98) if ceiling is None else np.float32(ceiling * sign)
    return np.minimum(ground, highest) * np.float32(sign)


def occupied_patches(mask: np.ndarray, patch_size: tuple[int, int, int]) -> np.ndarray:
    """(depth, height, width) -> (grid_depth, grid_height, grid_width): which patches hold any True voxel."""
    grid = [size // patch for size, patch in zip(mask.shape, patch_size, strict=True)]
    pairs = [extent for pair in zip(grid, patch_size, strict=True) for extent in pair]
    return mask.reshape(pairs).any(axis=(1, 3, 5))


def _spread(values: np.ndarray) -> float:
    """Scaled median absolute deviation from the median: the standard deviation of normal noise."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def _polarity(deviation: np.ndarray, noise: float) -> tuple[str, bool]:
    """The side with the stronger tail. Unsure when both tails leave the noise and neither clearly wins."""
    low, high = np.percentile(deviation, [0.1, 99.9])
    bright, dark = high, -low
    if max(bright, dark) < NOISE_FACTOR * noise:
        return "bright", bool(bright >= dark)
    if dark > bright:
        return "dark", bool(dark > 2 * bright)
    return "bright", bool(bright > 1.5 * dark)


def _level(slab: np.ndarray) -> np.ndarray:
    """The ground of a stack whose polarity nobody knows yet: midway between the grounds of both."""
    grounds = (local_background(slab, sign, np.inf * sign) for sign in (1.0, -1.0))
    return _spread_out(sum(grounds) / np.float32(2), slab.shape)


def _cell_means(slab: np.ndarray, pads) -> np.ndarray:
    """Mean grey level of the cells of one layer, its border repeated to whole cells."""
    pads = [(0, _CELL[0] - slab.shape[0]), *pads[1:]]
    slab = np.pad(slab, pads, mode="edge")
    rows, columns = (size // cell for size, cell in zip(slab.shape[1:], _CELL[1:], strict=True))
    return slab.reshape(1, _CELL[0], rows, _CELL[1], columns, _CELL[2]).mean(axis=(1, 3, 5), dtype=np.float32)


def _spread_out(cells: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """One number per cell -> one per voxel, cut to `shape`."""
    for axis, (size, cell) in enumerate(zip(shape, _CELL, strict=True)):
        cells = _along(np.repeat(cells, cell, axis=axis), axis, 0, size)
    return cells


def _grey_level(slabs: list[np.ndarray], sample: np.ndarray, background: float, spread: float) -> float:
    """The least noise a stack can have: a 255th of its range, or 1 in integers whose noise can be seen.

    An 8-bit picture stored in 16 bits still has 8-bit grey levels; a 16-bit one with noise of its own keeps the
    faint neurites that lie below an 8-bit level.
    """
    rounding = 1e-5 * float(np.abs(sample + background).max())  # of the blur's float32: no noise lies below it
    level = max(float(np.ptp(sample)) / 255, rounding, 1e-12)
    if not _is_integer(slabs[0]):
        return level
    levels = slabs[len(slabs) // 2].reshape(-1)
    step = np.diff(np.unique(levels[:: 1 + levels.size // 2**20]).astype(float)).min(initial=np.inf)
    return 1.0 if spread >= step else max(1.0, level)


def _tiles(shape: tuple[int, int, int]):
    """(tile, the tile with the blur's halo, where the tile lies in that) for each tile of a volume."""
    for start in product(*(range(0, size, step) for size, step in zip(shape, _TILE, strict=True))):
        axes = list(zip(start, _TILE, shape, blur_halo(), strict=True))
        tile = tuple(slice(s, min(s + t, size)) for s, t, size, _ in axes)
        read = tuple(slice(max(s - h, 0), min(s + t + h, size)) for s, t, size, h in axes)
        crop = tuple(slice(t.start - r.start, t.stop - r.start) for t, r in zip(tile, read, strict=True))
        yield tile, read, crop


def _sample(voxels) -> list[np.ndarray]:
    """The whole volume when small, else evenly spaced groups of five slices: the blur sees real neighbours.

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


def _along(array: np.ndarray, axis: int, start: int, stop: int) -> np.ndarray:
    return array[tuple(slice(start, stop) if a == axis else slice(None) for a in range(array.ndim))]


def _is_integer(voxels) -> bool:
    return np.issubdtype(np.dtype(voxels.dtype), np.integer) or np.dtype(voxels.dtype) == bool


@lru_cache(maxsize=8)
def _normalized_levels(statistics: IntensityStatistics, dtype: np.dtype) -> np.ndarray:
    return _normalize(np.arange(np.iinfo(dtype).max + 1), statistics)


def _normalize(voxels, statistics: IntensityStatistics) -> np.ndarray:
    scale = np.float32(statistics.sign / abs(statistics.bright - statistics.background))
    values = (np.asarray(voxels, dtype=np.float32) - np.float32(statistics.background)) * scale
    return np.clip(values, 0.0, 1.0) ** np.float32(DISPLAY_GAMMA)
