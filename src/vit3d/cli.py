"""One subcommand per verb: parse, call, print. Every import of a room happens inside its command."""

import csv
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from .arguments import (
    box_of,
    factors_of,
    flip_of,
    is_swc,
    new_file,
    new_folder,
    pairs,
    read_mask,
    read_stack,
    read_trees,
    root_of,
    stack_named,
    threshold_of,
    to_unit,
    triple,
    unit_of,
)
from .tables import as_json_text, as_table, summary

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
MaxGap = Annotated[float | None, typer.Option(help="Longest gap that is bridged; default 10 voxels in plane.")]
Forest = Annotated[bool, typer.Option(help="Keep what cannot be joined as trees of its own.")]
SwcUnit = Annotated[str | None, typer.Option(help="um or voxel; default um where the voxel size is known.")]
Unit = Annotated[str | None, typer.Option(help="um or voxel, for an SWC that does not say it.")]
PredictedUnit = Annotated[str | None, typer.Option(help="um or voxel, for an SWC that does not say it.")]
GoldUnit = Annotated[str | None, typer.Option(help="um or voxel, for an SWC that does not say it.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the stack, the tree and the picture.")] = Path("vit3d-demo"),
    seed: Annotated[int, typer.Option(help="Which neuron.")] = 1,
):
    """Simulate a neuron, reconstruct it, score it, draw it."""
    from .checkpoint import load_checkpoint
    from .reconstruction import reconstruct as run
    from .scoring import score_trees
    from .simulate import simulate_neuron
    from .tree import write_swc
    from .volume import write_volume

    new_folder(out)
    volume, truth = simulate_neuron(seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    write_volume(volume, out / "neuron.tif")
    write_swc(truth, out / "truth.swc")
    network, processor = load_checkpoint()
    result = run(network, volume, processor=processor)
    result.write(out, "neuron")
    scores = score_trees(result.tree, truth)
    typer.echo(as_table([{"name": "neuron", **summary(result.tree), **{key: scores[key] for key in MAIN_SCORES}}]))
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
    max_gap_um: MaxGap = None,
    forest: Forest = False,
    swc_unit: SwcUnit = None,
    select: Annotated[bool, typer.Option(help="Leave out patches that hold only background.")] = True,
):
    """Stack in; tree, probability and picture out: the main job. A folder gives one table; failures are listed."""
    from .reconstruction import find_stacks
    from .reconstruction import reconstruct as run

    stacks, out = find_stacks(stack), new_folder(out)
    for flag, value, parse in (("--spacing", spacing, triple), ("--swc-unit", swc_unit, unit_of)):
        parse(value, flag)  # what is wrong for all stacks is said once, and before the work
    level, allowed = threshold_of(threshold), read_mask(mask)
    from .checkpoint import load_checkpoint

    network, processor = load_checkpoint(model, device, polarity)
    rows, failures = [], []
    for name, path in stacks.items():
        try:
            volume = read_stack(path, spacing, channel)
            unit = unit_of(swc_unit, "--swc-unit", volume.spacing_um)
            box = box_of(crop, volume.shape)
            options = {"box": box, "mask": allowed, "select": select}
            tracing = {"threshold": level, "max_gap_um": max_gap_um, "forest": forest}
            result = run(network, volume, processor=processor, **options, **tracing)
            result.write(out, name, unit)
            rows.append({"name": name, **summary(result.tree), "review": len(result.reviews)})
        except (ValueError, OSError, MemoryError) as error:
            if not stack.is_dir():
                raise
            failures.append(f"{path.name} failed: {_sentence(error)}")
    if rows:
        typer.echo(as_table(rows))
        typer.echo(f"SWC, probability, picture and the list of places to review are in {out}/.", err=True)
    for failure in failures:
        _complain(failure)
    if failures:
        raise typer.Exit(2)


@app.command()
def segment(
    stack: Annotated[Path, typer.Argument(help="A stack.")],
    out: Annotated[Path, typer.Argument(help="The probability, a float32 TIFF.")],
    model: Model = "vit3d-tiny",
    spacing: Spacing = None,
    channel: Channel = None,
    polarity: Polarity = "auto",
    device: Device = "auto",
    crop: Crop = None,
):
    """Stack -> probability that each voxel belongs to a neurite."""
    out = new_file(out, ".tif", ".tiff")
    volume = read_stack(stack, spacing, channel)
    box = box_of(crop, volume.shape)
    from .checkpoint import load_checkpoint
    from .segmentation import segment as run
    from .volume import write_volume

    network, processor = load_checkpoint(model, device, polarity)
    statistics = processor.measure(volume.voxels)
    write_volume(run(network, volume.crop(box), processor=processor, statistics=statistics), out)


