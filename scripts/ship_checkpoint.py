"""Put the last checkpoint of a training into the package, in half precision, and write into its card how it came.

    python scripts/ship_checkpoint.py RUN [RUN ...] --to src/vit3d/checkpoints/vit3d-tiny \
        --card model_cards/vit3d-tiny/README.md

Several runs, in order, where one went on from the other's checkpoint; `--append` keeps the rows of earlier ones.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from vit3d import ViT3DForNeuronSegmentation
from vit3d.model.image_processing_vit3d import ViT3DImageProcessor
from vit3d.tables import fill_card, markdown_table

SHOWN = ("strategy", "max_steps", "batch_size", "encoder_rate", "head_rate", "weight_decay", "ema_decay", "seed")


def history(run: Path) -> dict:
    """One row: what the run was told, how far it came, and how long that took."""
    config = json.loads((run / "training.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    row = {"start": Path(config["init"]).name, **{key: config[key] for key in SHOWN}, "simulated": config["simulated"]}
    row |= {"steps done": lines[-1]["step"], "mean of last 20 logged losses": float(np.mean(losses[-20:]))}
    return row | {"minutes": round(lines[-1]["seconds"] / 60)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--card", type=Path, required=True)
    parser.add_argument("--append", action="store_true")
    args = parser.parse_args()

    model = ViT3DForNeuronSegmentation.from_pretrained(args.runs[-1] / "last", dtype=torch.float16)
    vars(model.config).pop("auto_map", None)  # of the code that a run carries, which lies beside the package's own
    model.save_pretrained(args.to)
    ViT3DImageProcessor.from_config(model.config).save_pretrained(args.to)
    table = markdown_table([history(run) for run in args.runs])
    if args.append:
        before = args.card.read_text().split("<!-- training -->")[1].split("<!-- /training -->")[0]
        table = "\n".join([before.strip(), *table.splitlines()[2:]])
    fill_card(args.card, "training", table)


if __name__ == "__main__":
    main()
