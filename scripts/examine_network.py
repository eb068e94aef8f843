"""What the network's design costs in accuracy: seams between windows, patches left out, other spacings; and the time
and memory of the whole command.

    OMP_NUM_THREADS=1 python scripts/examine_network.py --data ../shared/data/op --card model_cards/network/README.md

Writes the card's generated sections, examination.json and spacing.png beside it. About half an hour on one core.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import distance_transform_edt

from vit3d.annotations.gold import align_gold
from vit3d.bigneuron import find_pairs
from vit3d.checkpoint import load_checkpoint
from vit3d.model.inference_vit3d import window_plan
from vit3d.reconstruction import reconstruct
from vit3d.scoring import score_trees
from vit3d.segmentation import segment
from vit3d.simulate import Microscope, Style, expose, grow, simulate_neuron
from vit3d.tables import fill_card, markdown_table
from vit3d.tracing import trace
from vit3d.tree import NeuronTree, read_swc
from vit3d.volume import Volume, read_volume

OP_SPACING_UM = (1.0, 0.33, 0.33)
NEAR_VOX = 8  # seams are judged this near to a neurite
EXTENT_UM = (24.0, 50.0, 50.0)  # of the neuron that is sampled at many spacings
SPACINGS_UM = [(1.0, xy, xy) for xy in (0.1, 0.15, 0.2, 0.33, 0.5, 0.7, 1.0)]
SPACINGS_UM += [(z, 0.33, 0.33) for z in (0.2, 0.5, 2.0, 3.0)]
SPACINGS_UM += [(2.0, 1.0, 1.0), (3.0, 0.7, 0.7)]
MERGED = [(1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 2, 2), (2, 2, 2), (1, 3, 3), (3, 2, 2)]
GRIDS, GRID_SEEDS = ("own voxels", "network regridded", "reconstruct"), range(6)
PHOTONS = (60.0, 20.0, 10.0, 6.0, 3.0)  # per bright voxel; the default microscope counts 60
SEEDS = range(3)
MEASURED = """
import atexit, sys, time
def tell():
    peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
    print(time.process_time(), peak, file=sys.stderr)
