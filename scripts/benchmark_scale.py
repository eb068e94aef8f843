"""Out-of-core segmentation at scale: memory, overhead, ranks, crashes; and what a whole brain would cost.

    OMP_NUM_THREADS=1 python scripts/benchmark_scale.py --folder /tmp/scale --card model_cards/scale/README.md

Needs Linux and some 5 GB of disk. Each part fills its section of the card; `--parts memory,overhead,ranks,crash,plan`
runs some of them. The network is a stub (no weights, one voxel in, one logit out), so that the engine is measured; in
`ranks` and `crash` it sleeps, as a process does while its GPU works. Numbers that the plan needs from other parts are
kept in FOLDER/numbers.json.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import zarr
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vit3d.blockwise.block_store import BlockStore, partial_path
from vit3d.blockwise.memory_budget import peak_bytes
from vit3d.blockwise.out_of_core import RunOptions, segment_store
from vit3d.checkpoint import load_checkpoint
from vit3d.model.configuration_vit3d import ViT3DConfig
from vit3d.model.head_vit3d import HALO
from vit3d.model.image_processing_vit3d import ViT3DImageProcessor
from vit3d.simulate import simulate_neuron
from vit3d.tables import fill_card, markdown_table
from vit3d.volume import open_volume

SHAPE, QUARTER, TILE = (1024, 2048, 2048), (455, 1536, 1536), (128, 512, 512)
CHUNK, NEURONS_PER_TILE = (64, 128, 128), 0.2
BUDGET_BYTES = int(1.5 * 2**30)
REPEATS, WAIT_S = 3, 0.020  # of the overhead; what a window may take on a GPU
OVERHEAD_DEPTHS = (256, 768)  # two boxes and six: both runs begin alike, with two tiles to scan before the first window
KILLS, CRASH_SHAPE, CRASH_BOX = 25, (128, 128, 192), (64, 64, 64)
BRAIN_VOXELS, BRAIN_SHAPE, GPUS = 3.09e12, (14192, 20480, 10640), 8
GPU_FLOPS, CORES_PER_GPU, DOLLARS_PER_GPU_HOUR = 30e12, 8, 1.0  # assumed: bf16 reached, node, price
ANCHOR = 27e6  # voxels per second and A10G, published, another network


class Stub(nn.Module):
    """Brightness is probability; sleeps `sleep_s` per batch, `window_s` per window; remembers what it took itself.

    A token is one number: to add wider ones up is the network's device's work.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, sleep_s: float = 0.0, window_s: float = 0.0, **sizes):
        super().__init__()
        self.config, self.sleep_s, self.window_s = ViT3DConfig(**sizes), sleep_s, window_s
        self.cpu_s = self.wall_s = 0.0

    @property
    def head(self) -> "Stub":
        return self

    def forward(self, patches, token_mask):
        start, cpu = time.perf_counter(), time.thread_time()
        time.sleep(self.sleep_s + self.window_s * len(token_mask))
        tokens = torch.ones(len(patches), 1)
        self.cpu_s += time.thread_time() - cpu
        self.wall_s += time.perf_counter() - start
        return SimpleNamespace(tokens=tokens)

    def features(self, tokens):
        return torch.zeros(len(tokens) + 1, 1, 1)

    def paint(self, features, table, kept, raw):
        return 2 * raw[:, :, HALO:-HALO, HALO:-HALO, HALO:-HALO]


# ---------------------------------------------------------------- volumes


def cleaned_neuron(folder: Path) -> np.ndarray:
    """A simulated neuron, uint8, its background set to 0 as many microscopes' software does."""
    path = folder / "neuron.npy"
    if not path.exists():
        volume, _ = simulate_neuron(seed=0, shape=TILE, polarity="bright")
        voxels = volume.voxels.astype(np.float32)
        level, spread = np.median(voxels), np.percentile(voxels, 84) - np.median(voxels)
        np.save(path, (voxels - level - 4 * spread).clip(0, 255).astype(np.uint8))
    return np.load(path)


