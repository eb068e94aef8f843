"""Stack in; probability, mask and tree out: `pipeline("neuron-segmentation", model=...)`.

Runs from the Hub as it is. Where vit3d itself is installed it also reads every format that vit3d reads, and traces.
"""

import importlib
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import Pipeline
from transformers.utils import logging

from .image_processing_vit3d import ViT3DImageProcessor
from .inference_vit3d import predict
from .intensity_vit3d import check_finite

TASK = "neuron-segmentation"


class NeuronSegmentationPipeline(Pipeline):
    """A stack (depth, height, width) of any size -> where its neurites are, and the tree they form.

    Takes a numpy array (or what slices like one: a Zarr array, a memory map), a path, a `vit3d.Volume`, or a list
    of these. Gives a dict, or a list of them: `probability` (float32) and `mask` (bool), both of the stack's shape,
    and where vit3d is installed `tree`, a `NeuronTree`, and `swc`, its text: those of `vit3d reconstruct`, but it works
    on the stack's own voxels; of coarse ones `vit3d reconstruct`, which refines them, makes more.

    Args, of the pipeline or of a call:
        spacing_um: voxel size (z, y, x); overrides what a file or a `Volume` says.
        channel: which channel of a file to read, counted from 0.
        select: leave out patches that hold only background (cost follows the neuron); False computes everything.
        batch_size: most windows per forward pass; default as many as hold 4096 tokens.
        threshold: voxels of a higher probability are in the mask.
        trace: False leaves the tree out; True demands it, which fails where vit3d is not installed.
    """

    _load_image_processor = None  # made from the config where the checkpoint has none
    _load_tokenizer = _load_feature_extractor = _load_processor = _load_video_processor = False

    def __init__(self, model, *args, image_processor=None, batch_size: int | None = None, **kwargs):
        processor = image_processor or ViT3DImageProcessor.from_config(model.config)
        super().__init__(model, *args, image_processor=processor, windows=batch_size, **kwargs)
        self.model.eval()
        if self.device.type == "cpu" and self.model.dtype == torch.float16:
            self.model.float()  # CPUs store half precision and compute slowly in it

    def __call__(self, inputs, *args, batch_size: int | None = None, **kwargs):
        """See the class; `batch_size` counts windows, stacks go one by one."""
        return super().__call__(inputs, *args, batch_size=1, windows=batch_size, **kwargs)

    def _sanitize_parameters(
        self, spacing_um=None, channel=None, select=None, windows=None, threshold=None, trace=None
    ) -> tuple[dict, dict, dict]:
        groups = (
            {"spacing_um": spacing_um, "channel": channel},
            {"select": select, "windows": windows},
            {"threshold": threshold, "trace": trace},
        )
        return tuple({key: value for key, value in group.items() if value is not None} for group in groups)

    def preprocess(self, stack, spacing_um=None, channel=None) -> dict:
        if isinstance(stack, str | Path):
            stack, stated_um = _read(Path(stack), spacing_um, channel)
        else:
            stated_um = getattr(stack, "spacing_um", None)
            stack = getattr(stack, "voxels", stack)
        return {"voxels": _checked(stack), "spacing_um": spacing_um or stated_um}

    def _forward(self, inputs: dict, select: bool = True, windows: int | None = None) -> dict:
        def progress(batches: list):
            return logging.tqdm(batches, desc="segment", unit="batch", disable=None, leave=False)

        statistics = self.image_processor.measure(inputs["voxels"])
        options = {"statistics": statistics, "select": select, "batch_size": windows, "progress": progress}
        probability = predict(self.model, inputs["voxels"], processor=self.image_processor, **options)
        return {**inputs, "statistics": statistics, "probability": probability}

    def postprocess(self, outputs: dict, threshold: float = 0.5, trace: bool | None = None) -> dict:
        probability = outputs["probability"]
        found = {"probability": probability, "mask": probability > threshold}
        vit3d = None if trace is False else _installed("vit3d")
        if trace and vit3d is None:
            raise ValueError("A tree needs vit3d itself: pip install vit3d-neuron, or leave `trace` out.")
        if vit3d is not None:
            volumes = (vit3d.Volume(voxels, outputs["spacing_um"]) for voxels in (probability, outputs["voxels"]))
            traced = importlib.import_module("vit3d.reconstruction").traced
            found["tree"], _ = traced(*volumes, outputs["statistics"], {})
            found["swc"] = _swc_text(found["tree"], vit3d.write_swc)
        return found


def _installed(name: str):
    """A package that the network can do without, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _read(path: Path, spacing_um, channel: int | None) -> tuple:
    """(voxels, spacing in um or None) of a file, by vit3d's reader where it is installed."""
    if vit3d := _installed("vit3d"):
        volume = vit3d.read_volume(path, spacing_um=spacing_um, channel=channel)
        return volume.voxels, volume.spacing_um
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file.")
    tifffile = _installed("tifffile")
    if tifffile is None or path.suffix.lower() not in (".tif", ".tiff") or channel is not None:
        raise ValueError(
            f"{path} cannot be read here: pip install vit3d-neuron reads it (tifffile alone reads a TIFF of one "
            "channel), or pass its voxels as an array (depth, height, width)."
        )
    return tifffile.imread(path), None


def _checked(stack):
    """An array-like stack as it is, anything else as an array; a sentence where it is no stack of grey levels."""
    voxels = stack if hasattr(stack, "shape") and not isinstance(stack, torch.Tensor) else np.asarray(stack)
    if len(voxels.shape) != 3 or 0 in voxels.shape:
        raise ValueError(f"A stack is (depth, height, width) and not empty, got shape {tuple(voxels.shape)}.")
    if np.dtype(voxels.dtype).kind not in "buif":
        raise ValueError(f"A stack holds integers or floats, got {voxels.dtype}.")
    check_finite(voxels, "The stack")
    return voxels


def _swc_text(tree, write_swc) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_swc(tree, Path(folder) / "tree.swc")
        return (Path(folder) / "tree.swc").read_text()