atexit.register(tell)
from vit3d.cli import main
main()
"""  # the command, and at its end its CPU seconds and peak resident KiB; getrusage would count this process too


def gold_points(gold: NeuronTree, shape: tuple[int, ...]) -> np.ndarray:
    """(N, 3) voxels along the gold, inside the stack."""
    points = np.rint(gold.to("voxel").sampled(1.0)).astype(int)
    return points[((points >= 0) & (points < shape)).all(axis=1)]


def seam_row(name: str, volume: Volume, gold: NeuronTree, model, processor, patches: float = 0.0) -> dict:
    """Two segmentations whose windows lie half a window, and so many patches, apart, near the gold."""
    window, voxels = model.config.volume_size, np.asarray(volume.voxels)
    shared = window_plan(voxels.shape, model.config).overlap
    statistics = processor.measure(voxels)
    probability = []
    half = [w // 2 + int(patches * p) for w, p in zip(window, model.config.patch_size, strict=True)]
    for shift in ((0, 0, 0), half):
        ends = [
            -(s + n - w) % (w - o) if s + n > w else w - n - s
            for s, n, w, o in zip(shift, voxels.shape, window, shared, strict=True)
        ]  # the windows are then spread evenly, and share what they should
        padded = np.pad(voxels, list(zip(shift, ends, strict=True)), mode="edge")
        found = segment(model, Volume(padded), processor=processor, statistics=statistics).voxels
        probability.append(found[tuple(slice(s, s + n) for s, n in zip(shift, voxels.shape, strict=True))])
    neurites = np.ones(voxels.shape, dtype=bool)
    neurites[tuple(gold_points(gold, voxels.shape).T)] = False
    near = distance_transform_edt(neurites) <= NEAR_VOX
    difference = np.abs(probability[0] - probability[1])[near]
    row = {"neuron": name, "windows apart": "half a window" + (f" + {patches:g} patch" if patches else "")}
    row["mean difference"] = float(difference.mean())
    row |= {f"{share} %": float(np.percentile(difference, share)) for share in (95, 99)}
    trees = [trace(Volume(p, volume.spacing_um)).to("voxel") for p in probability]
    return row | {"F1 of one tree against the other": score_trees(trees[0], trees[1])["f1"]}


def selection_row(name: str, volume: Volume, gold: NeuronTree, processor) -> dict:
    """How much of the gold lies in patches that are left out."""
    statistics = processor.measure(volume.voxels)
    mask = processor.foreground(volume.voxels, statistics)
    patch = np.array(processor.patch_size)
    kept = processor.token_mask(np.pad(mask, [(0, n) for n in -np.array(mask.shape) % patch]))
    points = gold_points(gold, volume.shape)
    lost = ~kept[tuple((points // patch).T)]
    row = {"stack": name, "tokens kept": float(kept.mean()), "computes everything": "no" if statistics.sure else "yes"}
    return row | {"gold points": len(points), "lost": f"{100 * lost.mean():.2f} %"}


def dim_stacks() -> Iterator[tuple[str, Volume, NeuronTree]]:
    for photons in PHOTONS:
        for seed in SEEDS:
            microscope = Microscope(photons=photons, background=0.2, read_noise=0.03)
            yield f"simulated, {photons:g} photons, seed {seed}", *simulate_neuron(seed=seed, microscope=microscope)


def sampled_neuron(seed: int, spacing_um: tuple[float, float, float]) -> tuple[Volume, NeuronTree]:
    """The same neuron and microscope for every spacing; only the voxels differ."""
    rng = np.random.default_rng(seed)
    shape = tuple(round(extent / step) + 1 for extent, step in zip(EXTENT_UM, (0.2, 0.2, 0.2), strict=True))
    tree, brightness = grow(rng, shape, (0.2, 0.2, 0.2), Style(cable_um=250.0))
    tree = replace(tree, spacing_um=spacing_um)
    shape = tuple(round(extent / step) + 1 for extent, step in zip(EXTENT_UM, spacing_um, strict=True))
    return Volume(expose(rng, tree, brightness, shape, Microscope(debris=0)), spacing_um), tree


def f1_at_um(found: NeuronTree, truth: NeuronTree, threshold_um: float) -> float:
    found, truth = (replace(tree.to("um"), unit="voxel", spacing_um=None) for tree in (found, truth))
    return score_trees(found, truth, threshold=threshold_um)["f1"]


def spacing_row(spacing_um: tuple[float, float, float], model, processor) -> dict:
    columns = {name: [] for name in GRIDS}
    for seed in GRID_SEEDS:
        volume, truth = sampled_neuron(seed, spacing_um)
        found = reconstruct(model, volume, processor=processor)
        trees = trace(segment(model, volume, processor=processor)), trace(found.probability), found.tree
        for name, tree in zip(GRIDS, trees, strict=True):
            columns[name].append(f1_at_um(tree, truth, 2.0))
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    return {"z (um)": f"{spacing_um[0]:g}", "y, x (um)": f"{spacing_um[1]:g}", **means}


def merged(volume: Volume, gold: NeuronTree, factors: tuple[int, int, int]) -> tuple[Volume, NeuronTree]:
    """The stack as a coarser microscope would have taken it, each voxel the mean of so many; and its gold in um."""
    shape = [size // f for size, f in zip(volume.shape, factors, strict=True)]
    whole = tuple(slice(0, size * f) for size, f in zip(shape, factors, strict=True))
    parts = volume.voxels[whole].reshape([n for pair in zip(shape, factors, strict=True) for n in pair])
    voxels = np.rint(parts.mean(axis=(1, 3, 5))).astype(volume.voxels.dtype)
    step, merge = np.array(volume.spacing_um), np.array(factors)
    return Volume(voxels, tuple((step * merge).tolist())), gold.to("um").shifted(-(merge - 1) / 2 * step)


def coarser_row(factors: tuple[int, int, int], neurons: dict, model, processor) -> dict:
    """Mean F1 of the real neurons with so many voxels merged into one, on these voxels and by `reconstruct`."""
    row = {"voxels merged z, y, x": " x ".join(map(str, factors))}
    for name, regrid in (("own voxels", False), ("reconstruct", True)):
        found, start = [], time.process_time()
        for volume, gold in neurons.values():
            stack, truth = merged(volume, gold, factors)
            tree = reconstruct(model, stack, processor=processor, regrid=regrid).tree
            found.append([f1_at_um(tree, truth, threshold) for threshold in (1.0, 2.0)])
        near, far = np.mean(found, axis=0)
        row |= {f"{name}, F1 at 1 um": near, f"{name}, F1 at 2 um": far}
        row[f"{name}, CPU s"] = (time.process_time() - start) / len(neurons)
    return row


def command_row(stack: Path) -> dict:
    """`vit3d reconstruct` from command to picture, and tracing alone."""
    with TemporaryDirectory() as out:
        words = [sys.executable, "-c", MEASURED, "reconstruct", str(stack), "--out", out, "--spacing", "1,0.33,0.33"]
        start = time.perf_counter()
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    cpu_s, peak_kib = map(float, done.stderr.split()[-2:])
    volume = read_volume(stack, spacing_um=OP_SPACING_UM)
    model, processor = load_checkpoint(device="cpu")
    probability = segment(model, volume, processor=processor)
    start = time.process_time()
    trace(probability)
    tracing = time.process_time() - start
    row = {"stack": f"{stack.stem}, {' x '.join(map(str, volume.shape))}", "wall s": seconds}
    row |= {"CPU s": cpu_s, "of which tracing, CPU s": tracing}
    return row | {"peak GiB": peak_kib / 2**20}


def draw_spacing(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, fixed, varied in ((left, ("z (um)", "1"), "y, x (um)"), (right, ("y, x (um)", "0.33"), "z (um)")):
        shown = sorted((row for row in rows if row[fixed[0]] == fixed[1]), key=lambda row: float(row[varied]))
        for name in GRIDS:
            axes.plot([float(row[varied]) for row in shown], [row[name] for row in shown], "o-", label=name)
        axes.set(xlabel=f"spacing {varied}", ylabel="F1 at 2 um", xscale="log", title=f"{fixed[0]} = {fixed[1]}")
        axes.set_xticks([float(row[varied]) for row in shown], [row[varied] for row in shown])
        axes.minorticks_off()
    left.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--card", type=Path, required=True)
    parser.add_argument(
        "--only", default="", help="selection, seams, command, coarser, spacing, comma-separated; all by default"
    )
    args = parser.parse_args()

    model, processor = load_checkpoint(device="cpu")
    neurons = {}
    for pair in find_pairs(args.data):
        volume = read_volume(pair["image"], spacing_um=OP_SPACING_UM)
        gold = read_swc(pair["swc"], unit="voxel").to("voxel", OP_SPACING_UM)
        neurons[pair["name"]] = (volume, align_gold(gold, volume)[0])
    examinations = {
        "selection": lambda: (
            [selection_row(name, *pair, processor) for name, pair in neurons.items()]
            + [selection_row(*stack, processor) for stack in dim_stacks()]
        ),
        "seams": lambda: [
            seam_row(name, *neurons[name], model, processor, patches)
            for patches in (0.0, 0.5)
            for name in ("OP_3", "OP_6")
        ],
        "command": lambda: [command_row(args.data / "OP_6.tif")],
        "coarser": lambda: [coarser_row(factors, neurons, model, processor) for factors in MERGED],
        "spacing": lambda: [spacing_row(spacing_um, model, processor) for spacing_um in SPACINGS_UM],
    }
    for section in args.only.split(",") if args.only else examinations:
        table = examinations[section]()
        fill_card(args.card, section, markdown_table(table))
        store = args.card.with_name("examination.json")
        found = json.loads(store.read_text()) if store.exists() else {}
        store.write_text(json.dumps({**found, section: table}, indent=1) + "\n")
        if section == "spacing":
            draw_spacing(table, args.card.with_name("spacing.png"))


if __name__ == "__main__":
    main()
