"""VERB train: the Accelerate loop. `accelerate launch -m vit3d.training --data DIR --init SOURCE --out RUN`."""

import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import AutoConfig, get_cosine_schedule_with_warmup

from .bigneuron import find_pairs
from .checkpoint import load_checkpoint, place_of
from .gold import align_gold, untraced_structure
from .model.auto_vit3d import register
from .model.image_processing_vit3d import ViT3DImageProcessor
from .model.modeling_vit3d import ViT3DForNeuronSegmentation
from .patches import CropDataset, TrainingVolume
from .simulate import random_neuron
from .targets import training_labels
from .tree import NeuronTree, read_swc
from .volume import Volume, read_volume


@dataclass(frozen=True)
class TrainingConfig:
    """Everything a run depends on; written to `OUT/training.json`.

    data: folder of stacks and golds (`NAME.tif` + `NAME.swc`, in voxels where it says no unit); may be "".
    init: a 2D ViT (Hub id or folder) to inflate with `strategy`, or a vit3d checkpoint to go on from.
    prediction: "volume", or "center_slice": the paper's mode, five slices in and their centre out.
    validate: names of neurons kept out of training; the checkpoint with the best mean F1 on them is kept.
    simulated: how many simulated neurons are mixed in, and `simulated_share` of the crops they get.
    """

    data: str
    init: str
    out: str
    strategy: str = "center"
    prediction: str = "volume"
    validate: tuple[str, ...] = ()
    spacing_um: tuple[float, float, float] | None = None
    simulated: int = 32
    simulated_share: float = 0.4
    max_steps: int = 2000
    batch_size: int = 8
    encoder_rate: float = 1e-4
    head_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    ema_decay: float = 0.995
    validate_every: int = 500
    num_workers: int = 1
    mixed_precision: str = "no"
    seed: int = 0

    def __post_init__(self):
        for name, least in (("max_steps", 1), ("batch_size", 1), ("validate_every", 1), ("simulated", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")


def train(config: TrainingConfig) -> Path:
    """Run the training that `config` describes; returns the folder of the best checkpoint, `OUT/best`.

    Writes `OUT/metrics.jsonl`, one line per logged step, `OUT/last` and `OUT/best`. The weights kept are the
    exponential moving average. Raises ValueError before it starts when `OUT` holds another run.
    """
    out = Path(config.out)
    if (out / "training.json").exists():
        raise ValueError(f"{out} already holds a run; choose another --out or remove it.")
    accelerator = _accelerator(config)
    set_seed(config.seed)
    register()
    pairs = find_pairs(config.data) if config.data else []
    _check_validation_names(config, pairs)
    model = initial_model(config)
    processor = ViT3DImageProcessor.from_config(model.config)
    volumes, weights = training_volumes(config, pairs, processor)
    length = config.max_steps * config.batch_size * accelerator.num_processes
    crops = CropDataset(volumes, weights, processor, length, config.seed, model.config)
    loader = torch.utils.data.DataLoader(crops, batch_size=config.batch_size, num_workers=config.num_workers)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.max_steps)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    average = AveragedModel(accelerator.unwrap_model(model), multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    validator = Validator(config, pairs if accelerator.is_main_process else [], processor)
    keeper = Keeper(out, processor, validator, Log(out / "metrics.jsonl", accelerator))
    _begin(out, config, accelerator)
    model.train()
    bar = tqdm(loader, desc="train", unit="step", disable=None if accelerator.is_main_process else True)
    for step, batch in enumerate(bar, start=1):
        loss = model(**batch).loss
        if not torch.isfinite(loss):
            raise ValueError(f"The loss is not finite at step {step}; the last good checkpoint is in {out}.")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update_parameters(accelerator.unwrap_model(model))
        if step % 10 == 0:
            keeper.log(step=step, loss=loss.item(), rate=schedule.get_last_lr()[-1])
        if (step % config.validate_every == 0 or step == config.max_steps) and accelerator.is_main_process:
            keeper.keep(average.module, step)
    accelerator.end_training()
    return keeper.best


def _accelerator(config: TrainingConfig) -> Accelerator:
    handlers = [
        DistributedDataParallelKwargs(find_unused_parameters=True),  # the encoder's last norm feeds no head
        InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # all wait while one process validates
    ]
    return Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=handlers)


def _begin(out: Path, config: TrainingConfig, accelerator: Accelerator) -> None:
    """`OUT/training.json`, from which on the folder holds a run: after all that can be refused."""
    accelerator.wait_for_everyone()  # every process has looked whether the folder is free
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        facts = {**asdict(config), "num_processes": accelerator.num_processes}
        (out / "training.json").write_text(json.dumps(facts, indent=2))


def initial_model(config: TrainingConfig) -> ViT3DForNeuronSegmentation:
    """Go on from a vit3d checkpoint (a shipped name too), or inflate a 2D ViT."""
    try:
        kind = AutoConfig.from_pretrained(place_of(config.init)).model_type
    except OSError as error:
        raise ValueError(f"--init {config.init} is no folder and no model that the Hub gives out now.") from error
    if kind == "vit3d":
        return load_checkpoint(config.init, "cpu", dtype=torch.float32)[0]
    sizes = {"patch_size": (5, 8, 8), "volume_size": (5, 112, 112)} if config.prediction == "center_slice" else {}
    return ViT3DForNeuronSegmentation.from_2d_pretrained(
        config.init, config.strategy, prediction=config.prediction, **sizes
    )


def parameter_groups(model: ViT3DForNeuronSegmentation, config: TrainingConfig) -> list[dict]:
    """What was inherited learns at `encoder_rate`, what is new at `head_rate`."""
    new = [*model.head.parameters(), model.vit3d.embeddings.depth_embeddings]
    known = {id(parameter) for parameter in new}
    inherited = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [{"params": inherited, "lr": config.encoder_rate}, {"params": new, "lr": config.head_rate}]


def training_volumes(
    config: TrainingConfig, pairs: list[dict], processor: ViT3DImageProcessor
) -> tuple[list[TrainingVolume], list[float]]:
    """Real and simulated volumes, and the weight with which each is drawn."""
    real = [row for row in pairs if row["name"] not in config.validate]
    volumes = [_prepare_pair(row, processor) for row in tqdm(real, desc="read golds", disable=None)]
    share = config.simulated_share if real else 1.0
    weights = [(1 - share) / max(1, len(real))] * len(real)
    for index in tqdm(range(config.simulated), desc="simulate", disable=None):
        volume, tree = random_neuron(seed=10_000 * (config.seed + 1) + index)
        labels = training_labels(tree, volume.shape, min_radius_vox=1.5, ignore_vox=0.0)
        volumes.append(TrainingVolume.prepare(f"simulated {index}", volume.voxels, labels, processor))
        weights.append(share / config.simulated)
    if not volumes:
        raise ValueError("Nothing to train on: give --data a folder of pairs, or --simulated a number of neurons.")
    return volumes, weights


def _prepare_pair(row: dict, processor: ViT3DImageProcessor) -> TrainingVolume:
    volume = read_volume(row["image"])
    gold, polarity = read_gold(row["swc"], volume, processor)
    untraced = untraced_structure(volume, gold, polarity=polarity)
    labels = training_labels(gold, volume.shape, min_radius_vox=1.5, ignore_vox=0.0, untraced=untraced)
    return TrainingVolume.prepare(row["name"], volume.voxels, labels, processor)


def read_gold(path: str | Path, volume: Volume, processor: ViT3DImageProcessor) -> tuple[NeuronTree, str]:
    """The gold in voxels, aligned to its stack, and the stack's polarity. An SWC that says no unit is in voxels."""
    tree = read_swc(path)
    tree = replace(tree, unit="voxel") if tree.unit is None else tree
    polarity = processor.measure(volume.voxels).polarity
    return align_gold(tree.to("voxel", tree.spacing_um or volume.spacing_um), volume, polarity=polarity)[0], polarity


class Validator:
    """Whole neurons, as a user would run them: segment, trace, score against the aligned gold."""

    def __init__(self, config: TrainingConfig, pairs: list[dict], processor: ViT3DImageProcessor):
        self.processor = processor
        self.cases = []
        for row in pairs:
            if row["name"] in config.validate:
                volume = read_volume(row["image"], spacing_um=config.spacing_um)
                gold, _ = read_gold(row["swc"], volume, processor)
                self.cases.append((row["name"], volume, gold))

    def __call__(self, model) -> dict[str, float]:
        from .reconstruction import reconstruct  # the only place where training meets the other verbs
        from .scoring import score_trees

        scores = {}
        for name, volume, gold in self.cases:
            tree = reconstruct(model, volume, processor=self.processor).tree
            spacing_um = volume.spacing_um or (1.0, 1.0, 1.0)
            scores[f"f1/{name}"] = score_trees(tree.to("voxel", spacing_um), gold)["f1"]
        return {"f1": float(np.mean(list(scores.values()))), **scores} if scores else {}


class Keeper:
    """Validates, logs, and keeps two checkpoints: the last, and the best (the last, when nothing validates)."""

    def __init__(self, out: Path, processor: ViT3DImageProcessor, validator: Validator, log: "Log"):
        self.last, self.best, self.processor = out / "last", out / "best", processor
        self.validator, self.log, self.score = validator, log, -1.0

    def keep(self, model, step: int) -> None:
        save(model, self.processor, self.last)
        scores = self.validator(model)
        self.log(step=step, **scores)
        if scores.get("f1", 0.0) >= self.score or not scores:
            self.score = scores.get("f1", 0.0)
            save(model, self.processor, self.best)


class Log:
    """One JSON line per call, with the seconds since the start; a killed run keeps every line."""

    def __init__(self, path: Path, accelerator: Accelerator):
        self.path, self.main, self.start = path, accelerator.is_main_process, time.monotonic()

    def __call__(self, **values) -> None:
        if not self.main:
            return
        values["seconds"] = time.monotonic() - self.start
        rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(rounded) + "\n")


def save(model, processor: ViT3DImageProcessor, folder: Path) -> None:
    """Write a checkpoint beside its final name and swap it in: a kill while saving leaves the previous one."""
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)  # killed between the two renames below
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_validation_names(config: TrainingConfig, pairs: list[dict]) -> None:
    unknown = set(config.validate) - {row["name"] for row in pairs}
    if unknown:
        raise ValueError(f"--validate names {sorted(unknown)}, which {config.data or 'an empty --data'} does not hold.")


def main() -> None:
    """`python -m vit3d.training` and `accelerate launch -m vit3d.training`: the flags of `vit3d train`."""
    from .cli import main as command

    command(["train", *sys.argv[1:]])


if __name__ == "__main__":
    main()
