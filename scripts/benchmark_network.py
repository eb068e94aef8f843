"""Time this network beside MONAI's UNETR, DynUNet, BasicUNet and SwinUNETR: same stacks, one process, in turn.

    OMP_NUM_THREADS=1 python scripts/benchmark_network.py --data ../shared/data/op --card model_cards/network/README.md

Needs the extra `bench`. Weights other than vit3d-tiny's are random: they cost the same. Writes the card's generated
sections, speed.json and speed.png beside it. About fifteen minutes on one core of an EPYC with AVX512-BF16. `--fp32` is
for a processor that does not multiply bf16: inference alone, in fp32, into sections of its own.

This network is timed on whole `segment` calls. A peer is timed on one window of the stack under MONAI's
`sliding_window_inference` (overlap 0.25, Gaussian) and scaled by the windows it needs for the whole stack; a window is
as deep as the stack allows, and the slices it would be padded by are not counted.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from monai.data.utils import dense_patch_slices
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNETR, BasicUNet, DynUNet, SwinUNETR
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from vit3d.checkpoint import load_checkpoint, preferred_dtype
from vit3d.learning.patches import CropDataset, TrainingVolume
from vit3d.model.configuration_vit3d import ViT3DConfig
from vit3d.model.image_processing_vit3d import ViT3DImageProcessor
from vit3d.model.inference_vit3d import window_plan
from vit3d.model.modeling_vit3d import ViT3DForNeuronSegmentation
from vit3d.segmentation import segment
from vit3d.simulate import random_neuron
from vit3d.tables import fill_card, markdown_table
from vit3d.targets import training_labels
from vit3d.volume import Volume, read_volume

STACKS, SPACING_UM = ("OP_3", "OP_6"), (1.0, 0.33, 0.33)
DENSE_SHAPE = (101, 512, 512)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
SLICE = {"prediction": "center_slice", "patch_size": (5, 8, 8), "volume_size": (5, 112, 112)}
OURS = {"vit3d base": BASE, "vit3d tiny": {}, "vit3d base slices": BASE | SLICE, "vit3d tiny slices": SLICE}
KERNELS, STRIDES = [(1, 3, 3), *[(3, 3, 3)] * 5], [(1, 1, 1), (1, 2, 2), *[(2, 2, 2)] * 4]  # nnU-Net's for 1:3 voxels
PEERS = {
    "UNETR": lambda window: UNETR(1, 1, window, feature_size=16),
    "DynUNet": lambda window: DynUNet(
        3, 1, 1, KERNELS, STRIDES, STRIDES[1:], filters=[32, 64, 128, 256, 320, 320], norm_name="instance"
    ),
    "BasicUNet": lambda window: BasicUNet(3, 1, 1),
    "SwinUNETR-24": lambda window: SwinUNETR(in_channels=1, out_channels=1, feature_size=24),
}
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
IN_FP32 = ("vit3d base", "vit3d tiny", *PEERS)
WINDOW = 96  # of the peers, in the plane


@dataclass(frozen=True)
class Job:
    """One tool on one stack: `run` is timed, and stands for `1 / scale` of `voxels`."""

    stack: str
    tool: str
    dtype: str
    run: Callable[[], object]
    scale: float
    voxels: int
    kept: float = 1.0


def our_model(tool: str) -> tuple[ViT3DForNeuronSegmentation, ViT3DImageProcessor]:
    if tool == "vit3d tiny":
        return load_checkpoint(device="cpu", dtype=torch.float32)
    model = ViT3DForNeuronSegmentation(ViT3DConfig(**OURS[tool])).eval()
    return model, ViT3DImageProcessor.from_config(model.config)


def our_job(stack: str, tool: str, dtype: str, volume: Volume | None) -> Job:
    """`segment` of a whole stack; of the dense stack (`None`) 3 x 4 x 4 windows, with everything computed, scaled by
    windows: these share a little less than the whole stack's, so that more is painted than there is."""
    model, processor = our_model(tool)
    model, config = model.to(DTYPES[dtype]), model.config
    if volume is None:
        window, shared = config.output_size, window_plan(DENSE_SHAPE, config).overlap
        shape = [n + count * (n - o) for n, o, count in zip(window, shared, (2, 3, 3), strict=True)]
        small = random_volume(tuple(shape))
        windows = [len(window_plan(shape, config)) for shape in (DENSE_SHAPE, small.shape)]
        scale, kept = windows[0] / windows[1], 1.0
        run = lambda: segment(model, small, processor=processor, select=False)  # noqa: E731
        return Job(stack, tool, dtype, run, scale, math.prod(DENSE_SHAPE), kept)
    mask = processor.foreground(volume.voxels, processor.measure(volume.voxels))
    pads = [(0, -size % patch) for size, patch in zip(mask.shape, config.patch_size, strict=True)]
    kept = float(processor.token_mask(np.pad(mask, pads)).mean())
    run = lambda: segment(model, volume, processor=processor)  # noqa: E731
    return Job(stack, tool, dtype, run, 1.0, math.prod(volume.shape), kept)


