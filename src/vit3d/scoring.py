"""VERB score: tree against tree, mask against mask, several trees against a labelled volume.

Distances and thresholds are in voxels, as BigNeuron's; a length says its unit in its name.
"""

import warnings
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import binary_erosion
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import cKDTree

from vit3d.morphometry import path_lengths, path_sums
from vit3d.sampling import SampledTree, connected_runs
from vit3d.tree import SOMA, NeuronTree, Spacing, follow

_WAYS_AT_ONCE = 2**20  # ways along a tree that are measured together: a bound on memory


def score_trees(
    predicted: NeuronTree, gold: NeuronTree, *, threshold: float = 2.0, point_tolerance: float | None = None
) -> dict[str, float]:
    """Compare a tree with a gold tree, in voxels.

    Every edge of length L is sampled at int(1 + L + 0.5) points. A sample's distance is that to the nearest
    segment of the other tree; at distance >= threshold it is far (Vaa3D's neuron_distance; Peng et al. 2010).

    - precision, recall: share of the predicted, gold samples that are not far; f1 their harmonic mean.
    - esa: mean of the two directed mean distances. dsa: the same over far samples only; a direction without
      far samples is left out, 0 if both are. pds: mean of the two far shares. distance_max: smaller maximum.
    - branch_*: nodes with three or more neighbours; tip_*: ends of the cable, the root's too; somas are
      neither. Matched one to one within `point_tolerance` (2 thresholds by default), as many as possible.
    - *_length_vox, *_length_um: cable without somas. missing: gold far from the prediction. surplus: the
      prediction far from the gold.
    - missing_branches: for each connected run of far gold samples with more than one threshold of cable, the
      gold's ends in it, at least one. surplus_branches: such runs of the prediction.
    - wrong_joins: places where the prediction joins two points by ten thresholds of cable (less at an end),
      without such a run, but all the gold within two thresholds of one is over twenty from that near the
      other, along the gold, or not connected with it. missed_joins: the same with the roles exchanged.
    - corrections: the sum of these four; corrections_per_mm: per mm of gold cable.

    What is in um, and corrections_per_mm, comes only when the spacing is known. An empty prediction has
    precision, recall, f1 0 and infinite distances. ValueError: gold without nodes, units that do not fit.
    """
    if not (np.isfinite(threshold) and threshold > 0):
        raise ValueError(f"`threshold` must be a positive number of voxels, got {threshold}.")
    if len(gold) == 0:
        raise ValueError("the gold tree has no nodes; there is nothing to score against.")
    predicted, gold, spacing_um = _in_voxels(predicted, gold)
    sides = _Side.both(SampledTree.of(predicted, spacing_um), SampledTree.of(gold, spacing_um), threshold)
    tolerance = 2 * threshold if point_tolerance is None else point_tolerance
    return {
        **_distance_scores(*sides),
        **_point_scores("branch", _branch_points(predicted), _branch_points(gold), tolerance),
        **_point_scores("tip", _ends(predicted), _ends(gold), tolerance),
        **_length_scores(*sides),
        **_corrections(*sides, threshold),
    }


def _in_voxels(predicted: NeuronTree, gold: NeuronTree) -> tuple[NeuronTree, NeuronTree, Spacing | None]:
    """Both trees in voxels of one grid, and its spacing if known."""
    if (predicted.unit is None) != (gold.unit is None):
        silent = "predicted" if predicted.unit is None else "gold"
        raise ValueError(f"only one tree has a unit; state the {silent} one's: --{silent}-unit um or voxel.")
    spacings = [tree.spacing_um for tree in (gold, predicted) if tree.spacing_um is not None]
    if len(spacings) == 2 and not np.allclose(*spacings, rtol=1e-3):
        raise ValueError(
            f"the gold's spacing {spacings[0]} (z, y, x) um is not the prediction's, {spacings[1]}; "
            "state the one to score in (--spacing Z,Y,X)."
        )
    spacing = spacings[0] if spacings else None
    if predicted.unit is None:
        warnings.warn("neither tree states its unit; both are taken as voxels.", stacklevel=3)
        return replace(predicted, unit="voxel"), replace(gold, unit="voxel"), spacing
    if spacing is None and (predicted.unit, gold.unit) != ("voxel", "voxel"):
        raise ValueError("a tree in um is scored in voxels, but no spacing is known; give it (--spacing Z,Y,X).")
    return predicted.to("voxel", spacing), gold.to("voxel", spacing), spacing


