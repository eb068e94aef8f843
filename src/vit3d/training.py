"""VERB train: the Accelerate loop. `accelerate launch -m vit3d.training --data DIR --init SOURCE --out RUN`.

Crop i is a function of the seed and i alone, so a run that is resumed cuts the crops that it would have cut.
Several processes: `accelerate launch --multi_gpu --num_processes N -m vit3d.training ...`; on CPUs the same behind
`ACCELERATE_USE_CPU=true` (`--cpu` would start one process). Networks too large for one GPU: `scripts/fsdp2.yaml`.
"""

import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import AutoConfig

from .checkpoint import load_checkpoint, place_of, processor_of
from .learning.cldice import soft_cldice_loss
from .learning.consistency import disagreement
from .learning.launching import num_workers, start_accelerator
from .learning.optimization import averaging, freeze, optimizer_and_schedule, parameter_groups
from .learning.patches import CropDataset
from .learning.run_folder import Log, RunFolder, copy_checkpoint, save
from .learning.training_config import TrainingConfig
from .learning.training_data import chosen_neurons, glances, neuron_facts, tell_spacing, training_volumes
from .model.auto_vit3d import register
from .model.configuration_vit3d import ViT3DConfig
from .model.image_processing_vit3d import ViT3DImageProcessor
from .model.modeling_vit3d import ViT3DForNeuronSegmentation

__all__ = ["TrainingConfig", "TrainingRun", "initial_model", "parameter_groups", "save", "train"]


_DRAWING_S = 10.0  # seconds between two pictures of the curve: one takes as long as some steps
_LONGEST_WAIT = 0.05  # of a step's time, for its crops
_FEWEST_WAITS = 5  # logged, before anything is said about them


def train(config: TrainingConfig, resume: bool = False) -> Path:
    """Run the training that `config` describes; returns the folder of the checkpoint to use.

    That is `OUT/best` where neurons validate, else `OUT/last`; `learning.run_folder` says what else `OUT` holds. With
    `resume` a run that was stopped goes on from its newest state, to the same losses as if it never had been
    (same machine, same number of processes); a folder without a run is begun. ValueError, FileNotFoundError,
    before it starts: the folder holds another run or one of another configuration, nothing to train on, no such
    device, neuron, tracker or network. ValueError, while it runs: the loss is not finite.
    """
    accelerator = start_accelerator(config)
    if not accelerator.is_main_process:
        warnings.simplefilter("ignore", UserWarning)  # one process says it
    register()
    rows, config = chosen_neurons(config)
    folder = RunFolder(config.out)
    config = as_begun(config, folder.begun_with() if resume else None)
    facts = {**asdict(config), "num_processes": accelerator.num_processes}
    facts |= {"neurons": neuron_facts(rows), "files": glances(rows)}
    folder.refuse_unless_free(facts, resume)
    seen = folder.seen
    if folder.step == config.max_steps:  # it is finished
        if accelerator.is_main_process:  # and may have been stopped before it cleared away
            shutil.rmtree(folder.volumes, ignore_errors=True)
        return folder.best if config.validate else folder.last
    set_seed(config.seed)
    state = folder.newest_state
    if state is None:
        model, processor = initial_model(config)
    else:
        model = ViT3DForNeuronSegmentation(ViT3DConfig.from_pretrained(state))
        processor = processor_of(str(state), model.config)
    tell_spacing(model.config, rows, config)
    freeze(model, config.frozen)
    from .learning.validation import Validator  # it is composed of the other verbs

    with folder.left_as_it_was():
        with accelerator.local_main_process_first():  # the others find the volumes made
            volumes, weights = training_volumes(config, rows, model.config, folder.volumes, processor)
        length = config.max_steps * config.accumulation * config.batch_size * accelerator.num_processes
        paired = config.consistency_weight > 0
        crops = CropDataset(volumes, weights, processor, length, config.seed, model.config, paired=paired)
        validator = Validator(config, rows, accelerator)
    accelerator.wait_for_everyone()  # every process has looked whether the folder is free
    try:
        if accelerator.is_main_process:
            folder.begin(facts, seen)
        accelerator.wait_for_everyone()
        return TrainingRun(config, accelerator, folder, model, crops, validator).go()
    finally:
        folder.release()


