"""A stack of any size through the network, window by window.

What `vit3d.segment` and the Hub's pipeline both run. `voxels` need a `shape`, a `dtype` and slicing, no more:
a stack on disk is read one window, or one layer of patches, at a time. Arrays are (depth, height, width).

Windows share patches. The encoder sees such a patch in each of them; the mean of what it says is painted by the head,
once, beside the patches that lie around it in the volume.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from threading import Event, Lock

import numpy as np
import torch

from .blocks_vit3d import Block, BlockPlan, Box
from .canvas_vit3d import Canvas, Job
from .head_vit3d import HALO
from .image_processing_vit3d import ViT3DImageProcessor
from .intensity_vit3d import IntensityStatistics

TOKENS_PER_BATCH = 4096  # class tokens among them, of which a window has one
TOKENS_PER_GROUP = 4 * TOKENS_PER_BATCH  # so many are computed before what no deeper window adds to is painted
FAINT = 1 / 512  # less than half a level of an 8-bit picture: written as 0, so that background stays empty


def predict(
    model,
    voxels,
    *,
    processor: ViT3DImageProcessor,
    statistics: IntensityStatistics | None = None,
    select: bool = True,
    batch_size: int | None = None,
    progress: Callable[[list], Iterable] = iter,
) -> np.ndarray:
    """Probability in [0, 1] that each voxel belongs to a neurite: float32, the shape of `voxels`.

    Args:
        model: a `ViT3DForNeuronSegmentation` in evaluation mode, where it is to run.
        statistics: grey levels of the whole volume, where `voxels` are a part of it; measured when not given.
        select: leave out patches that hold only background; False computes everything.
        batch_size: most windows per forward pass; default as many as hold 4096 tokens.
        progress: called with the list of batches, gives them one by one; `tqdm` fits.
    """
    statistics = statistics or processor.measure(voxels)
    mask = processor.foreground(voxels, statistics) if select else None
    selected = None if mask is None else lambda window: processor.token_mask(window.read(mask))
    plan = window_plan(voxels.shape, model.config)
    todo = list(batches(occupied_windows(plan, selected, model.config), batch_size))
    return predict_box(model, voxels, plan, todo, processor, statistics, progress=progress)


def window_plan(shape: tuple[int, int, int], config) -> BlockPlan:
    """The windows that cover a volume: the size the network was trained with, and on one grid of patches.

    A token's answer depends on where its patch is cut more than on anything else about its window, so neighbours cut
    the same patches. One of them is shared in the plane; along z, where a window is only a few patches deep, half.
    """
    depth, *plane = config.grid_size
    shared = [depth // 2, *(min(1, patches - 1) for patches in plane)]
    overlap = tuple(n * size for n, size in zip(shared, config.painted_size, strict=True))
    return BlockPlan(shape, config.output_size, overlap, step=config.painted_size)


def windows_of(plan: BlockPlan, box: Box, config) -> list[Block]:
    """The windows that decide a box: those with a patch of it, or with one beside it, which its border sees."""
    around = [0 if config.prediction == "center_slice" else config.painted_size[0], *config.painted_size[1:]]
    return plan.meeting(tuple(slice(b.start - n, b.stop + n) for b, n in zip(box, around, strict=True)))


def occupied_windows(plan: Iterable[Block], selected: Callable[[Block], np.ndarray] | None, config) -> list[Job]:
    """A job for each block with a token, in the plan's order.

    `selected`: the token mask of a window; None keeps all tokens. With `center_slice` the window reaches beyond the
    one slice it writes.
    """
    sizes = zip(config.volume_size, config.output_size, strict=True)
    margin = [read // 2 - write // 2 for read, write in sizes]
    jobs = []
    for write in plan:
        start = tuple(s - m for s, m in zip(write.start, margin, strict=True))
        read = Block(start, config.volume_size)
        tokens = np.ones(config.grid_size, dtype=bool) if selected is None else selected(read)
        if tokens.any():
            jobs.append(Job(read, write, tokens))
    return jobs


def batches(jobs: list[Job], batch_size: int | None = None) -> Iterator[list[Job]]:
    """Windows of like token count together, which attend together; groups of them, one deeper than the other."""
    for group in _groups(jobs):
        batch, tokens = [], 0
        for job in sorted(group, key=lambda job: job.num_tokens):
            more = 1 + job.num_tokens
            if batch and (len(batch) == batch_size or tokens + more > TOKENS_PER_BATCH):
                yield batch
                batch, tokens = [], 0
            batch.append(job)
            tokens += more
        yield batch


def _groups(jobs: list[Job]) -> Iterator[list[Job]]:
    """All windows of one depth, and of the next ones, until they hold `TOKENS_PER_GROUP`."""
    group = []
    for _, beside in groupby(jobs, key=lambda job: job.write.start[0]):
        group += beside
        if sum(job.num_tokens for job in group) >= TOKENS_PER_GROUP:
            yield group
            group = []
    if group:
        yield group


@torch.inference_mode()
def predict_box(
    model,
    voxels,
    plan: BlockPlan,
    todo: list[list[Job]],
    processor: ViT3DImageProcessor,
    statistics: IntensityStatistics,
    box: Box | None = None,
    progress: Callable[[list], Iterable] = iter,
) -> np.ndarray:
    """Probability of a box of the volume (default all of it), float32, from batches of the windows that decide it.

    What no window keeps is 0. While the network encodes one batch, a thread reads and normalises the next, and one
    paints what is known by then.
    """
    box = box or tuple(slice(0, size) for size in plan.shape)
    probability = np.zeros([b.stop - b.start for b in box], dtype=np.float32)  # numpy asks for large pages
    canvas, given_up = Canvas(model, plan, todo, box), Event()
    voxels = voxels if isinstance(voxels, np.ndarray) else _OneReader(voxels)

    def raw(corners: np.ndarray) -> torch.Tensor:
        values = processor.pixel_values(_raw(voxels, corners, model.config).reshape(len(corners), -1), statistics)
        return torch.from_numpy(values).to(model.device).view(-1, 1, *(n + 2 * HALO for n in model.config.painted_size))

    @torch.inference_mode()
    def paint(stop: int) -> None:
        for corners, logits in canvas.painted(stop, raw):
            if given_up.is_set():
                return
            found = logits[:, 0].sigmoid()
            _write(probability, box, corners, found.masked_fill_(found < FAINT, 0).cpu().numpy())

    with ThreadPoolExecutor(1) as painter:
        try:
            begun, painting = 0, None
            for batch, tokens in _encoded(model, voxels, progress(todo), processor, statistics):
                canvas.add(batch, tokens)
                if canvas.num_known > begun:
                    if painting is not None:
                        painting.result()
                    begun = canvas.num_known
                    painting = painter.submit(paint, begun)
            if painting is not None:
                painting.result()
        except BaseException:  # an interrupt as well: nobody waits for what is still to be painted
            given_up.set()
            raise
    return probability


class _OneReader:
    """Voxels that two threads may read from, one at a time."""

    def __init__(self, voxels):
        self.shape, self.dtype, self._voxels, self._lock = voxels.shape, voxels.dtype, voxels, Lock()

    def __getitem__(self, box: Box) -> np.ndarray:
        with self._lock:
            return np.asarray(self._voxels[box])


def _encoded(
    model, voxels, todo: Iterable[list[Job]], processor: ViT3DImageProcessor, statistics: IntensityStatistics
) -> Iterator[tuple[list[Job], torch.Tensor]]:
    """For each batch, in one forward pass: the tokens of its windows' kept patches."""

    def prepared(batch: list[Job]) -> tuple[list[Job], np.ndarray]:
        patches = np.concatenate([_kept_patches(job, voxels, model.config.patch_size) for job in batch])
        return batch, processor.pixel_values(patches, statistics)

    for batch, patches in _one_ahead(prepared, todo):
        token_mask = torch.from_numpy(np.stack([job.kept for job in batch]))  # where its numbers are asked for
        yield batch, model(torch.from_numpy(patches).to(model.device), token_mask).tokens


