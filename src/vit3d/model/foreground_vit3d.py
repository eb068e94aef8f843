"""Where neurites may be: what stands out of the ground around it. Numpy only; arrays are (depth, height, width)."""

import numpy as np

from .ground_vit3d import CELL, along, blurred_box, boxes_around, cell_extremes, cell_means, ground_of_cells, repeated
from .intensity_vit3d import IntensityStatistics

BESIDE_FACTOR = 2.5  # noises that suffice beside what stands out: dim branches go on from bright ones
_BESIDE = (4, 8, 8)  # blocks of voxels in which "beside" is told


def foreground(voxels, statistics: IntensityStatistics) -> np.ndarray:
    """Where a neurite may be: bool, same shape. Everything, when the statistics are unsure.

    The rule: a blurred voxel that exceeds the ground around it (which haze and uneven light may have raised) by
    `statistics.threshold`, 3.5 to 6 noises, may belong to a neurite. In the same block of 4 x 8 x 8 voxels as such a
    one, or in one that touches that block, 2.5 noises suffice.

    Only cells in whose reach some voxel stands out before the blur, which never raises the largest, are blurred: the
    cost follows the neuron, and no float copy of the volume is made.
    """
    shape, sign = np.shape(voxels), statistics.sign
    if not statistics.sure:
        return np.ones(shape, dtype=bool)
    if statistics.fill is not None:
        voxels = np.asarray(voxels)
        voxels = np.where(voxels == statistics.fill, voxels.dtype.type(statistics.background), voxels)
    ground = ground_of_cells(cell_means(voxels), sign, statistics.ceiling)
    extremes = cell_extremes(voxels, np.minimum if sign < 0 else np.maximum)
    rise = (extremes - ground) * sign + 1e-6 * np.abs(extremes).max()  # what rounding in the blur may add
    clear = np.zeros(shape, dtype=bool)
    for box, raised in _rises(voxels, ground, rise > statistics.threshold, sign):
        clear[box] = raised > statistics.threshold
    beside, faint = _beside(clear), BESIDE_FACTOR * statistics.noise
    cells = occupied_patches(beside, tuple(c // b for c, b in zip(CELL, _BESIDE, strict=True)))
    for box, raised in _rises(voxels, ground, cells & (rise > faint), sign):
        blocks = tuple(slice(b.start // size, -(-b.stop // size)) for b, size in zip(box, _BESIDE, strict=True))
        clear[box] |= repeated(beside[blocks], _BESIDE, raised.shape) & (raised > faint)
    return clear


def foreground_reach(box: tuple[slice, ...], shape: tuple[int, int, int]) -> tuple[slice, ...]:
    """The part of a volume of this shape that decides `foreground` inside `box`: whole cells, and three more around.

    One for what lies beside a voxel, and two for the ground there.

    With statistics that hold a `ceiling`, `foreground` of that part is, inside the box, that of the whole volume.
    """
    axes = zip(box, CELL, shape, strict=True)
    return tuple(
        slice(max(b.start // cell - 3, 0) * cell, min((-(-b.stop // cell) + 3) * cell, size)) for b, cell, size in axes
    )


def occupied_patches(mask: np.ndarray, patch_size: tuple[int, int, int]) -> np.ndarray:
    """(depth, height, width) -> (grid_depth, grid_height, grid_width): which patches hold any True voxel.

    The last patch along an axis may be cut short.
    """
    for axis, patch in enumerate(patch_size):  # first axes first: many voxels at a time
        lacking = -mask.shape[axis] % patch
        if lacking:
            mask = np.pad(mask, [(0, lacking if a == axis else 0) for a in range(3)])
        cut = (*mask.shape[:axis], -1, patch, *mask.shape[axis + 1 :])
        mask = np.logical_or.reduce(mask.reshape(cut), axis=axis + 1)
    return mask


def _rises(voxels, ground: np.ndarray, cells: np.ndarray, sign: float):
    """(box, its blurred voxels' rise above their cells' ground), for boxes around the True `cells`."""
    for box, inside in boxes_around(cells, np.shape(voxels)):
        raised = blurred_box(voxels, box)
        for z, level in zip(range(0, len(raised), CELL[0]), ground[inside], strict=True):
            raised[z : z + CELL[0]] -= repeated(level, CELL[1:], raised.shape[1:])
        yield box, raised if sign > 0 else np.negative(raised, out=raised)


def _beside(mask: np.ndarray) -> np.ndarray:
    """Which blocks of `_BESIDE` voxels hold a True voxel or touch one that does, by a face, edge or corner; as many
    blocks as whole cells have."""
    blocks = occupied_patches(mask, _BESIDE)
    whole = [-(-size // cell) * (cell // block) for size, cell, block in zip(mask.shape, CELL, _BESIDE, strict=True)]
    blocks = np.pad(blocks, [(0, many - count) for many, count in zip(whole, blocks.shape, strict=True)])
    for axis, count in enumerate(blocks.shape):
        padded = np.pad(blocks, [(1, 1) if a == axis else (0, 0) for a in range(3)])
        blocks = np.logical_or.reduce([along(padded, axis, shift, shift + count) for shift in range(3)])
    return blocks
