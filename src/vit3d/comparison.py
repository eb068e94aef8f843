"""Scores as people ask for them, composed of the verbs: the gold aligned to its image, a folder's mean, a picture."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

from .annotations.gold import align_gold, check_place, without_untraced
from .model.intensity_vit3d import measure
from .scoring import score_trees
from .tree import NeuronTree
from .volume import Volume

_APART = 0.05  # F1 that trees of one neuron do not fall to


def compare(
    name: str, predicted: NeuronTree, gold: NeuronTree, threshold: float, volume: Volume | None = None
) -> list[dict]:
    """One row of scores; with the stack a second one, against the gold aligned to it.

    There `precision_of_traced` leaves out what the prediction follows of bright structure that no gold covers.
    """
    if volume is not None and volume.spacing_um and not (predicted.spacing_um or gold.spacing_um):
        predicted, gold = (replace(tree, spacing_um=volume.spacing_um) for tree in (predicted, gold))
    rows = [{"name": name, **score_trees(predicted, gold, threshold=threshold)}]
    if len(predicted) and rows[0]["f1"] < _APART:
        warnings.warn(
            f"{name}: the trees have hardly a place in common; do their units and the spacing fit?", stacklevel=2
        )
    if volume is None:
        return rows
    polarity = measure(volume.voxels).polarity
    _refuse_other_spacing(volume, predicted, gold)
    predicted, gold, _ = _in_voxels_of(volume, predicted, gold)
    _warn_if_elsewhere(name, gold, volume, polarity)
    aligned, shift = align_gold(gold, volume, polarity=polarity)
    scores = score_trees(predicted, aligned, threshold=threshold)
    judged = without_untraced(predicted, aligned, volume, polarity=polarity)
    scores["precision_of_traced"] = score_trees(judged, aligned, threshold=threshold)["precision"]
    words = ", ".join(f"{value:+.2f}" for value in shift)
    return [*rows, {"name": f"{name} aligned by ({words}) voxels (z, y, x)", **scores}]


def _refuse_other_spacing(volume: Volume, predicted: NeuronTree, gold: NeuronTree) -> None:
    for what, tree in (("predicted", predicted), ("gold", gold)):
        if volume.spacing_um and tree.spacing_um and not np.allclose(volume.spacing_um, tree.spacing_um, rtol=1e-3):
            raise ValueError(
                f"the {what} tree's spacing {tree.spacing_um} (z, y, x) um is not the stack's, {volume.spacing_um}."
            )


def _warn_if_elsewhere(name: str, gold: NeuronTree, volume: Volume, polarity: str) -> None:
    """What is not of this stack is aligned with whatever is bright in it."""
    try:
        if len(gold):
            check_place(gold, volume, name, polarity=polarity)
    except ValueError as elsewhere:
        warnings.warn(f"{elsewhere} The aligned scores mean little.", stacklevel=3)


def means(groups: list[list[dict]]) -> list[dict]:
    """The mean over pairs, raw rows and aligned rows apart; only of what every row has."""
    rows = []
    for what, part in zip(("mean", "mean aligned"), zip(*groups, strict=True), strict=False):
        keys = [key for key in part[0] if key != "name" and all(key in row for row in part)]
        rows.append({"name": what, **{key: math.fsum(row[key] for row in part) / len(part) for key in keys}})
    return rows


def plot_pair(
    predicted: NeuronTree, gold: NeuronTree, path: Path, threshold: float, volume: Volume | None = None
) -> None:
    """Where the two differ, in um where any of the three knows the voxel size; with the stack, the gold aligned."""
    from .plot import plot_difference

    polarity = "bright"
    if volume is None:
        spacing_um = gold.spacing_um or predicted.spacing_um
    else:
        predicted, gold, spacing_um = _in_voxels_of(volume, predicted, gold)
        polarity = measure(volume.voxels).polarity
        gold, _ = align_gold(gold, volume, polarity=polarity)
        volume = Volume(volume.voxels, spacing_um)
    trees = (_stated(tree).to("um" if spacing_um else "voxel", spacing_um) for tree in (predicted, gold))
    plot_difference(*trees, path, volume=volume, threshold=threshold, polarity=polarity)


def _in_voxels_of(volume: Volume, predicted: NeuronTree, gold: NeuronTree):
    """Both trees in the stack's voxels, and the voxel size that any of the three knows."""
    spacing_um = volume.spacing_um or gold.spacing_um or predicted.spacing_um
    predicted, gold = (_stated(tree).to("voxel", tree.spacing_um or spacing_um) for tree in (predicted, gold))
    return predicted, gold, spacing_um


def _stated(tree: NeuronTree) -> NeuronTree:
    """Two trees without a unit are scored as voxels."""
    return tree if tree.unit else replace(tree, unit="voxel")
