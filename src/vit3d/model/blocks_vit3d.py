"""NOUN  Block: a window to read; plans over a shape.

Numpy only, and no model.
Coordinates are voxels, (depth, height, width). Windows may reach beyond the volume (it is then replicated
at its border), so that a network always sees the size it was trained with.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Block:
    """A window and its place: `start` of the window in the volume (may be negative) and its `size`."""

    start: tuple[int, int, int]
    size: tuple[int, int, int]

    def inside(self, shape: tuple[int, int, int]) -> Box:
        """The part of the window that lies in the volume, in volume coordinates."""
        spans = zip(self.start, self.size, shape, strict=True)
        return tuple(slice(max(s, 0), min(s + n, extent)) for s, n, extent in spans)

    def read(self, array) -> np.ndarray:
        """The window's voxels; what lies outside the volume repeats its border."""
        box = self.inside(array.shape)
        ends = zip(box, self.start, self.size, strict=True)
        pads = [(i.start - s, s + n - i.stop) for i, s, n in ends]
        voxels = np.asarray(array[box])
        return np.pad(voxels, pads, mode="edge") if any(map(any, pads)) else voxels


class BlockPlan:
    """Windows of one size that cover a volume, and the weight that each of their patches has among those it lies in.

    Windows begin at multiples of `step` from the first: where that is a network's patch, neighbours cut their overlap
    into the same patches, and the last window may reach beyond the volume by less than a step.
    """

    def __init__(self, shape, window, overlap, step=(1, 1, 1)):
        if any(not 0 <= o < w for o, w in zip(overlap, window, strict=True)):
            raise ValueError(
                f"`overlap` {tuple(overlap)} must be at least 0 and smaller than `window` {tuple(window)}."
            )
        self.shape, self.window, self.overlap = tuple(shape), tuple(window), tuple(overlap)
        axes = list(zip(self.shape, self.window, self.overlap, strict=True))
        if any(s > w - o for (_, w, o), s in zip(axes, step, strict=True)):
            raise ValueError(
                f"A `step` of {tuple(step)} leaves windows of {self.window} less than {self.overlap} shared."
            )
        self._starts = [_starts(*axis, s) for axis, s in zip(axes, step, strict=True)]
        self._profiles = [_profiles(s, w) for s, w in zip(self._starts, self.window, strict=True)]

    @property
    def first(self) -> tuple[int, int, int]:
        """Where the first window begins along each axis."""
        return tuple(starts[0] for starts in self._starts)

    def __len__(self) -> int:
        return int(np.prod([len(starts) for starts in self._starts]))

    def __iter__(self):
        for start in product(*self._starts):
            yield Block(start, self.window)

    def meeting(self, box: Box) -> list[Block]:
        """The blocks that hold a voxel of `box`, in the plan's order; found without looking at the others."""
        spans = zip(self._starts, self.window, box, strict=True)
        near = [[s for s in starts if s < b.stop and s + size > b.start] for starts, size, b in spans]
        return [Block(start, self.window) for start in product(*near)]

    def weights(self, block: Block, patch: tuple[int, int, int]) -> np.ndarray:
        """(grid_depth, grid_height, grid_width) float32: falls linearly from the middle of an overlap to its ends.

        A window's share in the mean of a patch is its weight by the sum of all windows' weights there; none is 0.
        """
        z, y, x = (
            profiles[start].reshape(-1, size).mean(axis=1)
            for profiles, start, size in zip(self._profiles, block.start, patch, strict=True)
        )
        return z[:, None, None] * (y[:, None] * x)


def _starts(extent: int, window: int, overlap: int, step: int) -> list[int]:
    """Evenly spread windows along one axis; a volume smaller than the window sits in its middle."""
    if extent <= window:
        return [-((window - extent) // 2)]
    last = -(-(extent - window) // step)  # in steps, as is the furthest that two neighbours may lie apart
    count = 1 + -(-last // ((window - overlap) // step))
    return [step * round(i * last / (count - 1)) for i in range(count)]


def _profiles(starts: list[int], window: int) -> dict[int, np.ndarray]:
    """Per window a trapezoid whose ramps span the actual overlap with its neighbours."""
    profiles = {}
    for i, start in enumerate(starts):
        position = start + np.arange(window) + 0.5
        weight = np.ones(window, dtype=np.float32)
        if i > 0:
            weight *= _ramp(position, start, starts[i - 1] + window)
        if i + 1 < len(starts):
            weight *= 1 - _ramp(position, starts[i + 1], start + window)
        profiles[start] = weight
    return profiles


def _ramp(position: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`; a step where the two do not overlap."""
    return np.clip((position - low) / (high - low), 0, 1) if high > low else (position >= low).astype(float)
