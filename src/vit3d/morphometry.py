"""What a neuron measures: branches, orders, Sholl, volume. And the same neuron resampled.

Branches are the unbranched runs between critical nodes: roots, tips, branch points, somas. Trees are taken
with parents before children (`tree.sorted()`); lengths are in the tree's unit.
"""

from dataclasses import dataclass, replace

import numpy as np

from vit3d.tree import SOMA, NeuronTree, follow

_MOST_NODES = 100_000_000  # of a resampled tree, which takes some hundred bytes each
_MOST_SPHERES = 100_000


@dataclass(frozen=True)
class Branches:
    """One row per branch, parents before children: its last node, its first, its parent branch, its length.

    ends, starts: (B,) rows of the tree; `ends` is away from the root. parents: (B,) rows here, -1 at a root.
    lengths: (B,) path lengths. of_node: (N,) the branch that a node lies on, -1 for roots.
    """

    ends: np.ndarray
    starts: np.ndarray
    parents: np.ndarray
    lengths: np.ndarray
    of_node: np.ndarray


def critical_nodes(tree: NeuronTree) -> np.ndarray:
    """(N,) bool: roots, tips, branch points and somas, which resampling keeps and branches end at."""
    return (tree.parents < 0) | (tree.num_children != 1) | (tree.types == SOMA)


def path_sums(tree: NeuronTree, values: np.ndarray) -> np.ndarray:
    """(N,) sum of `values` over every node and its ancestors, in any order of nodes (pointer jumping)."""
    beyond = len(tree)  # one row more, worth nothing, is above all roots
    above = np.append(np.where(tree.parents < 0, beyond, tree.parents), beyond)
    sums = np.append(values, 0)
    while (above < beyond).any():
        sums, above = sums + sums[above], above[above]
    return sums[:-1]


def path_lengths(tree: NeuronTree) -> np.ndarray:
    """(N,) distance of every node from its root along the tree."""
    lengths = np.zeros(len(tree))
    lengths[tree.edges] = tree.edge_lengths
    return path_sums(tree, lengths)


def branches(tree: NeuronTree, also: np.ndarray | bool = False) -> Branches:
    """The branches of a tree whose parents come before their children (`tree.sorted()`), cut at `also` (N,) too."""
    rows, critical = np.arange(len(tree)), critical_nodes(tree) | also
    only_child = rows.copy()
    only_child[tree.parents[tree.edges]] = tree.edges
    below = follow(np.where(critical, rows, only_child))  # the critical node at the far end of the branch
    passing = np.where(critical | (tree.parents < 0), rows, tree.parents)
    ends = np.flatnonzero(critical & (tree.parents >= 0))
    starts = follow(passing)[tree.parents[ends]]
    branch_at = np.full(len(tree), -1)
    branch_at[ends] = np.arange(len(ends))
    distance = path_lengths(tree)
    of_node = np.where(tree.parents < 0, -1, branch_at[below])
    return Branches(ends, starts, branch_at[starts], distance[ends] - distance[starts], of_node)


def branch_orders(tree: NeuronTree) -> np.ndarray:
    """(B,) number of branch points, no somas, between each of `branches(tree)` and its root; stems have 0."""
    found, is_fork = branches(tree), (tree.degree >= 3) & (tree.types != SOMA)
    orders = np.zeros(len(found.ends), int)
    for branch, parent in enumerate(found.parents):
        if parent >= 0:
            orders[branch] = orders[parent] + is_fork[found.starts[branch]]
    return orders


def strahler_number(tree: NeuronTree) -> int:
    """The highest Horton-Strahler number of a branch: 1 at a tip, one more where the two highest below tie.

    The root itself is no branch: two equal stems do not raise the number.
    """
    found = branches(tree)
    highest = np.zeros((len(found.ends) + 1, 2), int)  # the two highest below each branch; the last row: root
    numbers = np.zeros(len(found.ends), int)
    for branch in range(len(numbers) - 1, -1, -1):
        first, second = highest[branch]
        numbers[branch] = first + (first == second)
        parent = found.parents[branch]
        highest[parent] = sorted([*highest[parent], numbers[branch]])[:0:-1]
    return int(numbers.max(initial=0))


