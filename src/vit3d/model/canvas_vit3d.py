"""Where the tokens of overlapping windows meet, so that the head paints each patch of a volume once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .blocks_vit3d import Block, BlockPlan, Box

PAINTED_AT_ONCE = 1024  # patches


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
    the box; a layer is what has the same z. Of a layer only its tokens are held until no window comes that adds to it
    or to the next, then what it paints until the next is painted: memory follows the windows' depth, not the volume's.

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
        self._features: dict[int, torch.Tensor] = {}
        self._num_added = self._num_painted = 0  # batches, layers

    def _met(self, job: Job) -> tuple[Box, Box, np.ndarray]:
        """The places that a window holds, the same counted from its own first, and its weights there (0: not kept)."""
        start = (np.array(job.write.start) - self._first) // self._size - self._low
        ends = zip(start.tolist(), job.kept.shape, self._shape, strict=True)
        there = tuple(slice(max(a, 0), max(min(a + n, size), 0)) for a, n, size in ends)
        inside = tuple(slice(t.start - a, t.stop - a) for t, a in zip(there, start.tolist(), strict=True))
        return there, inside, self._plan.weights(job.write, self._size)[inside] * job.kept[inside]

    def add(self, batch: list[Job], tokens: torch.Tensor) -> None:
        """Tokens (windows, kept patches, fused), each patch's in raster order: each adds its share to its patch."""
        for job, found in zip(batch, tokens, strict=True):
            there, inside, weights = self._met(job)
            order = (np.cumsum(job.kept) - 1).reshape(job.kept.shape)[inside]
            shares = weights / np.maximum(self._total[there], np.finfo(np.float32).tiny)
            for layer, share, index in zip(range(there[0].start, there[0].stop), shares, order, strict=True):
                kept = share > 0
                if kept.any():
                    arrays = (self._rank[layer][there[1:]][kept], index[kept], share[kept])
                    rows, chosen, factor = (torch.from_numpy(array).to(self._device) for array in arrays)
                    if layer not in self._tokens:
                        shape = (len(self._places[layer]), found.shape[1])
                        self._tokens[layer] = torch.zeros(shape, dtype=torch.float32, device=self._device)
                    self._tokens[layer].index_add_(0, rows, found[chosen].float() * factor[:, None])
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

        -> (first voxels in the volume, (patches, 3); logits, (patches, labels, pz, py, px)) in raster order.

        A thread may call this while another adds.

        raw: from such first voxels the normalised voxels with a halo, as the head wants them.
        """
        while self._num_painted < stop:
            first, last = self._num_painted, self._num_painted + 1
            while last < stop and sum(map(len, self._places[first : last + 1])) <= PAINTED_AT_ONCE:
                last += 1
            yield from self._paint(first, last, raw)
            self._num_painted = last

    def _paint(self, first: int, last: int, raw) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """The layers from `first` to before `last`, as far as they lie in the box."""
        around = 0 if self._apart else 1
        seen = range(max(first - around, 0), min(last + around, len(self._places)))
        for layer in seen:
            if layer in self._tokens:
                self._features[layer] = self._head.features(self._tokens.pop(layer).to(self._dtype))
        places = self._in_box(first, last)
        if len(places):
            held = [layer for layer in seen if layer in self._features]
            features = torch.cat([self._features[layer][:-1] for layer in held] + [self._features[held[-1]][-1:]])
            table = torch.from_numpy(self._table(seen, held, len(features) - 1)).to(self._device)
            for part in np.split(places, range(PAINTED_AT_ONCE, len(places), PAINTED_AT_ONCE)):
                z, y, x = part.T
                zero = np.zeros_like(z)
                kept = np.stack([z - first, zero, y, x] if self._apart else [zero, z - seen.start - 1, y, x])
                corners = (part + self._low) * self._size + self._first
                windows = raw(corners).to(features.dtype)
                yield corners, self._head.paint(features, table, torch.from_numpy(kept).to(self._device), windows)
        for layer in range(first - 1, last - around):
            self._features.pop(layer, None)

    def _in_box(self, first: int, last: int) -> np.ndarray:
        """The kept patches of these layers that lie in the box, (patches, 3), in raster order."""
        _, rows, columns = self._shape
        layers = range(max(first, 1), min(last, len(self._places) - 1))
        places = [np.insert(self._places[layer], 0, layer, axis=1) for layer in layers]
        places = np.concatenate(places) if places else np.empty((0, 3), dtype=int)
        y, x = places[:, 1], places[:, 2]
        return places[(y > 0) & (y < rows - 1) & (x > 0) & (x < columns - 1)]

    def _table(self, seen: range, held: list[int], nothing: int) -> np.ndarray:
        """Where the features of each place of the layers seen are, as the head's `paint` wants it."""
        _, rows, columns = self._shape
        table, begin = np.full((len(seen), rows + 2, columns + 2), nothing), 0
        for layer in held:
            y, x = self._places[layer].T + 1
            table[layer - seen.start, y, x] = np.arange(begin, begin + len(y))
            begin += len(y)
        if not self._apart:
            return table[None]
        apart = np.full((len(seen), 3, rows + 2, columns + 2), nothing)
        apart[:, 1] = table
        return apart