def peer_job(stack: str, tool: str, dtype: str, volume: Volume | None) -> Job:
    shape = DENSE_SHAPE if volume is None else volume.shape
    window = (32 * max(1, round(shape[0] / 32)), WINDOW, WINDOW)
    voxels = random_volume(window).voxels if volume is None else np.asarray(volume.voxels)
    corner = [(n - w) // 2 if n > w else 0 for n, w in zip(voxels.shape, window, strict=True)]
    crop = voxels[tuple(slice(c, c + w) for c, w in zip(corner, window, strict=True))].astype(np.float32) / 255
    crop = np.pad(crop, [(0, w - n) for n, w in zip(crop.shape, window, strict=True)], mode="edge")
    pixel_values = torch.from_numpy(crop)[None, None].to(DTYPES[dtype])
    network = PEERS[tool](window).eval().to(DTYPES[dtype])
    step = [window[0], *[int(WINDOW * 0.75)] * 2]
    windows = len(dense_patch_slices((window[0], *shape[1:]), window, step))
    run = lambda: sliding_window_inference(pixel_values, window, 1, network, overlap=0.25, mode="gaussian")  # noqa: E731
    return Job(stack, tool, dtype, run, windows * shape[0] / window[0], math.prod(shape))


def random_volume(shape: tuple[int, int, int]) -> Volume:
    return Volume(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), SPACING_UM)


def training_step(tool: str, dtype: str) -> tuple[Callable[[], object], int]:
    """Forward, backward and AdamW; how many voxels it trains on. bf16 is autocast: the weights stay fp32."""
    model = our_model(tool)[0].train() if tool in OURS else PEERS[tool]((WINDOW,) * 3).train()
    optimizer = torch.optim.AdamW(model.parameters())
    if tool in OURS:
        processor = ViT3DImageProcessor.from_config(model.config)
        volume, tree = random_neuron(seed=0)
        labels = training_labels(tree, volume.shape, min_radius_vox=1.5)
        neuron = TrainingVolume.prepare("simulated", volume.voxels, labels, processor)
        crops = CropDataset([neuron], [1.0], processor, 8, 0, model.config)
        batch = default_collate([crops[index] for index in range(8)])
        voxels, loss = batch["labels"].numel(), lambda: model(**batch).loss
    else:
        pixel_values, voxels = torch.randn(1, 1, *(WINDOW,) * 3), WINDOW**3
        loss = lambda: binary_cross_entropy_with_logits(  # noqa: E731
            model(pixel_values).reshape(-1), torch.zeros(WINDOW**3)
        )

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, voxels


def attention_flop(query, key, value, *args, out_val=None, **kwargs) -> int:
    """Two products per score; torch counts this operator on GPUs only."""
    batch, heads, tokens, size = query  # shapes
    return 4 * batch * heads * tokens * key[2] * size


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def gemm_speed(dtype: str) -> float:
    """GFLOP/s of a (2048, 768) x (768, 3072) product, the shape of a base layer's, best of two."""
    left, right = (torch.randn(shape).to(DTYPES[dtype]) for shape in ((2048, 768), (768, 3072)))
    return 2e-9 * 2048 * 768 * 3072 / min(cpu_seconds(lambda: left @ right) for _ in range(2))


@torch.inference_mode()
def work(jobs: list[Job]) -> list[float]:
    """GFLOP of each whole stack; the first call of each job, which also warms it up."""
    found = []
    for job in jobs:
        with FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: attention_flop}) as counter:
            job.run()
        found.append(counter.get_total_flops() * job.scale / 1e9)
    return found


@torch.inference_mode()
def timed(jobs: list[Job], gflop: list[float], repeats: int) -> list[dict]:
    """All jobs in turn, `repeats` times, each beside a matrix product."""
    times, speeds = [[] for _ in jobs], [[] for _ in jobs]
    for _ in range(repeats):
        for job, seconds, speed in zip(jobs, times, speeds, strict=True):
            speed.append(gemm_speed(job.dtype))
            seconds.append(cpu_seconds(job.run) * job.scale)
    rows = []
    for job, arithmetic, seconds, speed in zip(jobs, gflop, times, speeds, strict=True):
        median = statistics.median(seconds)
        row = {"stack": job.stack, "tool": job.tool, "dtype": job.dtype, "tokens kept": job.kept}
        row |= {"seconds": median, "spread": max(seconds) - min(seconds), "Mvoxel/s": job.voxels / median / 1e6}
        row |= {"GFLOP/Mvoxel": arithmetic / job.voxels * 1e6}
        rows.append(row | {"of GEMM": arithmetic / median / statistics.median(speed)})
    return rows


