"""Score a checkpoint on real and simulated neurons and write the numbers into its card and the README.

    python scripts/evaluate_checkpoint.py --data ../shared/data/op --card model_cards/vit3d-tiny/README.md

Every neuron goes through `reconstruct` as a user would run it. Golds are aligned with their image first; the
raw F1 is given beside it. A simulated stack of several unconnected neurites is traced as a forest; simulated cells tell
how often the soma is found. Stacks of kinds that no training makes (`unlike_stacks.py`) tell how often it fails, beside
tracing them without a network. About six minutes on one CPU core.

`--candidates FOLDER ...` scores checkpoints that might ship instead, and writes nothing but the card's table of them:
one line of `candidates.jsonl` beside it for each, called as its folder is (an earlier one of that name goes).
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from unlike_stacks import ALIKE, DARK, KINDS, SEEDS, UNSEEN, unlike_stack
from vit3d.annotations.gold import align_gold, without_untraced
from vit3d.bigneuron import find_pairs
from vit3d.checkpoint import load_checkpoint
from vit3d.plot import plot_reconstruction
from vit3d.reconstruction import inverted, reconstruct
from vit3d.scoring import score_trees
from vit3d.simulate import Microscope, Style, random_neuron, simulate_neuron
from vit3d.tables import fill_card, json_lines, markdown_table
from vit3d.tracing import trace
from vit3d.tree import SOMA, read_swc
from vit3d.volume import read_volume

SPACING_UM = (1.0, 0.33, 0.33)  # of the OP neurons; the files do not carry it
FAILED = 0.5  # an F1 below it is a failure
SHOWN = ("precision", "recall", "f1", "esa", "dsa", "pds", "corrections_per_mm")


def real_row(model, processor, pair: dict, selected_on: str) -> dict:
    volume = read_volume(pair["image"], spacing_um=SPACING_UM)
    gold = read_swc(pair["swc"], unit="voxel").to("voxel", SPACING_UM)
    start = time.process_time()
    tree = reconstruct(model, volume, processor=processor).tree.to("voxel")
    seconds = time.process_time() - start
    aligned, shift = align_gold(gold, volume)
    scores = score_trees(tree, aligned)
    judged = score_trees(without_untraced(tree, aligned, volume), aligned)["precision"]
    role = "selected on" if pair["name"] in selected_on.split(",") else "trained on"
    shift = ", ".join(f"{v:g}" for v in shift)
    row = {"neuron": pair["name"], "role": role, "gold shift z, y, x": shift, "raw F1": score_trees(tree, gold)["f1"]}
    row |= {key: scores[key] for key in SHOWN}
    return row | {"precision of traced": judged, "trees": tree.num_roots, "CPU seconds": round(seconds, 1)}


def simulated_row(model, processor, seed: int) -> dict:
    volume, truth = random_neuron(seed)
    tree = reconstruct(model, volume, processor=processor, forest=truth.num_roots > 1).tree
    spacing = ", ".join(f"{v:.2f}" for v in volume.spacing_um)
    scores = score_trees(tree, truth)
    row = {"seed": seed, "spacing z, y, x (um)": spacing, "true trees": truth.num_roots}
    return row | {key: scores[key] for key in SHOWN}


def unlike_row(model, processor, kind: str, seed: int) -> dict:
    """Scores of the network's tree, and the F1 of what `vit3d trace --threshold auto` makes of the stack itself."""
    volume, truth = unlike_stack(kind, seed)
    found = score_trees(reconstruct(model, volume, processor=processor).tree, truth)
    bare = score_trees(trace(inverted(volume) if kind in DARK else volume), truth)
    row = {"kind": kind, "seed": seed, **{key: found[key] for key in SHOWN}}
    return row | {"trace alone": bare["f1"]}


def cell(seed: int):
    """A neuron with a soma of 3 to 8 um, or, every third, without, in slices of 0.5 or 1 um; and its tree in um."""
    rng = np.random.default_rng([seed, 3])
    soma_um = rng.uniform(3, 8) if seed % 3 else 0.0
    stem_um = rng.uniform(0.4, min(1.6, soma_um / 3) if soma_um else 2.0)
    style = Style(
        soma_radius_um=soma_um, stem_radius_um=stem_um, thinnest_um=0.3,
        num_stems=int(rng.integers(2, 6)) if soma_um else 1, cable_um=rng.uniform(300, 900),
    )  # fmt: skip
    microscope = Microscope(
        photons=rng.uniform(15, 80), background=rng.uniform(0.02, 0.15), psf_um=(rng.uniform(0.8, 2), 0.35, 0.35)
    )
    spacing_um = (rng.choice([0.5, 1.0]), 0.33, 0.33)
    drawn = {"seed": seed, "shape": (48, 224, 224), "spacing_um": spacing_um}
    return simulate_neuron(**drawn, style=style, microscope=microscope)


def cell_row(model, processor, seed: int) -> dict:
    volume, truth = cell(seed)
    tree = reconstruct(model, volume, processor=processor).tree
    row = {"seed": seed, "soma": bool((truth.types == SOMA).any()), "found": bool((tree.types == SOMA).any())}
    if row["soma"] and row["found"]:
        place, true = (int(np.flatnonzero(each.types == SOMA)[0]) for each in (tree, truth))
        row["off_um"] = float(np.linalg.norm(tree.points[place] - truth.points[true]))
        row["radius"] = float(tree.radii[place] / truth.radii[true])
    return row | {"f1": score_trees(tree, truth)["f1"]}


