"""Is this network more accurate than the convolutional ones a user would take? Same crops' worth of data, same tracer.

    OMP_NUM_THREADS=1 python scripts/compare_networks.py --source ../shared/weights/deit-tiny-patch16-224 \
        --data ../shared/data/op --card model_cards/network/README.md

trains vit3d, DynUNet and BasicUNet on all neurons but one, for two folds and three seeds, with the loss, the optimiser
and the augmentation of `vit3d train`, and traces what they see of the neuron left out. Needs the extra `bench`. Every
finished run is a line of accuracy.jsonl beside the card; the same command goes on where it was stopped. The networks
have different windows, hence `--steps` of `--batch-size` windows: see that `loss before` and `loss` agree.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_cosine_schedule_with_warmup

from benchmark_network import PEERS, SPACING_UM
from vit3d.annotations.gold import align_gold, without_untraced
from vit3d.bigneuron import find_pairs
from vit3d.learning.optimization import parameter_groups
from vit3d.learning.training_config import TrainingConfig
from vit3d.learning.training_data import training_volumes
from vit3d.model.configuration_vit3d import ViT3DConfig
from vit3d.model.image_processing_vit3d import ViT3DImageProcessor
from vit3d.model.modeling_vit3d import ViT3DForNeuronSegmentation, segmentation_loss
from vit3d.patches import CropDataset
from vit3d.scoring import score_trees
from vit3d.segmentation import segment
from vit3d.tables import fill_card, markdown_table
from vit3d.tracing import trace
from vit3d.tree import read_swc
from vit3d.volume import Volume, read_volume

FOLDS, SEEDS = ("OP_6", "OP_3"), range(3)
NETWORKS = ("vit3d", "BasicUNet", "DynUNet")
PEER_WINDOW = (16, 96, 96)
SHOWN = ("f1", "precision", "recall", "corrections_per_mm")


def network_of(name: str, source: str) -> tuple[torch.nn.Module, ViT3DConfig]:
    """A network to train, and the config that says its windows; a peer's is one patch, so all of it is computed."""
    if name == "vit3d":
        model = ViT3DForNeuronSegmentation.from_2d_pretrained(source)
        return model, model.config
    config = ViT3DConfig(volume_size=PEER_WINDOW, patch_size=PEER_WINDOW)
    return PEERS[name](PEER_WINDOW), config


def loss_of(model, batch: dict) -> torch.Tensor:
    if isinstance(model, ViT3DForNeuronSegmentation):
        return model(**batch).loss
    return segmentation_loss(model(batch["pixel_values"]), batch["labels"])


def trained(model, crops: CropDataset, config: TrainingConfig, device: str) -> tuple[torch.nn.Module, list[float]]:
    """The average of the weights, as `vit3d train` keeps it, and the loss of each step."""
    groups = [{"params": list(model.parameters()), "lr": config.head_rate, "weight_decay": config.weight_decay}]
    is_ours = isinstance(model, ViT3DForNeuronSegmentation)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, config) if is_ours else groups)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.max_steps)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    losses = []
    for batch in torch.utils.data.DataLoader(crops, config.batch_size, num_workers=config.num_workers):
        loss = loss_of(model, {key: value.to(device) for key, value in batch.items()})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update_parameters(model)
        losses.append(loss.item())
    return average.module.eval(), losses


@torch.inference_mode()
def probability_of(model, volume: Volume, processor: ViT3DImageProcessor, device: str) -> Volume:
    if isinstance(model, ViT3DForNeuronSegmentation):
        return segment(model, volume, processor=processor)
    pixel_values = torch.from_numpy(processor.pixel_values(volume.voxels, processor.measure(volume.voxels)))
    predict: Callable = lambda window: model(window.to(device)).sigmoid()  # noqa: E731
    found = sliding_window_inference(pixel_values[None, None], PEER_WINDOW, 4, predict, overlap=0.25, mode="gaussian")
    return Volume(found[0, 0].float().cpu().numpy(), volume.spacing_um)


def perform(run: dict, args, store: Path) -> dict:
    torch.manual_seed(run["seed"])
    model, network = network_of(run["network"], args.source)
    processor = ViT3DImageProcessor.from_config(network)
    config = TrainingConfig(
        data=str(args.data), init="", out="", validate=(run["fold"],), spacing_um=SPACING_UM,
        simulated=args.simulated, max_steps=args.steps, batch_size=args.batch_size,
        encoder_rate=args.encoder_rate, warmup_steps=args.steps // 10, ema_decay=0.98, seed=run["seed"],
    )  # fmt: skip
    pairs = find_pairs(args.data)
    volumes, weights = training_volumes(config, pairs, processor, store)
    crops = CropDataset(volumes, weights, processor, args.steps * args.batch_size, run["seed"], network)
    start = time.process_time()
    model, losses = trained(model, crops, config, args.device)
    row = {**run, "steps": args.steps, "windows": len(crops), "CPU minutes": (time.process_time() - start) / 60}
    tenth = max(1, args.steps // 10)
    row |= {"loss before": fmean(losses[-2 * tenth : -tenth] or losses), "loss": fmean(losses[-tenth:])}
    pair = next(pair for pair in pairs if pair["name"] == run["fold"])
    volume = read_volume(pair["image"], spacing_um=SPACING_UM)
    gold, _ = align_gold(read_swc(pair["swc"], unit="voxel").to("voxel", SPACING_UM), volume)
    tree = trace(probability_of(model, volume, processor, args.device)).to("voxel")
    scores = score_trees(tree, gold)
    judged = score_trees(without_untraced(tree, gold, volume), gold)["precision"]
    return row | {key: scores[key] for key in SHOWN} | {"precision of traced": judged}


def means(rows: list[dict]) -> list[dict]:
    """Mean and standard deviation per network and fold."""
    found = []
    for fold in FOLDS:
        for network in NETWORKS:
            part = [row for row in rows if (row["network"], row["fold"]) == (network, fold)]
            if part:
                shown = ("steps", "windows", "CPU minutes", "loss before", "loss", *SHOWN, "precision of traced")
                spread = {key: f"{fmean(r[key] for r in part):.3g}" for key in shown[:3]}
                spread |= {key: _spread([row[key] for row in part]) for key in shown[3:]}
                found.append({"left out": fold, "network": network, "runs": len(part), **spread})
    return found


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--card", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--encoder-rate", type=float, default=3e-4)
    parser.add_argument("--simulated", type=int, default=0)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    store = args.card.with_name("accuracy.jsonl")
    runs = [{"network": n, "fold": f, "seed": s} for s in SEEDS for f in FOLDS for n in args.networks.split(",")]
    with tempfile.TemporaryDirectory() as volumes:
        for run in runs:
            rows = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
            if not any(run.items() <= row.items() for row in rows):
                row = perform(run, args, Path(volumes))
                with store.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
                fill_card(args.card, "accuracy", markdown_table(means([*rows, row])))


if __name__ == "__main__":
    main()
