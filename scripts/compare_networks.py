"""Is this network more accurate than the convolutional ones a user would take? Same crops' worth of data, same tracer.

    OMP_NUM_THREADS=1 python scripts/compare_networks.py --source ../shared/weights/deit-tiny-patch16-224 \
        --data ../shared/data/op --card model_cards/network/README.md --steps 600 --batch-size 4

trains vit3d, DynUNet and BasicUNet on all neurons but one, for two folds and three seeds, with the loss, the optimiser
and the augmentation of `vit3d train`, and traces what they see of the neuron left out. Needs the extra `bench`. Every
finished run is a line of accuracy.jsonl beside the card; the same command goes on where it was stopped, and with a
folder `--scratch` that is kept, also in the middle of a run. The networks have different windows, hence `--steps` of
`--batch-size` windows: see that `loss before` and `loss` agree. bf16 autocast where the hardware multiplies it.
`minutes` of training are one thread's on a CPU, the clock's on a GPU.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from itertools import product
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
from vit3d.checkpoint import preferred_dtype
from vit3d.learning.optimization import parameter_groups
from vit3d.learning.patches import CropDataset
from vit3d.learning.training_config import TrainingConfig
from vit3d.learning.training_data import tell_spacing, training_volumes
from vit3d.model.configuration_vit3d import ViT3DConfig
from vit3d.model.image_processing_vit3d import ViT3DImageProcessor
from vit3d.model.modeling_vit3d import MISSED_SHARE, ViT3DForNeuronSegmentation, segmentation_loss
from vit3d.scoring import score_trees
from vit3d.segmentation import segment
from vit3d.tables import add_json_line, fill_card, json_lines, markdown_table
from vit3d.tracing import trace
from vit3d.tree import read_swc
from vit3d.volume import Volume, read_volume

FOLDS, SEEDS = ("OP_6", "OP_3"), range(3)
NETWORKS = ("vit3d", "BasicUNet", "DynUNet")
PEER_WINDOW = (16, 96, 96)
SAVE_EVERY = 25  # steps
FEW_VOXELS = 1000  # a deep layer's; torch 2.13 on AVX512-BF16 fails over 2 x 12 x 12
SHOWN = ("f1", "precision", "recall", "corrections_per_mm")


def network_of(name: str, source: str) -> tuple[torch.nn.Module, ViT3DConfig]:
    """A network to train, and the config that says its windows; a peer's is one patch, so all of it is computed."""
    if name == "vit3d":
        model = ViT3DForNeuronSegmentation.from_2d_pretrained(source)
        return model, model.config
    config = ViT3DConfig(volume_size=PEER_WINDOW, patch_size=PEER_WINDOW)
    model = PEERS[name](PEER_WINDOW)
    for convolution in (module for module in model.modules() if type(module) is torch.nn.Conv3d):
        convolution.__class__ = SoundConvolution
    return model, config


class SoundConvolution(torch.nn.Conv3d):
    """In fp32 over few voxels: there the bf16 gradient of the weights, on a CPU, reads memory that nobody wrote."""

    def forward(self, voxels: torch.Tensor) -> torch.Tensor:
        few = voxels.device.type == "cpu" and math.prod(voxels.shape[2:]) < FEW_VOXELS
        with torch.autocast(voxels.device.type, enabled=torch.is_autocast_enabled(voxels.device.type) and not few):
            return super().forward(voxels.float() if few else voxels)


def loss_of(model, batch: dict) -> torch.Tensor:
    if isinstance(model, ViT3DForNeuronSegmentation):
        return model(**batch).loss
    return segmentation_loss(model(batch["pixel_values"]), batch["labels"])


