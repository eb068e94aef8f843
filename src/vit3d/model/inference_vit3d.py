"""A stack of any size through the network, window by window.

What `vit3d.segment` and the Hub's pipeline both run. `voxels` need a `shape`, a `dtype` and slicing, no more:
a stack on disk is read one window at a time. Arrays are (depth, height, width).
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from .blocks_vit3d import Block, BlockPlan, assemble
from .image_processing_vit3d import ViT3DImageProcessor
from .intensity_vit3d import IntensityStatistics

OVERLAP = (0.5, 0.25, 0.25)  # of the window (z, y, x), shared with each neighbour and blended
TOKENS_PER_BATCH = 4096
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
        batch_size: most windows per forward pass; default as many as 4096 tokens allow.
        progress: called with the list of batches, gives them one by one; `tqdm` fits.
    """
    statistics = statistics or processor.measure(voxels)
    mask = processor.foreground(voxels, statistics) if select else np.ones(voxels.shape, dtype=bool)
    plan = window_plan(voxels.shape, model.config)
    jobs = occupied_windows(plan, mask, processor, model.config)
    todo = progress(list(batches(jobs, batch_size)))
    results = (result for batch in todo for result in predict_batch(model, voxels, batch, processor, statistics))
    return without_faint(assemble(plan, results))


def window_plan(shape: tuple[int, int, int], config) -> BlockPlan:
    """The windows that cover a volume: the size the network was trained with, and on one grid of patches.

    A token's answer depends on where its patch is cut more than on anything else about its window, so neighbours cut
    the same patches. Along z a window is only a few patches deep: half of it is shared.
    """
    overlap = tuple(int(size * share) for size, share in zip(config.output_size, OVERLAP, strict=True))
    return BlockPlan(shape, config.output_size, overlap, step=config.painted_size)


def occupied_windows(plan: Iterable[Block], mask: np.ndarray, processor: ViT3DImageProcessor, config) -> list[Job]:
    """(window to read, block to write, token mask) of each block with a token, fewest tokens first.

    `mask` is bool, the volume's shape: where a neurite may be. With `center_slice` the window reaches beyond the
    one slice it writes.
    """
    sizes = zip(config.volume_size, config.output_size, strict=True)
    margin = [read // 2 - write // 2 for read, write in sizes]
    jobs = []
    for write in plan:
        start = tuple(s - m for s, m in zip(write.start, margin, strict=True))
        read = Block(start, config.volume_size)
        if mask[read.inside(mask.shape)].any():
            jobs.append((read, write, processor.token_mask(read.read(mask))))
    return sorted(jobs, key=lambda job: int(job[2].sum()))


def batches(jobs: list[Job], batch_size: int | None = None) -> Iterator[list[Job]]:
    """Windows of similar token count together, so that little is padded; `jobs` come fewest tokens first."""
    most = batch_size or len(jobs)
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


@torch.inference_mode()
def predict_batch(
    model, voxels, batch: list[Job], processor: ViT3DImageProcessor, statistics: IntensityStatistics
) -> list[tuple[Block, np.ndarray]]:
    """(block to write, its probability, float32) of each window of a batch, in one forward pass."""
    reads, writes, masks = zip(*batch, strict=True)
    windows = np.stack([processor.pixel_values(read.read(voxels), statistics) for read in reads])
    pixel_values = torch.from_numpy(windows[:, None]).to(model.device)
    token_mask = torch.from_numpy(np.stack(masks)).to(model.device)
    # all kept is the dense computation: without a mask it needs no gathering
    logits = model(pixel_values, None if token_mask.all() else token_mask).logits
    return list(zip(writes, logits[:, 0].sigmoid().cpu().numpy(), strict=True))


def without_faint(probability: np.ndarray) -> np.ndarray:
    """The same array, its probabilities below 1/512 set to 0."""
    probability[probability < FAINT] = 0
    return probability
