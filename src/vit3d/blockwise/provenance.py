"""What a stored result was computed from and on: recorded once, compared before anybody adds to it."""

import hashlib
import json
import platform
import re
from pathlib import Path

import numpy as np
import torch

from ..model.canvas_vit3d import PAINTED_AT_ONCE, TURNED_TO_FEATURES
from ..model.inference_vit3d import FAINT, TOKENS_PER_BATCH, TOKENS_PER_GROUP, window_plan
from ..model.intensity_vit3d import sampled
from ..model.modeling_vit3d import SCORES_AT_ONCE
from ..model.packing_vit3d import FREE_PADDING, MOST_PADDED
from ..volume import Volume
from .block_store import LEVELS, BlockStore, differences


def identity_of(model, volume: Volume, processor, select: bool) -> dict:
    """All that decides the probabilities, but for the statistics."""
    return {
        "input": {
            "shape": list(volume.shape),
            "dtype": str(np.dtype(volume.voxels.dtype)),
            "spacing_um": volume.spacing_um and list(volume.spacing_um),
            "sample": _sample_digest(volume.voxels),
        },
        "model": model_digest(model),
        "polarity": processor.polarity,
        "select": select,
        "windows": {
            "overlap": list(window_plan(volume.shape, model.config).overlap),
            "tokens_per_batch": TOKENS_PER_BATCH,
            "tokens_per_group": TOKENS_PER_GROUP,
            "scores_at_once": SCORES_AT_ONCE,
            "painted_at_once": [PAINTED_AT_ONCE, TURNED_TO_FEATURES],
            "padded": [MOST_PADDED, FREE_PADDING],
            "faint": FAINT,
            "rounded_to": LEVELS,
        },
    }


def model_digest(model) -> str:
    """SHA-256 of architecture and weights, the same in fp32 and bf16 and wherever the checkpoint lies."""
    told_elsewhere = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map")
    told_elsewhere += ("training_spacing_um",)  # decides on which grid, which the input tells
    config = {key: value for key, value in model.config.to_dict().items() if key not in told_elsewhere}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sample_digest(voxels) -> str:
    """SHA-256 of what statistics are taken from: of a small volume all, of a larger one a fixed number of voxels."""
    digest = hashlib.sha256()
    for part in sampled(voxels):
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def machine_of(model) -> dict:
    """What the last bits of a probability depend on."""
    device = torch.device(model.device)
    name = _processor_name() if device.type == "cpu" else torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""
    threads = torch.get_num_threads() if device.type == "cpu" else None
    return {
        "processor": f"{name} {capability}".strip(),
        "dtype": str(getattr(model, "dtype", torch.float32)),
        "threads": threads,
        "torch": torch.__version__,
    }


def _processor_name() -> str:
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def check_same(store: BlockStore, identity: dict, box=None, statistics=None) -> None:
    """Refuse to mix two computations in one store; `box` and `statistics` count where somebody asked for them."""
    wanted = {"identity": identity}
    recorded = {"identity": store.manifest.get("identity")}
    if box is not None:
        wanted["write box"], recorded["write box"] = list(box), list(store.layout.box)
    if statistics is not None:
        wanted["statistics"], recorded["statistics"] = statistics.to_dict(), store.manifest.get("statistics")
    if other := differences(recorded, wanted):
        sample = "identity.input.sample"  # two sums say nothing to anybody
        other = ["the voxels of the input are others" if each.startswith(sample) else each for each in other]
        raise ValueError(
            f"{store.folder} was begun with other settings: {'; '.join(other)}. Repeat them, or choose another output."
        )


def check_same_machine(store: BlockStore, machine: dict, force: bool) -> None:
    """Refuse, unless forced, what would give other last bits."""
    if (other := differences(store.manifest["machine"], machine)) and not force:
        raise ValueError(
            f"{store.folder} was begun on another kind of machine: {'; '.join(other)}. Boxes computed here would "
            "differ from the others in their last bits; --force goes on all the same."
        )
