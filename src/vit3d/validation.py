"""Whole neurons during training, as a user would run them: segment, trace, score against the aligned gold."""

from pathlib import Path
from statistics import fmean

from accelerate import Accelerator

from .checkpoint import load_checkpoint
from .reconstruction import reconstruct
from .scoring import score_trees
from .training_config import TrainingConfig
from .training_data import read_pair

MEANS = ("f1", "precision", "recall")


class Validator:
    """Every process reads and reconstructs its own share of the neurons; all get all scores."""

    def __init__(self, config: TrainingConfig, rows: list[dict], accelerator: Accelerator):
        self.accelerator = accelerator
        names = sorted(row["name"] for row in rows if row["name"] in config.validate)
        with accelerator.split_between_processes(names) as own:
            mine = set(own)
        self.active = bool(names)
        self.cases = [(row["name"], *read_pair(row, config.spacing_um)[:2]) for row in rows if row["name"] in mine]

    def __call__(self, checkpoint: Path) -> dict[str, float]:
        """`f1`, `precision`, `recall`: means over the neurons; `f1/NAME` of each. What is scored is what is saved."""
        model, processor = load_checkpoint(str(checkpoint), str(self.accelerator.device))
        found = []
        for name, volume, gold in self.cases:
            try:
                tree = reconstruct(model, volume, processor=processor).tree
            except ValueError as error:
                raise ValueError(f"{checkpoint} cannot be validated on {name}: {error}") from error
            scores = score_trees(tree.to("voxel", volume.spacing_um or (1.0, 1.0, 1.0)), gold)
            found.append((name, {key: float(scores[key]) for key in MEANS}))
        found = dict(sorted(self.accelerator.gather_for_metrics(found, use_gather_object=True)))
        means = {key: fmean(scores[key] for scores in found.values()) for key in MEANS}
        return means | {f"f1/{name}": scores["f1"] for name, scores in found.items()}
