"""A picture of a training: its loss and rate step by step, and what validation said."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..formats.appearing import appearing

_SMOOTHED = 20  # logged losses in a running mean


def plot_training(rows: list[dict], path: Path) -> None:
    """Draw the lines of a `metrics.jsonl` into a PNG, which appears under its name only when it is whole."""
    figure = Figure(figsize=(8, 5), dpi=100)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    figure.subplots_adjust(left=0.1, right=0.9, top=0.93, bottom=0.1, hspace=0.08)
    logged = [row for row in rows if "loss" in row]
    steps, losses = ([row[key] for row in logged] for key in ("step", "loss"))
    above.plot(steps, losses, color="0.7", lw=0.8, marker="." if len(steps) < _SMOOTHED else "", label="loss")
    if len(losses) >= _SMOOTHED:
        smooth = np.convolve(losses, np.ones(_SMOOTHED) / _SMOOTHED, mode="valid")
        above.plot(steps[_SMOOTHED - 1 :], smooth, color="C0", label=f"mean of {_SMOOTHED}")
    above.set_ylabel("loss")
    validated = [row for row in rows if "f1" in row]
    if validated:
        scores = above.twinx()
        scores.plot([row["step"] for row in validated], [row["f1"] for row in validated], "o-", color="C1", label="F1")
        scores.set(ylabel="F1 of validation", ylim=(0, 1))
    below.plot(steps, [row["rate"] for row in logged], color="C2")
    below.set(xlabel="step", ylabel="rate")
    figure.legend(loc="upper right", ncols=3, frameon=False)
    with appearing(path) as hidden:
        figure.savefig(hidden, format="png")
