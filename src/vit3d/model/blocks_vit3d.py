"""NOUN  Block: a window to read and what of it to keep; plans over a shape.

Numpy only, and no model: any function from a window to an array of the same size can be run block by block.
Coordinates are voxels, (depth, height, width). Windows may reach beyond the volume (it is then replicated
at its border), so that a network always sees the size it was trained with.
"""

from dataclasses import dataclass
from itertools import pairwise, product

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

    def crop(self, shape: tuple[int, int, int]) -> Box:
        """The same part in window coordinates."""
        spans = zip(self.inside(shape), self.start, strict=True)
        return tuple(slice(i.start - s, i.stop - s) for i, s in spans)

    def read(self, array) -> np.ndarray:
        """The window's voxels; what lies outside the volume repeats its border."""
        box = self.inside(array.shape)
        ends = zip(box, self.start, self.size, strict=True)
        pads = [(i.start - s, s + n - i.stop) for i, s, n in ends]
        voxels = np.asarray(array[box])
        return np.pad(voxels, pads, mode="edge") if any(map(any, pads)) else voxels


class BlockPlan:
    """Windows of one size that cover a volume, and the weight each voxel of a window has in the result.

    Windows begin at multiples of `step` from the first: where that is a network's patch, neighbours cut their overlap
    into the same patches, and the last window may reach beyond the volume by less than a step.
    `mode="blend"`: weights fall linearly from the middle of the overlap to its ends and add up to 1 everywhere.
    `mode="crop"`: every voxel is taken from the one window that holds it furthest from its faces.
    """

    def __init__(self, shape, window, overlap, mode: str = "blend", step=(1, 1, 1)):
        if mode not in ("blend", "crop"):
            raise ValueError(f"`mode` must be 'blend' or 'crop', got {mode!r}.")
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
        profiles = _blend_profiles if mode == "blend" else _crop_profiles
        self._profiles = [profiles(s, w, n) for s, (n, w, _) in zip(self._starts, axes, strict=True)]

    def __len__(self) -> int:
        return int(np.prod([len(starts) for starts in self._starts]))

    def __iter__(self):
        for start in product(*self._starts):
            yield Block(start, self.window)

    def kept(self, block: Block, box: Box) -> tuple[Box, Box]:
        """What of `box` the block holds, counted from the box's start; and the same voxels, from the window's."""
        spans = list(zip(box, block.inside(self.shape), block.start, strict=True))
        met = [slice(max(b.start, i.start), min(b.stop, i.stop)) for b, i, _ in spans]
        there = tuple(slice(m.start - b.start, m.stop - b.start) for m, (b, _, _) in zip(met, spans, strict=True))
        return there, tuple(slice(m.start - s, m.stop - s) for m, (_, _, s) in zip(met, spans, strict=True))

    def meeting(self, box: Box) -> list[Block]:
        """The blocks that hold a voxel of `box`, in the plan's order; found without looking at the others."""
        spans = zip(self._starts, self.window, box, strict=True)
        near = [[s for s in starts if s < b.stop and s + size > b.start] for starts, size, b in spans]
        return [Block(start, self.window) for start in product(*near)]

    def weight(self, block: Block, crop: Box = (slice(None),) * 3) -> np.ndarray:
        """(depth, height, width) float32, or a crop of it; over all blocks the weights of a voxel add up to 1."""
        z, y, x = self.profiles(block, crop)
        return z[:, None, None] * (y[:, None] * x)

    def profiles(self, block: Block, crop: Box = (slice(None),) * 3) -> list[np.ndarray]:
        """Per axis the weights, float32, of which `weight` is the product."""
        return [self._profiles[axis][start][crop[axis]] for axis, start in enumerate(block.start)]


def _starts(extent: int, window: int, overlap: int, step: int) -> list[int]:
    """Evenly spread windows along one axis; a volume smaller than the window sits in its middle."""
    if extent <= window:
        return [-((window - extent) // 2)]
    last = -(-(extent - window) // step)  # in steps, as is the furthest that two neighbours may lie apart
    count = 1 + -(-last // ((window - overlap) // step))
    return [step * round(i * last / (count - 1)) for i in range(count)]


def _blend_profiles(starts: list[int], window: int, extent: int) -> dict[int, np.ndarray]:
    """Per window a trapezoid whose ramps span the actual overlap with its neighbours."""
    profiles = {}
    for i, start in enumerate(starts):
        position = start + np.arange(window) + 0.5
        weight = np.ones(window)
        if i > 0:
            weight *= _ramp(position, start, starts[i - 1] + window)
        if i + 1 < len(starts):
            weight *= 1 - _ramp(position, starts[i + 1], start + window)
        profiles[start] = weight
    total = np.zeros(extent)  # three windows may meet where many are needed: divide by what they really add up to
    for start, weight in profiles.items():
        inside = slice(max(start, 0), min(start + window, extent))
        total[inside] += weight[inside.start - start : inside.stop - start]
    for start, weight in profiles.items():
        inside = slice(max(start, 0), min(start + window, extent))
        weight[inside.start - start : inside.stop - start] /= total[inside]
    return {start: weight.astype(np.float32) for start, weight in profiles.items()}


def _ramp(position: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`; a step where the two do not overlap."""
    return np.clip((position - low) / (high - low), 0, 1) if high > low else (position >= low).astype(float)


def _crop_profiles(starts: list[int], window: int, extent: int) -> dict[int, np.ndarray]:
    """1 where this window is the one whose centre is nearest, 0 elsewhere."""
    cuts = [-np.inf, *((a + b + window) / 2 for a, b in pairwise(starts)), np.inf]
    voxels = np.arange(window) + 0.5
    return {
        start: ((start + voxels >= low) & (start + voxels < high)).astype(np.float32)
        for start, (low, high) in zip(starts, pairwise(cuts), strict=True)
    }
