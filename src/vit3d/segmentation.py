"""VERB segment: model + Volume -> probability Volume, block by block."""

from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm

from .model.blocks_vit3d import Block, BlockPlan, assemble
from .model.image_processing_vit3d import ViT3DImageProcessor
from .model.intensity_vit3d import IntensityStatistics
from .volume import Volume

OVERLAP = 0.25  # of the window, shared with each neighbour and blended
TOKENS_PER_BATCH = 4096
FAINT = 1 / 512  # less than half a level of an 8-bit picture: written as 0, so that background stays empty


@torch.inference_mode()
def segment(
    model,
    volume: Volume,
    *,
    processor: ViT3DImageProcessor | None = None,
    statistics: IntensityStatistics | None = None,
    select: bool = True,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
) -> Volume:
    """Probability in [0, 1] that each voxel belongs to a neurite: float32, same shape and spacing as `volume`.

    Args:
        model: a `ViT3DForNeuronSegmentation`; moved to `device` (default: where it is) and put in evaluation mode.
        processor: normalises and selects; built from the model's config when none is given.
        statistics: grey levels of the whole volume, where `volume` is a part of it; measured when not given.
        select: leave out patches that hold only background (cost follows the neuron); False computes everything.
        batch_size: most windows per forward pass; default as many as 4096 tokens allow.

    Windows have the size the network was trained with, overlap
    by a quarter and are blended. A volume smaller than a window is padded by repeating its border.
    """
    model = model.eval() if device is None else model.eval().to(device)
    config = model.config
    processor = processor or ViT3DImageProcessor.from_config(config)
    statistics = statistics or processor.measure(volume.voxels)
    mask = processor.foreground(volume.voxels, statistics) if select else np.ones(volume.shape, dtype=bool)
    overlap = tuple(int(size * OVERLAP) for size in config.output_size)
    plan = BlockPlan(volume.shape, config.output_size, overlap)
    jobs = _occupied_windows(plan, mask, processor, config)
    batches = list(_batches(jobs, batch_size or len(jobs)))
    results = (
        result
        for batch in tqdm(batches, desc="segment", unit="batch", disable=None, leave=False)
        for result in _predict(model, volume.voxels, batch, processor, statistics)
    )
    probability = assemble(plan, results)
    probability[probability < FAINT] = 0
    return Volume(probability, volume.spacing_um)


def _occupied_windows(plan: BlockPlan, mask: np.ndarray, processor, config) -> list[tuple[Block, Block, np.ndarray]]:
    """(window to read, block to write, token mask) of each window with a token, fewest tokens first.

    With `center_slice` the window reaches beyond the one slice it writes.
    """
    sizes = zip(config.volume_size, config.output_size, strict=True)
    margin = [read // 2 - write // 2 for read, write in sizes]
    jobs = []
    for write in plan:
        start = tuple(s - m for s, m in zip(write.start, margin, strict=True))
        read = Block(start, config.volume_size)
        if mask[read.inside(plan.shape)].any():
            jobs.append((read, write, processor.token_mask(read.read(mask))))
    return sorted(jobs, key=lambda job: int(job[2].sum()))


def _batches(jobs: list, batch_size: int) -> Iterator[list]:
    """Windows of similar token count together, so that little is padded."""
    batch = []
    for job in jobs:
        if batch and (len(batch) == batch_size or (len(batch) + 1) * job[2].sum() > TOKENS_PER_BATCH):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _predict(
    model, voxels, batch: list, processor: ViT3DImageProcessor, statistics: IntensityStatistics
) -> Iterator[tuple[Block, np.ndarray]]:
    reads, writes, masks = zip(*batch, strict=True)
    windows = np.stack([processor.pixel_values(read.read(voxels), statistics) for read in reads])
    pixel_values = torch.from_numpy(windows[:, None]).to(model.device)
    token_mask = torch.from_numpy(np.stack(masks)).to(model.device)
    # all kept is the dense computation: without a mask it needs no gathering
    logits = model(pixel_values, None if token_mask.all() else token_mask).logits
    yield from zip(writes, logits[:, 0].sigmoid().cpu().numpy(), strict=True)
