"""Pictures of the nouns: a tree over its stack, and where two trees differ. Drawn with Agg, no window needed.

Every picture shows three projections at one physical scale: xy large, zy to its right (sharing y), xz below
it (sharing x). y points down, as the stack is stored. The centre of voxel i lies at i * spacing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.spatial import cKDTree

from vit3d.formats.appearing import appearing
from vit3d.formats.lazy_voxels import projection
from vit3d.formats.tiff import SOFTWARE
from vit3d.tree import NeuronTree
from vit3d.volume import Volume

_DPI = 150
_PANEL_INCHES = 6.0
_GAP_INCHES = 0.08
_LETTER_INCHES = 0.085  # of a title, on average and rather more
_DEPTH_COLORS = "rainbow"  # bright at both ends, so that it shows on black and on white
_SEEN_THROUGH = LinearSegmentedColormap.from_list("seen through", [(1, 0.1, 0.1, 0), (1, 0.1, 0.1, 1)])
_ROOT_RING = {"marker": "o", "linestyle": "", "mfc": "none", "mec": "magenta", "mew": 1.5, "ms": 9}
_LONGEST_NAME = 60  # letters of a stack's name that the title has room for
_UNIT_NAMES = {"um": "µm", "voxel": "voxels"}
_DIFFERENCE_WORDS = {"agreed": "grey", "missing": "red", "surplus": "blue"}


@dataclass(frozen=True)
class _View:
    """A projection along axis `along`; what runs downwards and what to the right (axes 0 z, 1 y, 2 x)."""

    name: str
    along: int
    down: int
    right: int


_VIEWS = (_View("xy", 0, 1, 2), _View("zy", 2, 1, 0), _View("xz", 1, 0, 2))


@dataclass(frozen=True)
class _Box:
    """What a panel shows: its corners (z, y, x) and their unit, "um" or "voxel"."""

    low: np.ndarray
    high: np.ndarray
    unit: str

    @classmethod
    def of_volume(cls, volume: Volume, start: Sequence[int] = (0, 0, 0)) -> "_Box":
        """From the outer face of the first voxel, number `start` of a larger stack, to that of the last."""
        step, first = np.array(volume.spacing_um or (1.0, 1.0, 1.0)), np.array(start) - 0.5
        return cls(first * step, (first + volume.shape) * step, "um" if volume.spacing_um else "voxel")

    @classmethod
    def of_trees(cls, *trees: NeuronTree) -> "_Box":
        points = np.concatenate([tree.points for tree in trees] + [np.zeros((0, 3))])
        points = points if len(points) else np.zeros((1, 3))
        margin = 0.05 * np.ptp(points, axis=0).max() + 1
        return cls(points.min(axis=0) - margin, points.max(axis=0) + margin, trees[0].unit)

    @property
    def size(self) -> np.ndarray:
        return self.high - self.low


def plot_reconstruction(
    volume: Volume,
    tree: NeuronTree,
    path: str | Path,
    *,
    probability: Volume | None = None,
    gold: NeuronTree | None = None,
    polarity: str = "bright",
    start: Sequence[int] = (0, 0, 0),
) -> None:
    """Write one PNG: the stack's projections, and beside them the same with the tree over it.

    `probability` and `gold` each add a panel of their own. `polarity="dark"` (dark neurites on a bright
    ground) projects the minimum. `start` (z, y, x): which voxel of the stack that the trees lie in is the first of
    `volume`. The file appears under its name only when it is whole. ValueError: a path
    that is no .png, a probability of another shape, a tree whose unit does not fit a stack without spacing.
    The title begins with the file's name.
    """
    name = Path(path).stem
    beside = {"probability": probability, "gold": gold, "polarity": polarity, "start": start}
    _save(draw_reconstruction(volume, tree, **beside, name=name), path)


def draw_reconstruction(
    volume: Volume,
    tree: NeuronTree,
    *,
    probability: Volume | None = None,
    gold: NeuronTree | None = None,
    polarity: str = "bright",
    start: Sequence[int] = (0, 0, 0),
    name: str = "",
) -> Figure:
    """The figure that `plot_reconstruction` writes; `name`, of the stack, begins its title."""
    _check(volume, probability, polarity)
    box = _Box.of_volume(volume, start)
    panels = [("image", volume, None), ("probability", probability, None), ("tree", volume, tree)]
    panels += [("gold", None if gold is None else volume, gold)]
    panels = [panel for panel in panels if panel[1] is not None]
    title = _named(name, _description(tree.to(box.unit, volume.spacing_um)))
    figure, rows = _panels(box, [name for name, _, _ in panels], title, margin=1.1)
    ink = "white" if polarity == "bright" else "black"
    for (panel, shown, drawn), axes in zip(panels, rows, strict=True):
        if panel == "probability":
            _show_projections(axes, shown, box, "bright", limits=(0.0, 1.0))
        else:
            _show_projections(axes, shown, box, polarity)
        if drawn is not None:
            _draw_tree(axes, drawn.to(box.unit, volume.spacing_um), box, ink)
    _draw_depth_bar(figure, box)
    if len(tree):
        _draw_root_legend(figure)
    _draw_scale_bar(rows[0][0], box, ink)
    return figure


def plot_segmentation(volume: Volume, probability: Volume, path: str | Path, *, polarity: str = "bright") -> None:
    """Write one PNG: the stack's projections, and beside them the same with the probability over it, red where sure.

    The title begins with the file's name, less `_segmentation`. ValueError as for `plot_reconstruction`.
    """
    name = Path(path).stem.removesuffix("_segmentation")
    _save(draw_segmentation(volume, probability, polarity=polarity, name=name), path)


def draw_segmentation(volume: Volume, probability: Volume, *, polarity: str = "bright", name: str = "") -> Figure:
    """The figure that `plot_segmentation` writes."""
    _check(volume, probability, polarity)
    box = _Box.of_volume(volume)
    share = float(np.mean(np.asarray(probability.voxels) > 0.5))
    title = _named(name, f"{share:.2%} of the voxels more likely neurite than not")
    figure, (alone, under) = _panels(box, ["image", "segmentation"], title, margin=0.1)
    _show_projections(alone, volume, box, polarity)
    _show_projections(under, volume, box, polarity)
    _show_projections(under, probability, box, "bright", limits=(0.0, 1.0), colors=_SEEN_THROUGH)
    _draw_scale_bar(alone[0], box, "white" if polarity == "bright" else "black")
    return figure


def _check(volume: Volume, probability: Volume | None, polarity: str) -> None:
    if polarity not in ("bright", "dark"):
        raise ValueError(f"`polarity` must be 'bright' or 'dark', got {polarity!r}.")
    if probability is not None and probability.shape != volume.shape:
        raise ValueError(f"`probability` must have the shape {volume.shape}, got {probability.shape}.")


def plot_difference(
    predicted: NeuronTree,
    gold: NeuronTree,
    path: str | Path,
    *,
    volume: Volume | None = None,
    threshold: float = 2.0,
    polarity: str = "bright",
) -> None:
    """Write one PNG: what `predicted` misses (red), has in surplus (blue), and where both agree (grey).

    Two pieces of cable agree when the other tree passes closer than `threshold` voxels (um where no spacing
    is known and the trees are in um). Both trees must have the same unit, else ValueError. `polarity`, bright or dark,
    says what of the volume is shown.
    """
    _save(draw_difference(predicted, gold, volume=volume, threshold=threshold, polarity=polarity), path)


def draw_difference(
    predicted: NeuronTree,
    gold: NeuronTree,
    *,
    volume: Volume | None = None,
    threshold: float = 2.0,
    polarity: str = "bright",
) -> Figure:
    """The figure that `plot_difference` writes."""
    if predicted.unit != gold.unit or gold.unit is None:
        raise ValueError(f"both trees must have one stated unit, got {predicted.unit} and {gold.unit}.")
    spacing_um = (None if volume is None else volume.spacing_um) or gold.spacing_um or predicted.spacing_um
    if volume is not None:
        box = _Box.of_volume(volume)
        predicted, gold = predicted.to(box.unit, spacing_um), gold.to(box.unit, spacing_um)
    else:
        box = _Box.of_trees(predicted, gold)
    step = np.array(spacing_um if spacing_um and box.unit == "um" else (1.0, 1.0, 1.0))
    gold_pieces, missing = _pieces(gold, predicted, step, threshold)
    predicted_pieces, surplus = _pieces(predicted, gold, step, threshold)
    kinds = {
        "agreed": (gold_pieces[~missing], "0.35"),
        "missing": (gold_pieces[missing], "red"),
        "surplus": (predicted_pieces[surplus], "blue"),
    }
    parts = [f"{name} ({word}) {_length(kinds[name][0]):,.0f}" for name, word in _DIFFERENCE_WORDS.items()]
    figure, (axes,) = _panels(box, ["difference"], f"{', '.join(parts)} {_UNIT_NAMES[box.unit]}", margin=0.1)
    if volume is not None:
        on_white = "gray" if polarity == "dark" else "gray_r"
        _show_projections(axes, volume, box, polarity, colors=on_white, headroom=2.5)
    for name, (pieces, color) in kinds.items():
        for ax, view in zip(axes, _VIEWS, strict=True):
            _draw_lines(ax, view, pieces, label=name, colors=color, linewidths=1.2)
    _draw_scale_bar(axes[0], box, "black")
    return figure


# ---------------------------------------------------------------- the sheet


def _panels(box: _Box, names: list[str], title: str, margin: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure, wide enough for its title, with one panel per name, each three axes in the order of `_VIEWS`, all at
    one scale; `margin` inches stay free at the right."""
    z, y, x = box.size
    scale = _PANEL_INCHES / max(x + z, y + z)
    width, height = (x + z) * scale + _GAP_INCHES, (y + z) * scale + _GAP_INCHES
    taken = len(names) * (width + 0.25) + 0.15 + margin
    figure = Figure((max(taken, _LETTER_INCHES * len(title)), height + 0.75), dpi=_DPI)
    figure.suptitle(title, fontsize=11, y=1 - 0.1 / figure.get_figheight())
    sheet = np.array([*figure.get_size_inches()] * 2)
    rows = []
    for number, name in enumerate(names):
        left, bottom = (sheet[0] - taken) / 2 + 0.25 + number * (width + 0.25), 0.15
        side, top = left + x * scale + _GAP_INCHES, bottom + z * scale + _GAP_INCHES
        places = [(left, top, x, y), (side, top, z, y), (left, bottom, x, z)]
        rows.append([])
        for view, (at_x, at_y, wide, tall) in zip(_VIEWS, places, strict=True):
            ax = figure.add_axes(np.array([at_x, at_y, wide * scale, tall * scale]) / sheet)
            ax.set(label=f"{name} {view.name}", xticks=[], yticks=[])
            ax.annotate(view.name, (1, 0), (-4, 3), "axes fraction", "offset points", color="0.5", ha="right")
            ax.set_xlim(box.low[view.right], box.high[view.right])
            ax.set_ylim(box.high[view.down], box.low[view.down])
            rows[-1].append(ax)
        rows[-1][0].set_title(name, fontsize=10)
    return figure, rows


