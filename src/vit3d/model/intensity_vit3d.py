"""What a stack's grey levels mean: background, noise, polarity, and where neurites may be.

Numpy only. Everything is measured once per volume and then applied to any box of it: statistics taken per
block would draw seams. Arrays are (depth, height, width).
"""

from dataclasses import asdict, dataclass
from itertools import product

import numpy as np

BLUR_VOX = (0.7, 1.0, 1.0)  # below the width of a neurite, enough to tell one from single-voxel noise
NOISE_FACTOR = 6.0  # a patch may hold a neurite where the blurred stack exceeds background + 6 noise
DISPLAY_GAMMA = 1 / 2.2  # photographs are gamma-encoded, microscope stacks are linear in light
_SAMPLE_VOXELS = 12_000_000  # statistics of a larger volume come from groups of slices that hold about so many
_MIN_GROUPS = 4
_TILE = (16, 64, 64)
_MIN_CONTRAST = 3.0  # upper bound at least this many noises above the background


@dataclass(frozen=True)
class IntensityStatistics:
    """Grey levels of one volume, in its own units.

    `background` and `noise` are median and scaled MAD of the lightly blurred volume (the noise floored at one
    grey level), `bright` the level at which a neurite counts as fully bright, on the side that `polarity` names:
    above the background ("bright", fluorescence) or below it ("dark", brightfield). `sure` is False when the
    volume does not show which side holds the neurites; everything is then computed.
    """

    background: float
    noise: float
    bright: float
    polarity: str = "bright"
    sure: bool = True

    @property
    def sign(self) -> float:
        return -1.0 if self.polarity == "dark" else 1.0

    @property
    def threshold(self) -> float:
        """Grey levels away from the background beyond which a blurred voxel may belong to a neurite."""
        return NOISE_FACTOR * self.noise

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
    blurred = np.concatenate([blur(slab).reshape(-1)[::thin] for slab in slabs])
    background = float(np.median(blurred))
    spread = 1.4826 * float(np.median(np.abs(blurred - background)))
    noise = max(spread, _grey_level(slabs, blurred, spread))
    sure = True
    if polarity == "auto":
        polarity, sure = _polarity(blurred, background, noise)
    deviation = (blurred - background) * (-1.0 if polarity == "dark" else 1.0)
    signal = deviation[deviation > NOISE_FACTOR * noise]
    contrast = float(np.percentile(signal, 80)) if signal.size else 0.0
    contrast = max(contrast, _MIN_CONTRAST * noise)
    bright = background + (-contrast if polarity == "dark" else contrast)
    return IntensityStatistics(background, noise, bright, polarity, sure)


def normalize(voxels, statistics: IntensityStatistics) -> np.ndarray:
    """Grey levels -> [0, 1] as a photograph would show them: background near 0, neurites bright, gamma-encoded."""
    scale = np.float32(statistics.sign / abs(statistics.bright - statistics.background))
    values = (np.asarray(voxels, dtype=np.float32) - np.float32(statistics.background)) * scale
    return np.clip(values, 0.0, 1.0) ** np.float32(DISPLAY_GAMMA)


def foreground(voxels, statistics: IntensityStatistics) -> np.ndarray:
    """Where a neurite may be: bool, same shape. Everything, when the polarity is unsure.

    Works tile by tile, and only where some voxel is beyond the threshold before the blur, which never raises the
    largest: the cost follows the neuron, and no float copy of the volume is made.
    """
    shape = np.shape(voxels)
    if not statistics.sure:
        return np.ones(shape, dtype=bool)
    mask = np.zeros(shape, dtype=bool)
    for tile, read, crop in _tiles(shape):
        part = np.asarray(voxels[read])
        extreme = float(part.min() if statistics.polarity == "dark" else part.max())
        if (extreme - statistics.background) * statistics.sign > statistics.threshold:
            mask[tile] = ((blur(part) - statistics.background) * statistics.sign > statistics.threshold)[crop]
    return mask


def occupied_patches(mask: np.ndarray, patch_size: tuple[int, int, int]) -> np.ndarray:
    """(depth, height, width) -> (grid_depth, grid_height, grid_width): which patches hold any True voxel."""
    grid = [size // patch for size, patch in zip(mask.shape, patch_size, strict=True)]
    pairs = [extent for pair in zip(grid, patch_size, strict=True) for extent in pair]
    return mask.reshape(pairs).any(axis=(1, 3, 5))


def _polarity(blurred: np.ndarray, background: float, noise: float) -> tuple[str, bool]:
    """The side with the stronger tail. Unsure when both tails leave the noise and neither clearly wins."""
    low, high = np.percentile(blurred, [0.1, 99.9])
    bright, dark = high - background, background - low
    if max(bright, dark) < NOISE_FACTOR * noise:
        return "bright", bool(bright >= dark)
    if dark > bright:
        return "dark", bool(dark > 2 * bright)
    return "bright", bool(bright > 1.5 * dark)


def _grey_level(slabs: list[np.ndarray], blurred: np.ndarray, spread: float) -> float:
    """The least noise a stack can have: a 255th of its range, or 1 in integers whose noise can be seen.

    An 8-bit picture stored in 16 bits still has 8-bit grey levels; a 16-bit one with noise of its own keeps the
    faint neurites that lie below an 8-bit level.
    """
    rounding = 1e-5 * float(np.abs(blurred).max())  # of the blur's float32: no noise lies below it
    level = max(float(np.ptp(blurred)) / 255, rounding, 1e-12)
    if not _is_integer(slabs[0]):
        return level
    sample = slabs[len(slabs) // 2].reshape(-1)
    step = np.diff(np.unique(sample[:: 1 + sample.size // 2**20]).astype(float)).min(initial=np.inf)
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
    """The whole volume when small, else evenly spaced groups of five slices: the blur sees real neighbours."""
    depth, height, width = voxels.shape
    groups = max(_MIN_GROUPS, _SAMPLE_VOXELS // (5 * height * width))
    if depth <= 5 * groups:
        return [np.asarray(voxels)]
    starts = np.linspace(0, depth - 5, groups).astype(int)
    return [np.asarray(voxels[start : start + 5]) for start in starts]


def _along(array: np.ndarray, axis: int, start: int, stop: int) -> np.ndarray:
    return array[tuple(slice(start, stop) if a == axis else slice(None) for a in range(array.ndim))]


def _is_integer(voxels) -> bool:
    return np.issubdtype(np.dtype(voxels.dtype), np.integer) or np.dtype(voxels.dtype) == bool
