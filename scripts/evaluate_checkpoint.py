"""Score a checkpoint on real and simulated neurons and write the numbers into its card and the README.

    python scripts/evaluate_checkpoint.py --data ../shared/data/op --card model_cards/vit3d-tiny/README.md

Every neuron goes through `reconstruct` as a user would run it. Golds are aligned with their image first; the
raw F1 is given beside it. A simulated stack of several unconnected neurites is traced as a forest. About two minutes
on two CPU cores.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from vit3d.annotations.gold import align_gold, without_untraced
from vit3d.bigneuron import find_pairs
from vit3d.checkpoint import load_checkpoint
from vit3d.plot import plot_reconstruction
from vit3d.reconstruction import reconstruct
from vit3d.scoring import score_trees
from vit3d.simulate import random_neuron, simulate_neuron
from vit3d.tables import fill_card, markdown_table
from vit3d.tree import read_swc
from vit3d.volume import read_volume

SPACING_UM = (1.0, 0.33, 0.33)  # of the OP neurons; the files do not carry it
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit3d-tiny")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--selected-on", default="OP_6")
    parser.add_argument("--card", type=Path, required=True)
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    args = parser.parse_args()

    model, processor = load_checkpoint(args.model)
    real = [real_row(model, processor, pair, args.selected_on) for pair in find_pairs(args.data)]
    simulated = [simulated_row(model, processor, seed) for seed in range(500, 512)]
    means = {key: float(np.mean([row[key] for row in simulated if np.isfinite(row[key])])) for key in SHOWN}
    simulated.append({"seed": "mean", "spacing z, y, x (um)": "", "true trees": "", **means})
    fill_card(args.card, "real neurons", markdown_table(real))
    fill_card(args.card, "simulated neurons", markdown_table(simulated))
    args.card.with_name("scores.json").write_text(json.dumps({"real": real, "simulated": simulated}, indent=1) + "\n")
    volume, _ = simulate_neuron(seed=1)
    result = reconstruct(model, volume, processor=processor)
    plot_reconstruction(volume, result.tree, args.card.with_name("demo.png"), probability=result.probability)
    chosen = next(row for row in real if row["role"] == "selected on")
    mean = np.mean([row["f1"] for row in real])
    command = f"`python scripts/evaluate_checkpoint.py --data {args.data} --card {args.card}`"
    words = (
        f"On {chosen['neuron']}, a real olfactory projection neuron that the network was not trained on (it chose the "
    )
    words += f"version that ships), F1 at 2 voxels is **{chosen['f1']:.3f}** against the gold trace shifted onto its "
    words += f"image; the mean over all {len(real)} neurons is {mean:.3f}. Segmenting and tracing it took "
    words += f"{chosen['CPU seconds']:.1f} s of processor time. "
    words += f"Written by {command}; the data are not part of the repository."
    fill_card(args.readme, "number", words)


if __name__ == "__main__":
    main()
