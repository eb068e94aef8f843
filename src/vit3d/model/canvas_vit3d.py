"""Where the tokens of overlapping windows meet, so that the head paints each patch of a volume once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .blocks_vit3d import Block, BlockPlan, Box

PAINTED_AT_ONCE = 1024  # patches
TURNED_TO_FEATURES = 4 * PAINTED_AT_ONCE  # those around them as well, so that few are turned again
_LAYERS_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class Job:
    """A window to read, the block of it that is painted, and which of its patches are kept (bool, one per patch)."""

    read: Block
    write: Block
    kept: np.ndarray

    @property
    def num_tokens(self) -> int:
        return int(self.kept.sum())


class Canvas:
    """The kept patches of a box and those beside them: the mean of each one's tokens, then what the head paints.

    Patches are told by their places (z, y, x) in a grid, of which the first and the last along each axis lie outside
    the box; a layer is what has the same z. A layer's tokens are held until no window comes that adds to it and the
    next is painted: memory follows the windows' depth, not the volume's. What tokens paint is held for a band of rows.

    Args:
        model: what encodes and paints: its `config`, `device` and `head`.
        plan: windows and their weights.
        todo: all batches that will be added, in this order.
        box: the part of the volume that is wanted.
    """

    def __init__(self, model, plan: BlockPlan, todo: list[list[Job]], box: Box):
        self._head, self._device, self._plan = model.head, model.device, plan
        self._size = np.array(model.config.painted_size)
        self._apart = model.config.prediction == "center_slice"  # a slice is painted without those beside it
        self._first = np.array(plan.first)
        ends = np.array([(b.start, b.stop) for b in box]) - self._first[:, None]
        self._low = ends[:, 0] // self._size - 1
        self._shape = (-(-ends[:, 1] // self._size) + 1 - self._low).tolist()
        self._total = np.zeros(self._shape, dtype=np.float32)  # of the weights
        starts = []
        for batch in todo:
            met = [self._met(job) for job in batch]
            for there, _, weights in met:
                self._total[there] += weights
            starts.append(min(there[0].start for there, _, _ in met))
        # before each batch, the first layer that it or a later one adds to; after the last all layers are known
        self._known = [*np.minimum.accumulate(starts[::-1])[::-1].tolist(), self._shape[0]]
        self._places = [np.argwhere(layer) for layer in self._total]  # (patches, 2)
        kept = self._total.reshape(self._shape[0], -1) > 0
        self._rank = np.cumsum(kept, axis=1).reshape(self._shape) - 1  # of a patch in its layer
        self._tokens: dict[int, torch.Tensor] = {}
        self._num_added = self._num_painted = 0  # batches, layers

    def _met(self, job: Job) -> tuple[Box, Box, np.ndarray]:
        """The places that a window holds, the same counted from its own first, and its weights there (0: not kept)."""
        start = (np.array(job.write.start) - self._first) // self._size - self._low
        ends = zip(start.tolist(), job.kept.shape, self._shape, strict=True)
        there = tuple(slice(max(a, 0), max(min(a + n, size), 0)) for a, n, size in ends)
        inside = tuple(slice(t.start - a, t.stop - a) for t, a in zip(there, start.tolist(), strict=True))
        return there, inside, self._plan.weights(job.write, self._size)[inside] * job.kept[inside]

    def add(self, batch: list[Job], tokens: torch.Tensor) -> None:
        """Tokens (kept patches, fused), window by window in raster order: each adds its share to its patch."""
        for job, found in zip(batch, tokens.split([job.num_tokens for job in batch]), strict=True):
            there, inside, weights = self._met(job)
            order = (np.cumsum(job.kept) - 1).reshape(job.kept.shape)[inside]
            kept = weights > 0
            counts = kept.sum(axis=(1, 2)).tolist()
            arrays = (self._rank[there][kept], order[kept], weights[kept] / self._total[there][kept])
            rows, chosen, share = (torch.from_numpy(array).to(self._device) for array in arrays)
            shared = found[chosen].float() * share[:, None]
            layers = range(there[0].start, there[0].stop)
            for layer, into, part in zip(layers, rows.split(counts), shared.split(counts), strict=True):
                if len(part):
                    if layer not in self._tokens:
                        self._tokens[layer] = part.new_zeros(len(self._places[layer]), part.shape[1])
                    self._tokens[layer].index_add_(0, into, part)
        self._dtype = tokens.dtype
        self._num_added += 1

    @property
    def num_known(self) -> int:
        """Layers that no window will change any more, nor the next one, which a layer's border sees."""
        known = self._known[self._num_added]
        return known if self._apart or known == self._shape[0] else max(known - 1, 0)

    def painted(
        self, stop: int, raw: Callable[[np.ndarray], torch.Tensor]
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """The patches of the known layers before `stop` that were not yet painted, some at a time.

        -> (first voxels in the volume, (patches, 3); logits, (patches, labels, pz, py, px)). A thread may do this while
        another adds.

        raw: from such first voxels the normalised voxels with a halo, as the head wants them.
        """
        while self._num_painted < stop:
            first, last = self._num_painted, self._num_painted + 1
            most = min(stop, first + _LAYERS_AT_ONCE)
            while last < most and sum(map(len, self._places[first : last + 1])) <= TURNED_TO_FEATURES:
                last += 1
            for rows in self._bands(first, last):
                yield from self._paint(first, last, rows, raw)
            self._num_painted = last
            for layer in list(self._tokens):  # at once: the other thread puts new ones in
                if layer < last - (not self._apart):
                    del self._tokens[layer]

    def _bands(self, first: int, last: int) -> Iterator[slice]:
        """Rows (y) of these layers, as many as hold `TURNED_TO_FEATURES` patches, within the box."""
        counts = (self._total[first:last] > 0).sum(axis=(0, 2))[1:-1]
        begin, many = 1, 0
        for row, count in enumerate(counts.tolist(), 1):
            if many and many + count > TURNED_TO_FEATURES:
                yield slice(begin, row)
                begin, many = row, 0
            many += count
        if many:
            yield slice(begin, len(counts) + 1)

    def _paint(self, first: int, last: int, rows: slice, raw) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """These rows of the layers from `first` to before `last`, as far as they lie in the box."""
        begin, end = max(first, 1), min(last, self._shape[0] - 1)
        places = np.argwhere(self._total[begin : max(begin, end), rows, 1:-1]) + np.array([begin, rows.start, 1])
        if not len(places):
            return
        around = 0 if self._apart else 1
        seen = range(max(first - around, 0), min(last + around, self._shape[0]))
        wider = slice(rows.start - 1, rows.stop + 1)
        features = self._head.features(self._tokens_within(seen, wider))
        table = torch.from_numpy(self._table(seen, wider)).to(self._device)
        for part in np.split(places, range(PAINTED_AT_ONCE, len(places), PAINTED_AT_ONCE)):
            z, y, x = (part - (seen.start, wider.start, 0)).T
            zero = np.zeros_like(z)
            kept = np.stack([z, zero, y, x] if self._apart else [zero, z - 1, y, x])
            corners = (part + self._low) * self._size + self._first
            windows = raw(corners).to(features.dtype)
            yield corners, self._head.paint(features, table, torch.from_numpy(kept).to(self._device), windows)

    def _tokens_within(self, layers: range, rows: slice) -> torch.Tensor:
        """The tokens of some rows of some layers, in raster order."""
        parts = []
        for layer in layers:
            if layer in self._tokens:
                begin, end = np.searchsorted(self._places[layer][:, 0], (rows.start, rows.stop))
                parts.append(self._tokens[layer][begin:end])
        return torch.cat(parts).to(self._dtype)

    def _table(self, layers: range, rows: slice) -> np.ndarray:
        """Where among their features that of each place is, as the head's `paint` wants it."""
        kept = self._total[layers.start : layers.stop, rows] > 0
        nothing = np.count_nonzero(kept)
        table = np.where(kept, np.cumsum(kept).reshape(kept.shape) - 1, nothing)
        if self._apart:
            return np.pad(table[:, None], [(0, 0), (1, 1), (1, 1), (1, 1)], constant_values=nothing)
        return np.pad(table[None], [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=nothing)