@dataclass(frozen=True, eq=False)
class _Side:
    """One tree against the other; of each sample the distance, the other's nearest row, whether it is far."""

    sampled: SampledTree
    distance: np.ndarray
    nearest: np.ndarray
    far: np.ndarray

    @classmethod
    def both(cls, predicted: SampledTree, gold: SampledTree, threshold: float) -> "tuple[_Side, _Side]":
        sides = []
        for one, other in ((predicted, gold), (gold, predicted)):
            distance, nearest = other.nearest(one.points)
            sides.append(cls(one, distance, nearest, distance >= threshold))
        return tuple(sides)

    @property
    def far_share(self) -> float:
        """Share of samples that are far; 1 for a tree without samples, which is wrong everywhere."""
        return float(np.average(self.far, weights=self.sampled.weights)) if len(self.far) else 1.0

    def mean_distance(self, rows: np.ndarray) -> float:
        """Mean over the samples `rows` (bool); inf without samples."""
        weights = self.sampled.weights * rows
        return float(np.average(self.distance, weights=weights)) if weights.any() else np.inf

    @property
    def largest_distance(self) -> float:
        return float(self.distance.max(initial=0, where=self.sampled.weights > 0))  # the others are no samples

    def far_length(self, lengths: np.ndarray) -> float:
        """Sum of the pieces' `lengths`, half of a piece counting with each far end."""
        parents = self.sampled.tree.parents
        return float((lengths * (self.far / 2 + self.far[parents] / 2))[parents >= 0].sum())


def _distance_scores(predicted: _Side, gold: _Side) -> dict[str, float]:
    precision, recall = 1 - predicted.far_share, 1 - gold.far_share
    means = [side.mean_distance(np.ones(len(side.far), bool)) for side in (predicted, gold)]
    far_means = [side.mean_distance(side.far) for side in (predicted, gold) if side.far.any()]
    return {
        "precision": precision,
        "recall": recall,
        "f1": _harmonic(precision, recall),
        "esa": float(np.mean(means)),
        "esa_predicted_to_gold": means[0],
        "esa_gold_to_predicted": means[1],
        "dsa": float(np.mean(far_means)) if far_means else 0.0,
        "pds": (predicted.far_share + gold.far_share) / 2,
        "distance_max": float(min(side.largest_distance for side in (predicted, gold) if len(side.far))),
    }


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


def _branch_points(tree: NeuronTree) -> np.ndarray:
    return tree.points[(tree.degree >= 3) & (tree.types != SOMA)]


def _ends(tree: NeuronTree) -> np.ndarray:
    return tree.points[(tree.degree <= 1) & (tree.types != SOMA)]


def _point_scores(name: str, predicted: np.ndarray, gold: np.ndarray, tolerance: float) -> dict[str, float]:
    """Precision, recall, F1 of the largest one-to-one matching within `tolerance`; nothing in both: 1."""
    if len(predicted) and len(gold):
        reach = tolerance + 1e-9  # at the tolerance is within, whatever unit the points came from
        near = cKDTree(predicted).sparse_distance_matrix(cKDTree(gold), reach, output_type="coo_matrix")
        pairs = csr_array((np.ones(near.nnz, np.int8), (near.row, near.col)), shape=near.shape)
        matched = int((maximum_bipartite_matching(pairs) >= 0).sum())
    else:
        matched = 0
    both_empty = float(len(predicted) == len(gold) == 0)
    precision = matched / len(predicted) if len(predicted) else both_empty
    recall = matched / len(gold) if len(gold) else both_empty
    return {
        f"{name}_precision": precision,
        f"{name}_recall": recall,
        f"{name}_f1": _harmonic(precision, recall),
    }


def _length_scores(predicted: _Side, gold: _Side) -> dict[str, float]:
    scores = {}
    for unit in ("vox", "um"):
        in_gold, in_predicted = (getattr(side.sampled, f"lengths_{unit}") for side in (gold, predicted))
        if in_gold is not None:
            scores[f"gold_length_{unit}"] = float(in_gold.sum())
            scores[f"predicted_length_{unit}"] = float(in_predicted.sum())
            scores[f"missing_length_{unit}"] = gold.far_length(in_gold)
            scores[f"surplus_length_{unit}"] = predicted.far_length(in_predicted)
    return scores


