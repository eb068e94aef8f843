"""How a crop is varied in training: where its voxels lie, and how bright they are. Arrays are (Z, Y, X)."""

from dataclasses import dataclass, fields, replace

import numpy as np
from scipy import ndimage

from ..model.intensity_vit3d import IntensityStatistics


@dataclass(frozen=True)
class Augmentation:
    """With which probability a crop is varied in which way; 0 leaves a variation out.

    flip: along an axis, each for itself. transpose: in the plane, where the window is square. rotate: in the
    plane, by any angle. stretch: in depth, as if slices lay closer together or further apart. expose: brightness
    and black level. gamma: dim neurites against bright ones. noise, blur. drop_slices: one or two slices are
    blank or repeat their neighbour. polarity: the crop as it would look in the other kind of microscope, dark
    neurites on a bright ground for fluorescence. crowd: cells out of focus. neighbours: sharp neurites of other
    cells, many and far dimmer. stripes: shadows of a light sheet. texture: clumped noise. speckle: of coherent
    light. sharpen: rings around what is bright.
    """

    flip: float = 0.5
    transpose: float = 0.5
    rotate: float = 0.3
    stretch: float = 0.2
    expose: float = 0.9
    gamma: float = 0.3
    noise: float = 0.5
    blur: float = 0.15
    drop_slices: float = 0.1
    polarity: float = 0.1
    crowd: float = 0.25
    neighbours: float = 0.2
    stripes: float = 0.1
    texture: float = 0.2
    speckle: float = 0.1
    sharpen: float = 0.15

    def __post_init__(self):
        for field in fields(self):
            if not 0 <= getattr(self, field.name) <= 1:
                raise ValueError(f"`{field.name}` is a probability, from 0 to 1; got {getattr(self, field.name)}.")

    @classmethod
    def none(cls, **probabilities: float) -> "Augmentation":
        """No variation but those that are named."""
        return replace(cls(**{field.name: 0.0 for field in fields(cls)}), **probabilities)


DEFAULT = Augmentation()


# --- where voxels lie ---


