"""Rows of numbers, one per volume -> one number for all of them."""

import math
from statistics import fmean, pstdev


def distinct(columns: dict[str, list]) -> dict[str, list]:
    """The columns without volumes that came twice: processes that share a few volumes fill up with copies.

    ValueError: two volumes of one name that are no copies, or no volume at all.
    """
    if not columns["name"]:
        raise ValueError("no volume was added; there is nothing to compute.")
    rows = {}
    for row in zip(*columns.values(), strict=True):
        facts = dict(zip(columns, row, strict=True))
        known = rows.setdefault(facts["name"], facts)
        if repr(known) != repr(facts):  # NaN is no copy of itself
            raise ValueError(f"the volume {facts['name']} was added twice, with other numbers; give it another name.")
    order = sorted(rows)
    return {key: [rows[name][key] for name in order] for key in columns}


def mean_and_std(scores: dict[str, list[float]]) -> dict[str, float]:
    """`key` and `key_std` (of the volumes, not of their mean) over what is finite; infinite if nothing is."""
    found = {}
    for key, values in scores.items():
        finite = [value for value in values if math.isfinite(value)]
        found[key] = fmean(finite) if finite else math.inf
        found[f"{key}_std"] = pstdev(finite) if finite else math.inf
    return found


def share(part: float, whole: float, *, of_nothing: float) -> float:
    """part / whole; `of_nothing` where the whole is 0."""
    return part / whole if whole else of_nothing
