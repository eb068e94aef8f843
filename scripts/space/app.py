"""vit3d in a browser: drop a stack, see its tree turn, download SWC and probability.

    pip install '.[space]' && python scripts/space/app.py

Everything is computed by `vit3d`; this file arranges it on a page. What a visitor uploads, and what comes of it,
lies in one folder that goes when the page is closed.
"""

import math
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import gradio as gr
import numpy as np
import plotly.graph_objects as go
import tifffile
from matplotlib import colormaps
from matplotlib.colors import to_hex

from vit3d.arguments import number, read_stack, sentence, threshold_of
from vit3d.checkpoint import load_checkpoint
from vit3d.morphometry import measure
from vit3d.plot import plot_segmentation
from vit3d.reconstruction import Reconstruction, reconstruct
from vit3d.regridding import as_trained
from vit3d.simulate import simulate_neuron
from vit3d.tables import markdown_table
from vit3d.volume import Volume

MODEL = "vit3d-tiny"  # a shipped name, a folder or a Hub id
LARGEST_FILE = "200mb"
LARGEST_VOXELS = 100_000_000  # two cores and 16 GB take minutes for it
ABOUT = f"""
# vit3d: from a light-microscopy stack to the neuron's tree

One stack in TIFF, OME-TIFF, ImageJ TIFF, LSM, `.v3draw` or `.v3dpbd`, up to {LARGEST_FILE.upper()} and
{LARGEST_VOXELS // 10**6} million voxels; larger ones: `vit3d reconstruct`. Your stack and its results are deleted
when you close this page.
"""

HOME = tempfile.TemporaryDirectory(prefix="vit3d-space-")
visits: dict[str, Path] = {}  # the folder of each open page; its name is random, for a page chooses its own key
STYLE = """
#tree .js-plotly-plot { height: 600px }
@media (max-width: 700px) { #tree .js-plotly-plot { height: 400px } }
"""
DEPTH_COLORS = [to_hex(color) for color in colormaps["rainbow"](np.linspace(0, 1, 32))]
checkpoint = cache(load_checkpoint)


# ---------------------------------------------------------------- what a visitor leaves here


def enter(request: gr.Request) -> Path:
    """An empty folder for this page; what it held before is gone."""
    leave(request)
    visits[request.session_hash] = Path(tempfile.mkdtemp(dir=HOME.name))
    return visits[request.session_hash]


def leave(request: gr.Request) -> None:
    folder = visits.pop(request.session_hash, None)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)  # a run may be writing into it: `answered` removes the rest


def receive(upload: str, request: gr.Request) -> tuple:
    """Take the upload out of the cache that all pages share: where it lies now, and a page without the last results."""
    return shutil.move(upload, enter(request) / Path(upload).name), *nothing()


def forget(request: gr.Request) -> tuple:
    """The visitor took the stack off the page."""
    leave(request)
    return None, *nothing()


class StoppedError(Exception):
    """Nobody waits for this run any more."""


def stop(request: gr.Request) -> None:
    """End this page's run: one whose folder is gone ends before its next windows."""
    folder = visits.get(request.session_hash)
    for run in folder.glob("run-*") if folder else ():
        if not any(run.glob("*.swc")):
            shutil.rmtree(run, ignore_errors=True)


def check_awaited(run: Path) -> None:
    if not run.exists():
        raise StoppedError


# ---------------------------------------------------------------- what comes of a stack