class Training:
    """A network, the average of its weights, as `vit3d train` keeps it, and the loss of each step so far.

    Crop number i is the same in every process, so a training goes on from the file `state` as if never stopped.
    """

    def __init__(self, model: torch.nn.Module, config: TrainingConfig, device: str, state: Path):
        groups = [{"params": list(model.parameters()), "lr": config.head_rate, "weight_decay": config.weight_decay}]
        is_ours = isinstance(model, ViT3DForNeuronSegmentation)
        self.model, self.config, self.device, self.state = model.to(device).train(), config, device, state
        optimizer = torch.optim.AdamW(parameter_groups(model, config) if is_ours else groups)
        schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.max_steps)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
        self.losses: list[float] = []
        self.seconds = 0.0  # of this process on a CPU, else of the clock

    def run(self, crops: CropDataset) -> torch.nn.Module:
        """Train to the end; the averaged network."""
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        if self.state.exists():
            self._load()
        rest = torch.utils.data.Subset(crops, range(len(self.losses) * self.config.batch_size, len(crops)))
        for batch in torch.utils.data.DataLoader(rest, self.config.batch_size, num_workers=self.config.num_workers):
            start = clock()
            self._step({key: value.to(self.device) for key, value in batch.items()})
            self.seconds += clock() - start
            if len(self.losses) % SAVE_EVERY == 0:
                self._save()
        return self.parts["average"].module.eval()

    def _step(self, batch: dict) -> None:
        dtype, optimizer = preferred_dtype(self.device), self.parts["optimizer"]
        with torch.autocast(self.device, dtype, enabled=dtype is not torch.float32):
            loss = loss_of(self.model, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not torch.isfinite(loss + norm):
            raise SystemExit(f"Step {len(self.losses) + 1} is not finite; the same command goes on from before it.")
        optimizer.step()
        optimizer.zero_grad()
        self.parts["schedule"].step()
        self.parts["average"].update_parameters(self.model)
        self.losses.append(loss.item())

    def _save(self) -> None:
        whole = {name: part.state_dict() for name, part in self.parts.items()}
        partial = self.state.with_suffix(".partial")
        torch.save(whole | {"losses": self.losses, "seconds": self.seconds}, partial)
        partial.replace(self.state)

    def _load(self) -> None:
        whole = torch.load(self.state, map_location=self.device, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(whole[name])
        self.losses, self.seconds = whole["losses"], whole["seconds"]


@torch.inference_mode()
def probability_of(model, volume: Volume, processor: ViT3DImageProcessor, device: str) -> Volume:
    """Of a peer too only where something stands out of the background: in windows where nothing does, which training
    never cuts and instance norm blows up, DynUNet marks a part, and its largest tree may lie there."""
    if isinstance(model, ViT3DForNeuronSegmentation):
        return segment(model, volume, processor=processor)
    statistics = processor.measure(volume.voxels)
    pixel_values = torch.from_numpy(processor.pixel_values(volume.voxels, statistics))
    predict: Callable = lambda window: model(window).sigmoid()  # noqa: E731
    placed = {"sw_device": device, "device": "cpu"}  # windows where the network is, the stack beside it
    found = sliding_window_inference(
        pixel_values[None, None], PEER_WINDOW, 4, predict, overlap=0.25, mode="gaussian", **placed
    )
    standing_out = processor.foreground(volume.voxels, statistics)
    return Volume(found[0, 0].float().cpu().numpy() * standing_out, volume.spacing_um)


def perform(run: dict, args, store: Path) -> dict:
    torch.manual_seed(run["seed"])
    model, network = network_of(run["network"], args.source)
    processor = ViT3DImageProcessor.from_config(network)
    config = TrainingConfig(
        data=str(args.data), init="", out="", validate=(run["fold"],), spacing_um=SPACING_UM,
        simulated=args.simulated, max_steps=args.steps, batch_size=args.batch_size,
        encoder_rate=args.encoder_rate, warmup_steps=args.steps // 10, ema_decay=0.98, seed=run["seed"],
        num_workers=0 if args.device == "cpu" else 8,
    )  # fmt: skip
    pairs = find_pairs(args.data)
    tell_spacing(network, pairs, config)
    volumes, weights = training_volumes(config, pairs, network, store)
    crops = CropDataset(volumes, weights, processor, args.steps * args.batch_size, run["seed"], network)
    state = store / ("_".join(map(str, run.values())) + ".pt")
    training = Training(model, config, args.device, state)
    model, losses = training.run(crops), training.losses
    row = {**run, "windows": len(crops), "minutes": training.seconds / 60}
    tenth = max(1, args.steps // 10)
    row |= {"loss before": fmean(losses[-2 * tenth : -tenth] or losses), "loss": fmean(losses[-tenth:])}
    pair = next(pair for pair in pairs if pair["name"] == run["fold"])
    volume = read_volume(pair["image"], spacing_um=SPACING_UM)
    gold, _ = align_gold(read_swc(pair["swc"], unit="voxel").to("voxel", SPACING_UM), volume)
    tree = trace(probability_of(model, volume, processor, args.device)).to("voxel")
    scores = score_trees(tree, gold)
    judged = score_trees(without_untraced(tree, gold, volume), gold)["precision"]
    state.unlink(missing_ok=True)
    return row | {key: scores[key] for key in SHOWN} | {"precision of traced": judged}


def means(rows: list[dict]) -> list[dict]:
    """Mean and standard deviation per neuron left out, budget, network and loss."""
    found = []
    budgets = sorted({(row["steps"], row["simulated"]) for row in rows})
    shares = sorted({row["missed_share"] for row in rows})
    for fold, (steps, simulated), network, share in product(FOLDS, budgets, NETWORKS, shares):
        group = {"fold": fold, "steps": steps, "simulated": simulated, "network": network, "missed_share": share}
        part = [row for row in rows if group.items() <= row.items()]
        if part:
            told = {"left out": fold, "steps": steps, "simulated": simulated, "network": network, "missed": share}
            shown = ("loss before", "loss", *SHOWN, "precision of traced")
            spread = {"runs": len(part), "windows": f"{fmean(row['windows'] for row in part):.0f}"}
            spread |= {"minutes": f"{fmean(row['minutes'] for row in part):.1f}"}
            found.append(told | spread | {key: _spread([row[key] for row in part]) for key in shown})
    return found


def paired(rows: list[dict]) -> list[dict]:
    """How often this network's tree has the higher F1, of the runs that another network has with the same seed, neuron
    left out, budget and loss."""
    same = ("steps", "simulated", "missed_share", "fold", "seed")
    ours = {tuple(row[key] for key in same): row["f1"] for row in rows if row["network"] == NETWORKS[0]}
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        run = tuple(row[key] for key in same)
        if row["network"] != NETWORKS[0] and run in ours:
            groups.setdefault((*run[:4], row["network"]), []).append(ours[run] - row["f1"])
    names = ("steps", "simulated", "missed", "left out", "against")
    return [
        dict(zip(names, group, strict=True)) | {"runs": len(ahead), "ahead in": sum(f1 > 0 for f1 in ahead)}
        | {"by, in the mean": _spread(ahead)}
        for group, ahead in sorted(groups.items())
    ]  # fmt: skip


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def fill_tables(card: Path, rows: list[dict]) -> None:
    fill_card(card, "accuracy", markdown_table(means(rows)))
    if beside := paired(rows):
        fill_card(card, "paired", markdown_table(beside))


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
    parser.add_argument("--scratch", type=Path, help="folder for volumes and the unfinished run")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    args = parser.parse_args()

    store = args.card.with_name("accuracy.jsonl")
    budget = {key: getattr(args, key) for key in ("steps", "batch_size", "encoder_rate", "simulated")}
    budget["source"] = Path(args.source).name
    loss = {"missed_share": MISSED_SHARE}  # rows of another loss stay in the table
    runs = [{"network": n, "fold": f, "seed": s} for s in SEEDS for f in FOLDS for n in args.networks.split(",")]
    with tempfile.TemporaryDirectory() as volumes:
        for run in runs:
            if not any((run | budget | loss).items() <= row.items() for row in json_lines(store)):
                row = perform(run | budget | loss, args, args.scratch or Path(volumes))
                add_json_line(store, row)
                print(json.dumps(row), flush=True)
            fill_tables(args.card, json_lines(store))


if __name__ == "__main__":
    main()