def _corrections(predicted: _Side, gold: _Side, threshold: float) -> dict[str, float]:
    missing, surplus = _long_runs(gold, threshold), _long_runs(predicted, threshold)
    is_end = (missing >= 0) & (gold.sampled.tree.degree <= 1)
    ends = np.bincount(missing[is_end], minlength=missing.max(initial=-1) + 1)
    counts = {
        "missing_branches": int(np.maximum(ends, 1).sum()),
        "surplus_branches": int(surplus.max(initial=-1) + 1),
        "wrong_joins": _contradictions(predicted, surplus >= 0, gold.sampled, threshold),
        "missed_joins": _contradictions(gold, missing >= 0, predicted.sampled, threshold),
    }
    counts["corrections"] = sum(counts.values())
    if gold.sampled.lengths_um is not None:
        gold_mm, none = gold.sampled.lengths_um.sum() / 1000, np.inf if counts["corrections"] else 0.0
        counts["corrections_per_mm"] = float(counts["corrections"] / gold_mm) if gold_mm > 0 else none
    return counts


def _long_runs(side: _Side, threshold: float) -> np.ndarray:
    """(M,) the connected far run, with more cable than the threshold, that a sample is in; -1 if in none."""
    parents = side.sampled.tree.parents
    run_of = connected_runs(parents, side.far)
    inner = side.far & (parents >= 0) & side.far[parents]
    lengths = np.bincount(run_of[inner], side.sampled.lengths_vox[inner], minlength=run_of.max(initial=-1) + 1)
    is_long = lengths.round(9) > threshold
    number = np.where(is_long, np.cumsum(is_long) - 1, -1)
    return np.append(number, -1)[run_of]


def _contradictions(side: _Side, in_run: np.ndarray, other: SampledTree, threshold: float) -> int:
    """How many places of one tree join what the other keeps apart (see `score_trees`).

    Two that lie on branches side by side are one where the root lies beyond their fork: each connected tree is looked
    at from both ends of its longest path, and the larger number counts.
    """
    if len(other.points) == 0 or len(side.far) == 0:
        return 0
    tree, rows = side.sampled.tree, np.arange(len(side.far))
    above, is_one, is_apart = np.full(len(rows), -1), np.zeros(len(rows), bool), np.zeros(len(rows), bool)
    part, counts = tree.root_of, []
    for rooted in _rooted_at_tips(tree):
        tops = _climb(rooted.parents, path_lengths(rooted), 10 * threshold)
        asked, above = rows[tops != above], tops  # from the other end most pairs are the same
        runs_above = path_sums(rooted, in_run)
        one = asked[runs_above[asked] == runs_above[above[asked]]]
        one = one[other.way(side.nearest[one], side.nearest[above[one]]) > 20 * threshold]
        is_one[asked] = is_apart[asked] = False
        is_one[one] = True
        is_apart[one] = _all_apart(other, tree.points[one], tree.points[above[one]], threshold)
        apart = rows[is_apart]
        _, first = np.unique(connected_runs(rooted.parents, is_one)[apart], return_index=True)
        counts.append(np.bincount(part[apart[first]], minlength=len(rows)))
    return int(np.maximum(*counts).sum())


def _climb(parents: np.ndarray, distance: np.ndarray, reach: float) -> np.ndarray:
    """(M,) the first ancestor at least `reach` away along the tree, or the root."""
    above = np.arange(len(parents))
    rows = above[parents >= 0]
    while len(rows):
        above[rows] = parents[above[rows]]
        rows = rows[(distance[rows] - distance[above[rows]] < reach) & (parents[above[rows]] >= 0)]
    return above