def _kept_patches(job: Job, voxels, patch_size: tuple[int, int, int]) -> np.ndarray:
    """(kept patches, voxels of a patch) of a window, in raster order."""
    window = job.read.read(voxels)
    cut = [side for pair in zip(job.kept.shape, patch_size, strict=True) for side in pair]
    return window.reshape(cut).transpose(0, 2, 4, 1, 3, 5)[job.kept].reshape(job.num_tokens, -1)


def _raw(voxels, corners: np.ndarray, config) -> np.ndarray:
    """Patches of a volume, their first voxels at `corners` (patches, 3), and a halo of `HALO` around each; its border
    is repeated. With `center_slice` so is that of a slice's window."""
    size = [n + 2 * HALO for n in config.painted_size]
    found = np.empty((len(corners), *size), dtype=voxels.dtype)
    reach = (-HALO, config.painted_size[0] + HALO - 1)
    if config.prediction == "center_slice":
        before = config.volume_size[0] // 2
        reach = np.clip(reach, -before, config.volume_size[0] - 1 - before)
    for layer, places in _by_layer(corners):
        low, high = corners[places].min(axis=0) - HALO, corners[places].max(axis=0) + size - HALO
        low[0], high[0] = layer + reach[0], layer + reach[1] + 1
        slab = Block(tuple(low.tolist()), tuple((high - low).tolist())).read(voxels)
        short = size[0] - len(slab)
        slab = np.pad(slab, [(short // 2, short - short // 2), (0, 0), (0, 0)], mode="edge") if short else slab
        windows = np.lib.stride_tricks.sliding_window_view(slab, size)[0]
        _, y, x = (corners[places] - HALO - low).T
        found[places] = windows[y, x]
    return found


def _write(probability: np.ndarray, box: Box, corners: np.ndarray, patches: np.ndarray) -> None:
    """Put patches, their first voxels at `corners` (patches, 3) of the volume, where a box of it has them."""
    size, room = np.array(patches.shape[1:]), np.array(probability.shape)
    corners = corners - [b.start for b in box]
    within = ((corners >= 0) & (corners + size <= room)).all(axis=1)
    for layer, places in _by_layer(corners):
        whole = places[within[places]]
        if len(whole):
            slab = probability[layer : layer + size[0]]
            windows = np.lib.stride_tricks.sliding_window_view(slab, size, writeable=True)[0]
            windows[corners[whole, 1], corners[whole, 2]] = patches[whole]
        for place in places[~within[places]]:
            low, high = np.maximum(corners[place], 0), np.minimum(corners[place] + size, room)
            cut = map(slice, low - corners[place], high - corners[place])
            probability[tuple(map(slice, low, high))] = patches[place][tuple(cut)]


def _by_layer(corners: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(z, which of the corners have it), from the first on."""
    for layer in np.unique(corners[:, 0]):
        yield int(layer), np.flatnonzero(corners[:, 0] == layer)


def _one_ahead(function: Callable, items: Iterable) -> Iterator:
    """`map`, in a thread that makes the next result while the last one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for item in items:
            last, coming = coming, pool.submit(function, item)
            del item  # freed by the thread, when it is done with it
            if last is not None:
                yield last.result()
        if coming is not None:
            yield coming.result()