@app.command()
def trace(
    probability: Annotated[Path, typer.Argument(help="A probability, a mask, or a raw stack.")],
    out: Annotated[Path, typer.Argument(help="The SWC; OUT_review.csv lists what to proofread first.")],
    spacing: Spacing = None,
    channel: Channel = None,
    polarity: Annotated[str, typer.Option(help="bright, or dark: neurites on a bright ground.")] = "bright",
    threshold: Threshold = "auto",
    crop: Crop = None,
    mask: Mask = None,
    root: Annotated[
        str | None,
        typer.Option(help="Where the tree starts: X,Y,Z in voxels from 0, or a Vaa3D .marker file."),
    ] = None,
    min_branch_um: Annotated[float | None, typer.Option(help="Shorter side branches are left out.")] = None,
    max_gap_um: MaxGap = None,
    step_um: Annotated[float | None, typer.Option(help="Distance between nodes.")] = None,
    forest: Forest = False,
    swc_unit: SwcUnit = None,
):
    """Probability, mask or stack -> SWC; no network, no GPU."""
    from .reconstruction import inverted, masked, place, placed_reviews, write_review
    from .tracing import trace_with_review
    from .tree import write_swc

    if polarity not in ("bright", "dark"):
        raise ValueError(f"--polarity takes bright or dark here, got {polarity!r}.")
    out, level = new_file(out, ".swc", ".eswc"), threshold_of(threshold)
    volume = read_stack(probability, spacing, channel)
    unit, box = unit_of(swc_unit, "--swc-unit", volume.spacing_um), box_of(crop, volume.shape)
    start = root_of(root, box, volume.spacing_um)
    volume = inverted(volume) if polarity == "dark" else volume
    volume = volume if mask is None else masked(volume, read_mask(mask))
    tree, reviews = trace_with_review(
        volume.crop(box),
        threshold=level,
        root=start,
        min_branch_um=min_branch_um,
        max_gap_um=max_gap_um,
        step_um=step_um,
        forest=forest,
    )
    write_swc(place(tree, box), out, unit=unit)
    write_review(placed_reviews(reviews, tree, box), out.with_name(out.stem + "_review.csv"), tree.unit)
    typer.echo(as_table([{"name": out.stem, **summary(tree), "review": len(reviews)}]))


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
        typer.Option(help="The stack (or their folder): scores once more against the gold aligned to it."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture (or their folder): missing red, surplus blue, agreed grey.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON; what is infinite is null.")] = False,
):
    """Tree against tree (precision, recall, F1, ESA, DSA, PDS in voxels), or mask against mask."""
    from .comparison import compare, means, plot_pair
    from .scoring import score_masks

    in_folders, groups = predicted.is_dir(), []
    if in_folders and not all(place is None or place.is_dir() for place in (image, plot)):
        raise ValueError("Folders are scored with a folder for --image and one that exists for --plot.")
    if plot is not None and not in_folders:
        new_file(plot, ".png")
    for name, first, second in pairs(predicted, gold):
        if not is_swc(first):
            masks = (read_stack(path, spacing, notice=False) for path in (first, second))
            groups.append([{"name": name, **score_masks(*masks)}])
            continue
        trees = read_trees(first, second, predicted_unit, gold_unit, spacing)
        shown = stack_named(image, name)
        volume = None if shown is None else read_stack(shown, spacing, notice=False)
        groups.append(compare(name, *trees, threshold, volume))
        if plot is not None:
            plot_pair(*trees, plot / f"{name}.png" if in_folders else plot, threshold, volume)
    rows = [row for group in groups for row in group] + (means(groups) if in_folders else [])
    if as_json:
        typer.echo(as_json_text(rows))
    else:
        keys = ["name", *(MAIN_SCORES if "f1" in rows[0] else [key for key in rows[0] if key != "name"])]
        extra = [key for key in ("precision_of_traced", "corrections_per_mm") if any(key in row for row in rows)]
        typer.echo(as_table([{key: row.get(key, "") for key in keys + extra} for row in rows]))


