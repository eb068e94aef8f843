"""The light blur of a stack and the ground that its voxels stand out from, box by box or whole.

Numpy only. Arrays are (depth, height, width).
"""

from functools import lru_cache
from itertools import product

import numpy as np

BLUR_VOX = (0.7, 1.0, 1.0)  # below the width of a neurite, enough to tell one from single-voxel noise
CELL = (4, 16, 16)  # voxels over which the ground is averaged; whole cells make a tile
_TILE = (16, 64, 128)  # blurred at once: in the cache


def blur(voxels: np.ndarray) -> np.ndarray:
    """Separable Gaussian of `BLUR_VOX`, truncated at three sigma, borders replicated; float32 out."""
    voxels = np.asarray(voxels)
    result = np.empty(voxels.shape, dtype=np.float32)
    for tile in _tiles(voxels.shape):
        result[tile] = blurred_box(voxels, tile)
    return result


def blur_halo() -> tuple[int, int, int]:
    """How far a blurred voxel looks, per axis."""
    return tuple(len(_kernel(width)) - 1 for width in BLUR_VOX)


def cell_means(voxels) -> np.ndarray:
    """Mean grey level of each cell, float32, borders repeated. First axes first: many voxels at a time."""
    layers = []
    for z in range(0, np.shape(voxels)[0], CELL[0]):
        slab = np.asarray(voxels[z : z + CELL[0]])
        pads = [(0, -size % cell) for size, cell in zip(slab.shape, CELL, strict=True)]
        slab = np.pad(slab, pads, mode="edge") if any(map(any, pads)) else slab
        few = np.uint16 if slab.dtype == np.uint8 else np.float32  # holds the sum of a column of a cell
        total = np.add.reduce(slab, axis=0, dtype=few).reshape(-1, CELL[1], slab.shape[2])
        total = np.add.reduce(total, axis=1, dtype=np.float32).reshape(len(total), -1, CELL[2])
        layers.append(np.add.reduce(total, axis=2) / np.float32(np.prod(CELL)))
    return np.stack(layers)


def cell_extremes(voxels, larger: np.ufunc) -> np.ndarray:
    """The largest (`larger` np.minimum: smallest) voxel that any blurred voxel of a cell sees, float32."""
    (deep, *halo), layers = blur_halo(), []
    for z in range(0, np.shape(voxels)[0], CELL[0]):
        plane = larger.reduce(voxels[max(z - deep, 0) : z + CELL[0] + deep], axis=0)
        for axis, (cell, around) in enumerate(zip(CELL[1:], halo, strict=True)):
            pads = [(around, around + -plane.shape[a] % cell) if a == axis else (0, 0) for a in range(2)]
            wide = np.pad(plane, pads, mode="edge")
            windows = np.lib.stride_tricks.sliding_window_view(wide, cell + 2 * around, axis)
            plane = larger.reduce(along(windows, axis, 0, None, cell), axis=2)
        layers.append(plane.astype(np.float32))
    return np.stack(layers)


def ground_of_cells(means: np.ndarray, sign: float, ceiling: float | None) -> np.ndarray:
    """Ground level around each cell, float32, from the cells' mean grey levels.

    The 30th percentile (counted from the ground's side, `sign` 1 for bright neurites) of the means of 5 x 5 x 5
    cells: neurites fill few of them. A soma larger than that is kept from passing for ground by a ceiling, by default
    the 98th percentile over all cells.
    """
    padded = np.pad(means * np.float32(sign), 2, mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, (5, 5, 5))
    rank = int(0.3 * 125)
    ground = np.stack([np.partition(plane.reshape(*plane.shape[:2], 125), rank)[..., rank] for plane in around])
    highest = np.percentile(ground, 98) if ceiling is None else np.float32(ceiling * sign)
    return np.minimum(ground, highest) * np.float32(sign)