def _save(figure: Figure, path: str | Path) -> None:
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"Pictures are written as PNG: the name must end in .png, got {path}.")
    with appearing(path) as hidden:
        figure.savefig(hidden, format="png", metadata={"Software": SOFTWARE})


# ---------------------------------------------------------------- what is drawn on it


def _show_projections(
    axes: list[Axes],
    volume: Volume,
    box: _Box,
    polarity: str,
    colors: str | LinearSegmentedColormap = "gray",
    headroom: float = 1.0,
    limits: tuple[float, float] | None = None,
) -> None:
    """Maximum projections (minimum for dark neurites) between `limits`, or else by their own contrast;
    `headroom` above 1 makes neurites fainter."""
    for ax, view in zip(axes, _VIEWS, strict=True):
        image = projection(volume.voxels, view.along, polarity == "dark").astype(np.float32)
        image = image.T if view.down > view.right else image
        low, high = limits or _contrast(image, polarity)
        extent = (box.low[view.right], box.high[view.right], box.high[view.down], box.low[view.down])
        span = headroom * (high - low)
        low, high = (high - span, high) if polarity == "dark" else (low, low + span)
        ax.imshow(image, colors, vmin=low, vmax=high, extent=extent, aspect="auto")


def _contrast(image: np.ndarray, polarity: str) -> tuple[float, float]:
    """Grey levels shown black and white: percentiles of the pixels that are not 0, for many grounds are."""
    filled = image[image != 0]
    if not filled.size:
        return 0.0, 1.0
    low = np.percentile(image, 30) if polarity == "bright" else np.percentile(filled, 0.5)
    high = np.percentile(filled, 99.5 if polarity == "bright" else 95)
    return float(low), float(max(high, low + 1e-6))