def sholl(tree: NeuronTree, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Radii (step, 2 step, ...) and how many edges cross each sphere around the soma or first root.

    An edge crosses where one end lies inside (distance < radius) and the other does not. A soma of several nodes, a
    contour say, is one, in their middle.
    """
    if not step > 0:
        raise ValueError(f"the Sholl step must be positive, got {step}.")
    if len(tree) == 0:
        return np.zeros(0), np.zeros(0, int)
    tree, _ = _with_one_soma(tree.sorted())
    somas = np.flatnonzero(tree.types == SOMA)
    centre = tree.points[somas[0] if len(somas) else np.flatnonzero(tree.parents < 0)[0]]
    distance = np.linalg.norm(tree.points - centre, axis=1) / step
    if distance.max() > _MOST_SPHERES:
        raise ValueError(f"a Sholl step of {step} makes more than {_MOST_SPHERES} spheres; take a longer one.")
    shell = np.floor(distance).astype(int)
    ends = np.sort([shell[tree.edges], shell[tree.parents[tree.edges]]], axis=0)
    size = shell.max() + 1
    entered, left = np.bincount(ends[0], minlength=size), np.bincount(ends[1], minlength=size)
    # An edge from within shell k to beyond it crosses the radius (k + 1) * step.
    return step * np.arange(1, size), np.cumsum(entered - left)[:-1]


def volume(tree: NeuronTree) -> float:
    """Sum of the edges as frusta, of those to a soma what lies outside of it, as thick as the neurite begins there."""
    child, parent = tree.edges, tree.parents[tree.edges]
    one, other = tree.radii[child], tree.radii[parent]
    one, other = (
        np.where(tree.types[child] == SOMA, other, one),
        np.where(tree.types[parent] == SOMA, one, other),
    )
    return float((np.pi / 3 * tree.cable_lengths * (one * one + one * other + other * other)).sum())


def measure(tree: NeuronTree) -> dict[str, float]:
    """One row of a table: counts, length, branch order, Strahler number, volume; the unit ends the names.

    A soma of several nodes, a contour say, is one; it is no part of lengths, of the volume or of the mean radius.
    """
    unit = {"um": "um", "voxel": "vox"}.get(tree.unit, "unknown_unit")
    whole = tree.sorted()
    cable = np.zeros(len(whole))
    cable[whole.edges] = whole.cable_lengths
    tree, rows = _with_one_soma(whole)
    neurite = tree.types != SOMA
    return {
        "nodes": len(whole),
        "trees": tree.num_roots,
        f"length_{unit}": float(cable.sum()),
        "tips": tree.num_tips,
        "branch_points": tree.num_branch_points,
        "max_branch_order": int(branch_orders(tree).max(initial=0)),
        "strahler": strahler_number(tree),
        f"volume_{unit}3": volume(whole),
        f"mean_radius_{unit}": float(tree.radii[neurite].mean()) if neurite.any() else 0.0,
        f"max_path_{unit}": float(path_sums(tree, cable[rows]).max(initial=0)),
    }


def _with_one_soma(tree: NeuronTree) -> tuple[NeuronTree, np.ndarray]:
    """Of each soma one node, in the middle of its nodes, with all that hangs on them; and the rows that stay."""
    rows = np.arange(len(tree))
    inner = (tree.types == SOMA) & (tree.parents >= 0) & (tree.types[tree.parents] == SOMA)
    first = follow(np.where(inner, tree.parents, rows))
    parents = np.where(tree.parents < 0, -1, first[tree.parents])
    nodes = np.bincount(first, minlength=len(tree))
    points = [np.bincount(first, column, len(tree)) / np.maximum(nodes, 1) for column in tree.points.T]
    points = np.column_stack(points)
    return replace(tree, points=points, parents=parents).take(rows[~inner]), rows[~inner]


def resample(tree: NeuronTree, step: float) -> NeuronTree:
    """The same branches with nodes about every `step` along them, evenly spaced per branch.

    Roots, tips, branch points and somas stay where they are, and so does the first node of what leaves a soma: there
    is no cable inside it, and nodes are put on such an edge from the surface on. Radius and confidence are interpolated
    along the branch, the type is that of its far end.
    """
    if not step > 0:
        raise ValueError(f"the resampling step must be positive, got {step}.")
    if tree.cable_length / step > _MOST_NODES:
        raise ValueError(f"a resampling step of {step} makes more than {_MOST_NODES} nodes; take a longer one.")
    tree = _from_surfaces(tree, step).sorted()
    is_soma, beside = tree.types == SOMA, np.zeros(len(tree), bool)
    child, parent = tree.edges, tree.parents[tree.edges]
    beside[child[is_soma[parent]]] = beside[parent[is_soma[child]]] = True
    found, roots = branches(tree, beside), np.flatnonzero(tree.parents < 0)
    counts = np.maximum(np.rint(found.lengths / step).astype(int), 1)  # nodes per branch, the far end included
    counts[is_soma[found.starts] | is_soma[found.ends]] = 1
    branch = np.repeat(np.arange(len(counts)), counts)
    nth = np.arange(len(branch)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
    columns = [tree.points, tree.radii[:, None]]
    columns += [] if tree.confidence is None else [tree.confidence[:, None]]
    values = np.hstack(columns)
    between = _along_branches(tree, found, values, branch, nth / counts[branch])
    values = np.concatenate([values[roots], between])
    last = len(roots) + np.cumsum(counts) - 1  # the new row of each branch's far end
    new_root = np.zeros(len(tree), int)
    new_root[roots] = np.arange(len(roots))
    start = np.where(found.parents < 0, new_root[found.starts], last[found.parents])
    parents = np.where(nth == 1, start[branch], len(roots) + np.arange(len(branch)) - 1)
    types = np.concatenate([tree.types[roots], tree.types[found.ends[branch]]])
    confidence = None if tree.confidence is None else values[:, 4]
    parents = np.concatenate([np.full(len(roots), -1), parents])
    resampled = replace(tree, points=values[:, :3], radii=values[:, 3], parents=parents, types=types,
                        confidence=confidence)  # fmt: skip
    return resampled


def _from_surfaces(tree: NeuronTree, step: float) -> NeuronTree:
    """The tree with a node where a neurite comes out of a soma, if its next one is more than `step` away from there."""
    child, parent, is_soma = tree.edges, tree.parents[tree.edges], tree.types == SOMA
    soma, neurite = np.where(is_soma[child], (child, parent), (parent, child))
    far = (is_soma[child] != is_soma[parent]) & (tree.edge_lengths > tree.radii[soma] + step)
    child, parent, soma, neurite = child[far], parent[far], soma[far], neurite[far]
    share = (tree.radii[soma] / tree.edge_lengths[far])[:, None]
    points = tree.points[soma] + share * (tree.points[neurite] - tree.points[soma])
    parents = tree.parents.copy()
    parents[child] = len(tree) + np.arange(len(child))
    return replace(
        tree,
        points=np.concatenate([tree.points, points]),
        radii=np.concatenate([tree.radii, tree.radii[neurite]]),
        parents=np.concatenate([parents, parent]),
        types=np.concatenate([tree.types, tree.types[neurite]]),
        confidence=None if tree.confidence is None else np.concatenate([tree.confidence, tree.confidence[neurite]]),
    )


def _along_branches(tree, found, values, branch, fraction) -> np.ndarray:
    """`values` of the tree's nodes, interpolated at `fraction` of the length of `branch`."""
    if len(branch) == 0:
        return values[:0]
    distance = path_lengths(tree)
    number = np.arange(len(found.ends))
    own = np.concatenate([found.of_node[tree.edges], number])
    node = np.concatenate([tree.edges, found.starts])
    along = distance[node] - distance[found.starts[own]]
    order = np.lexsort((along, own))
    # Laid end to end with a gap of 1 between them, all branches are one curve: one interpolation serves all.
    offset = np.cumsum(found.lengths + 1) - found.lengths
    curve = (along + offset[own])[order]
    wanted = fraction * found.lengths[branch] + offset[branch]
    return np.column_stack([np.interp(wanted, curve, column[node][order]) for column in values.T])
