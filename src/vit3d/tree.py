"""NOUN NeuronTree: points, radii, parents, types and their unit; SWC in and out.

SWC's x y z exists only in `read_swc` and `write_swc`. Everywhere else points are (z, y, x).
"""

import os
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import depth_first_order

from vit3d.formats.appearing import appearing
from vit3d.formats.axes import checked_spacing
from vit3d.swc import SwcText, header, node_lines

SOMA = 1
UNITS = ("um", "voxel")
Spacing = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class NeuronTree:
    """A tree (or several: one per root) of nodes with a position, a radius and a parent.

    points: (N, 3) float64, (z, y, x). A voxel coordinate is a voxel centre's index; um = index * spacing.
    radii: (N,) float64, in the unit of the points ("voxel" means x-voxels).
    parents: (N,) int, the row of the parent, -1 for a root; in any order, without cycles.
    types: (N,) int, SWC types (1 soma, 2 axon, 3 dendrite); 0 when not given.
    unit: "um", "voxel", or None for a foreign SWC whose unit nobody has stated.
    spacing_um: voxel size (z, y, x) of the grid the tree was traced on, or None.
    confidence: (N,) float64 or None.
    """

    points: np.ndarray
    radii: np.ndarray
    parents: np.ndarray
    types: np.ndarray | None = None
    unit: str | None = "um"
    spacing_um: Spacing | None = None
    confidence: np.ndarray | None = None

    def __post_init__(self):
        points = np.asarray(self.points, np.float64)
        points = points.reshape(0, 3) if points.size == 0 else points
        if points.ndim != 2 or points.shape[1] != 3:
            raise ValueError(f"`points` must have shape (N, 3) in (z, y, x) order, got {points.shape}.")
        types = np.zeros(len(points)) if self.types is None else self.types
        columns = {
            "radii": np.asarray(self.radii, np.float64),
            "parents": _whole_numbers(self.parents, "parents"),
            "types": _whole_numbers(types, "types"),
        }
        if self.confidence is not None:
            columns["confidence"] = np.asarray(self.confidence, np.float64)
        for name, column in columns.items():
            if column.shape != (len(points),):
                raise ValueError(f"`{name}` must have shape ({len(points)},) as `points`, got {column.shape}.")
        for name, column in {"points": points, **columns}.items():
            if not np.isfinite(column).all():
                raise ValueError(f"`{name}` must be finite; row {_first_row(~np.isfinite(column))} is not.")
            object.__setattr__(self, name, column)
        if self.spacing_um is not None:
            object.__setattr__(self, "spacing_um", checked_spacing(self.spacing_um))
        self._check()

    def _check(self) -> None:
        if self.unit not in (*UNITS, None):
            raise ValueError(f"`unit` must be 'um', 'voxel' or None, got {self.unit!r}.")
        if (self.radii < 0).any():
            raise ValueError(f"`radii` must not be negative; row {_first_row(self.radii < 0)} is.")
        out = (self.parents < -1) | (self.parents >= len(self))
        if out.any():
            row = _first_row(out)
            raise ValueError(f"row {row} has parent {self.parents[row]} of {len(self)} rows; a root has -1.")
        row = _row_on_a_cycle(self.parents)
        if row is not None:
            raise ValueError(f"`parents` must have no cycle; row {row} is its own ancestor.")

    @classmethod
    def empty(cls, unit: str | None = "um", spacing_um: Spacing | None = None) -> "NeuronTree":
        """A tree without nodes."""
        return cls(np.zeros((0, 3)), np.zeros(0), np.zeros(0, int), unit=unit, spacing_um=spacing_um)

    def __len__(self) -> int:
        return len(self.points)

    def __repr__(self) -> str:
        what = f"{len(self)} nodes, {self.num_roots} roots"
        return f"NeuronTree({what}, unit={self.unit!r}, spacing_um={self.spacing_um})"

    # --- what it is made of ---

    @cached_property
    def edges(self) -> np.ndarray:
        """Rows of the nodes that have a parent: one edge each, `edges` -> `parents[edges]`."""
        return np.flatnonzero(self.parents >= 0)

    @cached_property
    def num_children(self) -> np.ndarray:
        """(N,) number of children of every node."""
        return np.bincount(self.parents[self.edges], minlength=len(self))

    @property
    def degree(self) -> np.ndarray:
        """(N,) number of neighbours of every node: independent of where the root is."""
        return self.num_children + (self.parents >= 0)

    @property
    def root_of(self) -> np.ndarray:
        """(N,) row of the root above every node."""
        return follow(np.where(self.parents < 0, np.arange(len(self)), self.parents))

    @property
    def num_roots(self) -> int:
        """How many connected trees there are."""
        return int((self.parents < 0).sum())

    @property
    def num_tips(self) -> int:
        """Nodes without children, somas and lone nodes aside. The root is no tip."""
        return int(((self.num_children == 0) & (self.parents >= 0) & (self.types != SOMA)).sum())

    @property
    def num_branch_points(self) -> int:
        """Nodes with three or more neighbours, somas aside (so a root in mid-cable is none)."""
        return int(((self.degree >= 3) & (self.types != SOMA)).sum())

    @cached_property
    def edge_lengths(self) -> np.ndarray:
        """(E,) length of every edge in the tree's unit, in the order of `edges`; somas count as any node."""
        steps = self.points[self.edges] - self.points[self.parents[self.edges]]
        return np.sqrt(np.einsum("ij,ij->i", steps, steps))

    @property
    def cable_lengths(self) -> np.ndarray:
        """(E,) `edge_lengths` outside somas: an edge to a soma counts from the soma's surface on, one between
        two soma nodes not at all."""
        child, parent = self.edges, self.parents[self.edges]
        child_is_soma, parent_is_soma = self.types[child] == SOMA, self.types[parent] == SOMA
        inside = self.radii[child] * child_is_soma + self.radii[parent] * parent_is_soma
        return np.where(child_is_soma & parent_is_soma, 0, np.maximum(self.edge_lengths - inside, 0))

    @property
    def cable_length(self) -> float:
        """Sum of `cable_lengths` in the tree's unit; the soma is no part of it. Voxels of unequal sides have
        no length: convert `.to("um")` first."""
        return float(self.cable_lengths.sum())

    # --- the same tree elsewhere ---

    def to(self, unit: str, spacing_um: Spacing | None = None) -> "NeuronTree":
        """The tree in "um" or "voxel", by `spacing_um` (z, y, x) or its own. Radii scale by the x spacing.

        ValueError: the tree's unit was never stated, or no spacing is known and units differ.
        """
        if unit not in UNITS:
            raise ValueError(f"a tree converts to 'um' or 'voxel', got {unit!r}.")
        if self.unit is None:
            raise ValueError("the unit of this tree was never stated; give read_swc a `unit`, 'um' or 'voxel'.")
        spacing = self.spacing_um if spacing_um is None else checked_spacing(spacing_um)
        if unit == self.unit:
            return self if spacing == self.spacing_um else replace(self, spacing_um=spacing)
        if spacing is None:
            raise ValueError(f"a tree in {self.unit} becomes one in {unit} by a spacing (z, y, x); none is known.")
        factor = np.array(spacing) if unit == "um" else 1 / np.array(spacing)
        points, radii = self.points * factor, self.radii * factor[2]
        return replace(self, points=points, radii=radii, unit=unit, spacing_um=spacing)

    def shifted(self, offset) -> "NeuronTree":
        """Moved by `offset` (z, y, x), in the tree's unit."""
        return replace(self, points=self.points + np.asarray(offset, np.float64))

    def scaled(self, factor) -> "NeuronTree":
        """Points times `factor` (a number or z, y, x), radii times its x. The spacing follows: a tree in um
        keeps its voxel coordinates, a tree in voxels its place in um."""
        factor = np.broadcast_to(np.asarray(factor, np.float64), 3)
        if not (np.isfinite(factor).all() and (factor > 0).all()):
            raise ValueError(f"a tree is scaled by positive numbers, got {factor.tolist()}; --flip mirrors.")
        spacing = self.spacing_um
        if spacing is not None:
            spacing = tuple(np.array(spacing) * (factor if self.unit == "um" else 1 / factor))
        return replace(self, points=self.points * factor, radii=self.radii * factor[2], spacing_um=spacing)

    def flipped(self, axis: int, last: float) -> "NeuronTree":
        """Mirrored along `axis` (0 z, 1 y, 2 x). `last` is the coordinate of the last voxel centre there in
        the tree's unit: size - 1 in voxels, (size - 1) * spacing in um."""
        points = self.points.copy()
        points[:, axis] = last - points[:, axis]
        return replace(self, points=points)

    def take(self, rows: np.ndarray) -> "NeuronTree":
        """The tree of these rows, in this order. A node whose parent is left out becomes a root."""
        new_row = np.full(len(self) + 1, -1)  # the last entry serves parent -1
        new_row[rows] = np.arange(len(rows))
        confidence = None if self.confidence is None else self.confidence[rows]
        parents, types = new_row[self.parents[rows]], self.types[rows]
        points, radii = self.points[rows], self.radii[rows]
        return replace(self, points=points, radii=radii, parents=parents, types=types, confidence=confidence)

    def sorted(self) -> "NeuronTree":
        """Every parent before its children, depth first; a tree in such an order is returned as it is."""
        return self if is_sorted(self.parents) else self.take(_depth_first(self.parents))

    def rerooted(self, rows) -> "NeuronTree":
        """The same tree, its rows in the same order, with `rows` (at most one per tree) as roots."""
        parents = self.parents.copy()
        for row in np.atleast_1d(rows).tolist():
            above = -1
            while row >= 0:
                parents[row], above, row = above, row, parents[row]
        return replace(self, parents=parents)

    def split(self) -> "list[NeuronTree]":
        """One tree per root, in the order of the roots."""
        root_of = self.root_of
        order = np.argsort(root_of, kind="stable")
        cuts = np.flatnonzero(np.diff(root_of[order])) + 1
        return [self.take(rows) for rows in np.split(order, cuts)] if len(self) else []

    @classmethod
    def together(cls, trees: "list[NeuronTree]") -> "NeuronTree":
        """At least one tree, of one unit and spacing, as one forest; confidence where all have it."""
        first = np.cumsum([0, *map(len, trees)])
        parents = [np.where(t.parents < 0, -1, t.parents + n) for t, n in zip(trees, first, strict=False)]
        names = ("points", "radii", "types", "confidence")
        columns = {name: [getattr(tree, name) for tree in trees] for name in names}
        known = {name: np.concatenate(parts) for name, parts in columns.items() if all(p is not None for p in parts)}
        return replace(trees[0], parents=np.concatenate(parents), **{"confidence": None, **known})

    def sampled(self, step: float = 1.0) -> np.ndarray:
        """(M, 3) points along the tree: int(1 + L / step + 0.5) evenly spaced ones, both ends included, on
        every edge of length L, and every lone node. Step 1 in voxels is Vaa3D's sampling."""
        return self.sampled_edges(step)[0]

    def sampled_edges(self, step: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """`sampled`, and of each point the row of its edge's child (a lone node's own row)."""
        counts, lone = (1 + self.edge_lengths / step + 0.5).astype(int), np.flatnonzero(self.degree == 0)
        child = np.repeat(self.edges, counts)
        nth = np.arange(len(child)) - np.repeat(np.cumsum(counts) - counts, counts)
        fraction = (nth / np.maximum(np.repeat(counts, counts) - 1, 1))[:, None]
        points = self.points[child] + fraction * (self.points[self.parents[child]] - self.points[child])
        return np.concatenate([points, self.points[lone]]), np.concatenate([child, lone])


def follow(pointers: np.ndarray) -> np.ndarray:
    """Where every row ends that follows its pointer until a row that points to itself (pointer jumping)."""
    for _ in range(len(pointers).bit_length() + 1):
        further = pointers[pointers]
        if np.array_equal(further, pointers):
            break
        pointers = further
    return pointers


def is_sorted(parents: np.ndarray) -> bool:
    """Whether every parent comes before its children (then there is no cycle either)."""
    return bool((parents < np.arange(len(parents))).all())


def _row_on_a_cycle(parents: np.ndarray) -> int | None:
    if is_sorted(parents):
        return None
    ends = follow(np.where(parents < 0, np.arange(len(parents)), parents))
    ends = ends[parents[ends] >= 0]
    return int(ends.min()) if len(ends) else None


def _depth_first(parents: np.ndarray) -> np.ndarray:
    nodes = np.arange(len(parents)) + 1  # node 0 of the graph is a parent for all roots
    graph = csr_array((np.ones(len(parents), np.int8), (parents + 1, nodes)), shape=2 * (len(parents) + 1,))
    return depth_first_order(graph, 0, return_predecessors=False)[1:] - 1


def _first_row(bad: np.ndarray) -> int:
    return int(np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))[0])


