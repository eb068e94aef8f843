"""NeuronTree -> the mask a network learns: neurite, background, and what nobody should judge."""

from collections.abc import Iterator

import numpy as np

from .tree import NeuronTree

IGNORED = -100
TRAILMAP_CODES = {0: IGNORED, 1: 0, 2: 1, 3: 0, 4: IGNORED}  # unlabelled, background, axon, artefact, edge
_PAIRS_PER_CHUNK = 2_000_000  # (point, voxel) pairs held at once: about 100 MB
_LARGEST_SHARE = 0.2  # of its stack that a neuron fills by its radii; neurons fill about 0.003
_MOST_NEURITE = 0.5  # of a stack; a mask of more is one of something else
_WIDEST_SOMA_VOX = 100.0


def paint(
    tree: NeuronTree,
    shape: tuple[int, int, int],
    *,
    min_radius_vox: float = 0.0,
    max_radius_vox: float = np.inf,
) -> np.ndarray:
    """(Z, Y, X) bool: the voxels whose centre lies in a ball that rolls along the tree's edges.

    Radii run linearly along each edge. Balls are round in um where the tree knows its spacing, else round
    in voxels. Radii are cut to at most `max_radius_vox` x-voxels; then no ball is thinner than
    `min_radius_vox` voxels along any axis, so a neurite keeps its slices in a stack of coarse z. The voxel
    nearest to the tree is always painted: a neurite thinner than a voxel never breaks. Parts outside `shape`
    are left out.

    ValueError: the tree is neither in voxels nor knows its spacing.
    """
    points, radii = sample_balls(tree.to("voxel"), step_vox=0.5)
    semi_axes = _semi_axes(radii, tree.spacing_um, min_radius_vox, max_radius_vox)
    mask = np.zeros(shape, bool)
    nearest = np.rint(points).astype(int)
    mask[tuple(nearest[_inside(nearest, shape)].T)] = True
    for voxels, _, distances in voxels_near(points, semi_axes, shape):
        mask.ravel()[voxels[distances <= 1]] = True
    return mask


def training_labels(
    tree: NeuronTree,
    shape: tuple[int, int, int],
    *,
    min_radius_vox: float = 1.0,
    max_radius_vox: float = 2.5,
    untraced: np.ndarray | None = None,
) -> np.ndarray:
    """(Z, Y, X) int8: 1 neurite, 0 background, -100 ignored by the loss.

    The neurite has radii between `min_radius_vox` and `max_radius_vox`. Ignored are what a thicker neurite or a soma
    has beyond (not where `radii_fit` says no), and `untraced`, (Z, Y, X) bool: bright structure that no gold covers.
    """
    neurite = paint(tree, shape, min_radius_vox=min_radius_vox, max_radius_vox=max_radius_vox)
    widest = _WIDEST_SOMA_VOX if radii_fit(tree, shape) else max_radius_vox
    whole = paint(tree, shape, min_radius_vox=min_radius_vox, max_radius_vox=widest)
    labels = np.zeros(shape, np.int8)
    if untraced is not None:
        if untraced.shape != tuple(shape):
            raise ValueError(f"`untraced` must have the labels' shape {tuple(shape)}, got {untraced.shape}.")
        labels[untraced] = IGNORED
    labels[whole] = IGNORED
    labels[neurite] = 1
    return labels


def radii_fit(tree: NeuronTree, shape: tuple[int, int, int]) -> bool:
    """Whether the radii can be those of a neuron in a stack of `shape` (Z, Y, X): it would not fill a fifth of it.

    Radii in nm, or in um where one voxel is far less, would, and no background were left to learn from.
    """
    tree = tree.to("voxel")
    one, other = tree.radii, tree.radii[np.where(tree.parents < 0, np.arange(len(tree)), tree.parents)]
    frustums = np.pi / 3 * _edge_lengths(tree) * (one**2 + one * other + other**2)
    return bool(frustums.sum() <= _LARGEST_SHARE * np.prod(np.array(shape) * _x_voxels(tree.spacing_um)))


def labels_from_codes(codes: np.ndarray, meaning: dict[int, int] | None = None) -> np.ndarray:
    """(Z, Y, X) int8 as `training_labels`, from a partly annotated volume: code -> label, TRAILMAP's by default.

    ValueError: a code without a meaning.
    """
    meaning = TRAILMAP_CODES if meaning is None else meaning
    found = np.unique(codes)
    unknown = [code.item() for code in found if code.item() not in meaning]
    if unknown:
        raise ValueError(f"the label volume holds the codes {unknown[:5]}; known are {sorted(meaning)}.")
    labels = np.array([meaning[code.item()] for code in found], np.int8)
    return labels[np.searchsorted(found, codes)]