def sparse_volume(path: Path, shape: tuple[int, int, int]) -> None:
    """Chunk by chunk: a fifth of the tiles hold a neuron, every chunk is written, also the empty ones."""
    if path.exists():
        return
    growing = path.with_name(path.name + ".growing")
    shutil.rmtree(growing, ignore_errors=True)
    neuron = cleaned_neuron(path.parent)
    neurons = [np.flip(neuron, axes) for axes in ((), (0,), (1,), (2,), (1, 2))]
    config = {"write_empty_chunks": True}
    array = zarr.create_array(growing, shape=shape, chunks=CHUNK, dtype="uint8", config=config)
    luck = random.Random(0)
    for index in np.ndindex(*(-(-n // t) for n, t in zip(shape, TILE, strict=True))):
        box = tuple(slice(i * t, min((i + 1) * t, n)) for i, t, n in zip(index, TILE, shape, strict=True))
        occupied = luck.random() < NEURONS_PER_TILE or not any(index)
        tile = luck.choice(neurons) if occupied else np.zeros(TILE, np.uint8)
        array[box] = tile[tuple(slice(0, b.stop - b.start) for b in box)]
    growing.rename(path)


def small_volume(path: Path, shape: tuple[int, int, int]) -> None:
    if not path.exists():
        array = zarr.create_array(path, shape=shape, chunks=(64, 64, 64), dtype="uint8")
        array.attrs["missing_chunks"] = "fill"
        start = [max(t - n, 0) // 2 for n, t in zip(shape, TILE, strict=True)]  # of the middle: the cell body
        middle = cleaned_neuron(path.parent)[tuple(map(slice, start, np.add(start, shape)))]
        array[...] = np.tile(middle, [-(-n // m) for n, m in zip(shape, middle.shape, strict=True)])[
            tuple(map(slice, shape))
        ]


# ---------------------------------------------------------------- one process


def work(
    source: Path,
    out: Path,
    network: dict,
    options: RunOptions,
    select=True,
    measured=False,
    in_memory=False,
    report=None,
) -> None:
    """A rank; what it took goes into the queue `report`. `measured`: with the volume's grey levels known before.
    `in_memory`: with the whole volume read before."""
    torch.set_num_threads(1)
    model, volume = Stub(**network), open_volume(source, spacing_um=(1.0, 0.33, 0.33))
    if in_memory:
        volume = replace(volume, voxels=np.asarray(volume.voxels))
    statistics = ViT3DImageProcessor.from_config(model.config).measure(volume.voxels) if measured else None
    start, cpu = time.perf_counter(), time.process_time()
    outcome = segment_store(model, volume, out, select=select, statistics=statistics, options=options)
    if report is not None:
        box = BlockStore(out).layout.box
        took = {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
        took |= {"model_cpu_s": model.cpu_s, "model_wall_s": model.wall_s}
        report.put({**asdict(outcome), **took, "box": box, "shape": volume.shape, "finished": time.time()})


class Team:
    """Starts processes that have imported everything and share nothing."""

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        # not "__main__": Python 3.11's server cannot load that, and says nothing
        self.context.set_forkserver_preload(
            ["vit3d.blockwise.out_of_core", "vit3d.formats.zarr_store", "vit3d.simulate", "vit3d.checkpoint"]
        )
        self.fresh = multiprocessing.get_context("spawn")

    def start(self, *arguments, fresh: bool = False, target=work, **options):
        process = (self.fresh if fresh else self.context).Process(target=target, args=arguments, kwargs=options)
        process.start()
        return process

    def run(self, *arguments, fresh: bool = False, target=work, **options):
        """One process to its end; what it reported."""
        report = (self.fresh if fresh else self.context).Queue()
        process = self.start(*arguments, fresh=fresh, target=target, report=report, **options)
        ended([process])
        return report.get()


def statuses(processes: list) -> list[int]:
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def ended(processes: list) -> None:
    """Wait for them; what they report is small enough to wait in the pipe."""
    if any(statuses(processes)):
        raise SystemExit("A process of this run failed; what it said stands above.")


# ---------------------------------------------------------------- parts


def memory(team: Team, folder: Path, numbers: dict) -> str:
    """The two volumes in turn; medians."""
    shapes, runs = {"quarter": QUARTER, "whole": SHAPE}, {"quarter": [], "whole": []}
    for name in [*shapes] * REPEATS:
        sparse_volume(folder / f"{name}.zarr", shapes[name])
        out = clean(folder / f"{name}-out.zarr")
        took = team.run(folder / f"{name}.zarr", out, {}, RunOptions(memory_bytes=BUDGET_BYTES), fresh=True)
        runs[name].append(took)
        shutil.rmtree(out)
    rows = []
    for name, shape in shapes.items():
        took, peaks = runs[name][-1], [each["peak_bytes"] / 2**30 for each in runs[name]]
        times = {f"{kind} s": median(each[f"{kind.lower()}_s"] for each in runs[name]) for kind in ("wall", "CPU")}
        seconds = {stage: median(each["seconds"][stage] for each in runs[name]) for stage in sorted(took["seconds"])}
        rows.append(
            {
                "volume": " x ".join(map(str, shape)),
                "Gvoxel": np.prod(shape) / 1e9,
                "write box": " x ".join(map(str, took["box"])),
                "boxes": took["boxes"],
                "windows": took["windows"],
                "peak GiB": median(peaks),
                "from .. to": f"{min(peaks):.3f} .. {max(peaks):.3f}",
                **{key: round(each, 1) for key, each in times.items()},
                **{f"{stage} s": round(each, 1) for stage, each in seconds.items()},
            }
        )
        numbers[f"memory {name}"] = {k: v for k, v in took.items() if k != "store"} | {"seconds": seconds}
    ratio = rows[1]["peak GiB"] / rows[0]["peak GiB"]
    budget = f"Budget {BUDGET_BYTES / 2**30:.1f} GiB. The whole volume's peak is {ratio:.3f} of its quarter's."
    return f"{markdown_table(rows)}\n\n{budget}"


def overhead(team: Team, folder: Path, numbers: dict) -> str:
    """Slopes between two volumes whose grey levels are known, so that what is done once is not counted.

    The run with a network that waits tells how much longer it takes than its network, with the volume in memory and,
    reading included, on disk.
    """
    sizes, times = (
        {"volume_size": (96, 96, 96), "patch_size": (8, 8, 8)},
        ("cpu_s", "wall_s", "model_cpu_s", "model_wall_s"),
    )

    def slope(select: bool, window_s: float, in_memory: bool) -> dict:
        took = []
        for depth in OVERHEAD_DEPTHS:
            source, out = folder / f"overhead{depth}.zarr", clean(folder / "overhead-out.zarr")
            small_volume(source, (depth, 512, 512))
            known = {"select": select, "measured": True, "in_memory": in_memory}
            took.append(
                team.run(source, out, {**sizes, "window_s": window_s}, RunOptions(box=(128, 512, 512)), **known)
            )
            shutil.rmtree(out)
        run = {key: took[1][key] - took[0][key] for key in ("windows", *times)}
        per_window = {key: 1000 * run[key] / run["windows"] for key in times}
        added = {kind: per_window[f"{kind}_s"] - per_window[f"model_{kind}_s"] for kind in ("wall", "cpu")}
        return {"windows": run["windows"], **added}

    rows = []
    for select, window_s in ((False, 0.0), (False, WAIT_S), (True, 0.0), (True, WAIT_S)):
        slopes = {
            place: [slope(select, window_s, place == "memory") for _ in range(REPEATS)] for place in ("memory", "disk")
        }
        row = {"patches": "selected" if select else "all", "windows": slopes["disk"][0]["windows"]}
        row["network"] = f"waits {1000 * window_s:.0f} ms per window" if window_s else "immediate"
        for name, place, key in (
            ("added wall", "memory", "wall"),
            ("added wall with reading", "disk", "wall"),
            ("CPU", "memory", "cpu"),
        ):
            values = [each[key] for each in slopes[place]]
            row |= {
                f"{name}, ms per window": median(values),
                f"{name}, from .. to": f"{min(values):.1f} .. {max(values):.1f}",
            }
        rows.append(row)
    numbers["overhead"] = rows
    return markdown_table(rows)


def ranks(team: Team, folder: Path, numbers: dict) -> str:
    source, rows = folder / "ranks.zarr", []
    small_volume(source, (256, 512, 512))
    network = {"sleep_s": 0.3}
    for count in (1, 2):
        out = clean(folder / "ranks-out.zarr")
        report = team.context.Queue()
        options = [RunOptions(box=(64, 256, 256), rank=rank, ranks=count) for rank in range(count)]
        processes = [team.start(source, out, network, option, select=False, report=report) for option in options]
        ended(processes)
        done = [report.get() for _ in processes]
        begun = min(each["finished"] - each["wall_s"] for each in done)  # Python and torch are loaded
        wall = max(each["finished"] for each in done) - begun
        rows.append({"ranks": count, "boxes": "+".join(str(each["boxes"]) for each in done), "wall s": wall})
    numbers["ranks"] = rows
    return f"{markdown_table(rows)}\n\n2 ranks are {rows[0]['wall s'] / rows[1]['wall s']:.2f} times as fast as 1."


def crash(team: Team, folder: Path, numbers: dict) -> str:
    source, network = folder / "crash.zarr", {"sleep_s": 0.2, "volume_size": (16, 64, 64)}
    small_volume(source, CRASH_SHAPE)

    def start(out: Path, count: int) -> list:
        options = [RunOptions(box=CRASH_BOX, rank=rank, ranks=count) for rank in range(count)]
        return [team.start(source, out, network, option) for option in options]

    rows, luck = [], random.Random(0)
    for count in (1, 2):
        for _ in range(2):  # the first warms up
            out, begun = clean(folder / "crash-out.zarr"), time.monotonic()
            statuses(start(out, count))
            seconds = time.monotonic() - begun
        expected = shards(out)
        kills = late = lost = unequal = kept = 0
        while kills < KILLS:
            clean(out)
            processes = start(out, count)
            time.sleep(luck.uniform(0.3, 0.95) * seconds)
            for process in processes:
                process.kill()
            statuses(processes)
            if out.exists():
                late += 1
                continue
            kills += 1
            begun_boxes = len(list((partial_path(out) / "0/.vit3d/leases").glob("[0-9]*")))
            kept += len(shards(partial_path(out)))
            again = statuses(start(out, count))
            lost += begun_boxes
            print(f"crash {count} ranks: kill {kills}, T {seconds:.1f} s", flush=True)
            unequal += again != [0] * count or shards(out) != expected
        total = kills * len(expected)
        rows.append(
            {
                "ranks": count,
                "T s": seconds,
                "kills on unfinished work": kills,
                "too late, not counted": late,
                "outputs not byte-equal": unequal,
                "boxes kept": f"{kept} of {total}",
                "begun and lost, so computed again": f"{lost} ({100 * lost / total:.1f} %)",
            }
        )
    numbers["crash"] = rows
    return markdown_table(rows)


def shards(store: Path) -> dict[str, str]:
    paths = [path for path in (store / "0/c").rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def plan(team: Team, folder: Path, numbers: dict) -> str:
    """What the measured parts say about a whole brain; assumptions are named as such."""
    whole, dense = numbers["memory whole"], numbers["overhead"][0]
    voxels = float(np.prod(whole["shape"]))
    read, select, write = (whole["seconds"][stage] / voxels for stage in ("read", "select", "write"))
    windows = whole["windows"] / voxels * BRAIN_VOXELS
    network, _ = load_checkpoint(device="cpu")
    grid = network.config.grid_size
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, 1, *network.config.volume_size, dtype=network.dtype))
    flops = counter.get_total_flops()
    engine_s = dense["CPU, ms per window"] / 1000 * np.prod(network.config.volume_size) / 96**3
    cores = GPUS * CORES_PER_GPU
    rows = [
        ("read and decode", read * BRAIN_VOXELS, cores),
        ("select: scan, ground, tokens", select * BRAIN_VOXELS, cores),
        ("normalise, put together", windows * engine_s, GPUS),  # in threads beside the network
        ("compress, checksum, write", write * BRAIN_VOXELS, GPUS),
        (f"network, {flops / 1e9:.0f} GFLOP per full window", windows * flops / GPU_FLOPS, GPUS),
    ]
    table = [
        {"stage": name, "busy hours of one": busy / 3600, "of them": many, "hours": busy / 3600 / many}
        for name, busy, many in rows
    ]
    longest = max(table, key=lambda row: row["hours"])
    hours, box = longest["hours"], whole["box"]
    speed = BRAIN_VOXELS / (hours * 3600) / GPUS
    met = np.prod([(b + w) / b for b, w in zip(box, network.config.volume_size, strict=True)])
    large = np.prod([(b + w) / b for b, w in zip((256, 1024, 1024), network.config.volume_size, strict=True)])
    window = " x ".join(map(str, network.config.volume_size))
    dollars = hours * GPUS * DOLLARS_PER_GPU_HOUR
    lines = (
        f"{BRAIN_VOXELS / 1e12:.2f} Tvoxel ({' x '.join(map(str, BRAIN_SHAPE))}), as sparse as the volume above: "
        f"{windows / 1e6:.1f} M windows of {window} voxels ({np.prod(grid)} tokens when full). The stages overlap, so "
        f"the longest counts: **{longest['stage'].split(',')[0]}**, {hours:.1f} hours on {GPUS} GPUs, "
        f"{speed / 1e6:.0f} Mvoxel/s per GPU (published for another network on an A10G: {ANCHOR / 1e6:.0f}), "
        f"{dollars:.1f} dollars.",
        f"Assumed, not measured: {GPU_FLOPS / 1e12:.0f} TFLOP/s reached in bf16, every window full (selection makes it "
        f"less), {CORES_PER_GPU} cores per GPU like the one measured, {DOLLARS_PER_GPU_HOUR:.0f} dollar per "
        "GPU and hour, storage that keeps up. The times measured are wall times on a shared machine.",
        f"Windows that meet two write boxes are computed for both: {met:.2f} times the windows with boxes of "
        f"{' x '.join(map(str, box))}, {large:.2f} with 256 x 1024 x 1024, which `--memory-budget 16` chooses.",
    )
    return "\n\n".join([markdown_table(table), *lines])


def clean(out: Path) -> Path:
    for path in (out, partial_path(out)):
        shutil.rmtree(path, ignore_errors=True)
    return out


def machine() -> str:
    name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()).group(1)
    row = {"processor": name, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "zarr": zarr.__version__}
    return markdown_table([{**row, **versions, "base GiB": peak_bytes() / 2**30}])


PARTS = {"memory": memory, "overhead": overhead, "ranks": ranks, "crash": crash, "plan": plan}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--card", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    kept, team = options.folder / "numbers.json", Team()
    numbers = json.loads(kept.read_text()) if kept.exists() else {}
    fill_card(options.card, "run", machine())
    for part in options.parts.split(","):
        fill_card(options.card, part, PARTS[part](team, options.folder, numbers))
        kept.write_text(json.dumps(numbers, default=str, indent=1))
        print(part, "done", flush=True)


if __name__ == "__main__":
    main()