class TrainingRun:
    """Everything that moves while a network learns: its weights, their average, the optimiser, the rate."""

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, folder: RunFolder, model, crops, validator):
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.crops, self.validator, self.processor = crops, validator, crops.processor
        self.score, self.step = -1.0, folder.step
        if config.gradient_checkpointing:
            _checkpoint_activations(model)
        optimizer, self.schedule = optimizer_and_schedule(model, config)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.average = None
        if accelerator.distributed_type != DistributedType.FSDP:
            model = accelerator.unwrap_model(self.model)
            self.average = AveragedModel(model, multi_avg_fn=averaging(config.ema_decay))
        set_seed(config.seed, device_specific=True)
        if folder.newest_state:
            self._resume(folder.newest_state)
        self.num_workers = num_workers(config, accelerator)
        self.clock, self.drawn = Clock(), Pause(_DRAWING_S)
        self.log = Log(folder, accelerator)
        if config.log_with:
            accelerator.init_trackers("vit3d", {key: str(value) for key, value in asdict(config).items()})

    def go(self) -> Path:
        """The loop; returns the folder of the checkpoint to use."""
        self.model.train()
        batches = self.clock.timed(self._batches())
        shown = None if self.accelerator.is_main_process else True
        steps = range(self.step + 1, self.config.max_steps + 1)
        for step in (bar := tqdm(steps, "train", self.config.max_steps, initial=self.step, unit="step", disable=shown)):
            self.step = step
            learned = self._learn(batches)
            last = step == self.config.max_steps
            if last or step % self.config.log_every == 0:
                self.log(step, **learned, data_wait=self.clock.share())
                bar.set_postfix(loss=f"{learned['loss']:.3f}", refresh=False)
            validates = self.validator.active and (last or step % self.config.validate_every == 0)
            if last or validates or step % self.config.save_every == 0:
                self._refuse_to_keep_what_diverged()
                self._keep(validates)
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder.volumes, ignore_errors=True)
        self.accelerator.end_training()
        return self.folder.best if self.validator.active else self.folder.last

    def _batches(self) -> Iterator[dict]:
        """The batches of this process from the current step on."""
        per_step = self.config.accumulation * self.config.batch_size * self.accelerator.num_processes
        loader = torch.utils.data.DataLoader(
            self.crops,
            batch_size=self.config.batch_size,
            sampler=range(self.step * per_step, len(self.crops)),
            num_workers=self.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator(),  # its own: starting workers must not draw from the network's random numbers
        )
        return iter(self.accelerator.prepare(loader))

    def _learn(self, batches: Iterator[dict]) -> dict[str, float]:
        """One step of the optimiser: `loss`, its mean over all processes, the `rate` at which new weights learned
        from it, and `gradient`, the norm before clipping."""
        losses = torch.stack([self._backward(next(batches)) for _ in range(self.config.accumulation)])
        losses = self.accelerator.gather(losses)
        self._refuse_what_is_not_finite("loss", losses)
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0))
        if self.accelerator.scaler is None:  # fp16 leaves out such steps and goes on with a smaller scale
            self._refuse_what_is_not_finite("gradient", torch.full_like(losses, norm))
        rate = self.schedule.get_last_lr()[-1]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.accelerator.unwrap_model(self.model))
        return {"loss": losses.mean().item(), "rate": rate, "gradient": norm}

    def _backward(self, batch: dict) -> torch.Tensor:
        if self.crops.paired:  # (crops, 2, ...) -> (windows, ...)
            batch = {name: values.flatten(0, 1) for name, values in batch.items()}
        places = batch.pop("places", None)
        self.batch = batch
        with self.accelerator.accumulate(self.model):
            output = self.model(**batch)
            loss = output.loss
            if self.config.cldice_weight:
                loss = loss + self.config.cldice_weight * soft_cldice_loss(output.logits, batch["labels"])
            if places is not None:
                apart = disagreement(output.logits, batch["token_mask"], places, self.crops.config.painted_size)
                loss = loss + self.config.consistency_weight * apart
            self.accelerator.backward(loss)
        return loss.detach()

    def _refuse_what_is_not_finite(self, what: str, values: torch.Tensor) -> None:
        """values: one per batch of this step, those of the first process first."""
        if torch.isfinite(values).all():
            return
        names = set()
        for place in torch.nonzero(~torch.isfinite(values)).flatten().tolist():
            process, nth = divmod(place, self.config.accumulation)
            batch = ((self.step - 1) * self.config.accumulation + nth) * self.accelerator.num_processes + process
            first = batch * self.config.batch_size
            names |= {self.crops.name_of(index) for index in range(first, first + self.config.batch_size)}
        last = self.folder.last
        kept = f"the last good checkpoint is {last}" if last.exists() else "nothing was kept yet"
        raise ValueError(
            f"The {what} is not finite at step {self.step}, on crops of {', '.join(sorted(names))}; {kept}. "
            "A lower rate or a longer warm-up helps, where those stacks are sound."
        )

    def _refuse_to_keep_what_diverged(self) -> None:
        """The loss was finite before this step; what is kept must also be so after it."""
        model = self.accelerator.unwrap_model(self.model).eval()
        with torch.no_grad():
            loss = model(**self.batch).loss.detach()
        model.train()
        losses = torch.zeros(self.config.accumulation, device=loss.device)
        losses[-1] = loss
        self._refuse_what_is_not_finite("loss", self.accelerator.gather(losses))

    # --- what is kept ---

    def _keep(self, validates: bool) -> None:
        """The last checkpoint, the best one where it validates, the curve, and then the state."""
        model = self.accelerator.unwrap_model(self.model)
        # the average is whole everywhere; sharded weights are gathered, and every process takes part
        weights = self.accelerator.get_state_dict(self.model) if self.average is None else None
        if self.accelerator.is_main_process:
            save(model if self.average is None else self.average.module, self.processor, self.folder.last, weights)
        self.accelerator.wait_for_everyone()
        if validates:
            self._validate()
        if self.accelerator.is_main_process and (self.step == self.config.max_steps or self.drawn.passed()):
            self._draw()
            self._warn_of_waiting()
        self.folder.save_state(self.accelerator, self.step, self._save_the_rest)
        self.clock.restart()

    def _validate(self) -> None:
        scores = self.validator(self.folder.last)
        self.log(self.step, **scores)
        if scores["f1"] >= self.score:
            self.score = scores["f1"]
            if self.accelerator.is_main_process:
                copy_checkpoint(self.folder.last, self.folder.best)

    def _draw(self) -> None:
        from .learning.curve import plot_training

        plot_training(self.folder.rows(), self.folder.curve)
        self.drawn = Pause(_DRAWING_S)

    def _warn_of_waiting(self) -> None:
        waits = [row["data_wait"] for row in self.folder.rows() if "data_wait" in row]
        if self.num_workers and len(waits) >= _FEWEST_WAITS and fmean(waits) > _LONGEST_WAIT:
            more = f"--num-workers {2 * self.num_workers} instead of {self.num_workers}"
            warnings.warn(f"Steps wait {fmean(waits):.0%} of their time for crops; try {more}.", stacklevel=2)

    def _save_the_rest(self, state: Path) -> None:
        self.accelerator.unwrap_model(self.model).config.save_pretrained(state)
        self.processor.save_pretrained(state)
        average = None if self.average is None else self.average.state_dict()
        torch.save({"score": self.score, "schedule": self.schedule.state_dict(), "average": average}, state / "run.pt")

    def _resume(self, state: Path) -> None:
        self.accelerator.load_state(str(state))
        rest = torch.load(state / "run.pt", map_location="cpu", weights_only=True)
        self.score = rest["score"]
        self.schedule.load_state_dict(rest["schedule"])
        if self.average is not None:
            self.average.load_state_dict(rest["average"])


