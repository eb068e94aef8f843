"""What an image says about a gold trace: how far it is shifted, whether it lies there, what it leaves out.

Everything here looks at image and gold alone, never at a prediction.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from ..tree import NeuronTree
from ..volume import Volume

_BLUR_VOX = (0.7, 1.0, 1.0)
_SMALLEST_SHIFT_VOX = 0.5
_LOWEST_STANDING = 0.9  # the OP golds stand at 0.99 and above, flipped ones below 0.8
_SURE_STANDING = 0.97  # a flipped one in a small stack full of neurites may stand at 0.92, and at 0.98 turned back
_CLEARLY_HIGHER = 0.02
_AXES = "zyx"


def align_gold(
    tree: NeuronTree, volume: Volume, *, polarity: str = "bright", radius_vox: float = 3.0
) -> tuple[NeuronTree, np.ndarray]:
    """The gold moved onto its image, and the shift (3,) in voxels (z, y, x) that was applied.

    A shift of less than half a voxel is below what the estimate can tell: the tree is then returned as it is.
    """
    shift_vox = estimate_shift(tree, volume, polarity=polarity, radius_vox=radius_vox)
    if np.abs(shift_vox).max() < _SMALLEST_SHIFT_VOX:
        return tree, np.zeros(3)
    return tree.shifted(shift_vox * (tree.spacing_um if tree.unit == "um" else 1.0)), shift_vox


def estimate_shift(
    tree: NeuronTree,
    volume: Volume,
    *,
    polarity: str = "bright",
    radius_vox: float = 3.0,
    step_vox: float = 0.5,
) -> np.ndarray:
    """(3,) voxels (z, y, x) to add to the gold: where the trace is brightest within +-`radius_vox`.

    Brightness is the mean of log(1 + blurred intensity) along the trace, so that dim branches count like
    bright ones. Whole voxels are searched first, then ever smaller steps around the best, down to `step_vox`.
    Without nodes the shift is zero. ValueError: the tree is neither in voxels nor knows its spacing.
    """
    points = tree.to("voxel").sampled(1.0)
    if not len(points):
        return np.zeros(3)
    image, corner = _around(points, volume, polarity, int(np.ceil(radius_vox)) + 4)
    return _brightest_shift(image, points - corner, radius_vox, step_vox)


def check_bounds(tree: NeuronTree, shape: tuple[int, int, int], name: str, *, margin_vox: float = 3.0) -> None:
    """ValueError, one sentence: nodes lie more than `margin_vox` voxels outside a stack of `shape` (Z, Y, X).

    The margin is what `align_gold` may move a gold by.
    """
    points = tree.to("voxel").points
    beyond = np.maximum(-points, points - (np.array(shape) - 1))
    outside = (beyond > margin_vox).any(axis=1)
    if outside.any():
        node, axis = np.unravel_index(beyond.argmax(), beyond.shape)
        raise ValueError(
            f"{name}: {int(outside.sum())} of {len(tree)} SWC nodes lie outside the stack of "
            f"{' x '.join(map(str, shape))} voxels (z, y, x), the farthest at {_AXES[axis]} = "
            f"{points[node, axis]:.1f}; is the SWC in um, or of another stack?"
        )


def check_place(tree: NeuronTree, volume: Volume, name: str, *, polarity: str = "bright") -> None:
    """ValueError, one sentence with the likely cause: a trace that `check_bounds` refuses, or that lies on nothing."""
    check_bounds(tree, volume.shape, name)
    if not lies_on_image(tree, volume, polarity=polarity):
        raise ValueError(f"{name}: {likely_cause(tree, volume, polarity=polarity)}")


def lies_on_image(tree: NeuronTree, volume: Volume, *, polarity: str = "bright") -> bool:
    """Whether the trace, shifted to its best place, is among the brightest of the image.

    Measured as the mean rank of the brightness along it, 0.5 for a trace put anywhere and 1 on top. One that is not
    sure must not stand clearly higher flipped, swapped or rescaled.
    """
    here = _standing(tree, volume, polarity)
    if not _LOWEST_STANDING < here < _SURE_STANDING:
        return here > _LOWEST_STANDING
    return all(_standing(t, volume, polarity) < here + _CLEARLY_HIGHER for _, t in _other_places(tree, volume))


def likely_cause(tree: NeuronTree, volume: Volume, *, polarity: str = "bright") -> str:
    """Why a trace does not lie on its image: flipped, swapped, in um, the other polarity; and what mends it."""
    if lies_on_image(tree, volume, polarity=polarity):
        return "The trace lies on the image."
    other = "dark" if polarity == "bright" else "bright"
    guesses = [(why, _standing(moved, volume, polarity)) for why, moved in _other_places(tree, volume)]
    guesses += [(f"the image is taken as {other} neurites.", _standing(tree, volume, other))]
    why, standing = max(guesses, key=lambda guess: guess[1])
    if standing <= _LOWEST_STANDING:
        return (
            "The trace lies nowhere near bright structure, flipped, swapped or rescaled: "
            "check that it belongs to this image."
        )
    return f"The trace does not lie on the image as it is; it does when {why}"


def untraced_structure(
    tree: NeuronTree,
    volume: Volume,
    *,
    distance_vox: float = 6.0,
    polarity: str = "bright",
    min_voxels: int = 100,
) -> np.ndarray:
    """(Z, Y, X) bool: bright connected structure that lies more than `distance_vox` from any gold path.

    Bright is what exceeds, in the blurred stack, both the background (median + 6 robust standard deviations +
    one grey level) and half of what the dimmest tenth of the trace measures. Pieces of fewer than
    `min_voxels` are taken for noise. Align the gold first.
    """
    image = _blurred(np.asarray(volume.voxels), polarity)
    points = tree.to("voxel").sampled(1.0)
    bright = image > _bright_level(image, points)
    voxels = np.argwhere(bright)
    if len(points) and len(voxels):
        distances, _ = cKDTree(points).query(voxels, distance_upper_bound=distance_vox)
        bright[tuple(voxels[distances <= distance_vox].T)] = False
    pieces, _ = ndimage.label(bright, np.ones((3, 3, 3)))
    keep = np.bincount(pieces.ravel()) >= min_voxels
    keep[0] = False
    return keep[pieces]


def without_untraced(tree: NeuronTree, gold: NeuronTree, volume: Volume, *, polarity: str = "bright") -> NeuronTree:
    """`tree`, in voxels, without the nodes that lie on `untraced_structure`: what the gold can judge.

    Its precision is not lowered by neurites that the annotator left out.
    """
    voxels = np.clip(np.rint(tree.points).astype(int), 0, np.array(volume.shape) - 1)
    unjudged = untraced_structure(gold, volume, polarity=polarity)[tuple(voxels.T)]
    return tree.take(np.flatnonzero(~unjudged))


# --- brightness along a trace ---


def _blurred(voxels: np.ndarray, polarity: str) -> np.ndarray:
    """Float32 stack in which neurites are bright and nothing is negative."""
    if polarity not in ("bright", "dark"):
        raise ValueError(f"`polarity` must be 'bright' or 'dark', got {polarity!r}.")
    image = voxels.astype(np.float32)
    image = image - image.min() if polarity == "bright" else image.max() - image
    return ndimage.gaussian_filter(image, _BLUR_VOX, truncate=3)


def _around(points: np.ndarray, volume: Volume, polarity: str, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """The blurred part of the stack around these points, and its first voxel."""
    low = np.clip(np.floor(points.min(0)).astype(int) - margin, 0, np.array(volume.shape) - 1)
    high = np.clip(np.ceil(points.max(0)).astype(int) + margin + 1, low + 1, volume.shape)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    return _blurred(np.asarray(volume.voxels[box]), polarity), low


def _brightness(image: np.ndarray, points: np.ndarray) -> float:
    """Mean log(1 + intensity) at these points; outside the image the nearest voxel counts."""
    return float(np.log1p(ndimage.map_coordinates(image, points.T, order=1, mode="nearest")).mean())


def _brightest_shift(image: np.ndarray, points: np.ndarray, radius_vox: float, step_vox: float) -> np.ndarray:
    best, step = np.zeros(3), 1.0
    offsets = np.arange(-np.floor(radius_vox), np.floor(radius_vox) + 1)
    while True:
        shifts = [best + offset for offset in product(offsets, repeat=3)]
        shifts = [shift for shift in shifts if np.abs(shift).max() <= radius_vox]
        # of equally bright places (a plateau, a constant image) the one nearest to where the gold is
        best = max(shifts, key=lambda shift: (round(_brightness(image, points + shift), 6), -(shift @ shift)))
        if step <= step_vox:
            return best
        step /= 2
        offsets = np.array([-step, 0.0, step])


def _sample(image: np.ndarray, size: int = 500_000) -> np.ndarray:
    """About `size` voxels at regular distances."""
    return image.ravel()[:: max(image.size // size, 1)]


def _bright_level(image: np.ndarray, points: np.ndarray) -> float:
    sample = _sample(image)
    median = np.median(sample)
    noise = 1.4826 * np.median(np.abs(sample - median))
    grey_level = max(1.0, image.max() / 255) if image.max() > 1 else 1 / 255
    level = median + 6 * noise + grey_level
    if not len(points):
        return float(level)
    along = ndimage.map_coordinates(image, points.T, order=1, mode="nearest")
    return float(max(level, median + 0.5 * (np.percentile(along, 10) - median)))


# --- does it lie there at all ---


def _standing(tree: NeuronTree, volume: Volume, polarity: str) -> float:
    """Mean rank, from 0 to 1, of the trace's brightness among all voxels, at its best place nearby."""
    points = tree.to("voxel").sampled(1.0)
    if not len(points):
        return 0.0
    image = _blurred(np.asarray(volume.voxels), polarity)
    points = points + _brightest_shift(image, points, radius_vox=3.0, step_vox=1.0)
    along = ndimage.map_coordinates(image, points.T, order=1, mode="nearest")
    ranked = np.sort(_sample(image))
    # a cleaned background is all ties: they share their middle rank
    ranks = np.searchsorted(ranked, along, "left") + np.searchsorted(ranked, along, "right")
    return float(ranks.mean() / (2 * len(ranked)))


def _other_places(tree: NeuronTree, volume: Volume) -> Iterator[tuple[str, NeuronTree]]:
    """Usual mistakes undone: (what was done and what mends it, in words; the tree in voxels)."""
    tree = tree.to("voxel")
    for axis, size in enumerate(volume.shape):
        name = _AXES[axis]
        flip = f"`vit3d convert --unit voxel --flip {name}:{size - 1}`"
        yield f"{name} is flipped ({name} -> {size - 1} - {name}): {flip} does that.", tree.flipped(axis, size - 1)
    for a, b in ((1, 2), (0, 2), (0, 1)):
        order = [0, 1, 2]
        order[a], order[b] = order[b], order[a]
        yield f"{_AXES[a]} and {_AXES[b]} are swapped.", replace(tree, points=tree.points[:, order])
    if volume.spacing_um is not None:
        as_um = tree.points / np.array(volume.spacing_um)
        yield "its coordinates are read as um: a line `# unit: um` in the SWC says so.", replace(tree, points=as_um)