def cell_table(rows: list[dict]) -> list[dict]:
    """One row: how many somata are found and where, and how many where none is."""
    with_soma = [row for row in rows if row["soma"]]
    found = [row for row in with_soma if row["found"]]
    return [
        {
            "cells": len(with_soma), "somata found": len(found),
            "off, um (median)": float(np.median([row["off_um"] for row in found])),
            "radius / true (median)": float(np.median([row["radius"] for row in found])),
            "mean F1": float(np.mean([row["f1"] for row in with_soma])),
            "neurons without": len(rows) - len(with_soma),
            "somata found there": sum(row["found"] for row in rows if not row["soma"]),
        }
    ]  # fmt: skip


def unlike_table(rows: list[dict]) -> list[dict]:
    """Per kind, and over those that training saw something alike and those it did not: F1, and how many failed."""
    groups = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    groups["all that training saw alike"] = [row for row in rows if row["kind"] in ALIKE]
    groups["all that it did not"] = [row for row in rows if row["kind"] not in (*ALIKE, "plain")]
    return [{"kind": kind, "stacks": len(part), **_summary(part)} for kind, part in groups.items()]


def _summary(rows: list[dict]) -> dict:
    summary = {}
    for name, key in (("vit3d", "f1"), ("trace alone", "trace alone")):
        values = [row[key] for row in rows]
        summary |= {f"{name}: mean F1": float(np.mean(values)), f"{name}: worst": min(values)}
        summary[f"{name}: failed"] = f"{np.mean(np.less(values, FAILED)):.0%}"
    return summary


def scores(source: str, data: Path, selected_on: str, unlike_seeds=UNSEEN) -> dict[str, list[dict]]:
    """A row per stack: real ones, those of the training's generator, and those of kinds that it does not make."""
    model, processor = load_checkpoint(source)
    return {
        "real": [real_row(model, processor, pair, selected_on) for pair in find_pairs(data)],
        "simulated": [simulated_row(model, processor, seed) for seed in range(500, 512)],
        "unlike": [unlike_row(model, processor, kind, seed) for kind in KINDS for seed in unlike_seeds],
        "cells": [cell_row(model, processor, seed) for seed in range(24)],
    }


def write(found: dict[str, list[dict]], card: Path, readme: Path, data: Path) -> None:
    """The card's tables, `scores.json` beside it, and the README's number."""
    real, simulated = found["real"], found["simulated"]
    means = {key: float(np.mean([row[key] for row in simulated if np.isfinite(row[key])])) for key in SHOWN}
    mean_row = {"seed": "mean", "spacing z, y, x (um)": "", "true trees": "", **means}
    tables = {"real": real, "simulated": [*simulated, mean_row], "unlike": unlike_table(found["unlike"])}
    tables["cells"] = cell_table(found["cells"])
    for section in ("real neurons", "simulated neurons", "unlike stacks", "cells"):
        fill_card(card, section, markdown_table(tables[section.split()[0]]))
    card.with_name("scores.json").write_text(json.dumps(tables, indent=1) + "\n")
    chosen = next(row for row in real if row["role"] == "selected on")
    mean = np.mean([row["f1"] for row in real])
    command = f"`python scripts/evaluate_checkpoint.py --data {data} --card {card}`"
    words = (
        f"On {chosen['neuron']}, a real olfactory projection neuron that the network was not trained on (versions of "
    )
    words += f"it were chosen by it), F1 at 2 voxels is **{chosen['f1']:.3f}** against the gold trace shifted onto its "
    words += f"image; the mean over it and the {len(real) - 1} that were trained on is {mean:.3f}. Segmenting and "
    words += f"tracing it took {chosen['CPU seconds']:.1f} s of processor time. "
    words += f"Written by {command}; the data are not part of the repository."
    fill_card(readme, "number", words)


def candidate_row(name: str, found: dict[str, list[dict]]) -> dict:
    """Mean F1 of each sort of stacks, and how many of the unlike ones, `plain` left out, failed."""
    row = {"weights": name, **{sort: float(np.mean([r["f1"] for r in found[sort]])) for sort in ("real", "simulated")}}
    row |= {pair["neuron"]: pair["f1"] for pair in found["real"] if pair["role"] == "selected on"}
    row |= {kind: float(np.mean([r["f1"] for r in found["unlike"] if r["kind"] == kind])) for kind in KINDS}
    row["cells"] = float(np.mean([r["f1"] for r in found["cells"]]))
    return row | {"failed": sum(r["f1"] < FAILED for r in found["unlike"] if r["kind"] != "plain")}


def compare(folders: list[Path], args) -> None:
    store = args.card.with_name("candidates.jsonl")
    for folder in folders:
        row = candidate_row(folder.name, scores(str(folder), args.data, args.selected_on, SEEDS))
        rows = sorted(
            [row, *(o for o in json_lines(store) if o["weights"] != folder.name)], key=lambda row: row["weights"]
        )
        store.write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = [dict.fromkeys(row, "-") | each for each in rows]
        fill_card(args.card, "candidates", markdown_table(rows))  # "-": a kind that there was not yet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit3d-tiny")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--selected-on", default="OP_6")
    parser.add_argument("--card", type=Path, required=True)
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--candidates", type=Path, nargs="+", default=[], metavar="FOLDER")
    args = parser.parse_args()

    if args.candidates:
        return compare(args.candidates, args)
    write(scores(args.model, args.data, args.selected_on), args.card, args.readme, args.data)
    model, processor = load_checkpoint(args.model)
    volume, _ = simulate_neuron(seed=1)
    result = reconstruct(model, volume, processor=processor)
    plot_reconstruction(volume, result.tree, args.card.with_name("demo.png"), probability=result.probability)


if __name__ == "__main__":
    main()
