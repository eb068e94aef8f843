"""A stack of any size through the network, window by window.

What `vit3d.segment` and the Hub's pipeline both run. `voxels` need a `shape`, a `dtype` and slicing, no more:
a stack on disk is read one window at a time. Arrays are (depth, height, width).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from .blocks_vit3d import Block, BlockPlan, Box
from .image_processing_vit3d import ViT3DImageProcessor
from .intensity_vit3d import IntensityStatistics

OVERLAP = (0.5, 0.25, 0.25)  # of the window (z, y, x), shared with each neighbour and blended
TOKENS_PER_BATCH = 4096
PATCHES_PER_BATCH = 4 * TOKENS_PER_BATCH  # those left out as well: their voxels take memory all the same
MOST_PADDED, FREE_PADDING = 1.25, 4  # a batch's largest row may hold so many times the tokens of its smallest, and 4
FAINT = 1 / 512  # less than half a level of an 8-bit picture: written as 0, so that background stays empty

Job = tuple[Block, Block, np.ndarray]  # window to read, block to write, token mask


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
        batch_size: most windows per forward pass; default as many as 4096 tokens and 16384 patches allow.
        progress: called with the list of batches, gives them one by one; `tqdm` fits.
    """
    statistics = statistics or processor.measure(voxels)
    mask = processor.foreground(voxels, statistics) if select else None
    tokens = None if mask is None else lambda window: processor.token_mask(window.read(mask))
    plan = window_plan(voxels.shape, model.config)
    jobs = occupied_windows(plan, tokens, model.config)
    todo = progress(list(batches(jobs, batch_size)))
    results = predict_batches(model, voxels, todo, processor, statistics)
    return without_faint(assemble(plan, results))


def window_plan(shape: tuple[int, int, int], config) -> BlockPlan:
    """The windows that cover a volume: the size the network was trained with, and on one grid of patches.

    A token's answer depends on where its patch is cut more than on anything else about its window, so neighbours cut
    the same patches. Along z a window is only a few patches deep: half of it is shared.
    """
    overlap = tuple(int(size * share) for size, share in zip(config.output_size, OVERLAP, strict=True))
    return BlockPlan(shape, config.output_size, overlap, step=config.painted_size)


def occupied_windows(plan: Iterable[Block], selected: Callable[[Block], np.ndarray] | None, config) -> list[Job]:
    """(window to read, block to write, token mask) of each block with a token, fewest tokens first.

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
            jobs.append((read, write, tokens))
    return sorted(jobs, key=lambda job: int(job[2].sum()))


def batches(jobs: list[Job], batch_size: int | None = None) -> Iterator[list[Job]]:
    """Windows of similar token count together, so that little is padded; `jobs` come fewest tokens first."""
    most = batch_size or max(1, PATCHES_PER_BATCH // jobs[0][2].size if jobs else 1)
    batch, least = [], 0
    for job in jobs:
        tokens = int(job[2].sum())
        full = len(batch) == most or (len(batch) + 1) * tokens > TOKENS_PER_BATCH
        if batch and (full or tokens > MOST_PADDED * least + FREE_PADDING):
            yield batch
            batch = []
        if not batch:
            least = tokens
        batch.append(job)
    if batch:
        yield batch


def predict_batches(
    model,
    voxels,
    todo: Iterable[list[Job]],
    processor: ViT3DImageProcessor,
    statistics: IntensityStatistics,
) -> Iterator[list[tuple[Block, torch.Tensor]]]:
    """For each batch, in one forward pass: (block to write, logits on the CPU) of each window.

    While the network works on one batch, a thread reads and normalises the next.
    """
    # two, in turn, for all batches: fresh memory would take longer than normalising
    buffers = [np.empty(0, dtype=np.float32)] * 2

    def prepared(batch: list[Job]) -> tuple[list[Job], np.ndarray]:
        shape = (len(batch), 1, *batch[0][0].size)
        buffers.reverse()
        if buffers[0].size < math.prod(shape):
            buffers[0] = np.empty(math.prod(shape), dtype=np.float32)
        windows = buffers[0][: math.prod(shape)].reshape(shape)
        for (read, _, _), window in zip(batch, windows, strict=True):
            processor.pixel_values(read.read(voxels), statistics, out=window[0])
        return batch, windows

    for batch, windows in _one_ahead(prepared, todo):
        yield _logits(model, batch, windows)


@torch.inference_mode()
def _logits(model, batch: list[Job], windows: np.ndarray) -> list[tuple[Block, torch.Tensor]]:
    token_mask = np.stack([tokens for _, _, tokens in batch])
    # all kept is the dense computation: without a mask it needs no gathering
    mask = None if token_mask.all() else torch.from_numpy(token_mask).to(model.device)
    logits = model(torch.from_numpy(windows).to(model.device), mask).logits[:, 0].cpu()
    return [(write, window) for (_, write, _), window in zip(batch, logits, strict=True)]


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


def assemble(
    plan: BlockPlan,
    results: Iterable[list[tuple[Block, np.ndarray]]],
    box: Box | None = None,
    activation: Callable[[torch.Tensor], torch.Tensor] = torch.sigmoid,
) -> np.ndarray:
    """Weighted sum of `activation` of the windows (arrays or tensors), float32, the volume's shape or that of a `box`.

    A thread adds one batch while the next is computed. A block left out counts as zeros.
    """
    box = box or tuple(slice(0, size) for size in plan.shape)
    volume = np.zeros([b.stop - b.start for b in box], dtype=np.float32)  # numpy asks for large pages

    def add(batch: list[tuple[Block, np.ndarray]]) -> None:
        for block, result in batch:
            there, crop = plan.kept(block, box)
            shares, rows, columns = plan.profiles(block, crop)
            across, kept = torch.from_numpy(rows[:, None] * columns), torch.as_tensor(result[crop], dtype=torch.float32)
            for plane, values, share in zip(torch.from_numpy(volume[there]), kept, shares.tolist(), strict=True):
                plane.addcmul_(activation(values), across, value=share)  # plane by plane: in the cache

    for _ in _one_ahead(add, results):
        pass
    return volume


def without_faint(probability: np.ndarray) -> np.ndarray:
    """The same array, its probabilities below 1/512 set to 0."""
    for plane in probability:  # plane by plane: in the cache
        plane *= plane >= FAINT
    return probability
