"""What a run may hold in memory: the write box that fits, and the refusal of what does not."""

import math
import os
import re
import resource
import sys
from pathlib import Path

import numpy as np
import torch

from ..model.blocks_vit3d import Block
from ..model.canvas_vit3d import TURNED_TO_FEATURES, Job
from ..model.ground_vit3d import CELL
from ..model.head_vit3d import HALO
from ..model.image_processing_vit3d import ViT3DImageProcessor
from ..model.inference_vit3d import TOKENS_PER_BATCH, TOKENS_PER_GROUP, predict_box, window_plan
from ..model.intensity_vit3d import IntensityStatistics
from ..volume import Volume
from .block_store import CHUNK, Layout
from .selection import KEPT_BYTES

BOXES = ((256, 1024, 1024), (256, 512, 512), (128, 512, 512), (128, 384, 384), (128, 256, 256), (64, 128, 128))
_ALLOWANCE_BYTES = 3 * 2**28  # Python, torch and a batch's activations, where the box is chosen


def choose_layout(model, volume: Volume, memory_bytes: int, box: tuple[int, int, int] | None = None) -> Layout:
    """The write box asked for, or the largest that should fit into memory; no larger than the volume."""
    whole = [-(-n // c) * c for n, c in zip(volume.shape, CHUNK, strict=True)]
    wanted = [box] if box else BOXES
    layouts = [Layout(volume.shape, tuple(map(min, size, whole)), volume.spacing_um) for size in wanted]
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    free = memory_bytes - _ALLOWANCE_BYTES - weights
    return next((fit for fit in layouts if working_bytes(fit, model.config, volume) <= free), layouts[-1])


def working_bytes(layout: Layout, config, volume: Volume) -> int:
    """Most memory that the boxes under way take: one that was read and computed, one that was computed, one that is
    read or scanned, what is known of scanned ones, and chunks being decoded."""
    sizes = zip(config.volume_size, config.patch_size, strict=True)
    windows = [2 * (window - 1 + patch + HALO) for window, patch in sizes]  # of what lies beside the box as well
    seen, scanned = (_voxels_around(layout, around) for around in (windows, [2 * 3 * cell for cell in CELL]))
    chunks = getattr(volume.voxels, "chunks", None) or (1, 1, 1)
    itemsize = np.dtype(volume.voxels.dtype).itemsize
    decoding = 2 * (os.cpu_count() or 1) * float(np.prod(chunks, dtype=float)) * itemsize
    known = min(KEPT_BYTES, np.prod(layout.shape, dtype=float) / 8)
    finite = np.dtype(volume.voxels.dtype).kind == "f"  # asked voxel by voxel
    coming = max(seen * (itemsize + finite), scanned * (itemsize + 2))  # the mask, and a copy that is cut or filled up
    written = 2 * 4 * np.prod(layout.box, dtype=float)
    return int(seen * itemsize + coming + written + known + decoding + _canvas_bytes(layout, config))


def _canvas_bytes(layout: Layout, config) -> float:
    """Tokens of the layers that a group of windows adds to, or that wait to be painted, and what a band paints."""
    size = config.painted_size
    depth, rows, columns = (b // p + 2 for b, p in zip(layout.box, size, strict=True))
    layer, fused = rows * columns, len(config.fused_layers) * config.hidden_size
    tokens = min(depth * layer, (config.output_size[0] // size[0] + 4) * layer + TOKENS_PER_GROUP)
    turned = 3 * min(depth * layer, TURNED_TO_FEATURES + 2 * columns) * config.head_channels * np.prod(size)
    return 4.0 * (tokens * fused + turned)


def _voxels_around(layout: Layout, around: list[int]) -> float:
    """Voxels of a write box and so many more along each axis, at most the volume's."""
    return np.prod([min(b + more, n) for b, more, n in zip(layout.box, around, layout.shape, strict=True)], dtype=float)


def check_memory(layout: Layout, model, volume: Volume, statistics: IntensityStatistics, memory_bytes: int) -> None:
    """Run the largest batch, which also warms the network up, and refuse what will not fit."""
    config = model.config
    try:
        _trial(model, volume, statistics)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"One batch of windows does not fit on {model.device}: {error}") from error
    base, working = peak_bytes(), working_bytes(layout, config, volume)
    if base + working > memory_bytes:
        raise ValueError(
            f"A write box of {layout.box} voxels needs {working / 2**30:.2f} GiB beside {base / 2**30:.2f} GiB for the "
            f"network, more than the memory budget of {memory_bytes / 2**30:.2f} GiB; allow more, or choose a "
            "smaller box for a new store."
        )


def _trial(model, volume: Volume, statistics: IntensityStatistics) -> None:
    """A batch of `TOKENS_PER_BATCH`, or one window that holds more; every other keeps a patch less, for padding takes
    memory too."""
    config = model.config
    read, write = Block((0, 0, 0), config.volume_size), Block((0, 0, 0), config.output_size)
    size = math.prod(config.grid_size)
    windows = -(-TOKENS_PER_BATCH // (1 + size))
    most = min(size, max(1, TOKENS_PER_BATCH // windows - 1))
    kept = [(np.arange(size) < max(1, most - number % 2)).reshape(config.grid_size) for number in range(windows)]
    batch = [Job(read, write, tokens) for tokens in kept]
    voxels, plan = np.zeros(config.volume_size, dtype=volume.voxels.dtype), window_plan(config.output_size, config)
    predict_box(model, voxels, plan, [batch], ViT3DImageProcessor.from_config(config), statistics)


def peak_bytes() -> int:
    """Most memory this process has had. Linux also counts what its parent had into `ru_maxrss`, hence not that."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status).group(1))
    except (OSError, AttributeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