def repeated(array: np.ndarray, counts: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Each number so many times along each axis, cut to a shape: one per voxel instead of one per cell."""
    for axis, (count, size) in enumerate(zip(counts, shape, strict=True)):
        array = along(np.repeat(array, count, axis=axis), axis, 0, size)
    return array


def along(array: np.ndarray, axis: int, start: int, stop: int | None, step: int = 1) -> np.ndarray:
    return array[tuple(slice(start, stop, step) if a == axis else slice(None) for a in range(array.ndim))]


def boxes_around(cells: np.ndarray, shape: tuple[int, int, int]):
    """(box of voxels, box of cells) around the True cells of each tile of a volume."""
    for tile in _tiles(shape):
        corner = [t.start // cell for t, cell in zip(tile, CELL, strict=True)]
        inside = cells[tuple(slice(c, -(-t.stop // cell)) for c, t, cell in zip(corner, tile, CELL, strict=True))]
        if inside.any():
            low, high = (edge(np.nonzero(inside), axis=1) + corner for edge in (np.min, np.max))
            ends = zip(low.tolist(), (high + 1).tolist(), CELL, shape, strict=True)
            yield (
                tuple(slice(a * cell, min(b * cell, size)) for a, b, cell, size in ends),
                tuple(map(slice, low.tolist(), (high + 1).tolist())),
            )


def blurred_box(voxels, box: tuple[slice, ...]) -> np.ndarray:
    """`blur` of the voxels inside a box.

    Along every axis flat runs of voxels are added, the border's among them, which is faster than to leave that out.
    """
    kernels = [_kernel(width) for width in BLUR_VOX]
    wide = _with_border(voxels, box, [len(kernel) - 1 for kernel in kernels])
    result = wide.reshape(-1)
    pair = np.empty_like(result)
    for kernel, step in zip(kernels, (wide[0].size, wide.shape[2], 1), strict=True):
        flat, middle = result, (len(kernel) - 1) * step
        length = flat.size - 2 * middle
        result, pair = flat[middle : middle + length] * kernel[0], pair[:length]
        for distance in range(1, len(kernel)):
            low, high = middle - distance * step, middle + distance * step
            np.add(flat[low : low + length], flat[high : high + length], out=pair)
            pair *= kernel[distance]
            result += pair
    return np.lib.stride_tricks.as_strided(result, [b.stop - b.start for b in box], wide.strides)


def _tiles(shape: tuple[int, int, int]):
    """Boxes that cover a volume, small enough for the cache."""
    for start in product(*(range(0, size, step) for size, step in zip(shape, _TILE, strict=True))):
        yield tuple(slice(s, min(s + t, size)) for s, t, size in zip(start, _TILE, shape, strict=True))


@lru_cache(maxsize=8)
def _kernel(sigma: float) -> np.ndarray:
    """The weights of a Gaussian from its middle on, cut at three sigma; with the mirrored half they add up to 1."""
    half = np.exp(-0.5 * (np.arange(int(np.ceil(3 * sigma)) + 1) / sigma) ** 2)
    return (half / (2 * half.sum() - half[0])).astype(np.float32)


def _with_border(voxels, box: tuple[slice, ...], halo: list[int]) -> np.ndarray:
    """Float32 copy of a box and what is around it; beyond the volume its border is repeated."""
    axes = list(zip(box, halo, np.shape(voxels), strict=True))
    read = tuple(slice(max(b.start - h, 0), min(b.stop + h, size)) for b, h, size in axes)
    inside = [slice(r.start - b.start + h, r.stop - b.start + h) for r, (b, h, _) in zip(read, axes, strict=True)]
    part = np.empty([b.stop - b.start + 2 * h for b, h, _ in axes], dtype=np.float32)
    part[tuple(inside)] = voxels[read]
    for axis, (there, size) in enumerate(zip(inside, part.shape, strict=True)):
        if there.start:
            along(part, axis, 0, there.start)[...] = along(part, axis, there.start, there.start + 1)
        if there.stop < size:
            along(part, axis, there.stop, size)[...] = along(part, axis, there.stop - 1, there.stop)
    return part
