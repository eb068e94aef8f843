"""Whole neurons during training, as a user would run them: segment, trace, score against the aligned gold."""

import warnings
from math import isfinite
from pathlib import Path

from accelerate import Accelerator

from ..checkpoint import load_checkpoint
from ..metrics.neuron_tracing.neuron_tracing import NeuronTracing
from ..reconstruction import reconstruct
from .training_config import TrainingConfig
from .training_data import read_pair, read_stack, warn_of_shifts

MEANS = ("f1", "precision", "recall", "esa", "dsa", "pds")


class Validator:
    """Every process reconstructs its own share of the neurons, a stack at a time; all get all scores."""

    def __init__(self, config: TrainingConfig, rows: list[dict], accelerator: Accelerator):
        self.accelerator, self.spacing_um = accelerator, config.spacing_um
        names = sorted(row["name"] for row in rows if row["name"] in config.validate)
        with accelerator.split_between_processes(names) as own:
            mine = set(own)
        self.active = bool(names)
        self.cases, shifts = [], []
        for row in rows:
            if row["name"] in mine:
                pair = read_pair(row, config.spacing_um, align=config.align, keep_misplaced=config.keep_misplaced)
                self.cases.append((row, pair.gold))
                shifts.append((row["name"], pair.shift_vox))
        if self.active:
            warn_of_shifts(dict(accelerator.gather_for_metrics(shifts, use_gather_object=True)))

    def __call__(self, checkpoint: Path) -> dict[str, float]:
        """Means of `MEANS` over the neurons, where finite; `f1/NAME` of each. What is scored is what is saved."""
        model, processor = load_checkpoint(str(checkpoint), str(self.accelerator.device))
        metric, found = NeuronTracing(keep_in_memory=True), []
        for row, gold in self.cases:
            volume = read_stack(row, self.spacing_um)
            try:
                with warnings.catch_warnings():  # of what a network finds that has not learned it yet
                    warnings.simplefilter("ignore", UserWarning)
                    tree = reconstruct(model, volume, processor=processor).tree
            except ValueError as error:
                raise ValueError(f"{checkpoint} cannot be validated on {row['name']}: {error}") from error
            found.append(metric.row(row["name"], tree.to("voxel", volume.spacing_um or (1.0, 1.0, 1.0)), gold))
        found = sorted(self.accelerator.gather_for_metrics(found, use_gather_object=True), key=lambda row: row["name"])
        for row in found:
            metric.add(**row)
        means = metric.compute()
        return {key: means[key] for key in MEANS if isfinite(means[key])} | {
            f"f1/{row['name']}": row["f1"] for row in found
        }