def _whole_numbers(column, name: str) -> np.ndarray:
    column = np.asarray(column)
    whole = column.astype(np.int64) if np.isfinite(column).all() else column
    if not np.array_equal(whole, column):
        raise ValueError(f"`{name}` must be whole numbers.")
    return whole


# --- SWC in and out ---


def read_swc(path: str | os.PathLike, *, unit: str | None = None) -> NeuronTree:
    """Read an SWC (or eSWC) file; nodes come back with parents before children.

    The unit is the header's `# unit:` line, else `unit`, else None; a contradiction is an error. Repairs are
    reported by one warning. A file without nodes is an error, unless its header says that the tree is empty.
    ValueError, FileNotFoundError: one sentence with file, line and id.
    """
    swc = SwcText.open(Path(path))
    if unit and swc.unit not in (None, unit):
        raise ValueError(f"{path} says '# unit: {swc.unit}', but {unit!r} was given; leave the unit out.")
    unit = swc.unit or unit
    if not swc.has_nodes and swc.says_empty:
        return NeuronTree.empty(unit, swc.spacing_um)
    if not swc.has_nodes:
        raise ValueError(f"{path} has no nodes: it holds only comments or blank lines.")
    repairs: list[str] = []
    table = _table(swc, repairs)
    parents = _rows_of_parents(table, swc, repairs)
    if (table[:, 5] < 0).any():
        repairs.append(f"{int((table[:, 5] < 0).sum())} negative radii set to 0")
    confidence = table[:, 7] if table.shape[1] > 7 else None
    points, radii = table[:, 4:1:-1].copy(), np.maximum(table[:, 5], 0)
    tree = NeuronTree(points, radii, parents, table[:, 1], unit, swc.spacing_um, confidence)
    tree = _one_point_soma(tree, repairs)
    if not is_sorted(tree.parents):
        repairs.append("nodes sorted, parents before children")
    if repairs:
        warnings.warn(f"{path} was repaired: {'; '.join(repairs)}.", stacklevel=2)
    return tree.sorted()