def vary_geometry(window: tuple[int, int, int], rng: np.random.Generator, augmentation: Augmentation):
    """((3, 3) matrix from crop to stack voxels, both counted from their centres; the window to read for it).

    The matrix is None when nothing is to be resampled.
    """
    angle = rng.uniform(0, 2 * np.pi) if rng.random() < augmentation.rotate else 0.0
    step = np.exp(rng.uniform(-0.5, 0.5)) if rng.random() < augmentation.stretch else 1.0
    if angle == 0.0 and step == 1.0:
        return None, window
    matrix = np.array([[step, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    reach = np.ceil(np.abs(matrix) @ (np.array(window) - 1) - 1e-9).astype(int) + 1
    return matrix, tuple(reach.tolist())


def resample(array: np.ndarray, matrix: np.ndarray, window: tuple[int, int, int], *, smooth: bool) -> np.ndarray:
    """(Z, Y, X) of `window` voxels out of what `vary_geometry` said to read; linear if `smooth`, else nearest.

    Slices stay slices, so that depth and plane are looked up one after the other: many times faster than a general
    affine transform. Beyond the border its voxels are repeated.
    """
    z, y, x = (np.arange(size) - (size - 1) / 2 for size in window)
    centre, most = (np.array(array.shape) - 1) / 2, np.array(array.shape) - 1
    z = np.clip(centre[0] + matrix[0, 0] * z, 0, most[0])
    y, x = (
        np.clip(centre[axis] + matrix[axis, 1] * y[:, None] + matrix[axis, 2] * x, 0, most[axis]) for axis in (1, 2)
    )
    if not smooth:
        z, y, x = (np.rint(places).astype(np.intp) for places in (z, y, x))
        return array.reshape(len(array), -1)[z][:, y * array.shape[2] + x]
    (z, after_z), (y, after_y), (x, after_x) = (_whole_and_rest(places) for places in (z, y, x))
    array = array.astype(np.float32)
    slab = array[z] * (1 - after_z)[:, None, None] + array[np.minimum(z + 1, most[0])] * after_z[:, None, None]
    slab, width = slab.reshape(len(slab), -1), array.shape[2]
    below, right = np.minimum(y + 1, most[1]) * width, np.minimum(x + 1, most[2])
    upper = slab[:, y * width + x] * (1 - after_x) + slab[:, y * width + right] * after_x
    lower = slab[:, below + x] * (1 - after_x) + slab[:, below + right] * after_x
    return upper * (1 - after_y) + lower * after_y


def _whole_and_rest(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    whole = np.floor(places)
    return whole.astype(np.intp), (places - whole).astype(np.float32)


def vary_orientation(
    arrays: tuple[np.ndarray, ...], rng: np.random.Generator, augmentation: Augmentation = DEFAULT
) -> tuple[np.ndarray, ...]:
    """Flips along each axis and the in-plane transposition, the same for all arrays."""
    for axis in range(3):
        if rng.random() < augmentation.flip:
            arrays = tuple(np.flip(array, axis) for array in arrays)
    if arrays[0].shape[1] == arrays[0].shape[2] and rng.random() < augmentation.transpose:
        arrays = tuple(array.transpose(0, 2, 1) for array in arrays)
    return arrays


# --- how bright they are ---


def vary_intensity(
    voxels: np.ndarray,
    statistics: IntensityStatistics,
    rng: np.random.Generator,
    augmentation: Augmentation = DEFAULT,
) -> tuple[np.ndarray, IntensityStatistics]:
    """The same crop from another microscope, and the statistics that its volume would then have.

    Works on light: 0 in the background, 1 on a bright neurite, whatever the polarity of the stack.
    """
    light = (voxels.astype(np.float32) - np.float32(statistics.background)) * np.float32(statistics.sign)
    light /= np.float32(statistics.contrast)
    if statistics.fill is not None:
        light[voxels == statistics.fill] = 0
    light = _with_artefacts(light, rng, augmentation)
    if rng.random() < augmentation.blur:
        width = rng.uniform(0.4, 1.2)
        light = ndimage.gaussian_filter(light, (rng.uniform(0, 0.5), width, width), truncate=3)
    if rng.random() < augmentation.gamma:
        light = np.sign(light) * np.abs(light) ** np.float32(np.exp(rng.uniform(-0.35, 0.35)))
    if rng.random() < augmentation.drop_slices:
        light = _without_slices(light, rng)
    dark = (statistics.polarity == "dark") ^ (rng.random() < augmentation.polarity)
    other = dark != (statistics.polarity == "dark")
    density = rng.uniform(0.5, 1.5)
    if dark and other:  # a stained neurite swallows light (Beer and Lambert): the ground is 1, it tends to 0
        light = 1 - np.exp(-density * np.clip(light, -1, None))
        full = 1 - np.exp(-density)
    else:
        full = 1.0
    if rng.random() < augmentation.noise:
        light = light + np.float32(rng.uniform(0, 0.06)) * rng.standard_normal(light.shape, np.float32)
    ground, exposure = 0.0, 1.0
    if rng.random() < augmentation.expose:
        ground, exposure = rng.uniform(-0.03, 0.03), np.exp(rng.uniform(-0.7, 0.7))
    sign = -1.0 if dark else 1.0
    return sign * light, replace(
        statistics,
        background=sign * ground,
        bright=sign * (ground + full * exposure),
        noise=statistics.noise / statistics.contrast,
        polarity="dark" if dark else "bright",
        fill=None,
    )


def _with_artefacts(light: np.ndarray, rng: np.random.Generator, augmentation: Augmentation) -> np.ndarray:
    """What is no neurite, in the order in which light meets it: cells, optics, detector, software."""
    haze = np.float32(rng.uniform(0, 0.3))  # unstructured light that the statistics took for background
    if rng.random() < augmentation.crowd:
        others = light[::-1, ::-1]
        if rng.random() < 0.5:  # more of them
            others = others + np.roll(light, rng.integers(light.shape), axis=(0, 1, 2))
        width = rng.uniform(4, 8)
        glow = ndimage.gaussian_filter(others, (rng.uniform(1.5, 4), width, width), mode="wrap", truncate=3)
        light = light + np.float32(rng.uniform(0.1, 1.0)) * glow / max(np.float32(np.percentile(glow, 99.5)), 1e-3)
    if rng.random() < augmentation.neighbours:
        copies = [_elsewhere(light, rng) for _ in range(rng.integers(2, 6))]
        light = light + np.float32(np.exp(rng.uniform(np.log(0.04), np.log(0.25)))) * np.clip(sum(copies), 0, 2)
    if rng.random() < augmentation.stripes:
        light = (light + haze) * _stripes(light.shape, rng) - haze
    if rng.random() < augmentation.speckle:
        light = (light + haze) * _speckle(light.shape, rng) - haze
    if rng.random() < augmentation.texture:
        light = light + np.float32(rng.uniform(0.01, 0.2)) * _clumped_noise(light.shape, rng)
    if rng.random() < augmentation.sharpen:
        width = rng.uniform(1.2, 3)
        blurred = ndimage.gaussian_filter(light, (0.5 * width, width, width), truncate=3)
        light = light + np.float32(rng.uniform(0.5, 3)) * (light - blurred)
    return light


def _elsewhere(light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same neurites in other places: flipped, and moved around the crop."""
    flipped = light[tuple(slice(None, None, rng.choice([-1, 1])) for _ in range(3))]
    return ndimage.shift(flipped, rng.integers(light.shape), order=0, mode="mirror")


def _stripes(shape: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """(Z, Y, X) factors: bands along y or x that drift with depth, each from a place on, and whole slices."""
    depth, height, width = shape
    sheets = ndimage.gaussian_filter(rng.standard_normal((depth, height)), (rng.uniform(0.5, 3), rng.uniform(0.5, 3)))
    sheets /= max(sheets.std(), 1e-6)
    begins = rng.uniform(-1, 1, (1, height, 1)) * width
    factors = np.exp(-rng.uniform(0.05, 0.6) * sheets[:, :, None] * (np.arange(width) > begins))
    factors *= np.exp(rng.uniform(0, 0.3) * rng.standard_normal((depth, 1, 1)))
    turn = height == width and rng.random() < 0.5
    return (factors.transpose(0, 2, 1) if turn else factors).astype(np.float32)


def _speckle(shape: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """(Z, Y, X) factors of mean 1, coarser than a voxel: the intensity of one to four random waves."""
    waves, width = int(rng.choice([1, 2, 4])), rng.uniform(0.3, 1.1)
    fields = rng.standard_normal((2 * waves, *shape), np.float32)
    factors = np.square(ndimage.gaussian_filter(fields, (0, 0.5 * width, width, width), truncate=3)).sum(axis=0)
    return factors / max(factors.mean(), 1e-6)


def _clumped_noise(shape: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """(Z, Y, X) noise of standard deviation 1 whose neighbours are alike, or, in rings, opposite."""
    width = rng.uniform(0.5, 1.6)
    noise = rng.standard_normal(shape, np.float32)
    fine = ndimage.gaussian_filter(noise, (rng.uniform(0, 1) * width, width, width), truncate=3)
    if rng.random() < 0.5:  # a band of frequencies, as a deconvolution leaves it
        fine -= ndimage.gaussian_filter(noise, 1.6 * width, truncate=3)
    return fine / max(fine.std(), 1e-6)


def _without_slices(light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    light = light.copy()
    for z in rng.choice(len(light), min(len(light), int(rng.integers(1, 3))), replace=False):
        light[z] = 0 if rng.random() < 0.5 or z == 0 else light[z - 1]
    return light
