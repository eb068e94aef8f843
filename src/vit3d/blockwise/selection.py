"""Where in a volume that stays on disk a neurite may be, asked tile by tile and remembered."""

from collections import OrderedDict
from collections.abc import Callable
from itertools import product

import numpy as np

from ..model.blocks_vit3d import Block, Box
from ..model.foreground_vit3d import foreground_reach, occupied_patches
from ..model.image_processing_vit3d import ViT3DImageProcessor
from ..model.intensity_vit3d import IntensityStatistics
from .block_store import Index, Layout

KEPT_BYTES = 2**25  # of 2048 tiles of 128 x 512 x 512 voxels in patches of 4 x 8 x 8: three layers of a whole brain


class Selection:
    """Token masks of any window of a volume, those that the mask of the whole volume would give.

    The windows of a write box reach far into its neighbours, whose own windows reach back: to scan what each box sees
    would be to scan the volume four times. So each tile (about a write box, in whole patches) is scanned once, and one
    bit per grain is kept: a patch, or a voxel along an axis where windows do not begin at whole patches.

    Args:
        read: the voxels of a box of the volume.
        processor, statistics, config: of the network and the volume; the statistics must be sure.
    """

    def __init__(
        self,
        read: Callable[[Box], np.ndarray],
        layout: Layout,
        processor: ViT3DImageProcessor,
        statistics: IntensityStatistics,
        config,
    ):
        self._read, self._layout, self._processor, self._statistics = read, layout, processor, statistics
        self._patch = config.patch_size
        self._size = tuple(max(b // p, 1) * p for b, p in zip(layout.box, config.patch_size, strict=True))
        sizes = zip(layout.shape, config.volume_size, config.output_size, config.patch_size, strict=True)
        self._grain = tuple(
            patch if extent > window and window == output else 1 for extent, window, output, patch in sizes
        )
        self.shape = tuple(-(-n // g) for n, g in zip(layout.shape, self._grain, strict=True))
        self._tile = tuple(n // g for n, g in zip(self._size, self._grain, strict=True))
        self._known: OrderedDict[Index, np.ndarray] = OrderedDict()

    def tokens(self, window: Block) -> np.ndarray:
        """(grid_depth, grid_height, grid_width) bool: which of a window's patches may hold a neurite."""
        start, size, patch = (
            tuple(n // g for n, g in zip(numbers, self._grain, strict=True))
            for numbers in (window.start, window.size, self._patch)
        )
        return occupied_patches(Block(start, size).read(self), patch)

    def __getitem__(self, box: Box) -> np.ndarray:
        """Which grains of a box may hold a neurite; bool."""
        found = np.zeros([b.stop - b.start for b in box], dtype=bool)
        spans = [range(b.start // tile, -(-b.stop // tile)) for b, tile in zip(box, self._tile, strict=True)]
        for index in product(*spans):
            axes = list(zip(box, index, self._tile, strict=True))
            met = [(max(b.start, i * t), min(b.stop, (i + 1) * t)) for b, i, t in axes]
            there = tuple(slice(a - b.start, z - b.start) for (a, z), (b, _, _) in zip(met, axes, strict=True))
            inside = tuple(slice(a - i * t, z - i * t) for (a, z), (_, i, t) in zip(met, axes, strict=True))
            bits = self._bits(index)[inside[:2]]
            found[there] = np.unpackbits(bits, axis=2, count=self._tile[2]).view(bool)[..., inside[2]]
        return found

    def _bits(self, index: Index) -> np.ndarray:
        """The grains of one tile, packed along x; it is scanned when it is met first, or again after long."""
        bits = self._known.pop(index, None)
        if bits is None:
            bits = np.packbits(self._scanned(index), axis=2)
        self._known[index] = bits  # the last one used comes last
        while len(self._known) * bits.nbytes > KEPT_BYTES and len(self._known) > 1:
            self._known.popitem(last=False)
        return bits

    def _scanned(self, index: Index) -> np.ndarray:
        axes = zip(index, self._size, self._layout.shape, strict=True)
        box = tuple(slice(i * size, min((i + 1) * size, extent)) for i, size, extent in axes)
        reach = foreground_reach(box, self._layout.shape)
        voxels, grains = self._read(reach), np.zeros(self._tile, dtype=bool)
        if not _is_plain(voxels, self._statistics):
            inside = tuple(slice(b.start - r.start, b.stop - r.start) for b, r in zip(box, reach, strict=True))
            met = occupied_patches(self._processor.foreground(voxels, self._statistics)[inside], self._grain)
            grains[tuple(map(slice, met.shape))] = met
        return grains


def _is_plain(voxels: np.ndarray, statistics: IntensityStatistics) -> bool:
    """No voxel can rise above any ground there may be: most of a sparse volume costs two passes and no more."""
    low, high = float(voxels.min()), float(voxels.max())
    ceiling = statistics.ceiling if statistics.ceiling is not None else (low if statistics.sign > 0 else high)
    rise = high - min(low, ceiling) if statistics.sign > 0 else max(high, ceiling) - low
    rounding = 1e-6 * max(abs(low), abs(high))  # what the blur may add, as in `foreground`
    return rise + rounding <= statistics.threshold
