"""Time, measure and score `trace` beside kimimaro and scikit-image + skan: same masks, one process, one thread.

    OMP_NUM_THREADS=1 python scripts/benchmark_tracing.py --data ../shared/data/op --card model_cards/tracing/README.md

Needs the extra `bench` (kimimaro is GPL-3: a peer to measure, never a dependency), Linux, and no torch. Without
`--data` the real neurons are left out. Writes the card's generated sections, scores.json and benchmark.png beside it.
About twenty minutes on one core.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import kimimaro
import numpy as np
import skan
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree
from scipy.spatial import cKDTree
from skimage.morphology import skeletonize

from vit3d.annotations.gold import align_gold
from vit3d.centerlines.foreground import find_foreground
from vit3d.centerlines.threshold import find_threshold
from vit3d.morphometry import branches, path_lengths, resample
from vit3d.scoring import score_trees
from vit3d.simulate import Style, grow
from vit3d.tables import fill_card, markdown_table
from vit3d.targets import paint
from vit3d.tracing import trace
from vit3d.tree import NeuronTree, read_swc
from vit3d.volume import Volume, read_volume

OP_NEURONS, OP_SPACING_UM = [f"OP_{number}" for number in (1, 3, 4, 5, 6, 7)], (1.0, 0.33, 0.33)
TEASAR = {"scale": 1.5, "const": 2, "pdrf_scale": 100_000, "pdrf_exponent": 4}  # in voxels; best of a grid on 128^3
KIMIMARO = {"teasar_params": TEASAR, "dust_threshold": 100, "progress": False}  # the default, 1000, loses fragments
SLOW_UP_TO, DAMAGE_UP_TO = 2**25, 2**24  # voxels; `fix_branching` takes hours beyond
F1 = ("F1 at 1", "F1 at 2", "branch F1 at 3")
TIMES = ("volume", "foreground", "tool", "runs", "wall_s", "cpu_s", "scan_s", "bytes_per_fg")
GAP_VOXELS, GAP_SHARE, SALT_SHARE = (4, 10), 0.05, 0.01
BLUR_VOX, LEVELS = (0.7, 1.0, 1.0), np.geomspace(0.02, 0.5, 7)


@dataclass(frozen=True)
class Tool:
    """`run` is what is timed; `tree_of` turns what it returns into a NeuronTree in voxels."""

    name: str
    color: str
    run: Callable[[np.ndarray], object]
    tree_of: Callable[[object], NeuronTree]


def tree_of_kimimaro(skeletons: dict) -> NeuronTree:
    (skeleton,) = skeletons.values()
    return spanning_tree(skeleton.vertices.astype(float), skeleton.edges.astype(int), skeleton.radius)


def tree_of_skan(skeleton: skan.Skeleton) -> NeuronTree:
    paths = skeleton.paths_list()
    edges = np.concatenate([np.stack([path[:-1], path[1:]], axis=1) for path in paths])
    pixels, edges = np.unique(edges, return_inverse=True)
    return spanning_tree(skeleton.coordinates[pixels].astype(float), edges.reshape(-1, 2), np.ones(len(pixels)))


def spanning_tree(points: np.ndarray, edges: np.ndarray, radii: np.ndarray) -> NeuronTree:
    """The shortest tree over a graph of points (N, 3) and edges (E, 2): loops are opened at their longest edge."""
    count = len(points)
    edges = np.unique(np.sort(edges, axis=1), axis=0)
    lengths = np.linalg.norm(points[edges[:, 0]] - points[edges[:, 1]], axis=1)
    kept = minimum_spanning_tree(coo_array((lengths, edges.T), (count, count)).tocsr()).tocoo()
    tops = np.unique(connected_components(kept, directed=False)[1], return_index=True)[1]
    ends = np.append(kept.row, np.full(len(tops), count)), np.append(kept.col, tops)  # node `count` is above all roots
    graph = coo_array((np.ones(len(ends[0])), ends), (count + 1, count + 1)).tocsr()
    parents = breadth_first_order(graph, count, directed=False)[1][:count]
    return NeuronTree(points, radii, np.where(parents == count, -1, parents), unit="voxel")


TOOLS = (
    Tool("vit3d", "tab:red", lambda mask: trace(Volume(mask), forest=True), lambda tree: tree),
    Tool(
        "kimimaro",
        "tab:blue",
        lambda mask: kimimaro.skeletonize(mask, fix_branching=False, **KIMIMARO),
        tree_of_kimimaro,
    ),
    Tool("kimimaro fix_branching", "tab:cyan", lambda mask: kimimaro.skeletonize(mask, **KIMIMARO), tree_of_kimimaro),
    Tool("skimage + skan", "tab:grey", lambda mask: skan.Skeleton(skeletonize(mask > 0)), tree_of_skan),
)
VIT3D, FAST, SLOW, SKAN = TOOLS


@dataclass(frozen=True)
class Case:
    name: str
    kind: str  # "simulated" or "gold mask"
    truth: NeuronTree
    mask: np.ndarray


def smooth(num_stems: int, thickest: float, thinnest: float, every: float, cable: float = np.inf) -> Style:
    """Lengths in voxels. Stems of the same radius meet in a point; twigs are `thinnest`."""
    radii = {"stem_radius_um": thickest, "soma_radius_um": thickest, "thinnest_um": thinnest}
    plain = {"arbor": 1.0, "beads": 0.0, "boutons": 0.0}
    return Style(num_stems=num_stems, branch_every_um=every, cable_um=cable, **radii, **plain)


SIMULATED = {  # shape, seed, style
    "128^3": ((128, 128, 128), 0, smooth(8, 3.2, 1.5, 10)),
    "256^3": ((256, 256, 256), 0, smooth(8, 3.0, 1.5, 15)),
    "256^3 dense": ((256, 256, 256), 1, smooth(20, 4.5, 2.2, 8, 60_000)),
    "128x512x512": ((128, 512, 512), 0, smooth(6, 3.0, 1.5, 15, 100_000)),
    "512^3": ((512, 512, 512), 0, smooth(30, 4.5, 2.3, 12, 600_000)),
}


def simulated(name: str) -> Case:
    shape, seed, style = SIMULATED[name]
    tree, _ = grow(np.random.default_rng(seed), shape, (1.0, 1.0, 1.0), style)
    truth = replace(legible(replace(tree, types=None)).to("voxel"), spacing_um=None)
    return Case(name, "simulated", truth, paint(truth, shape).astype(np.uint8))


def legible(tree: NeuronTree) -> NeuronTree:
    """Without the side branches that a mask cannot show.

    Left out are those shorter than 20 voxels, those that fork within 8 voxels of another fork, and those that are
    not 1 voxel clear of everything 15 voxels after their fork. Branches that stay may touch further on.
    """
    rows = np.arange(len(tree))
    starts = np.flatnonzero((tree.parents != rows - 1) | (rows == 0))
    kept, forks = np.zeros(len(tree), bool), []
    for first, stop in zip(starts, np.append(starts[1:], len(tree)), strict=True):
        hook, probe = tree.parents[first], first + 9
        if hook >= 0:
            if not kept[hook] or stop - first < 14:
                continue
            if hook > 0 and (np.linalg.norm(tree.points[forks] - tree.points[hook], axis=1) < 8).any():
                continue
            gap = np.linalg.norm(tree.points[kept] - tree.points[probe], axis=1) - tree.radii[kept]
            if gap.min() < tree.radii[probe] + 1:
                continue
            forks.append(hook)
        kept[first:stop] = True
    return tree.take(np.flatnonzero(kept))


def find_cases(chosen: list[str], data: Path | None) -> Iterator[Case]:
    for name in chosen:
        if name in SIMULATED:
            yield simulated(name)
        elif data:
            gold = read_swc(data / f"{name}.swc", unit="voxel")
            mask = paint(gold, read_volume(data / f"{name}.tif").shape, min_radius_vox=1.0, max_radius_vox=2.5)
            yield Case(name, "gold mask", gold, mask.astype(np.uint8))


def timed(call: Callable[[], object], limit_s: float) -> tuple[object, float, float]:
    """What the call returns, its wall and its CPU seconds. None when it is not back within so much CPU time."""
    signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        output = call()
    except TimeoutError:
        output = None
    signal.setitimer(signal.ITIMER_PROF, 0)
    return output, time.perf_counter() - wall, time.process_time() - cpu


def give_up(*_) -> None:
    raise TimeoutError


def compare(case: Case, repeats: int, limit_s: float) -> list[dict]:
    """A row per tool: medians over runs taken in turns. A tool that has used up its time is not run again."""
    tools = [tool for tool in TOOLS if tool != SLOW or case.mask.size <= SLOW_UP_TO]
    outputs, seconds, scans = {}, {tool.name: [] for tool in tools}, []
    for _ in range(repeats):
        scans.append(scan_seconds(case.mask))
        for tool in tools:
            if sum(cpu for _, cpu in seconds[tool.name]) < limit_s:
                outputs[tool.name], *both = timed(lambda tool=tool: tool.run(case.mask), limit_s)
                seconds[tool.name].append(both)
    rows = []
    for tool in tools:
        output, (wall, cpu) = outputs[tool.name], np.median(seconds[tool.name], axis=0)
        row = {"volume": case.name, "kind": case.kind, "foreground": int(case.mask.sum()), "tool": tool.name}
        row |= {"runs": len(seconds[tool.name]), "wall_s": wall, "cpu_s": cpu, "timed_out": output is None}
        if tool == VIT3D:
            row["scan_s"] = float(np.median(scans))
        if output is not None:
            row["bytes_per_fg"] = round(memory_bytes(tool, case.mask) / row["foreground"])
            row |= accuracy(tool.tree_of(output), case.truth)
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def scan_seconds(mask: np.ndarray) -> float:
    """CPU seconds that a box of this shape costs `trace` when it holds a single foreground voxel."""
    empty = np.full_like(mask, 0)  # filled, so that its pages are real memory
    empty.flat[0] = 1
    return timed(lambda: find_foreground(*find_threshold(Volume(empty))), 3600)[2]


def memory_bytes(tool: Tool, mask: np.ndarray) -> int:
    """Peak memory beyond the input, in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(peak_bytes, tool.name, mask).result()


