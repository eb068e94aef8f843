"""The threshold above which a volume counts as neuron, and what a voxel's value says about being one."""

import math
import warnings
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter

from vit3d.formats.lazy_voxels import LazyVoxels, pieces
from vit3d.model.intensity_vit3d import check_finite
from vit3d.volume import Volume

LIKELY = 0.5  # foreground of a probability lies above it
_NOISE_LEVELS = 5.0  # standard deviations of the background that no neurite hides in
_SLAB_VOXELS = 1 << 18
_PIECE = (64, 256, 256)  # read at once from disk; reading and blurring repeat work at the edges of pieces
_SAMPLE_VOXELS = 1 << 22
_PLANES, _ALIKE = 16, 0.96  # looked at for ids, and share of neighbours that are then the same
_ROUNDING = 1e-4  # by so much may a probability that was resampled leave its range
_SEEN, _SURE = 0.1, 0.25  # of the voxels of a probability above the first, at least this share is above `LIKELY`
_BLUR_VOXELS = 0.7  # along the finest axis: removes shot noise, leaves neurites of a voxel's width
_TRUNCATE = 3.0
_SEEMS_INTENSITY = (
    "The voxels lie from 0 to 1 and are taken for a probability, but few of those that are not dark lie above 0.5: "
    "if they are intensities, say so with `threshold='intensity'` (--threshold intensity)."
)
_SEEMS_LABELS = (
    "The voxels look like ids of several neurons, and are taken for grey levels: trace a mask of the one that you mean."
)


@dataclass(frozen=True)
class Threshold:
    """What counts as foreground: voxels above `value`; and what a voxel's value says about being neuron."""

    value: float
    is_probability: bool
    dark: float = 0.0  # intensities count from here: below 0 where a stack goes there
    is_mask: bool = False  # of two values: all that lies above is sure

    def probability(self, values: np.ndarray) -> np.ndarray:
        """float32 in [0, 1]: the value itself, or i / (i + value) of an intensity i."""
        values = np.asarray(values, np.float32)
        if self.is_probability:
            return np.clip(values, 0, 1)
        if self.is_mask:
            return (values > self.value).astype(np.float32)
        values = np.maximum(values - np.float32(self.dark), 0)
        half = max(np.float32(self.value - self.dark), np.finfo(np.float32).tiny)  # above nothing all are sure
        return values / (values + half)


def find_threshold(volume: Volume, threshold: float | str | Threshold = "auto") -> tuple[Volume, Threshold]:
    """What counts as foreground for a `threshold`, and the volume, smoothed where it is found in grey levels.

    "auto": 0.5 of a probability (all in [0, 1], up to rounding), halfway in a mask, else found; "intensity": found; a
    `Threshold` stays. Whoever blanks part of a volume finds it before. ValueError: as `check_finite`.
    """
    if isinstance(threshold, Threshold):
        return volume, threshold
    low, high, seems_intensity = _survey(volume.voxels)
    is_probability = low >= -_ROUNDING and high <= 1 + _ROUNDING and threshold != "intensity"
    if threshold not in ("auto", "intensity"):
        return volume, Threshold(float(threshold), is_probability, min(low, 0.0))
    if is_probability:
        if seems_intensity:
            warnings.warn(_SEEMS_INTENSITY, stacklevel=4)
        return volume, Threshold(LIKELY, True)
    if threshold == "auto" and seems_labels(volume.voxels):
        warnings.warn(_SEEMS_LABELS, stacklevel=4)
    blurred = smoothed(volume)
    found = intensity_threshold(blurred.voxels)
    return blurred, Threshold(found, False, min(low, 0.0), is_mask=blurred is volume)


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
    """Halfway, in log intensity, between the background's noise and the neurites' brightness.

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


def slabs(voxels):
    """The volume part by part: (z, y, x) where it starts, voxels. On disk these are boxes of whole chunks (a slab of
    them would grow with the plane), in memory slabs."""
    if isinstance(voxels, LazyVoxels):
        for box in pieces(voxels, _PIECE):
            yield tuple(part.start for part in box), voxels[box]
        return
    deep = max(1, _SLAB_VOXELS // math.prod(voxels.shape[1:]))
    for z in range(0, voxels.shape[0], deep):
        yield (z, 0, 0), np.asarray(voxels[z : z + deep])


def _survey(voxels) -> tuple[float, float, bool]:
    """Least and largest value; and whether voxels from 0 to 1 look like a stack that was scaled: a network, or a
    classifier, is mostly sure of what it finds. Integers are a mask. ValueError: as `check_finite`."""
    low, high, sure, seen = np.inf, -np.inf, 0, 0
    for _, part in slabs(voxels):
        low, high = min(low, float(part.min())), max(high, float(part.max()))
        check_finite(np.array([[part.min(), part.max()]]))
        if high > _SEEN and voxels.dtype.kind == "f":
            seen += np.count_nonzero(part > _SEEN)
            sure += np.count_nonzero(part > LIKELY)
    scaled = voxels.dtype.kind == "f" and -_ROUNDING <= low < high <= 1 + _ROUNDING
    return low, high, scaled and (sure < _SURE * seen or high <= LIKELY)
