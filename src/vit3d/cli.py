"""One subcommand per verb: parse, call, print. Every import of a room happens inside its command."""

import csv
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from .arguments import box_of, flip_of, number, pairs, read_mask, read_stack, read_trees, root_of, triple

MAIN_SCORES = ("precision", "recall", "f1", "esa", "dsa", "pds")

app = typer.Typer(
    help="Turn a light-microscopy stack of a neuron into its tree (SWC).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Spacing = Annotated[str | None, typer.Option(help="Voxel size Z,Y,X in um; overrides the file's own.")]
Model = Annotated[str, typer.Option(help="A checkpoint: a shipped name, a folder or a Hub id.")]
Channel = Annotated[int | None, typer.Option(help="Channel to read, counted from 0.")]
Polarity = Annotated[str, typer.Option(help="auto, bright (fluorescence) or dark (brightfield) neurites.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threshold = Annotated[str, typer.Option(help="Foreground lies above it: a number, or auto.")]
Crop = Annotated[
    str | None, typer.Option(help="Box z0:z1,y0:y1,x0:x1 in voxels; the SWC keeps full-stack coordinates.")
]
Mask = Annotated[Path | None, typer.Option(help="Image of the same shape; nothing is traced where it is 0.")]
SwcUnit = Annotated[str | None, typer.Option(help="um or voxel; default um where the spacing is known.")]
PredictedUnit = Annotated[str | None, typer.Option(help="um or voxel, for an SWC that does not say it.")]
GoldUnit = Annotated[str | None, typer.Option(help="um or voxel, for an SWC that does not say it.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the stack, the tree and the picture.")] = Path("vit3d-demo"),
    seed: Annotated[int, typer.Option(help="Which neuron.")] = 1,
):
    """Simulate a neuron, reconstruct it, score it, draw it."""
    from .reconstruction import reconstruct as run
    from .scoring import score_trees
    from .segmentation import load_checkpoint
    from .simulate import simulate_neuron
    from .tree import write_swc
    from .volume import write_volume

    volume, truth = simulate_neuron(seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    write_volume(volume, out / "neuron.tif")
    write_swc(truth, out / "truth.swc")
    network, processor = load_checkpoint()
    result = run(network, volume, processor=processor)
    result.write(out, "neuron")
    scores = score_trees(result.tree, truth)
    typer.echo(_rows([{"name": "neuron", **_summary(result.tree), **{key: scores[key] for key in MAIN_SCORES}}]))
    typer.echo(f"The stack, its tree, the truth and a picture are in {out}/.")


@app.command()
def reconstruct(
    stack: Annotated[Path, typer.Argument(help="A stack, or a folder of stacks.")],
    out: Annotated[
        Path, typer.Option(help="Folder for NAME.swc, NAME_probability.tif, NAME.png, NAME_review.csv.")
    ] = Path("."),
    model: Model = "vit3d-tiny",
    spacing: Spacing = None,
    channel: Channel = None,
    polarity: Polarity = "auto",
    device: Device = "auto",
    threshold: Threshold = "auto",
    crop: Crop = None,
    mask: Mask = None,
    swc_unit: SwcUnit = None,
    select: Annotated[bool, typer.Option(help="Leave out patches that hold only background.")] = True,
):
    """Stack in; tree, probability and picture out: the main job. A folder gives one table; failures are listed."""
    from .reconstruction import find_stacks
    from .reconstruction import reconstruct as run
    from .segmentation import load_checkpoint

    stacks = find_stacks(stack)
    network, processor = load_checkpoint(model, device, polarity)
    rows, failures = [], []
    for path in stacks:
        try:
            volume = read_stack(path, spacing, channel)
            result = run(
                network,
                volume,
                processor=processor,
                box=box_of(crop, volume.shape),
                mask=read_mask(mask),
                select=select,
                threshold=number(threshold),
            )
            result.write(out, path.stem, swc_unit)
            rows.append({"name": path.stem, **_summary(result.tree), "review": len(result.reviews)})
        except (ValueError, OSError) as error:
            if len(stacks) == 1:
                raise
            failures.append(f"{path.name}: {error}")
    if rows:
        typer.echo(_rows(rows))
    for failure in failures:
        typer.echo(f"failed: {failure}", err=True)
    if failures:
        raise typer.Exit(2)


@app.command()
def segment(
    stack: Path,
    out: Annotated[Path, typer.Argument(help="The probability, a float32 TIFF.")],
    model: Model = "vit3d-tiny",
    spacing: Spacing = None,
    channel: Channel = None,
    polarity: Polarity = "auto",
    device: Device = "auto",
    crop: Crop = None,
):
    """Stack -> probability that each voxel belongs to a neurite."""
    from .segmentation import load_checkpoint
    from .segmentation import segment as run
    from .volume import write_volume

    volume = read_stack(stack, spacing, channel)
    box = box_of(crop, volume.shape)
    network, processor = load_checkpoint(model, device, polarity)
    statistics = processor.measure(volume.voxels)
    write_volume(run(network, volume.crop(box), processor=processor, statistics=statistics), out)


@app.command()
def trace(
    probability: Annotated[Path, typer.Argument(help="A probability, a mask, or a raw stack.")],
    out: Annotated[Path, typer.Argument(help="The SWC; OUT_review.csv lists what to proofread first.")],
    spacing: Spacing = None,
    channel: Channel = None,
    polarity: Annotated[str, typer.Option(help="bright, or dark neurites on a bright ground.")] = "bright",
    threshold: Threshold = "auto",
    crop: Crop = None,
    mask: Mask = None,
    root: Annotated[
        str | None,
        typer.Option(help="Where the tree starts: X,Y,Z in voxels from 0, or a Vaa3D .marker file."),
    ] = None,
    min_branch_um: Annotated[float | None, typer.Option(help="Shorter side branches are left out.")] = None,
    max_gap_um: Annotated[float | None, typer.Option(help="Longest gap that is bridged.")] = None,
    step_um: Annotated[float | None, typer.Option(help="Distance between nodes.")] = None,
    forest: Annotated[bool, typer.Option(help="Keep what cannot be joined as trees of its own.")] = False,
    swc_unit: SwcUnit = None,
):
    """Probability, mask or stack -> SWC; no network, no GPU."""
    from .reconstruction import masked, place, placed_reviews, write_review
    from .tracing import trace_with_review
    from .tree import write_swc

    volume = read_stack(probability, spacing, channel)
    if polarity == "dark":
        volume = volume.inverted()
    if mask is not None:
        volume = masked(volume, read_mask(mask))
    box = box_of(crop, volume.shape)
    tree, reviews = trace_with_review(
        volume.crop(box),
        threshold=number(threshold),
        root=root_of(root, box, volume.spacing_um),
        min_branch_um=min_branch_um,
        max_gap_um=max_gap_um,
        step_um=step_um,
        forest=forest,
    )
    write_review(placed_reviews(reviews, tree, box), out.with_name(out.stem + "_review.csv"), tree.unit)
    write_swc(place(tree, box), out, unit=swc_unit)
    typer.echo(_rows([{"name": out.stem, **_summary(tree), "review": len(reviews)}]))


@app.command()
def score(
    predicted: Annotated[Path, typer.Argument(help="An SWC, a mask, or a folder of either.")],
    gold: Annotated[Path, typer.Argument(help="The same for the truth; folders are paired by name.")],
    predicted_unit: PredictedUnit = None,
    gold_unit: GoldUnit = None,
    spacing: Spacing = None,
    threshold: Annotated[float, typer.Option(help="Voxels from which on a point is far.")] = 2.0,
    image: Annotated[
        Path | None,
        typer.Option(help="The stack: the gold is aligned to it, and bright untraced structure told apart."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture: missing red, surplus blue, agreed grey.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
):
    """Tree against tree (precision, recall, F1, ESA, DSA, PDS in voxels), or mask against mask."""
    rows = []
    for name, first, second in pairs(predicted, gold):
        if first.suffix.lower() in (".swc", ".eswc"):
            trees = read_trees(first, second, predicted_unit, gold_unit, spacing)
            rows += _score_trees(name, *trees, threshold, image, spacing)
            if plot is not None:
                from .plot import plot_difference

                plot_difference(
                    *trees,
                    plot,
                    volume=read_stack(image, spacing, None) if image else None,
                    threshold=threshold,
                )
        else:
            from .scoring import score_masks

            rows.append(
                {
                    "name": name,
                    **score_masks(read_stack(first, spacing, None), read_stack(second, spacing, None)),
                }
            )
    if len(rows) > 1 and predicted.is_dir():
        keys = [key for key in rows[0] if key != "name"]
        rows.append({"name": "mean", **{key: sum(row[key] for row in rows) / len(rows) for key in keys}})
    if as_json:
        typer.echo(json.dumps(rows if len(rows) > 1 else rows[0], indent=2))
    else:
        keys = ["name", *(key for key in MAIN_SCORES if key in rows[0])] if "f1" in rows[0] else list(rows[0])
        extra = [key for key in ("precision_of_traced", "corrections_per_mm") if any(key in row for row in rows)]
        typer.echo(_rows([{key: row.get(key, math.nan) for key in keys + extra} for row in rows]))


@app.command()
def measure(swcs: Annotated[list[Path], typer.Argument(help="SWC files.")]):
    """Length, tips, branch points, order, Strahler number, volume: one CSV row per SWC."""
    from .morphometry import measure as run
    from .tree import read_swc

    rows = [{"name": path.stem, **run(read_swc(path))} for path in swcs]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(sys.stdout, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN.swc")],
    out: Annotated[Path, typer.Argument(metavar="OUT.swc")],
    unit: Annotated[str | None, typer.Option(help="um or voxel, for an SWC that does not say it.")] = None,
    swc_unit: SwcUnit = None,
    spacing: Spacing = None,
    scale: Annotated[str | None, typer.Option(help="Factor, or factors Z,Y,X.")] = None,
    flip: Annotated[str | None, typer.Option(help="AXIS:LAST, the axis (x, y or z) and its last voxel centre.")] = None,
    resample: Annotated[float | None, typer.Option(help="New distance of nodes; tips and branch points stay.")] = None,
    split: Annotated[bool, typer.Option(help="One file per tree: OUT_1.swc, OUT_2.swc, ...")] = False,
):
    """Units, scale, flip, resampling, sorting (always), splitting of SWCs."""
    from .morphometry import resample as run
    from .tree import read_swc, write_swc

    tree = read_swc(source, unit=unit)
    if swc_unit is not None:
        tree = tree.to(swc_unit, triple(spacing, "--spacing"))
    if scale is not None:
        tree = tree.scaled(number(scale) if "," not in scale else triple(scale, "--scale"))
    if flip is not None:
        tree = tree.flipped(*flip_of(flip))
    if resample is not None:
        tree = run(tree, resample)
    for count, part in enumerate(tree.split() if split else [tree], start=1):
        write_swc(part, out.with_name(f"{out.stem}_{count}.swc") if split else out)


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="The stack; its tree goes beside it as an SWC.")],
    seed: Annotated[int, typer.Option(help="Which neuron.")] = 0,
    shape: Annotated[str, typer.Option(help="Z,Y,X voxels.")] = "64,256,256",
    spacing: Annotated[str, typer.Option(help="Voxel size Z,Y,X in um.")] = "1,0.33,0.33",
    polarity: Annotated[str, typer.Option(help="bright or dark.")] = "bright",
):
    """A neuron with a known truth, as a microscope would show it."""
    from .simulate import simulate_neuron
    from .tree import write_swc
    from .volume import write_volume

    size = tuple(int(n) for n in triple(shape, "--shape"))
    volume, tree = simulate_neuron(seed=seed, shape=size, spacing_um=triple(spacing, "--spacing"), polarity=polarity)
    write_volume(volume, out)
    write_swc(tree, out.with_suffix(".swc"))


@app.command()
def train(
    data: Annotated[str, typer.Option(help="Folder of NAME.tif + NAME.swc (golds in voxels); may be left out.")] = "",
    init: Annotated[
        str, typer.Option(help="2D ViT to inflate, or a vit3d checkpoint to go on from.")
    ] = "facebook/dino-vitb16",
    out: Annotated[str, typer.Option(help="Folder of the run.")] = "run",
    strategy: Annotated[str, typer.Option(help="center, average or random.")] = "center",
    validate: Annotated[str, typer.Option(help="Names of neurons to validate on, comma-separated.")] = "",
    spacing: Spacing = None,
    simulated: Annotated[int, typer.Option(help="Simulated neurons mixed in.")] = 32,
    max_steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Crops per step and process.")] = 8,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.")] = 500,
    seed: Annotated[int, typer.Option(help="Crops and new weights.")] = 0,
    mixed_precision: Annotated[str, typer.Option(help="no or bf16.")] = "no",
):
    """Fine-tune on your own stacks; `accelerate launch -m vit3d.training` takes the same flags."""
    from .training import TrainingConfig
    from .training import train as run

    names = tuple(name for name in validate.split(",") if name)
    config = TrainingConfig(
        data, init, out, strategy, names, triple(spacing, "--spacing"), simulated,
        max_steps=max_steps, batch_size=batch_size, validate_every=validate_every, seed=seed,
        mixed_precision=mixed_precision,
    )  # fmt: skip
    typer.echo(f"best checkpoint: {run(config)}")


