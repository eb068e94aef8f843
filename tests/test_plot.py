"""Pictures: the tree lies on the neuron to a fraction of a voxel, in all three views, at the right scale."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import imread

from vit3d.plot import (
    draw_difference,
    draw_reconstruction,
    draw_segmentation,
    plot_difference,
    plot_reconstruction,
    plot_segmentation,
)
from vit3d.tree import NeuronTree, read_swc
from vit3d.volume import Volume, read_volume

VIEWS = {"xy": (0, 1, 2), "zy": (2, 1, 0), "xz": (1, 0, 2)}  # along, downwards, rightwards
CORNERS = np.array([[2, 4, 5], [2, 4, 30], [2, 15, 30], [8, 15, 30]])  # an L in xy, its end goes down in z


def l_shape(spacing=None, shape=(11, 20, 40), dtype=np.uint8):
    """An asymmetric bright path, one voxel wide, in a non-cubic stack, and the tree through its centres."""
    voxels = np.zeros(shape, dtype)
    for start, stop in itertools.pairwise(CORNERS):
        voxels[tuple(slice(a, b + 1) for a, b in zip(start, stop, strict=True))] = 200
    tree = NeuronTree(CORNERS, np.ones(4), [-1, 0, 1, 2], unit="voxel", spacing_um=spacing)
    return Volume(voxels, spacing), tree


def axes_of(figure, name):
    return next(ax for ax in figure.axes if ax.get_label() == name)


def lines_of(ax, label="tree"):
    return next(item for item in ax.findobj(LineCollection) if item.get_label() == label)


def rendered(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).astype(int)


@pytest.mark.parametrize("spacing", [None, (2.0, 0.7, 0.4)])
def test_a_part_of_a_stack_is_drawn_where_it_lies_in_the_whole(spacing):
    volume, tree = l_shape(spacing)
    start = np.array([1, 3, 4])
    part = Volume(volume.voxels[1:, 3:, 4:], spacing)
    whole, cut = draw_reconstruction(volume, tree), draw_reconstruction(part, tree, start=start)
    for name in VIEWS:
        ours, theirs = (lines_of(axes_of(figure, f"tree {name}")).get_segments() for figure in (cut, whole))
        np.testing.assert_allclose(np.concatenate(ours), np.concatenate(theirs))
        ours, theirs = (axes_of(figure, f"tree {name}").images[0].get_extent() for figure in (cut, whole))
        assert [abs(one - other) > 1e-9 for one, other in zip(ours, theirs, strict=True)] == [True, False, False, True]
    step = 1.0 if spacing is None else spacing[0]
    bar = next(ax for ax in cut.axes if "depth z" in ax.get_ylabel())
    assert sorted(bar.get_ylim()) == pytest.approx([0.5 * step, 10.5 * step])


@pytest.mark.parametrize("spacing", [None, (2.0, 0.7, 0.4), (0.3, 1.0, 0.5)])
@pytest.mark.parametrize("unit", ["voxel", "um"])
def test_the_line_passes_through_the_centres_of_bright_pixels_in_every_view(spacing, unit):
    volume, tree = l_shape(spacing)
    tree = tree.to(unit, spacing) if spacing else tree
    figure = draw_reconstruction(volume, tree)
    for name, (along, down, right) in VIEWS.items():
        ax = axes_of(figure, f"tree {name}")
        image = ax.images[0].get_array()
        left, far, bottom, top = ax.images[0].get_extent()
        assert ax.images[0].origin == "upper"
        ends = np.concatenate(lines_of(ax).get_segments())
        columns = (ends[:, 0] - left) / (far - left) * volume.shape[right] - 0.5
        rows = (ends[:, 1] - top) / (bottom - top) * volume.shape[down] - 0.5
        # pixel (row, column) of the projection, whose centre is a whole number
        expected = CORNERS[[1, 0, 2, 1, 3, 2]]
        np.testing.assert_allclose(columns, expected[:, right], atol=1e-9)
        np.testing.assert_allclose(rows, expected[:, down], atol=1e-9)
        projection = volume.voxels.max(along)  # its axes in the order z, y, x
        assert (image == (projection if down < right else projection.T)).all()
        assert (image[np.rint(rows).astype(int), np.rint(columns).astype(int)] == 200).all()


@pytest.mark.parametrize("spacing", [None, (2.0, 0.7, 0.4), (0.3, 1.0, 0.5)])
def test_what_the_lines_paint_in_the_picture_is_bright_in_the_image(spacing):
    """The picture is drawn with the tree and without it; what changes must have been neuron, not ground."""
    volume, tree = l_shape(spacing)
    figure = draw_reconstruction(volume, tree)
    axes = [axes_of(figure, f"tree {name}") for name in VIEWS]
    for ax in axes:
        for other in [*ax.lines, *ax.texts]:
            other.set_visible(False)
    with_tree = rendered(figure)
    for ax, label in itertools.product(axes, ("tree", "casing")):
        lines_of(ax, label).set_visible(False)
    without = rendered(figure)
    painted = np.abs(with_tree - without).sum(axis=-1) > 60
    for ax in axes:
        box = ax.get_window_extent()
        inside = np.zeros_like(painted)
        height = len(painted)
        inside[round(height - box.y1) : round(height - box.y0), round(box.x0) : round(box.x1)] = True
        assert (painted & inside).sum() > 20
        assert (without[painted & inside, 0] > 100).mean() > 0.97
        # and the line runs along the middle of the bright path, to one and a half pixels of the picture
        path = (without[..., 0] > 100) & inside
        for lined, bright in zip(np.nonzero(painted & inside), np.nonzero(path), strict=True):
            assert abs(lined.min() + lined.max() - bright.min() - bright.max()) <= 3


@pytest.mark.parametrize("spacing", [None, (2.0, 0.7, 0.4)])
def test_one_um_is_equally_long_in_every_view_and_direction(spacing):
    volume, tree = l_shape(spacing)
    figure = draw_reconstruction(volume, tree)
    inches = []
    for panel in ("image", "tree"):
        for name, (_, down, right) in VIEWS.items():
            step = spacing or (1, 1, 1)
            box = axes_of(figure, f"{panel} {name}").get_window_extent()
            inches += [box.width / (volume.shape[right] * step[right])]
            inches += [box.height / (volume.shape[down] * step[down])]
    np.testing.assert_allclose(inches, inches[0], rtol=1e-6)


def test_the_side_views_share_an_axis_with_the_large_one():
    figure = draw_reconstruction(*l_shape((2.0, 0.7, 0.4)))
    xy, zy, xz = (axes_of(figure, f"tree {name}") for name in VIEWS)
    assert xy.get_ylim() == zy.get_ylim()
    assert xy.get_xlim() == xz.get_xlim()
    assert xy.get_position().y0 == pytest.approx(zy.get_position().y0)
    assert xy.get_position().x0 == pytest.approx(xz.get_position().x0)


def test_edges_are_coloured_by_their_depth_and_the_bar_names_the_unit():
    figure = draw_reconstruction(*l_shape((2.0, 0.7, 0.4)))
    lines = lines_of(axes_of(figure, "tree xy"))
    assert lines.get_array().tolist() == [4.0, 4.0, 10.0]  # um: slices 2, 2 and the middle of 2 and 8
    bar = next(ax for ax in figure.axes if "depth z" in ax.get_ylabel())
    assert bar.get_ylabel() == "depth z (µm)"
    assert sorted(bar.get_ylim()) == [lines.norm.vmin, lines.norm.vmax] == [-1.0, 21.0]
    figure = draw_reconstruction(*l_shape())
    assert any(ax.get_ylabel() == "depth z (voxels)" for ax in figure.axes)


@pytest.mark.parametrize("spacing, words, length", [(None, "10 voxels", 10), ((2, 0.7, 0.4), "2 µm", 2)])
def test_the_scale_bar_is_as_long_as_it_says(spacing, words, length):
    ax = axes_of(draw_reconstruction(*l_shape(spacing)), "image xy")
    bar = next(line for line in ax.lines if line.get_label() == "scale bar")
    assert np.ptp(bar.get_xdata()) == pytest.approx(length)
    assert words in [text.get_text() for text in ax.texts]


def test_the_title_counts_what_the_tree_has_and_the_roots_are_marked():
    volume, _ = l_shape((2.0, 0.7, 0.4))
    points = [[2, 4, 5], [2, 4, 15], [2, 4, 25], [2, 14, 15], [5, 10, 10]]
    tree = NeuronTree(points, np.ones(5), [-1, 0, 1, 1, -1], unit="voxel")
    figure = draw_reconstruction(volume, tree)
    assert figure.get_suptitle() == "cable length 15 µm, 2 tips, 1 branch point"  # 20 * 0.4 + 10 * 0.7
    roots = next(line for line in axes_of(figure, "tree zy").lines if line.get_label() == "roots")
    np.testing.assert_allclose(roots.get_xydata(), [[4.0, 2.8], [10.0, 7.0]])


def test_an_empty_tree_is_said_in_words():
    volume, _ = l_shape()
    figure = draw_reconstruction(volume, NeuronTree.empty("voxel"))
    assert figure.get_suptitle() == "empty tree"
    assert "empty tree" in [text.get_text() for text in axes_of(figure, "tree xy").texts]
    assert axes_of(figure, "tree xy").images


def test_dark_neurites_are_projected_by_their_minimum():
    volume, tree = l_shape()
    dark = Volume(255 - volume.voxels)
    image = axes_of(draw_reconstruction(dark, tree, polarity="dark"), "tree xy").images[0].get_array()
    assert (image == dark.voxels.min(0)).all()
    with pytest.raises(ValueError, match="'bright' or 'dark', got 'auto'"):
        draw_reconstruction(volume, tree, polarity="auto")


def test_a_difference_is_drawn_over_dark_neurites_too():
    volume, tree = l_shape()
    shown = [
        axes_of(draw_difference(tree, tree, volume=Volume(voxels), polarity=polarity), "difference xy").images[0]
        for voxels, polarity in ((volume.voxels, "bright"), (255 - volume.voxels, "dark"))
    ]
    bright, dark = (image.to_rgba(image.get_array())[..., 0] for image in shown)
    assert (bright.max(), dark.max()) == (1, 1)
    assert bright.min() == pytest.approx(0.6, abs=0.01)
    np.testing.assert_allclose(dark, bright, atol=0.01)


def test_one_hot_voxel_does_not_darken_the_picture():
    volume, tree = l_shape(dtype=np.uint16, shape=(11, 100, 200))
    volume.voxels[:, 50:] += np.arange(200, dtype=np.uint16)
    volume.voxels[0, 0, 0] = 60000
    assert axes_of(draw_reconstruction(volume, tree), "image xy").images[0].get_clim()[1] <= 200


@pytest.mark.parametrize("level", [0, 7])
def test_a_constant_stack_can_be_drawn(level, tmp_path):
    volume = Volume(np.full((3, 4, 5), level, np.uint8))
    plot_reconstruction(volume, NeuronTree.empty("voxel"), tmp_path / "a.png")
    assert imread(tmp_path / "a.png").ndim == 3


def test_probability_and_gold_have_panels_of_their_own():
    volume, tree = l_shape()
    probability = Volume(volume.voxels / np.float32(200))
    figure = draw_reconstruction(volume, tree, probability=probability, gold=tree.shifted((0, 1, 0)))
    assert axes_of(figure, "probability xy").images[0].get_array().max() == 1
    lines = {name: lines_of(axes_of(figure, f"{name} xy")).get_segments() for name in ("tree", "gold")}
    assert np.allclose(np.array(lines["gold"]) - np.array(lines["tree"]), [0, 1])
    with pytest.raises(ValueError, match=r"must have the shape \(11, 20, 40\)"):
        draw_reconstruction(volume, tree, probability=Volume(np.ones((2, 3, 4))))


@pytest.mark.parametrize("highest", [1.0, 0.4])
def test_a_probability_is_shown_from_0_to_1_however_sure_the_network_is(highest):
    volume, tree = l_shape()
    probability = Volume(volume.voxels / np.float32(200) * highest)
    figure = draw_reconstruction(volume, tree, probability=probability)
    for name in VIEWS:
        assert axes_of(figure, f"probability {name}").images[0].get_clim() == (0, 1)
        assert axes_of(figure, f"image {name}").images[0].get_clim() == (0, 200)


def test_the_line_stands_out_from_a_saturated_neurite():
    """Seen across the neurite: something dark on both sides of something coloured, all within the bright path."""
    volume, tree = l_shape(shape=(11, 40, 60))
    volume.voxels[:, 4:17] = 255
    figure = draw_reconstruction(volume, tree)
    box = axes_of(figure, "tree xy").get_window_extent()
    pixels = rendered(figure)
    column = round(box.x0 + box.width * 20.5 / 60)  # between the ends of the first edge, at y 4
    rows = slice(round(len(pixels) - box.y1), round(len(pixels) - box.y1 + box.height * 9 / 40))
    across = pixels[rows, column, :3]
    line = np.flatnonzero(np.ptp(across, axis=1) > 100)
    assert 2 <= len(line) <= 8
    for side in (across[line[0] - 8 : line[0]], across[line[-1] : line[-1] + 8]):
        assert (side.sum(axis=1) < 150).any()
        assert (side.min(axis=1) > 240).any()


def test_the_ring_of_the_root_is_explained_where_there_is_one():
    volume, tree = l_shape()
    (legend,) = draw_reconstruction(volume, tree).legends
    assert [text.get_text() for text in legend.get_texts()] == ["root"]
    assert legend.get_lines()[0].get_markeredgecolor() == "magenta"
    assert not draw_reconstruction(volume, NeuronTree.empty("voxel")).legends


@pytest.mark.parametrize("step", [25, 1, 0.1])
def test_the_line_is_seen_all_along_however_close_its_nodes_lie(step):
    volume, _ = l_shape(shape=(11, 40, 60))
    x = np.arange(5, 30 + step / 2, step)
    points = np.stack([np.full_like(x, 2), np.full_like(x, 4), x], axis=1)
    figure = draw_reconstruction(volume, NeuronTree(points, np.ones(len(x)), np.arange(len(x)) - 1, unit="voxel"))
    box = axes_of(figure, "tree xy").get_window_extent()
    pixels = rendered(figure)
    row, columns = len(pixels) - box.y1 + box.height * 4.5 / 40, box.x0 + box.width * np.arange(8, 30) / 60
    line = pixels[round(row), columns.round().astype(int), :3]  # beyond the ring of the root
    assert (np.ptp(line, axis=1) > 100).all()


@pytest.mark.parametrize("name, shown", [("OP_6", "OP_6: cable"), ("n" * 300, "n" * 59 + "…: cable")])
def test_the_title_of_a_picture_begins_with_the_name_of_its_stack(tmp_path, monkeypatch, name, shown):
    titles = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: path.touch() or titles.append(self.get_suptitle()))
    short = name[:100]  # as long as a file's name may be
    plot_reconstruction(*l_shape(), tmp_path / f"{short}.png")
    assert titles[0].startswith(shown)


def test_the_segmentation_lies_over_the_stack_red_where_sure_and_unseen_elsewhere(tmp_path):
    volume, _ = l_shape((2.0, 0.7, 0.4))
    probability = Volume((volume.voxels > 0).astype(np.float32), volume.spacing_um)
    probability.voxels[:, 15, :] = 0  # the last part of the path is missed
    figure = draw_segmentation(volume, probability, name="OP_6")
    assert figure.get_suptitle().startswith("OP_6: 0.4")
    pixels = rendered(figure)

    def colour(panel, y, x):
        box = axes_of(figure, f"{panel} xy").get_window_extent()
        down, right = (y + 0.5) / 20 * box.height, (x + 0.5) / 40 * box.width
        return pixels[round(len(pixels) - box.y1 + down), round(box.x0 + right), :3]

    assert np.allclose(colour("segmentation", 4, 17), [255, 25.5, 25.5], atol=3)
    for panel, y, x in [("segmentation", 10, 10), ("image", 10, 10)]:
        assert (colour(panel, y, x) < 5).all()
    for panel, y, x in [("segmentation", 15, 30), ("image", 4, 17)]:
        assert (colour(panel, y, x) > 250).all()
    plot_segmentation(volume, probability, tmp_path / "a_segmentation.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a_segmentation.png"]
    with pytest.raises(ValueError, match="must have the shape"):
        draw_segmentation(volume, Volume(np.ones((2, 3, 4))))


def test_a_tree_in_um_over_a_stack_without_spacing_is_refused():
    volume, _ = l_shape()
    with pytest.raises(ValueError, match="spacing"):
        draw_reconstruction(volume, NeuronTree(CORNERS, np.ones(4), [-1, 0, 1, 2], unit="um"))


def test_one_png_is_written_and_nothing_half_finished(tmp_path, monkeypatch):
    plot_reconstruction(*l_shape(), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    before = (tmp_path / "a.png").read_bytes()

    def full_disk(self, name, **_):
        name.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="No space"):
        plot_reconstruction(*l_shape(), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before
    with pytest.raises(ValueError, match=r"must end in \.png"):
        plot_reconstruction(*l_shape(), tmp_path / "a.pdf")


def test_drawing_leaves_no_global_figure_and_needs_no_pyplot():
    code = "import vit3d.plot, sys; sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------ where two trees differ


def cable(figure, label, view="xy"):
    pieces = np.array(lines_of(axes_of(figure, f"difference {view}"), label).get_segments())
    return np.linalg.norm(pieces[:, 1] - pieces[:, 0], axis=1).sum() if len(pieces) else 0.0


def forked(with_branch, unit="voxel", spacing=None):
    """A straight cable of 50 along x, and if wanted a branch of 20 along y from its middle."""
    points = [[3, 10, 0], [3, 10, 25], [3, 10, 50]] + [[3, 30, 25]] * with_branch
    parents = [-1, 0, 1, 1][: len(points)]
    return NeuronTree(points, np.ones(len(points)), parents, unit="voxel", spacing_um=spacing).to(unit)


def test_missing_and_surplus_cable_are_told_apart():
    figure = draw_difference(forked(False), forked(True), threshold=2.0)
    assert cable(figure, "missing") == pytest.approx(18, abs=1)  # the first two voxels of the branch are near
    assert cable(figure, "surplus") == 0
    assert cable(figure, "agreed") == pytest.approx(52, abs=1)
    figure = draw_difference(forked(True), forked(False), threshold=2.0)
    assert cable(figure, "surplus") == pytest.approx(18, abs=1)
    assert (cable(figure, "missing"), cable(figure, "agreed")) == (0, pytest.approx(50))
    for label, color in {"missing": (1, 0, 0), "surplus": (0, 0, 1), "agreed": (0.35, 0.35, 0.35)}.items():
        line = lines_of(axes_of(figure, "difference zy"), label)
        assert line.get_color()[0][:3] == pytest.approx(color)
    assert figure.get_suptitle() == "agreed (grey) 50, missing (red) 0, surplus (blue) 18 voxels"


@pytest.mark.parametrize("offset, agreed", [(1.9, 50), (2.0, 0), (2.1, 0)])
def test_cable_agrees_when_it_is_closer_than_the_threshold(offset, agreed):
    figure = draw_difference(forked(False), forked(False).shifted((0, offset, 0)), threshold=2.0)
    assert cable(figure, "agreed") == pytest.approx(agreed)
    assert cable(figure, "missing") == cable(figure, "surplus") == pytest.approx(50 - agreed)


def test_the_threshold_is_in_voxels_also_for_trees_in_um():
    spacing = (3.0, 0.5, 0.5)
    gold = forked(False, "um", spacing)
    one_slice = draw_difference(gold.shifted((3.0, 0, 0)), gold, threshold=2.0)  # 3 um deep is one voxel
    assert cable(one_slice, "agreed") == pytest.approx(25)
    sideways = draw_difference(gold.shifted((0, 1.1, 0)), gold, threshold=2.0)  # 1.1 um aside is 2.2
    assert cable(sideways, "missing") == pytest.approx(25)


def test_a_difference_is_drawn_over_the_stack_where_the_cable_lies():
    volume, tree = l_shape((2.0, 0.7, 0.4))
    figure = draw_difference(tree, tree, volume=volume)
    for name, (along, down, right) in VIEWS.items():
        ax = axes_of(figure, f"difference {name}")
        left, far, bottom, top = ax.images[0].get_extent()
        points = np.concatenate(lines_of(ax, "agreed").get_segments())
        columns = np.rint((points[:, 0] - left) / (far - left) * volume.shape[right] - 0.5).astype(int)
        rows = np.rint((points[:, 1] - top) / (bottom - top) * volume.shape[down] - 0.5).astype(int)
        assert (ax.images[0].get_array()[rows, columns] == 200).all(), (name, along)


def test_without_a_stack_everything_is_shown_and_y_still_points_down():
    figure = draw_difference(forked(False), forked(True))
    for name, (_, down, right) in VIEWS.items():
        ax = axes_of(figure, f"difference {name}")
        (left, far), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        points = forked(True).points
        assert left < points[:, right].min() <= points[:, right].max() < far
        assert top < points[:, down].min() <= points[:, down].max() < bottom


def test_an_empty_tree_misses_everything_and_two_empty_ones_differ_in_nothing(tmp_path):
    figure = draw_difference(NeuronTree.empty("voxel"), forked(True))
    assert cable(figure, "missing") == pytest.approx(70)
    plot_difference(NeuronTree.empty("voxel"), NeuronTree.empty("voxel"), tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_trees_of_unequal_or_unstated_unit_are_refused():
    unknown = NeuronTree(CORNERS, np.ones(4), [-1, 0, 1, 2], unit=None)
    for pair in [(forked(True), forked(True, "um", (1, 1, 1))), (unknown, unknown)]:
        with pytest.raises(ValueError, match="one stated unit"):
            draw_difference(*pair)


def test_the_aligned_gold_of_a_real_neuron_lies_on_bright_pixels(shared):
    folder = shared / "data/op"
    shift = json.loads((folder / "gold_shift.json").read_text())["OP_6"]
    volume = read_volume(folder / "OP_6.tif", spacing_um=(1, 0.33, 0.33))
    gold = read_swc(folder / "OP_6.swc", unit="voxel").shifted(shift)
    figure = draw_reconstruction(volume, gold)
    for name, (_, down, right) in VIEWS.items():
        ax = axes_of(figure, f"tree {name}")
        left, far, bottom, top = ax.images[0].get_extent()
        points = np.concatenate(lines_of(ax).get_segments())
        columns = np.rint((points[:, 0] - left) / (far - left) * volume.shape[right] - 0.5).astype(int)
        rows = np.rint((points[:, 1] - top) / (bottom - top) * volume.shape[down] - 0.5).astype(int)
        image = ax.images[0].get_array().data
        assert np.median(image[rows, columns]) > 50 > 10 * np.median(image)


@pytest.mark.parametrize("shape", [(16, 400, 48), (8, 32, 400), (300, 40, 40), (48, 96, 96)])
def test_nothing_that_is_written_on_a_picture_runs_over_its_edge(shape):
    voxels = np.zeros(shape, np.uint8)
    voxels[:, 10, 10] = 200
    volume = Volume(voxels, (1.0, 0.33, 0.33))
    points = [(0, 10, 10), (shape[0] - 1, 10, 10)]
    tree = NeuronTree(points, [1, 1], [-1, 0], unit="voxel", spacing_um=volume.spacing_um)
    for figure in (draw_reconstruction(volume, tree, name="x" * 40), draw_difference(tree, tree, volume=volume)):
        canvas = FigureCanvasAgg(figure)
        texts = [figure._suptitle, *(text for ax in figure.axes for text in ax.texts)]
        for text in texts:
            box = text.get_window_extent(canvas.get_renderer())
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text.get_text()