def _table(swc: SwcText, repairs: list[str]) -> np.ndarray:
    if swc.says_confidence:
        try:
            return swc.table(columns=8)
        except ValueError:  # a node drawn by hand has no confidence; anything worse fails again below
            repairs.append("confidence dropped, a line lacks it")
    return swc.table()


def _rows_of_parents(table: np.ndarray, swc: SwcText, repairs: list[str]) -> np.ndarray:
    """Ids -> rows. A root's parent is -1, itself, or 0 where no node 0 exists."""
    ids, parent_ids = table[:, 0].astype(np.int64), table[:, 6].astype(np.int64)
    order = np.argsort(ids, kind="stable")
    repeated = np.diff(ids[order]) == 0
    if repeated.any():
        raise swc.error(order[repeated.argmax() + 1], "repeats an id; ids must be unique")
    is_self, is_zero = parent_ids == ids, (parent_ids == 0) & ~(ids == 0).any()
    for count, parent in ((is_self.sum(), "the node itself"), (is_zero.sum(), "0, which is no node")):
        repairs += [f"root made of {count} node(s) whose parent is {parent}"] if count else []
    is_root = is_self | is_zero | (parent_ids == -1)
    place = np.minimum(np.searchsorted(ids, parent_ids, sorter=order), len(ids) - 1)
    parents = np.where(is_root, -1, order[place])
    missing = ~is_root & (ids[parents] != parent_ids)
    if missing.any():
        row = missing.argmax()
        raise swc.error(row, f"has parent {parent_ids[row]}, which is no node of the file")
    row = _row_on_a_cycle(parents)
    if row is not None:
        raise swc.error(row, "lies on a cycle: it is its own ancestor")
    return parents