def labels_from_mask(mask: np.ndarray) -> np.ndarray:
    """(Z, Y, X) int8: 1 where a mask that is annotated everywhere is not background, which is 0, or the lower one of
    two values (ilastik counts from 1).

    ValueError: what is no mask, or one that is mostly neurite.
    """
    mask = np.asarray(mask)
    low = mask.min()
    ids = low == 0 and (mask.dtype.kind != "f" or not (mask % 1).any())
    if not ids and not ((mask == low) | (mask == mask.max())).all():
        raise ValueError(f"a mask holds whole numbers, 0 among them, or two values; this one goes from {low:g} on.")
    neurite = mask != low
    if neurite.mean() > _MOST_NEURITE:
        raise ValueError(f"by this mask {neurite.mean():.0%} of the stack is neurite; is it inverted?")
    return neurite.astype(np.int8)


def sample_balls(tree: NeuronTree, step_vox: float) -> tuple[np.ndarray, np.ndarray]:
    """Points (M, 3) and radii (M,) along a tree in voxels, at most `step_vox` x-voxels apart."""
    rows, fraction = sample_edges(tree, step_vox)
    parents = np.where(tree.parents[rows] < 0, rows, tree.parents[rows])
    points = tree.points[rows] + fraction[:, None] * (tree.points[parents] - tree.points[rows])
    return points, tree.radii[rows] + fraction * (tree.radii[parents] - tree.radii[rows])


def sample_edges(tree: NeuronTree, step_vox: float) -> tuple[np.ndarray, np.ndarray]:
    """(M,) rows and (M,) fractions of the way from each row to its parent; a root stands for itself, once."""
    counts = np.maximum(np.ceil(_edge_lengths(tree) / step_vox), 1).astype(int)
    rows = np.repeat(np.arange(len(tree)), counts)
    nth = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, nth / np.repeat(counts, counts)


def _edge_lengths(tree: NeuronTree) -> np.ndarray:
    """(N,) x-voxels from each node to its parent; 0 for a root."""
    ends = tree.points[np.where(tree.parents < 0, np.arange(len(tree)), tree.parents)]
    return np.linalg.norm((tree.points - ends) * _x_voxels(tree.spacing_um), axis=1)


def voxels_near(
    points: np.ndarray, semi_axes: np.ndarray, shape: tuple[int, int, int]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of a voxel and an ellipsoid near it, in chunks of (flat voxel index, row of the point, distance).

    points, semi_axes: (M, 3) in voxels. The distance is 1 on the surface; every voxel inside is met.
    """
    nearest = np.rint(points).astype(int)
    reach = np.floor(semi_axes + 0.5).astype(int)  # the centre is at most half a voxel from its nearest voxel
    touches = ((nearest + reach >= 0) & (nearest - reach < shape)).all(axis=1)
    rows_left = np.flatnonzero(touches)
    boxes, box_of = np.unique(reach[rows_left], axis=0, return_inverse=True)
    for number, box in enumerate(boxes):
        offsets = np.argwhere(np.ones(2 * box + 1)) - box
        rows = rows_left[box_of.ravel() == number]
        for part in np.array_split(rows, 1 + len(rows) * len(offsets) // _PAIRS_PER_CHUNK):
            yield _pairs(points[part], semi_axes[part], nearest[part], offsets, part, shape)


def _pairs(points, semi_axes, nearest, offsets, rows, shape):
    size = np.maximum(semi_axes, 1e-6)
    squared = np.zeros((len(rows), len(offsets)), np.float32)
    index = np.zeros((len(rows), len(offsets)), np.int64)
    inside = np.ones((len(rows), len(offsets)), bool)
    for axis in range(3):
        voxel = nearest[:, axis, None] + offsets[None, :, axis]
        squared += (((voxel - points[:, axis, None]) / size[:, axis, None]) ** 2).astype(np.float32)
        inside &= (voxel >= 0) & (voxel < shape[axis])
        index = index * shape[axis] + voxel
    return index[inside], np.broadcast_to(rows[:, None], inside.shape)[inside], np.sqrt(squared[inside])


def _semi_axes(radii: np.ndarray, spacing_um, min_radius_vox: float, max_radius_vox: float) -> np.ndarray:
    round_in_um = np.minimum(radii, max_radius_vox)[:, None] / _x_voxels(spacing_um)
    return np.maximum(round_in_um, min_radius_vox)


def _x_voxels(spacing_um) -> np.ndarray:
    """Voxel size (z, y, x) in x-voxels; ones where the spacing is unknown."""
    return np.ones(3) if spacing_um is None else np.array(spacing_um) / spacing_um[2]


def _inside(voxels: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    return ((voxels >= 0) & (voxels < shape)).all(axis=1)
