"""VERB segment: model + Volume -> probability Volume, block by block.

`accelerate launch -m vit3d.segmentation IN.zarr OUT.zarr` (or torchrun) is `vit3d segment` in many processes; what is
larger than memory is in `blockwise`.
"""

import sys
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from .model.image_processing_vit3d import ViT3DImageProcessor
from .model.inference_vit3d import predict
from .model.intensity_vit3d import IntensityStatistics, check_finite
from .volume import Volume, refuse_other_than_volume


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
        batch_size: most windows per forward pass; default as many as hold 4096 tokens.

    Windows have the size the network was trained with and share half of their depth and a patch in the plane; a patch
    is painted once, from the mean of its tokens. A volume smaller than a window is padded by repeating its border.
    ValueError for NaN, infinite voxels and those beyond float32, and for a network that gives such.
    """
    refuse_other_than_volume(volume)
    check_finite(volume.voxels)
    model = model.eval() if device is None else model.eval().to(device)
    probability = predict(
        model,
        volume.voxels,
        processor=processor or ViT3DImageProcessor.from_config(model.config),
        statistics=statistics,
        select=select,
        batch_size=batch_size,
        progress=partial(tqdm, desc="segment", unit="batch", disable=None, leave=False),
    )
    if not np.isfinite(probability.sum()):
        raise ValueError("The network gave NaN or infinite probabilities.")
    return Volume(probability, volume.spacing_um)


def main() -> None:
    """`python -m vit3d.segmentation`: the arguments of `vit3d segment`. No process group: ranks meet in the store."""
    from .cli import main as command

    command(["segment", *sys.argv[1:]])


if __name__ == "__main__":
    main()
