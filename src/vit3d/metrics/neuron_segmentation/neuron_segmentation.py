"""Masks of neurites against gold masks, over `vit3d.scoring.score_masks`: volume by volume, then all together."""

import datasets
import evaluate
import numpy as np

from vit3d.metrics.aggregation import distinct, mean_and_std, share
from vit3d.scoring import score_masks

_DESCRIPTION = """Dice, IoU, precision, recall, clDice and the 95th percentile of the Hausdorff distance of masks.
Neurites fill few per mille of a stack, so only the neurite class counts."""
_INPUTS = """One row per volume, as `metric.row(name, predicted, gold)` gives it; add with `metric.add(**row)`.

Args:
    name: of the volume; a name that comes twice with the same numbers counts once.
    true_positives, false_positives, false_negatives: voxels.
    cldice: of the volume. hd95_vox: in voxels, infinite where one mask is empty.
Returns:
    dice, iou, precision, recall, cldice, hd95_vox: means over volumes, and `*_std`. dice_pooled, precision_pooled,
    recall_pooled: of all voxels together. hd95_vox leaves out volumes where it is infinite; num_infinite counts them.
    num_volumes.
"""
_COUNTS = ("true_positives", "false_positives", "false_negatives")


class NeuronSegmentation(evaluate.Metric):
    """See `inputs_description`."""

    def _info(self) -> evaluate.MetricInfo:
        kinds = {"name": "string", **dict.fromkeys(_COUNTS, "int64"), "cldice": "float64", "hd95_vox": "float64"}
        features = datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=features)

    def row(self, name: str, predicted, gold, **options) -> dict:
        """What to `add` for one volume, from two masks (Z, Y, X); `options` are those of `score_masks`."""
        scores = score_masks(predicted, gold, **options)
        masks = [np.asarray(getattr(mask, "voxels", mask)) != 0 for mask in (predicted, gold)]
        inside = options.get("evaluate")
        if inside is not None:
            masks = [mask & (np.asarray(getattr(inside, "voxels", inside)) != 0) for mask in masks]
        both, counts = int((masks[0] & masks[1]).sum()), [int(mask.sum()) for mask in masks]
        counted = dict(zip(_COUNTS, (both, counts[0] - both, counts[1] - both), strict=True))
        return {"name": name, **counted, "cldice": scores["cldice"], "hd95_vox": scores["hd95_vox"]}

    def _compute(self, **columns) -> dict[str, float]:
        columns = distinct(columns)
        counts = list(zip(*(columns[name] for name in _COUNTS), strict=True))
        scores = [_of_counts(*volume) for volume in counts]
        by_name = {key: [score[key] for score in scores] for key in scores[0]}
        pooled = _of_counts(*map(sum, zip(*counts, strict=True)))
        return {
            **mean_and_std({**by_name, "cldice": columns["cldice"], "hd95_vox": columns["hd95_vox"]}),
            **{f"{key}_pooled": pooled[key] for key in ("dice", "precision", "recall")},
            "num_infinite": int(np.isinf(columns["hd95_vox"]).sum()),
            "num_volumes": len(counts),
        }


def _of_counts(both: int, surplus: int, missing: int) -> dict[str, float]:
    empty = float(both + surplus + missing == 0)
    return {
        "dice": share(2 * both, 2 * both + surplus + missing, of_nothing=empty),
        "iou": share(both, both + surplus + missing, of_nothing=empty),
        "precision": share(both, both + surplus, of_nothing=empty),
        "recall": share(both, both + missing, of_nothing=empty),
    }