@app.command()
def measure(
    swcs: Annotated[list[Path], typer.Argument(help="SWC files.")],
    unit: Unit = None,
    sholl_step: Annotated[
        float | None, typer.Option(help="Distance of Sholl spheres; one column of crossings per sphere.")
    ] = None,
):
    """Length, tips, branch points, order, Strahler number, volume, Sholl: one CSV row per SWC."""
    from .morphometry import measure as run
    from .morphometry import sholl
    from .tree import read_swc

    rows = []
    for path in swcs:
        tree = read_swc(path, unit=unit_of(unit, "--unit"))
        crossings = zip(*sholl(tree, sholl_step), strict=True) if sholl_step is not None else ()
        rows.append({"name": path.stem, **run(tree), **{f"sholl_{radius:g}": int(n) for radius, n in crossings}})
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(sys.stdout, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN.swc")],
    out: Annotated[Path, typer.Argument(metavar="OUT.swc")],
    unit: Unit = None,
    swc_unit: Annotated[str | None, typer.Option(help="um or voxel: convert to it.")] = None,
    spacing: Spacing = None,
    scale: Annotated[str | None, typer.Option(help="Factor, or factors Z,Y,X.")] = None,
    flip: Annotated[
        str | None, typer.Option(help="AXIS:LAST: x, y or z, and its last voxel centre in the unit of OUT.swc.")
    ] = None,
    resample: Annotated[float | None, typer.Option(help="New distance of nodes; tips and branch points stay.")] = None,
    split: Annotated[bool, typer.Option(help="One file per tree: OUT_1.swc, OUT_2.swc, ...")] = False,
):
    """Units, scale, flip, resampling, splitting of an SWC, in this order; parents come before children."""
    from .morphometry import resample as run
    from .tree import read_swc, write_swc

    out = new_file(out, ".swc", ".eswc")
    tree = to_unit(read_swc(source, unit=unit_of(unit, "--unit")), swc_unit, spacing)
    if scale is not None:
        tree = tree.scaled(factors_of(scale))
    if flip is not None:
        tree = tree.flipped(*flip_of(flip))
    if resample is not None:
        tree = run(tree, resample)
    parts = tree.split() if split else [tree]
    if not parts:
        warnings.warn(f"{source} is an empty tree: nothing to split.", stacklevel=2)
    for count, part in enumerate(parts, start=1):
        write_swc(part, out.with_name(f"{out.stem}_{count}{out.suffix}") if split else out)


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="The stack, a TIFF; its tree goes beside it as an SWC.")],
    seed: Annotated[int, typer.Option(help="Which neuron.")] = 0,
    shape: Annotated[str, typer.Option(help="Z,Y,X voxels.")] = "64,256,256",
    spacing: Annotated[str, typer.Option(help="Voxel size Z,Y,X in um.")] = "1,0.33,0.33",
    polarity: Annotated[str, typer.Option(help="bright or dark.")] = "bright",
):
    """A neuron with a known truth, as a microscope would show it."""
    from .simulate import simulate_neuron
    from .tree import write_swc
    from .volume import write_volume

    out, size = new_file(out, ".tif", ".tiff"), tuple(int(n) for n in triple(shape, "--shape"))
    volume, tree = simulate_neuron(seed=seed, shape=size, spacing_um=triple(spacing, "--spacing"), polarity=polarity)
    write_volume(volume, out)
    write_swc(tree, out.with_suffix(".swc"))


@app.command()
def train(
    data: Annotated[
        str, typer.Option(help="Folder of NAME.tif + NAME.swc, in voxels where it says no unit; may be left out.")
    ] = "",
    init: Annotated[
        str, typer.Option(help="2D ViT to inflate, or a vit3d checkpoint to go on from.")
    ] = "facebook/dino-vitb16",
    out: Annotated[str, typer.Option(help="Folder of the run.")] = "run",
    strategy: Annotated[str, typer.Option(help="center, average or random.")] = "center",
    prediction: Annotated[str, typer.Option(help="volume, or center_slice: the paper's mode.")] = "volume",
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

    new_folder(Path(out))
    names = tuple(name for name in validate.split(",") if name)
    config = TrainingConfig(
        data, init, out, strategy, prediction, names, triple(spacing, "--spacing"), simulated,
        max_steps=max_steps, batch_size=batch_size, validate_every=validate_every, seed=seed,
        mixed_precision=mixed_precision,
    )  # fmt: skip
    typer.echo(f"best checkpoint: {run(config)}")


@app.command()
def share(
    checkpoint: Annotated[str, typer.Argument(help="Folder written by train, or a shipped name.")],
    repo_id: Annotated[str, typer.Argument(help="NAMESPACE/NAME on the Hub.")],
    private: Annotated[bool, typer.Option(help="Visible to you alone.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Prepare and list the files, upload nothing.")] = False,
):
    """Publish a checkpoint on the Hub in one commit."""
    from .sharing import share as run

    for line in run(checkpoint, repo_id, private=private, dry_run=dry_run):
        typer.echo(line)


def _sentence(error: Exception) -> str:
    """What the error says, on one line."""
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({error}); crop the stack or use a larger machine."
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}."
    return " ".join(str(error).split())


def _complain(what) -> None:
    print(f"vit3d: {what}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """The `vit3d` command: one sentence and exit status 2 for what a person can mend, no traceback."""
    warnings.showwarning = lambda message, *_: _complain(message)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app(arguments, prog_name="vit3d")
    except (ValueError, OSError, MemoryError) as error:
        _complain(_sentence(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
