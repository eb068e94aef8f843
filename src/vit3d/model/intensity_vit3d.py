"""What a stack's grey levels mean: background, noise, polarity, and where neurites may be.

Numpy only. Everything is measured once per volume and then applied to any box of it: statistics taken per
block would draw seams. Arrays are (depth, height, width).
"""

from dataclasses import asdict, dataclass

import numpy as np

BLUR_VOX = (0.7, 1.0, 1.0)  # below the width of a neurite, enough to tell one from single-voxel noise
NOISE_FACTOR = 6.0  # a patch may hold a neurite where the blurred stack exceeds background + 6 noise
DISPLAY_GAMMA = 1 / 2.2  # photographs are gamma-encoded, microscope stacks are linear in light
_SAMPLE_SLABS = 24
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
        kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / width) ** 2)
        kernel = (kernel / kernel.sum()).astype(np.float32)
        length = result.shape[axis]
        padded = np.pad(result, [(radius, radius) if a == axis else (0, 0) for a in range(3)], mode="edge")
        taps = (_along(padded, axis, k, k + length) for k in range(2 * radius + 1))
        result = sum(weight * tap for weight, tap in zip(kernel, taps, strict=True))
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
    blurred = np.concatenate([blur(slab).reshape(-1) for slab in slabs])
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
    contrast = abs(statistics.bright - statistics.background)
    values = (np.asarray(voxels, dtype=np.float32) - statistics.background) * (statistics.sign / contrast)
    return np.clip(values, 0.0, 1.0) ** np.float32(DISPLAY_GAMMA)


def foreground(voxels, statistics: IntensityStatistics) -> np.ndarray:
    """Where a neurite may be: bool, same shape. Everything, when the polarity is unsure."""
    if not statistics.sure:
        return np.ones(np.shape(voxels), dtype=bool)
    return (blur(voxels) - statistics.background) * statistics.sign > statistics.threshold


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
    level = max(float(np.ptp(blurred)) / 255, 1e-12)
    if not _is_integer(slabs[0]):
        return level
    sample = slabs[len(slabs) // 2].reshape(-1)
    step = np.diff(np.unique(sample[:: 1 + sample.size // 2**20]).astype(float)).min(initial=np.inf)
    return 1.0 if spread >= step else max(1.0, level)


def _sample(voxels):
    """Whole volume when small, else evenly spaced groups of five slices, so that the blur sees real neighbours."""
    depth = voxels.shape[0]
    if depth <= 5 * _SAMPLE_SLABS:
        return [np.asarray(voxels)]
    starts = np.linspace(0, depth - 5, _SAMPLE_SLABS).astype(int)
    return [np.asarray(voxels[start : start + 5]) for start in starts]


def _along(array: np.ndarray, axis: int, start: int, stop: int) -> np.ndarray:
    return array[tuple(slice(start, stop) if a == axis else slice(None) for a in range(array.ndim))]


def _is_integer(voxels) -> bool:
    return np.issubdtype(np.dtype(voxels.dtype), np.integer) or np.dtype(voxels.dtype) == bool