class Pause:
    """Seconds that should pass before something is done again."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def passed(self) -> bool:
        return time.monotonic() >= self.end


class Clock:
    """How much of the time is spent waiting for data."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.start, self.waited = time.perf_counter(), 0.0

    def timed(self, batches: Iterator) -> Iterator:
        """`batches`, with the time counted that each takes to come. The first one, for which workers start, is free."""
        for count in range(sys.maxsize):
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            if count:
                self.waited += time.perf_counter() - asked
            else:
                self.restart()
            yield batch

    def share(self) -> float:
        """Of the time since the last call that was spent waiting."""
        share = self.waited / max(time.perf_counter() - self.start, 1e-9)
        self.restart()
        return round(share, 4)


def _checkpoint_activations(model) -> None:
    how = {"use_reentrant": False}  # the other way runs backward hooks twice, which DDP does not take
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.23 or a little before
        model.activation_checkpointing_enable(how)
    else:
        model.gradient_checkpointing_enable(how)


def as_begun(config: TrainingConfig, before: dict | None) -> TrainingConfig:
    """The configuration with a `strategy` and a `prediction`: as the run was begun with (`before`), or as `init` has
    them. ValueError: they are asked of a checkpoint, which keeps its own."""
    names = ("strategy", "prediction")
    if before is not None:
        return replace(config, **{name: getattr(config, name) or before.get(name) for name in names})
    found = _config_of(config.init)
    if found.model_type != "vit3d":
        return replace(config, strategy=config.strategy or "center", prediction=config.prediction or "volume")
    if config.strategy:
        raise ValueError(f"--strategy says how a 2D ViT becomes 3D, and --init {config.init} is 3D already.")
    if config.prediction not in (None, found.prediction):
        raise ValueError(f"--init {config.init} predicts by `{found.prediction}`, which no training changes.")
    return replace(config, prediction=found.prediction)


def _config_of(init: str):
    try:
        return AutoConfig.from_pretrained(place_of(init))
    except OSError as error:
        if Path(place_of(init)).is_dir():
            raise ValueError(f"--init {init} holds no config.json that says what model it is.") from error
        raise ValueError(f"--init {init} is no folder and no model that the Hub gives out now.") from error


def initial_model(config: TrainingConfig) -> tuple[ViT3DForNeuronSegmentation, ViT3DImageProcessor]:
    """Go on from a vit3d checkpoint (a shipped name too) and its processor, or inflate a 2D ViT; see `as_begun`."""
    if _config_of(config.init).model_type == "vit3d":
        return load_checkpoint(config.init, "cpu", dtype=torch.float32)
    sizes = {"patch_size": (5, 8, 8), "volume_size": (5, 112, 112)} if config.prediction == "center_slice" else {}
    model = ViT3DForNeuronSegmentation.from_2d_pretrained(
        config.init, config.strategy, prediction=config.prediction, **sizes
    )
    return model, ViT3DImageProcessor.from_config(model.config)


def main() -> None:
    """`python -m vit3d.training` and `accelerate launch -m vit3d.training`: the flags of `vit3d train`."""
    from .cli import main as command

    command(["train", *sys.argv[1:]])


if __name__ == "__main__":
    main()