def _all_apart(other: SampledTree, ones: np.ndarray, others: np.ndarray, threshold: float) -> np.ndarray:
    """(N,) whether no place near one point of a pair is connected with a place near the other by a short way."""
    near = [other.near(points, 2 * threshold) for points in (ones, others)]
    sizes = [np.fromiter(map(len, rows), int, len(rows)) for rows in near]
    apart, num_ways = np.ones(len(ones), bool), sizes[0] * sizes[1]
    for pairs in np.array_split(np.flatnonzero(num_ways), 1 + num_ways.sum() // _WAYS_AT_ONCE):
        start = [np.repeat(near[0][pair], sizes[1][pair]) for pair in pairs]
        end = [np.tile(near[1][pair], sizes[0][pair]) for pair in pairs]
        if pairs.size:
            short = other.way(np.concatenate(start), np.concatenate(end)) <= 20 * threshold
            apart[np.repeat(pairs, num_ways[pairs])[short]] = False
    return apart


def _rooted_at_tips(tree: NeuronTree) -> tuple[NeuronTree, NeuronTree]:
    """Each root moved to one end of its tree's longest path, and to the other: every way through a root has a top
    then, and neither where the tree was rooted nor how it lies decides anything."""
    one = tree.rerooted(np.sort(_furthest(tree)))
    return one, one.rerooted(np.sort(_furthest(one)))


def _furthest(tree: NeuronTree) -> np.ndarray:
    """(T,) of each tree the node furthest from its root along the cable, in the order of the roots."""
    root_of, length = tree.root_of, np.round(path_lengths(tree), 6)
    longest = np.zeros(len(tree))
    np.maximum.at(longest, root_of, length)
    rows = np.flatnonzero(length == longest[root_of])
    furthest = np.full(len(tree), -1)
    furthest[root_of[rows]] = rows  # of several the last
    return furthest[furthest >= 0]


def score_masks(predicted, gold, *, evaluate=None, spacing_um: tuple[float, ...] | None = None) -> dict[str, float]:
    """Compare two masks (arrays or Volumes; bool, or of two values the lower one is background) of one shape.

    Both are first cut to the mask `evaluate`. dice, iou, precision, recall; cldice: harmonic mean of the
    shares of each skeleton inside the other mask (Shit et al. 2021); hd95_vox: the larger directed 95th
    percentile of distances between surface voxels, and hd95_um with a spacing (a Volume brings its own).
    Both empty: 1 and distance 0; one empty: 0 and inf. ValueError: shapes or spacings differ, a mask is a probability.
    """
    stated = [mask.spacing_um for mask in (predicted, gold) if getattr(mask, "spacing_um", None)]
    if not spacing_um and len(stated) == 2 and not np.allclose(*stated, rtol=1e-3):
        raise ValueError(
            f"masks must have one spacing; predicted and gold have {stated[0]} and {stated[1]} um (z, y, x)."
        )
    spacing_um = spacing_um or getattr(gold, "spacing_um", None) or getattr(predicted, "spacing_um", None)
    predicted, gold = _mask(predicted, "predicted"), _mask(gold, "gold")
    inside = np.ones(gold.shape, bool) if evaluate is None else _mask(evaluate, "evaluate")
    if not predicted.shape == gold.shape == inside.shape:
        names, shapes = "predicted and gold", f"{predicted.shape} and {gold.shape}"
        if evaluate is not None:
            names, shapes = "predicted, gold and evaluate", f"{predicted.shape}, {gold.shape} and {inside.shape}"
        raise ValueError(f"masks must have one shape; {names} have {shapes}.")
    predicted, gold = predicted & inside, gold & inside
    found, wanted, both = int(predicted.sum()), int(gold.sum()), int((predicted & gold).sum())
    if found + wanted == 0:
        perfect = dict.fromkeys(("dice", "iou", "precision", "recall", "cldice"), 1.0)
        return perfect | dict.fromkeys(("hd95_vox", "hd95_um") if spacing_um else ("hd95_vox",), 0.0)
    box = _bounding_box(predicted | gold)
    predicted, gold = np.pad(predicted[box], 1), np.pad(gold[box], 1)
    scores = {
        "dice": 2 * both / (found + wanted),
        "iou": both / (found + wanted - both),
        "precision": both / found if found else 0.0,
        "recall": both / wanted if wanted else 0.0,
        "cldice": _cldice(predicted, gold),
        "hd95_vox": _hausdorff95(predicted, gold, np.ones(gold.ndim)),
    }
    return scores | ({"hd95_um": _hausdorff95(predicted, gold, np.array(spacing_um))} if spacing_um else {})


def _mask(mask, name: str) -> np.ndarray:
    mask = np.asarray(getattr(mask, "voxels", mask))
    if mask.dtype != bool and mask.size:
        low, high = mask.min(), mask.max()
        if not ((mask == low) | (mask == high)).all():
            raise ValueError(f"the {name} mask must hold two values; threshold it first ({low} to {high}).")
        return mask != (low if low < high else 0)
    return mask.astype(bool)


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    places = [np.flatnonzero(mask.any(axis=tuple(set(range(mask.ndim)) - {axis}))) for axis in range(mask.ndim)]
    return tuple(slice(place[0], place[-1] + 1) for place in places)


def _cldice(predicted: np.ndarray, gold: np.ndarray) -> float:
    if not (predicted.any() and gold.any()):
        return 0.0
    return _harmonic(float(gold[_skeleton(predicted)].mean()), float(predicted[_skeleton(gold)].mean()))


def _skeleton(mask: np.ndarray) -> np.ndarray:
    from skimage.morphology import skeletonize

    skeleton = skeletonize(mask)
    return skeleton if skeleton.any() else mask  # a speck of a few voxels can vanish


def _hausdorff95(predicted: np.ndarray, gold: np.ndarray, scale: np.ndarray) -> float:
    surfaces = [np.argwhere(mask & ~binary_erosion(mask)) * scale for mask in (predicted, gold)]
    if not all(map(len, surfaces)):
        return np.inf
    there, back = cKDTree(surfaces[1]).query(surfaces[0])[0], cKDTree(surfaces[0]).query(surfaces[1])[0]
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


def score_forest(trees: list[NeuronTree], labels, *, merge_nodes: int = 50) -> dict[str, float]:
    """Compare several gold trees, in voxels, with a labelled volume (Z, Y, X), 0 being background.

    Trees are sampled about every voxel; a sample takes the label of its voxel, 0 outside the volume.

    - splits: pieces whose ends have two different labels. omitted_length: pieces with a 0 at an end.
    - merges: labels with over `merge_nodes` samples on each of two or more trees.
    - run: cable connected without a split or omitted piece. expected_run_length: that of the run at a random
      place of the cable, 0 where the place is omitted or its label merged (Januszewski et al. 2018);
      erl_normalised: divided by what a perfect segmentation gets.

    Lengths are in um (suffix _um) when every tree has a spacing, else _vox. ValueError: no cable, no unit.
    """
    labels = np.asarray(getattr(labels, "voxels", labels))
    in_um = all(tree.spacing_um is not None for tree in trees)
    unit = "um" if in_um else "vox"
    sampled = [SampledTree.of(tree.to("voxel"), tree.spacing_um) for tree in trees]
    lengths = [one.lengths_um if in_um else one.lengths_vox for one in sampled]
    total = sum(length.sum() for length in lengths)
    if not total > 0:
        raise ValueError("the gold trees have no cable; there is nothing to score against.")
    found = [_labels_at(labels, one.points) for one in sampled]
    merged = _merged_labels(found, merge_nodes)
    splits, omitted, squares = 0, 0.0, 0.0
    for one, length, label in zip(sampled, lengths, found, strict=True):
        ends, above = label[one.tree.edges], label[one.tree.parents[one.tree.edges]]
        splits += int(((ends != above) & (ends > 0) & (above > 0)).sum())
        omitted += length[one.tree.edges][(ends == 0) | (above == 0)].sum()
        squares += _squared_runs(one, length, label, merged)
    whole = [np.bincount(one.tree.root_of, length) for one, length in zip(sampled, lengths, strict=True)]
    best = sum((connected**2).sum() for connected in whole) / total
    return {
        "splits": splits,
        "merges": len(merged),
        f"omitted_length_{unit}": float(omitted),
        f"gold_length_{unit}": float(total),
        f"expected_run_length_{unit}": float(squares / total),
        "erl_normalised": float(squares / total / best),
    }


def _labels_at(labels: np.ndarray, points: np.ndarray) -> np.ndarray:
    voxels = np.rint(points).astype(int)
    inside = ((voxels >= 0) & (voxels < labels.shape)).all(axis=1)
    found = np.zeros(len(points), labels.dtype)
    found[inside] = labels[tuple(voxels[inside].T)]
    return found


def _merged_labels(found: list[np.ndarray], merge_nodes: int) -> np.ndarray:
    on_tree = []
    for labels in found:
        values, counts = np.unique(labels[labels > 0], return_counts=True)
        on_tree.append(values[counts > merge_nodes])
    values, trees = np.unique(np.concatenate(on_tree), return_counts=True)
    return values[trees > 1]


def _squared_runs(sampled: SampledTree, lengths: np.ndarray, labels: np.ndarray, merged: np.ndarray) -> float:
    parents = sampled.tree.parents
    kept = (parents >= 0) & (labels == labels[parents]) & (labels > 0) & ~np.isin(labels, merged)
    run = follow(np.where(kept, parents, np.arange(len(parents))))
    return float((np.bincount(run[kept], lengths[kept], minlength=1) ** 2).sum())
