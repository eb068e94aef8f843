"""Traced trees against gold trees, over `vit3d.scoring.score_trees`: volume by volume, then all together."""

import math

import datasets
import evaluate

from vit3d.metrics.aggregation import distinct, mean_and_std, share
from vit3d.scoring import score_trees

_DESCRIPTION = """How well traced neurons agree with golds: share of cable within a threshold (precision, recall, F1),
BigNeuron's distances ESA, DSA and PDS (Peng et al. 2010), and how many places a person would have to correct."""
_INPUTS = """One row per volume, as `metric.row(name, predicted, gold)` gives it; add with `metric.add(**row)`.

Args:
    name: of the volume; a name that comes twice with the same numbers counts once.
    precision, recall, f1, esa, dsa, pds: as `score_trees`; esa is infinite for an empty prediction.
    *_length_vox: cable of the gold, of the prediction, of it missing and surplus. gold_length_um: NaN if unknown.
    corrections: number of places.
Returns:
    precision, recall, f1, esa, dsa, pds, corrections: means over volumes, and `*_std`. precision_pooled,
    recall_pooled, f1_pooled: of all cable together. corrections_per_mm: of all gold cable, where its length in
    um is known. esa leaves out empty predictions; num_infinite counts them. num_volumes.
"""
_SCORES = ("precision", "recall", "f1", "esa", "dsa", "pds")
_LENGTHS = ("gold_length_vox", "predicted_length_vox", "missing_length_vox", "surplus_length_vox", "gold_length_um")


class NeuronTracing(evaluate.Metric):
    """See `inputs_description`."""

    def _info(self) -> evaluate.MetricInfo:
        kinds = {"name": "string", **dict.fromkeys((*_SCORES, *_LENGTHS), "float64"), "corrections": "int64"}
        features = datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=features)

    def row(self, name: str, predicted, gold, **options) -> dict:
        """What to `add` for one volume, from two `NeuronTree`s; `options` are those of `score_trees`."""
        return self.row_of(name, score_trees(predicted, gold, **options))

    def row_of(self, name: str, scores: dict[str, float]) -> dict:
        """The same from what `score_trees` gave."""
        return {
            "name": name,
            **{key: float(scores.get(key, math.nan)) for key in (*_SCORES, *_LENGTHS)},
            "corrections": int(scores["corrections"]),
        }

    def _compute(self, **columns) -> dict[str, float]:
        columns = distinct(columns)
        gold, predicted, missing, surplus, gold_um = (sum(columns[key]) for key in _LENGTHS)
        precision = 1 - share(surplus, predicted, of_nothing=1.0)
        recall = 1 - share(missing, gold, of_nothing=0.0)
        scores = {
            **mean_and_std({key: columns[key] for key in (*_SCORES, "corrections")}),
            "precision_pooled": precision,
            "recall_pooled": recall,
            "f1_pooled": share(2 * precision * recall, precision + recall, of_nothing=0.0),
            "num_infinite": sum(map(math.isinf, columns["esa"])),
            "num_volumes": len(columns["name"]),
        }
        if gold_um > 0:  # not where one length is NaN
            scores["corrections_per_mm"] = 1000 * sum(columns["corrections"]) / gold_um
        return scores