def peak_bytes(name: str, mask: np.ndarray) -> int:
    tool = next(tool for tool in TOOLS if tool.name == name)
    warm_up(tool)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident_bytes("VmRSS")
    output = tool.run(mask)
    return resident_bytes("VmHWM") - before if output is not None else 0


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def warm_up(*tools: Tool) -> None:
    """Compile and import everything on a small bar."""
    bar = np.zeros((20, 20, 60), np.uint8)
    bar[8:13, 8:13, 5:55] = bar[8:13, 8:20, 30:34] = 1
    for tool in tools:
        tool.tree_of(tool.run(bar))


def accuracy(tree: NeuronTree, truth: NeuronTree) -> dict:
    at_1, at_2 = (score_trees(tree, truth, threshold=t, point_tolerance=3.0) for t in (1.0, 2.0))
    scores = {"F1 at 1": at_1["f1"], "F1 at 2": at_2["f1"], "branch F1 at 3": at_1["branch_f1"]}
    return {"length": tree.cable_length / truth.cable_length, **scores, "trees": tree.num_roots}


def with_gaps(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """The mask with a share of the path erased, and the number of gaps.

    A gap takes 4 to 10 voxels of one branch; 10 or more remain between gaps and to the ends of the branch.
    """
    tree = resample(case.truth, 0.5)
    found, along = branches(tree), path_lengths(tree)
    gaps = []
    for row, length in enumerate(found.lengths):
        start = along[found.starts[row]] + rng.uniform(10, 20)
        while (stop := start + rng.uniform(*GAP_VOXELS)) < along[found.starts[row]] + length - 10:
            gaps.append((row, start, stop))
            start = stop + rng.uniform(10, 60)
    gaps = rng.permutation(gaps)
    gaps = gaps[np.cumsum(gaps[:, 2] - gaps[:, 1]) <= GAP_SHARE * tree.cable_length]
    erased = np.zeros(len(tree), bool)
    for row, start, stop in gaps:
        erased |= (found.of_node == row) & (along >= start) & (along <= stop)
    voxels = np.argwhere(case.mask)
    gone = voxels[erased[cKDTree(tree.points).query(voxels)[1]]]
    mask = case.mask.copy()
    mask[tuple(gone.T)] = 0
    return mask, len(gaps)


def damaged_rows(case: Case) -> list[dict]:
    """A row per tool for gaps and one for salt. kimimaro joins with `join_close_components`."""
    rng = np.random.default_rng(0)
    gapped, count = with_gaps(case, rng)
    salted = case.mask | (rng.random(case.mask.shape, np.float32) < SALT_SHARE)
    rows = []
    for damage, mask in ((f"{count} gaps", gapped), ("salt", salted.astype(np.uint8))):
        for tool in (VIT3D, FAST, SKAN):
            output = tool.run(mask)
            if tool == FAST and mask is gapped:
                output = {1: kimimaro.join_close_components(list(output.values()), radius=GAP_VOXELS[1] + 4)}
            row = {"volume": case.name, "damage": damage, "tool": tool.name}
            rows.append(row | accuracy(tool.tree_of(output), case.truth))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def box_row(case: Case, repeats: int) -> dict:
    """CPU seconds of `trace` without the scan, in the box and in one twice as long, wide and deep."""
    large = np.pad(case.mask, [(size // 2, size // 2) for size in case.mask.shape])
    rest = {"box": [], "large": []}
    for _ in range(repeats):
        for name, mask in (("box", case.mask), ("large", large)):
            rest[name].append(timed(lambda mask=mask: trace(Volume(mask)), 3600)[2] - scan_seconds(mask))
    box, large_s = (float(np.median(rest[name])) for name in ("box", "large"))
    return {"volume": case.name, "rest_s": box, "rest_in_8_times_the_box_s": large_s, "ratio": large_s / box}


FIRST_CALL = """
import time
import numpy as np
from vit3d.tracing import trace
from vit3d.volume import Volume
mask = np.zeros((16, 64, 64), np.uint8)
mask[6:10, 30:34, 4:60] = mask[6:10, 4:30, 30:34] = 1
start = time.process_time()
trace(Volume(mask, (1.0, 0.5, 0.5)))
print(time.process_time() - start)
"""


def first_calls(repeats: int) -> list[dict]:
    """CPU seconds of a process's first `trace`: with an empty cache of compiled code, and with what that run left."""
    times = {"empty": [], "filled": []}
    for _ in range(repeats):
        with TemporaryDirectory() as cache:
            for state in times:
                command = [sys.executable, "-c", FIRST_CALL]
                done = subprocess.run(command, env={**os.environ, "NUMBA_CACHE_DIR": cache}, capture_output=True)
                times[state].append(float(done.stdout))
    rows = [{"cache": state, "runs": repeats, "first call CPU s": float(np.median(times[state]))} for state in times]
    return [row | {"from": min(times[row["cache"]]), "to": max(times[row["cache"]])} for row in rows]


def raw_row(name: str, data: Path) -> dict:
    """`trace` on the blurred stack beside the best global threshold (chosen with the gold) + skeletonize."""
    volume = read_volume(data / f"{name}.tif", spacing_um=OP_SPACING_UM)
    gold, _ = align_gold(read_swc(data / f"{name}.swc", unit="voxel").to("voxel", OP_SPACING_UM), volume)
    stack = np.asarray(volume.voxels)
    blurred = np.rint(gaussian_filter(stack.astype(np.float32), BLUR_VOX)).astype(stack.dtype)
    scores = score_trees(trace(Volume(blurred, OP_SPACING_UM)).to("voxel"), gold)
    peers = {}
    for level in LEVELS * float(blurred.max()):
        peers[float(level)] = score_trees(SKAN.tree_of(SKAN.run(blurred > level)), gold)["f1"]
    best = max(peers, key=peers.get)
    row = {"neuron": name} | {key: scores[key] for key in ("precision", "recall", "f1")}
    return row | {"skeletonize f1": peers[best], "at its best level": best, "lead": scores["f1"] - peers[best]}


def summary(cases: list[dict]) -> list[dict]:
    """The worst of each tool over the volumes that it finished."""
    rows = []
    for kind, tool in product(("simulated", "gold mask"), TOOLS):
        done = [row for row in cases if (row["kind"], row["tool"]) == (kind, tool.name) and not row["timed_out"]]
        if done:
            rate = min(row["foreground"] / row["cpu_s"] / 1000 for row in done)
            row = {"volumes": kind, "tool": tool.name, "finished": len(done), "thousand voxels/s": round(rate)}
            row |= {"exponent": exponent(done) if kind == "simulated" and len(done) > 1 else "-"}
            row |= {"length error": max(abs(row["length"] - 1) for row in done)}
            rows.append(row | {key: min(row[key] for row in done) for key in F1})
    return rows


def exponent(rows: list[dict]) -> float:
    """Slope of log time (without the scan, where it is known) against log foreground."""
    seconds = [max(row["cpu_s"] - row.get("scan_s", 0), 1e-3) for row in rows]
    return float(np.polyfit(np.log([row["foreground"] for row in rows]), np.log(seconds), 1)[0])


def fill(card: Path, results: dict) -> None:
    cases = results["cases"]
    sections = {"run": [results["run"]], "summary": summary(cases)}
    sections["volumes"] = [{key: row.get(key, "-") for key in (*TIMES, "length", *F1, "trees")} for row in cases]
    sections |= {name: results[name] for name in ("damaged", "boxes", "raw", "first call")}
    for name, rows in sections.items():
        fill_card(card, name, markdown_table(rows) if rows else "Not run.")


def draw(cases: list[dict], path: Path) -> None:
    """Seconds against foreground on the simulated volumes; mean scores over simulated volumes and gold masks."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    speed, *bars = figure.subplots(1, 3)
    for place, tool in enumerate(TOOLS):
        rows = sorted((row for row in cases if row["tool"] == tool.name), key=lambda row: row["foreground"])
        for out, style in ((False, "o-"), (True, "^")):
            line = [row for row in rows if row["kind"] == "simulated" and row["timed_out"] == out]
            speed.loglog([r["foreground"] for r in line], [r["cpu_s"] for r in line], style, color=tool.color)
        for axes, kind in zip(bars, ("simulated", "gold mask"), strict=True):
            done = [row for row in rows if row["kind"] == kind and not row["timed_out"]]
            means = [np.mean([row[key] for row in done] or [0]) for key in F1]
            drawn = axes.bar(np.arange(len(F1)) + 0.2 * place - 0.3, means, 0.18, color=tool.color, label=tool.name)
            axes.bar_label(drawn, fmt="%.3f", fontsize=7, rotation=90, padding=2)
            axes.set(xticks=range(len(F1)), xticklabels=F1, ylim=(0, 1.15), title=f"mean over {kind} volumes")
    figure.legend(handles=bars[0].containers, loc="outside lower center", ncols=len(TOOLS))
    speed.set(xlabel="foreground voxels", ylabel="CPU seconds (triangle: given up)", title="simulated volumes")
    speed.grid(which="both", alpha=0.2)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the OP neurons, NAME.tif and NAME.swc")
    parser.add_argument("--card", type=Path, default=Path("model_cards/tracing/README.md"))
    parser.add_argument("--volumes", nargs="+", default=[*SIMULATED, *OP_NEURONS], choices=[*SIMULATED, *OP_NEURONS])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=120.0, help="CPU seconds a tool may spend on one volume")
    parser.add_argument("--only-first-call", action="store_true", help="keep what scores.json holds of the rest")
    args = parser.parse_args()
    kept = args.card.with_name("scores.json")
    results = json.loads(kept.read_text()) if args.only_first_call else measure(args)
    results["first call"] = first_calls(args.repeats)
    kept.write_text(json.dumps(results, indent=1) + "\n")
    fill(args.card, results)
    draw(results["cases"], args.card.with_name("benchmark.png"))


def measure(args: argparse.Namespace) -> dict:
    warm_up(*TOOLS)
    cpu = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    run = {"processor": cpu[0], "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set")}
    run |= {name: version(name) for name in ("kimimaro", "skan", "scikit-image", "numba", "numpy")}
    results = {"run": run, "cases": [], "damaged": [], "boxes": [], "raw": []}
    for case in find_cases(args.volumes, args.data):
        results["cases"] += compare(case, args.repeats, args.limit)
        if case.kind == "simulated" and case.mask.size <= DAMAGE_UP_TO:
            results["damaged"] += damaged_rows(case)
            results["boxes"].append(box_row(case, args.repeats))
        elif case.kind == "gold mask":
            results["raw"].append(raw_row(case.name, args.data))
    return results


if __name__ == "__main__":
    main()