def _one_point_soma(tree: NeuronTree, repairs: list[str]) -> NeuronTree:
    """NeuroMorpho's three-point soma (a centre, two type-1 children a radius to either side) as one node."""
    soma = np.flatnonzero(tree.types == SOMA)
    if len(soma) != 3 or (tree.parents[soma] < 0).sum() != 1:
        return tree
    centre = soma[tree.parents[soma] < 0][0]
    sides = soma[soma != centre]
    offsets = tree.points[sides] - tree.points[centre]
    radius = tree.radii[centre]
    opposite = np.allclose(offsets[0], -offsets[1], rtol=0, atol=0.05 * radius)
    on_surface = np.allclose(np.linalg.norm(offsets, axis=1), radius, rtol=0.1)
    if not (opposite and on_surface and (tree.parents[sides] == centre).all()):
        return tree
    repairs.append("three-point soma read as one node")
    tree = replace(tree, parents=np.where(np.isin(tree.parents, sides), centre, tree.parents))
    return tree.take(np.setdiff1d(np.arange(len(tree)), sides))


def write_swc(tree: NeuronTree, path: str | os.PathLike, *, unit: str | None = None) -> None:
    """Write an SWC with ids 1 to N, parents before children, in `unit` or else the tree's own.

    The header states unit, spacing and columns; `read_swc` reads it back. A confidence is the eighth column of an
    .eswc; an .swc has seven, as some readers give the last of more the meaning of the first. Written under a
    temporary name and renamed: a failure leaves no `path`.
    """
    tree = (tree if unit is None else tree.to(unit)).sorted()
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist; make it first.")
    confidence = [tree.confidence] if tree.confidence is not None and path.suffix.lower() == ".eswc" else []
    parent_ids = np.where(tree.parents < 0, -1, tree.parents + 1)
    ids = np.arange(1, len(tree) + 1)
    columns = [ids, tree.types, *tree.points.T[::-1], tree.radii, parent_ids, *confidence]
    with appearing(path) as hidden, open(hidden, "w", encoding="utf-8", newline="\n") as file:
        file.write(header(tree.unit, tree.spacing_um, confidence=bool(confidence), empty=len(tree) == 0))
        file.writelines(node_lines(np.column_stack(columns)))
