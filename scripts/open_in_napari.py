"""Open a stack in napari with its tree over it, each branch one path that can be edited.

    pip install 'napari[pyqt6]' && python scripts/open_in_napari.py STACK.tif OUT/STACK.swc --spacing 1,0.33,0.33

With `--picture PNG` the window is drawn, saved and closed again; without a screen, put `xvfb-run -a` before it. The
picture in model_cards/tracing/ is of a simulated neuron:

    vit3d simulate out/neuron.tif --seed 1 && vit3d reconstruct out/neuron.tif --out out
    xvfb-run -a python scripts/open_in_napari.py out/neuron.tif out/neuron.swc --picture model_cards/tracing/napari.png
"""

import argparse
from pathlib import Path

import napari
import numpy as np
from PIL import Image

from vit3d.arguments import read_stack
from vit3d.morphometry import branches
from vit3d.tree import NeuronTree, read_swc
from vit3d.volume import Volume


def paths(tree: NeuronTree) -> list[np.ndarray]:
    """(N, 3) points (z, y, x) along each branch, from where it leaves its parent."""
    tree = tree.sorted()
    found = branches(tree)
    rows = np.argsort(found.of_node, kind="stable")  # branch by branch, parents first; roots, which are -1, before
    along = np.split(tree.points[rows], np.searchsorted(found.of_node[rows], np.arange(len(found.ends))))[1:]
    return [np.vstack([tree.points[start], points]) for start, points in zip(found.starts, along, strict=True)]


def show(volume: Volume, tree: NeuronTree, name: str) -> napari.Viewer:
    """The stack at its voxel size, the tree in the same unit: they lie on one another without any shift."""
    viewer = napari.Viewer(ndisplay=3, title=name)
    scale, unit = volume.spacing_um or (1.0, 1.0, 1.0), "um" if volume.spacing_um else "pixel"
    viewer.add_image(volume.voxels, name=name, scale=scale, units=[unit] * 3, rendering="mip", colormap="gray")
    tree = tree.to("um" if volume.spacing_um else "voxel", volume.spacing_um)
    lines = {"shape_type": "path", "edge_color": "cyan", "edge_width": min(scale), "units": [unit] * 3}
    viewer.add_shapes(paths(tree), name="tree", **lines)
    roots = {"face_color": "magenta", "size": 8 * min(scale), "units": [unit] * 3}
    viewer.add_points(tree.points[tree.parents < 0], name="root", **roots)
    viewer.scale_bar.visible = True
    return viewer


def save_picture(viewer: napari.Viewer, path: Path) -> None:
    viewer.window.resize(1200, 800)
    picture = Image.fromarray(viewer.screenshot(canvas_only=False, flash=False)).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    viewer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stack", type=Path)
    parser.add_argument("swc", type=Path)
    parser.add_argument("--spacing", help="voxel size Z,Y,X in um; overrides the file's own")
    parser.add_argument("--unit", help="um or voxel, for an SWC that does not say it")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    volume, tree = read_stack(args.stack, args.spacing), read_swc(args.swc, unit=args.unit)
    viewer = show(volume, tree, args.stack.name)
    if args.picture is None:
        napari.run()
    else:
        save_picture(viewer, args.picture)


if __name__ == "__main__":
    main()