def run_upload(stack: str | None, spacing, channel, polarity, threshold, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
    if stack is None:
        raise gr.Error("Drop a stack first, or press the example.", title="No stack", print_exception=False)
    path = Path(stack)
    with answered(path.parent):
        check_size(path)
        progress(0, "reading")
        volume = read_stack(path, spacing.strip() or None, channel_of(channel))
        return results(volume, path.stem, path.parent, polarity, threshold, progress)
    return nothing()


def run_example(polarity, threshold, request: gr.Request, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
    """A simulated neuron: nobody's data."""
    progress(0, "simulating a neuron")
    folder = visits.get(request.session_hash) or enter(request)
    with answered(folder):
        return results(simulate_neuron(seed=1)[0], "example", folder, polarity, threshold, progress)
    return nothing()


def results(volume: Volume, name: str, folder: Path, polarity: str, threshold: str, progress) -> tuple:
    """What the page shows of one stack, in the order of its components; the files of the last run are removed."""
    level = threshold_of(threshold.strip())
    out = Path(tempfile.mkdtemp(dir=folder, prefix="run-"))  # a new name, or browsers show what they have kept
    progress(0, "loading the network")
    network, processor = checkpoint(MODEL, "auto", polarity)
    if math.prod(as_trained(volume, network.config).shape) > LARGEST_VOXELS:
        raise ValueError(f"{name} is coarse, and on the voxels of the training too large for this page; crop it.")
    progress(0.05, "measuring the background")
    watch = network.register_forward_pre_hook(lambda *_: check_awaited(out))
    try:
        found = reconstruct(network, volume, processor=processor, threshold=level)
    finally:
        watch.remove()
    check_awaited(out)  # tracing hears of no one
    progress(0.9, "drawing")
    found.write(out, name)
    plot_segmentation(found.volume, found.probability, out / f"{name}_segmentation.png", polarity=found.polarity)
    for old in set(folder.glob("run-*")) - {out}:
        shutil.rmtree(old)
    return (
        turning(found),
        numbers(found),
        *(str(out / f"{name}{end}") for end in ("_segmentation.png", ".png")),
        *(gr.DownloadButton(value=str(out / f"{name}{end}"), interactive=True) for end in DOWNLOADS),
    )


def nothing() -> tuple:
    """What the page shows before there are results, in the order of its components."""
    return None, "The numbers come here.", None, None, *(gr.DownloadButton(value=None, interactive=False),) * 3


def channel_of(text: str) -> int | None:
    return int(number(text, "Channel")) if text.strip() else None


def check_size(path: Path) -> None:
    """Refuse a stack that is too large for this page by its header, before anything is decoded."""
    voxels = declared_voxels(path)
    if voxels > LARGEST_VOXELS:
        raise ValueError(
            f"{path} declares {voxels:,} voxels, this page takes {LARGEST_VOXELS:,}; "
            "crop it, or use `vit3d reconstruct`."
        )


def declared_voxels(path: Path) -> int:
    """Voxels that the header declares, all channels; 0 where it can't be read, for the reader says what is wrong."""
    try:
        if path.suffix.lower().startswith(".v3d"):
            order = "<" if path.read_bytes()[24:25] == b"L" else ">"
            return math.prod(np.fromfile(path, f"{order}i4", 4, offset=27).tolist())
        with tifffile.TiffFile(path) as tiff:
            return tiff.series[0].size
    except Exception:
        return 0


@contextmanager
def answered(folder: Path) -> Iterator[None]:
    """Errors are what the command line would say, without the folder that only this machine knows; warnings are notes.

    A run that was stopped is silent. Where the page was closed meanwhile, nothing of it stays.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        try:
            with suppress(StoppedError):
                yield
        except (ValueError, OSError, MemoryError) as error:
            words = sentence(error).replace(f"{folder}/", "")
            raise gr.Error(words, duration=None, title="This did not work", print_exception=False) from error
        finally:
            for warning in said:
                if issubclass(warning.category, UserWarning):
                    gr.Info(str(warning.message).replace(f"{folder}/", ""), title="Note")
            if folder not in visits.values():
                shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- how it looks


def turning(found: Reconstruction) -> go.Figure:
    """The tree in 3D, coloured by depth as in the pictures and first seen as they show it: x right, y down, z away."""
    tree = found.tree
    unit = {"um": "µm"}.get(tree.unit, "voxels")
    edges = np.full((len(tree.edges), 3, 3), np.nan)  # two ends and a gap
    edges[:, 0], edges[:, 1] = tree.points[tree.edges], tree.points[tree.parents[tree.edges]]
    z, y, x = edges.reshape(-1, 3).T
    deepest = found.volume.shape[0] * (found.volume.spacing_um or (1,))[0]
    line = {"color": np.nan_to_num(z), "colorscale": DEPTH_COLORS, "cmin": 0, "cmax": deepest, "width": 5}
    drawn = go.Figure(go.Scatter3d(x=x, y=y, z=z, mode="lines", line=line, showlegend=False, hoverinfo="skip"))
    sides = np.maximum(np.ptp(tree.points, axis=0), 1e-3) if len(tree) else np.ones(3)
    z, y, x = tree.points[tree.parents < 0].T
    drawn.add_scatter3d(x=x, y=y, z=z, mode="markers", marker={"color": "magenta", "size": 5}, name="root")
    drawn.update_scenes(
        aspectmode="manual",
        aspectratio=dict(zip("zyx", sides / sides.max(), strict=True)),
        dragmode="orbit",
        camera={"eye": {"x": 0.5, "y": -0.6, "z": -1.75}, "up": {"x": 0, "y": -1, "z": 0}},
        **{f"{name}axis_title": f"{name} ({unit})" for name in "xyz"},
    )
    return drawn.update_layout(
        autosize=True, margin={"l": 0, "r": 0, "t": 0, "b": 0}, legend={"x": 1, "xanchor": "right"}
    )


def numbers(found: Reconstruction) -> str:
    rows = measure(found.tree) | {"places_to_review": len(found.reviews)}
    return markdown_table([{"measure": named(name), "value": short(value)} for name, value in rows.items()])


def named(measure: str) -> str:
    """`max_path_um` as people write it: max path (µm)."""
    units = {"_um3": " (µm³)", "_um": " (µm)", "_vox3": " (voxels)", "_vox": " (voxels)"}
    end = next((end for end in units if measure.endswith(end)), "")
    words = measure.removesuffix(end).replace("_", " ") + units.get(end, "")
    return {"strahler": "Strahler number"}.get(words, words)


def short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if value >= 100 else f"{value:.2f}"


DOWNLOADS = {
    ".swc": "Tree (SWC)",
    "_probability.tif": "Probability (TIFF)",
    "_review.csv": "Places to review (CSV)",
}


def page() -> gr.Blocks:
    with gr.Blocks(title="vit3d", delete_cache=(3600, 3600), analytics_enabled=False) as demo:
        stack = gr.State()
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                upload = gr.File(label="Stack", height=160)
                spacing = gr.Textbox(label="Voxel size Z,Y,X in µm", placeholder="the file's own; or 1,0.33,0.33")
                channel = gr.Textbox(label="Channel, counted from 0", placeholder="where there are several")
                polarity = gr.Radio(["auto", "bright", "dark"], value="auto", label="Neurites are")
                threshold = gr.Textbox(label="Threshold of the probability", value="auto")
                with gr.Row():
                    run = gr.Button("Reconstruct", variant="primary", min_width=150)
                    halt = gr.Button("Stop", min_width=80)
                example = gr.Button("Example: a simulated neuron")
            with gr.Column(scale=3):
                tree = gr.Plot(label="The tree, coloured by depth; drag to turn it", elem_id="tree")
            with gr.Column(scale=1, min_width=260):
                table = gr.Markdown("The numbers come here.", label="Numbers")
                files = [gr.DownloadButton(label, interactive=False) for label in DOWNLOADS.values()]
        with gr.Tab("Segmentation"):
            segmentation = gr.Image(show_label=False, interactive=False, buttons=["fullscreen"])
        with gr.Tab("Probability and tree"):
            picture = gr.Image(show_label=False, interactive=False, buttons=["fullscreen"])
        shown = [tree, table, segmentation, picture, *files]
        alone = {"concurrency_id": "network", "concurrency_limit": 1}
        shows = {"outputs": shown, "show_progress_on": tree, "api_visibility": "private", **alone}
        at_once = {"show_progress": "hidden", "api_visibility": "private"}
        upload.upload(receive, upload, [stack, *shown], **at_once)
        upload.clear(forget, None, [stack, *shown], **at_once)
        halt.click(stop, None, None, **at_once)
        run.click(run_upload, [stack, spacing, channel, polarity, threshold], **shows)
        example.click(run_example, [polarity, threshold], **shows)
        demo.unload(leave)
    return demo


def main() -> None:
    gr.set_static_paths(HOME.name)  # served from where they lie: no second copy that outlives the page
    page().launch(max_file_size=LARGEST_FILE, show_error=True, css=STYLE, footer_links=["gradio"])


if __name__ == "__main__":
    main()
