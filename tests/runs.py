"""What the tests of training share: a tiny network, tiny neurons, and what a run leaves behind."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from vit3d import ViT3DConfig, ViT3DForNeuronSegmentation
from vit3d.simulate import simulate_neuron
from vit3d.tree import write_swc
from vit3d.volume import write_volume

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WINDOW = {"fused_layers": (1, 2), "volume_size": (8, 32, 32), "patch_size": (4, 8, 8)}


def make_checkpoint(folder: Path, **overrides) -> str:
    """A tiny network that has learned nothing."""
    torch.manual_seed(0)
    ViT3DForNeuronSegmentation(ViT3DConfig(**{**SIZES, **WINDOW, **overrides})).save_pretrained(folder)
    return str(folder)


def make_pairs(folder: Path, units: dict[str, str]) -> Path:
    """Simulated pairs by name, their SWCs in um or in voxels; the latter say nothing about it, as BigNeuron's."""
    folder.mkdir(exist_ok=True)
    for seed, (name, unit) in enumerate(units.items()):
        volume, tree = simulate_neuron(seed=seed, shape=(12, 64, 72))
        swc = folder / f"{name}.swc"
        write_volume(volume, folder / f"{name}.tif")
        write_swc(tree, swc, unit=unit)
        if unit == "voxel":
            swc.write_text("\n".join(line for line in swc.read_text().splitlines() if not line.startswith("#")))
    return folder


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float]]:
    """(step, loss) to the last bit: JSON holds the shortest number that reads back the same."""
    return [(row["step"], row["loss"]) for row in metrics(out) if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def launch(processes: int, port: int, *flags: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a training with gloo processes."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", str(processes)]
    command = [*accelerate, *options, "--main_process_port", str(port), "-m", "vit3d.training", *flags]
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return command, {**os.environ, **own}