@app.command()
def share(
    checkpoint: Annotated[Path, typer.Argument(help="Folder written by train.")],
    repo_id: Annotated[str, typer.Argument(help="NAMESPACE/NAME on the Hub.")],
    private: Annotated[bool, typer.Option(help="Visible to you alone.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Prepare and list the files, upload nothing.")] = False,
):
    """Publish a checkpoint on the Hub in one commit."""
    from .sharing import share as run

    for line in run(checkpoint, repo_id, private=private, dry_run=dry_run):
        typer.echo(line)


def _score_trees(name: str, predicted, gold, threshold: float, image: Path | None, spacing: str | None) -> list[dict]:
    """One row; with an image a second one against the aligned gold.

    `precision_of_traced` leaves out what the prediction follows of bright structure that the gold does not cover.
    """
    from .scoring import score_trees

    rows = [{"name": name, **score_trees(predicted, gold, threshold=threshold)}]
    if image is None:
        return rows
    from .gold import align_gold, without_untraced

    volume = read_stack(image, spacing, None)
    aligned, shift = align_gold(_as_voxels(gold, volume), volume)
    predicted = _as_voxels(predicted, volume)
    scores = score_trees(predicted, aligned, threshold=threshold)
    judged = without_untraced(predicted, aligned, volume)
    scores["precision_of_traced"] = score_trees(judged, aligned, threshold=threshold)["precision"]
    words = ", ".join(f"{value:+.2f}" for value in shift)
    return [*rows, {"name": f"{name} aligned by ({words}) voxels", **scores}]


def _as_voxels(tree, volume):
    return tree if tree.unit is None else tree.to("voxel", tree.spacing_um or volume.spacing_um)


def _summary(tree) -> dict:
    unit = "um" if tree.unit == "um" else "vox"
    return {
        "nodes": len(tree),
        "trees": tree.num_roots,
        f"cable_{unit}": tree.cable_length if tree.unit == "um" else float(tree.edge_lengths.sum()),
        "tips": tree.num_tips,
        "branch_points": tree.num_branch_points,
    }


def _rows(rows: list[dict]) -> str:
    """A plain table: names left, numbers right."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys, *([_cell(row.get(key, "")) for key in keys] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(keys))]
    lines = (
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in cells
    )
    return "\n".join("  ".join(line) for line in lines)


def _cell(value) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> None:
    """The `vit3d` command: one sentence and exit status 2 for what a person can mend, no traceback."""
    warnings.showwarning = lambda message, *_: print(f"vit3d: {message}", file=sys.stderr)
    try:
        app(arguments, prog_name="vit3d")
    except (ValueError, OSError) as error:
        print(f"vit3d: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