def peak_gib(tool: str, task: str, data: Path) -> float:
    """Peak resident memory of this process, once it has done a training step or one run on OP_6."""
    if task == "training":
        training_step(tool, "bf16")[0]()
    else:
        volume = read_volume(data / "OP_6.tif", spacing_um=SPACING_UM)
        with torch.inference_mode():
            (our_job if tool in OURS else peer_job)("OP_6", tool, "bf16", volume).run()
    # not `getrusage`: a new process starts with the peak of the one that started it
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def memory_rows(data: Path) -> list[dict]:
    """Each tool and task in a process of its own."""
    rows = []
    for tool in IN_FP32:
        row = {"tool": tool}
        for task in ("OP_6", "training"):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                row[f"{task}, GiB"] = pool.submit(peak_gib, tool, task, data).result()
        rows.append(row)
    return rows


def training_rows() -> list[dict]:
    """Forward, backward, AdamW: eight crops with selected tokens (a peer: one window). The second of two steps."""
    rows = []
    for dtype, tools in (("bf16", (*OURS, *PEERS)), ("fp32", ("vit3d base", "vit3d tiny", "UNETR"))):
        for tool in tools:
            step, voxels = training_step(tool, dtype)
            step()
            seconds, speed = cpu_seconds(step), gemm_speed(dtype)
            row = {"tool": tool, "dtype": dtype, "voxels": voxels, "seconds": seconds}
            rows.append(row | {"Mvoxel/s": voxels / seconds / 1e6, "GEMM GFLOP/s": round(speed)})
    return rows


def bars(rows: list[dict], dtype: str) -> list[dict]:
    """What the design promises (in bf16), beside what was measured in `dtype`."""
    seconds = {(row["stack"], row["tool"]): row["seconds"] for row in rows if row["dtype"] == dtype}
    share = next(r["of GEMM"] for r in rows if (r["stack"], r["tool"], r["dtype"]) == ("dense", "vit3d base", dtype))
    promised = [(stack, *pair) for stack in STACKS for pair in (("UNETR", "base", 20), ("UNETR", "tiny", 60))]
    promised += [*((stack, "BasicUNet", "tiny", 15) for stack in STACKS), ("dense", "UNETR", "tiny", 3)]
    table = []
    for stack, peer, size, wanted in promised:
        found = seconds[stack, peer] / seconds[stack, f"vit3d {size}"]
        table.append(
            {"stack": stack, "times faster": f"{size} than {peer}", "wanted": wanted, "measured": round(found, 1)}
        )
    table.append(
        {"stack": "dense", "times faster": "base, share of GEMM speed", "wanted": 0.5, "measured": round(share, 2)}
    )
    return [row | {"": "reached" if row["measured"] >= row["wanted"] else "missed"} for row in table]


def draw(rows: list[dict], path: Path) -> None:
    """Voxels per second of each tool in bf16, one panel per stack."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, stack in zip(figure.subplots(1, 3, sharex=True, sharey=True), (*STACKS, "dense"), strict=True):
        shown = [row for row in rows if row["stack"] == stack and row["dtype"] == "bf16"][::-1]
        colors = ["tab:orange" if row["tool"] in OURS else "tab:gray" for row in shown]
        axes.barh([row["tool"] for row in shown], [row["Mvoxel/s"] for row in shown], color=colors)
        axes.set(title=stack, xscale="log", xlabel="Mvoxel/s")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--card", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fp32", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    dtype, tools = ("fp32", IN_FP32) if args.fp32 else ("bf16", (*OURS, *PEERS))
    suffix, rows = " fp32" if args.fp32 else "", []
    for name in (*STACKS, "dense"):
        volume = None if name == "dense" else read_volume(args.data / f"{name}.tif", spacing_um=SPACING_UM)
        jobs = jobs_of(name, tools, dtype, volume)
        gflop = dict(zip(tools, work(jobs), strict=True))
        rows += timed(jobs, list(gflop.values()), args.repeats)
        if not args.fp32 and name == STACKS[-1]:
            rows += timed(jobs_of(name, IN_FP32, "fp32", volume), [gflop[tool] for tool in IN_FP32], 1)
        fill_card(args.card, f"inference{suffix}", markdown_table(rows))  # interrupted, a run leaves what it has
    sections = {"machine": [facts()], "bars": bars(rows, dtype), "inference": rows}
    if not args.fp32:
        sections |= {"training": training_rows(), "memory": memory_rows(args.data)}
        draw(rows, args.card.with_name("speed.png"))
    for section, table in sections.items():
        fill_card(args.card, f"{section}{suffix}", markdown_table(table))
    name = "speed-fp32.json" if args.fp32 else "speed.json"
    args.card.with_name(name).write_text(json.dumps(sections, indent=1) + "\n")


def jobs_of(stack: str, tools: tuple[str, ...], dtype: str, volume: Volume | None) -> list[Job]:
    return [(our_job if tool in OURS else peer_job)(stack, tool, dtype, volume) for tool in tools]


def facts() -> dict:
    found = {"processor": processor_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    found |= {"monai": version("monai"), "preferred dtype": str(preferred_dtype("cpu")).removeprefix("torch.")}
    return found | {f"GEMM {dtype}, GFLOP/s": round(gemm_speed(dtype)) for dtype in DTYPES}


def processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()
