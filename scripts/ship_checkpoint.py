"""Put the last checkpoint of a training into the package, in half precision, and write into its card how it came.

    python scripts/ship_checkpoint.py RUN [RUN ...] --to src/vit3d/checkpoints/vit3d-tiny \
        --card model_cards/vit3d-tiny/README.md

Several runs, in order, where one went on from the other's checkpoint; `--append` keeps the rows of earlier ones.
`--keep SHARE` leaves that share of the weights that lie in `--to`, where the run went on from them: the mean of the two
holds more of what the run did not train on.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from vit3d import ViT3DForNeuronSegmentation
from vit3d.model.image_processing_vit3d import ViT3DImageProcessor
from vit3d.tables import fill_card, json_lines, markdown_table

SHOWN = ("strategy", "max_steps", "batch_size", "encoder_rate", "head_rate", "weight_decay", "ema_decay")
SHOWN += ("consistency_weight", "seed")
KEPT = "kept of the weights before"


def history(run: Path, kept: float) -> dict:
    """One row: what the run was told, how far it came, how long that took, and the share of the weights before it."""
    config = json.loads((run / "training.json").read_text())
    lines = json_lines(run / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    row = {"start": Path(config["init"]).name, **{key: config.get(key, "-") for key in SHOWN}}
    row |= {
        "simulated": config["simulated"],
        "steps done": lines[-1]["step"],
        "mean of last 20 logged losses": float(np.mean(losses[-20:])),
    }
    return row | {"minutes": round(lines[-1]["seconds"] / 60), KEPT: kept}


def rows_of(table: str) -> list[dict]:
    """The rows of a Markdown table, as text."""
    names, _, *rows = ([cell.strip() for cell in line.strip("| ").split("|")] for line in table.strip().splitlines())
    return [dict(zip(names, row, strict=True)) for row in rows]


def keep(model: torch.nn.Module, place: Path, share: float) -> None:
    """Move the weights by `share` of the way back to those of the checkpoint at `place`."""
    before = ViT3DForNeuronSegmentation.from_pretrained(place, dtype=torch.float32).state_dict()
    model.load_state_dict({name: torch.lerp(new, before[name], share) for name, new in model.state_dict().items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--card", type=Path, required=True)
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--keep", type=float, default=0.0, metavar="SHARE")
    args = parser.parse_args()

    before = args.card.read_text().split("<!-- training -->")[1].split("<!-- /training -->")[0].strip()
    shares = [0.0] * (len(args.runs) - 1) + [args.keep]
    rows = list(map(history, args.runs, shares))
    known = rows_of(before) if args.append and before else []
    shipped = rows_of(markdown_table(rows))[-1]
    if any(row | {KEPT: ""} == shipped | {KEPT: ""} for row in known):
        parser.error(f"{args.card} says that this run was shipped; again, it would be mixed with itself.")
    first_ones = {KEPT: 0.0}  # of the rows written before there was such a column
    table = markdown_table([dict.fromkeys(shipped, "-") | first_ones | row for row in [*known, *rows]])

    model = ViT3DForNeuronSegmentation.from_pretrained(args.runs[-1] / "last", dtype=torch.float32)
    if args.keep:
        keep(model, args.to, args.keep)
    model = model.half()
    vars(model.config).pop("auto_map", None)  # of the code that a run carries, which lies beside the package's own
    model.save_pretrained(args.to)
    ViT3DImageProcessor.from_config(model.config).save_pretrained(args.to)
    fill_card(args.card, "training", table)


if __name__ == "__main__":
    main()