def _draw_tree(axes: list[Axes], tree: NeuronTree, box: _Box, ink: str) -> None:
    """Edges coloured by the depth of their middle, roots as rings; without nodes, the words "empty tree"."""
    if len(tree) == 0:
        axes[0].text(0.5, 0.5, "empty tree", color=ink, ha="center", transform=axes[0].transAxes)
        return
    edges = np.stack([tree.points[tree.edges], tree.points[tree.parents[tree.edges]]], axis=1)
    depth = {"array": edges[:, :, 0].mean(axis=1), "cmap": _DEPTH_COLORS, "norm": _depths(box)}
    roots = tree.points[tree.parents < 0]
    casing = "black" if ink == "white" else "white"  # else a saturated neurite swallows the line
    for ax, view in zip(axes, _VIEWS, strict=True):
        # all of the casing comes first: drawn edge by edge, that of each edge would cover the edge before
        _draw_lines(ax, view, edges, label="casing", linewidths=3.0, capstyle="round", colors=casing)
        _draw_lines(ax, view, edges, label="tree", linewidths=1.6, capstyle="round", **depth)
        ax.plot(roots[:, view.right], roots[:, view.down], label="roots", **_ROOT_RING)


def _draw_lines(ax: Axes, view: _View, pieces: np.ndarray, **style) -> None:
    # (M, 2 ends, 3 axes) -> (M, 2 ends, right and down)
    ax.add_collection(LineCollection(pieces[:, :, [view.right, view.down]], **style), autolim=False)


def _draw_depth_bar(figure: Figure, box: _Box) -> None:
    width, height = figure.get_size_inches()
    place = figure.add_axes((1 - 0.75 / width, 0.3 / height, 0.15 / width, 1 - 1.2 / height))
    bar = figure.colorbar(ScalarMappable(_depths(box), _DEPTH_COLORS), cax=place)
    bar.set_label(f"depth z ({_UNIT_NAMES[box.unit]})")
    bar.ax.invert_yaxis()


def _draw_root_legend(figure: Figure) -> None:
    place = (1, 1 - 0.35 / figure.get_figheight())
    ring = Line2D([], [], **_ROOT_RING)
    figure.legend([ring], ["root"], loc="upper right", bbox_to_anchor=place, frameon=False, handletextpad=0)


def _depths(box: _Box) -> Normalize:
    return Normalize(box.low[0], box.high[0])


def _draw_scale_bar(ax: Axes, box: _Box, ink: str) -> None:
    """A bar of 1, 2 or 5 times a power of ten, at most a quarter of the width, at the lower left."""
    _, tall, wide = box.size
    decade = 10.0 ** math.floor(math.log10(wide / 4))
    length = max(factor * decade for factor in (1, 2, 5) if factor * decade <= wide / 4)
    x, y = box.low[2] + 0.04 * wide, box.high[1] - 0.04 * tall
    ax.plot([x, x + length], [y, y], color=ink, linewidth=2.5, label="scale bar")
    ax.annotate(f"{length:g} {_UNIT_NAMES[box.unit]}", (x, y), (0, 3), textcoords="offset points", color=ink)


def _named(name: str, words: str) -> str:
    name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
    return f"{name}: {words}" if name else words


def _description(tree: NeuronTree) -> str:
    if len(tree) == 0:
        return "empty tree"
    length = f"cable length {tree.cable_length:,.0f} {_UNIT_NAMES[tree.unit]}"
    counts = {"tip": tree.num_tips, "branch point": tree.num_branch_points}
    return ", ".join([length, *(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items())])


# ---------------------------------------------------------------- where two trees differ


def _pieces(tree: NeuronTree, other: NeuronTree, step: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The tree's edges cut into pieces of about one voxel (M, 2, 3), and which lie far from the other tree.

    Distances are between points divided by `step`, half a voxel apart on the other tree.
    """
    sampling = float(step.min())
    points, child = tree.sampled_edges(sampling)
    joined = child[1:] == child[:-1]
    pieces = np.stack([points[:-1][joined], points[1:][joined]], axis=1)
    if len(other) == 0 or len(pieces) == 0:
        return pieces, np.ones(len(pieces), bool)
    distance, _ = cKDTree(other.sampled(sampling / 2) / step).query(pieces.mean(axis=1) / step)
    return pieces, distance >= threshold


def _length(pieces: np.ndarray) -> float:
    return float(np.linalg.norm(pieces[:, 1] - pieces[:, 0], axis=1).sum())
