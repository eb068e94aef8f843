"""One subcommand per verb: parse, call, print. Every import of a room happens inside its command."""

import csv
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from .arguments import (
    box_of,
    bytes_of,
    factors_of,
    flip_of,
    is_folder,
    is_swc,
    launched,
    make_room,
    new_file,
    new_folder,
    open_mask,
    open_stack,
    pairs,
    read_stack,
    read_stating,
    read_trees,
    refuse_mixed_units,
    root_of,
    sentence,
    shape_of,
    stack_named,
    threshold_of,
    to_unit,
    triple,
    unit_of,
    write_box_of,
)
from .tables import as_json_text, as_table, summary

_UsageError = typer.BadParameter.__base__  # what a wrongly spelled command raises
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
MaxGap = Annotated[float | None, typer.Option(help="Longest gap that is bridged, in um; default 10 voxels in plane.")]
Forest = Annotated[
    bool, typer.Option(help="Keep what cannot be joined as trees of its own, an SWC each: NAME_1.swc, NAME_2.swc, ...")
]
Level = Annotated[
    str | None,
    typer.Option(
        help="Level of a multiscale OME-Zarr: its name, or a spacing it shall not exceed, as 2um or 2,1,1um. "
        "Coordinates count from its first voxel."
    ),
]
MemoryBudget = Annotated[
    float, typer.Option(help="GiB that this process may use; a larger stack is worked on box by box, on disk.")
]
MissingAsFill = Annotated[
    bool,
    typer.Option("--missing-as-fill", help="Read chunks that a Zarr store lacks as its fill value; else an error."),
]
SwcUnit = Annotated[
    str | None,
    typer.Option(help="Unit of the SWC that is written: um or voxel; default um where the voxel size is known."),
]
Unit = Annotated[str | None, typer.Option(help="Unit of the SWC that is read, where it does not say it: um or voxel.")]
PredictedUnit = Annotated[
    str | None, typer.Option(help="Unit of the predicted SWC, where it does not say it: um or voxel.")
]
GoldUnit = Annotated[str | None, typer.Option(help="Unit of the gold SWC, where it does not say it: um or voxel.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vit3d {__version__}")
        raise typer.Exit


@app.callback()
def vit3d(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say the version.")
    ] = False,
):
    """Turn a light-microscopy stack of a neuron into its tree (SWC)."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the stack, the tree and the picture.")] = Path("vit3d-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Which neuron.")] = 1,
):
    """Simulate a neuron, reconstruct it, score it, draw it."""
    from .checkpoint import load_checkpoint
    from .reconstruction import reconstruct as run
    from .results import WRITTEN_BESIDE, is_ours, refuse_foreign
    from .scoring import score_trees
    from .simulate import simulate_neuron
    from .tree import write_swc
    from .volume import write_volume

    stack, tree_file = new_folder(out) / "neuron.tif", out / "truth.swc"
    for path in (stack, tree_file):
        if path.exists() and not is_ours(path):
            raise ValueError(f"{path} is no result of an earlier demo and would be lost; choose another --out.")
    refuse_foreign(out / "neuron.swc", False, WRITTEN_BESIDE)
    volume, truth = simulate_neuron(seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    write_volume(volume, stack)
    write_swc(truth, tree_file)
    network, processor = load_checkpoint()
    result = run(network, volume, processor=processor)
    result.write(out, "neuron")
    scores = score_trees(result.tree, truth)
    typer.echo(as_table([{"name": "neuron", **summary(result.tree), **{key: scores[key] for key in MAIN_SCORES}}]))
    typer.echo(f"The stack, its tree, the truth and a picture are in {out}/.")


@app.command()
def reconstruct(
    stack: Annotated[
        Path, typer.Argument(help="A stack, a folder of stacks or of z-slices, or the URL of a Zarr store.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for NAME.swc, NAME_probability.tif (or .zarr), NAME.png, NAME_review.csv.")
    ] = Path("."),
    model: Model = "vit3d-tiny",
    spacing: Spacing = None,
    channel: Channel = None,
    level: Level = None,
    polarity: Polarity = "auto",
    device: Device = "auto",
    threshold: Threshold = "auto",
    crop: Crop = None,
    mask: Mask = None,
    max_gap_um: MaxGap = None,
    forest: Forest = False,
    swc_unit: SwcUnit = None,
    missing_as_fill: MissingAsFill = False,
    select: Annotated[bool, typer.Option(help="Leave out patches that hold only background.")] = True,
    regrid: Annotated[
        bool, typer.Option(help="Resample stacks coarser than the training's (up to 4 times) to its voxel size.")
    ] = True,
    memory_budget: MemoryBudget = 4.0,
    out_of_core: Annotated[
        bool | None, typer.Option("--out-of-core/--in-memory", help="Box by box or not; default: what fits the budget.")
    ] = None,
):
    """Stack in; tree, probability and picture out: the main job. A folder gives one table; failures are listed.

    What is larger than memory is computed into NAME_probability.zarr by as many processes as are started on it
    (`torchrun --no-python vit3d reconstruct ...`, srun, or the same command several times). Started again, it goes on.
    """
    from .reconstruction import Reconstruction, find_stacks, fits_in_memory, reconstruct_on_disk
    from .reconstruction import reconstruct as run
    from .results import WRITTEN_BESIDE, refuse_foreign
    from .tracing import check_lengths

    check_lengths(max_gap_um=max_gap_um)
    stacks = find_stacks(stack)
    out = new_folder(out, source=stack if stack in stacks.values() else None)  # results may lie among several stacks
    for flag, value, parse in (("--spacing", spacing, triple), ("--swc-unit", swc_unit, unit_of)):
        parse(value, flag)  # what is wrong for all stacks is said once, and before the work
    cut, allowed = threshold_of(threshold, of_probability=True), open_mask(mask, missing_as_fill)
    process = {"memory_bytes": bytes_of(memory_budget), **launched(os.environ)}

    def on_disk(volume, box=None) -> bool:
        """Whether a stack, or a box of it, is worked on where it lies."""
        if out_of_core is not None:
            return out_of_core
        known = network.config if regrid else None
        return process["ranks"] > 1 or not fits_in_memory(volume, process["memory_bytes"], box, known)

    from .checkpoint import device_of, load_checkpoint

    network, processor = load_checkpoint(model, device_of(device, process["local_rank"]), polarity)
    rows, failures = [], []
    for name, path in stacks.items():
        try:
            volume = open_stack(path, spacing, channel, level, on_disk, missing_as_fill)
            unit = unit_of(swc_unit, "--swc-unit", volume.spacing_um)
            box = box_of(crop, volume.shape)
            refuse_foreign(out / f"{name}.swc", forest, WRITTEN_BESIDE[: 1 if on_disk(volume, box) else None])
            options = {"processor": processor, "box": box, "mask": allowed, "select": select, "regrid": regrid}
            options |= {"threshold": cut, "max_gap_um": max_gap_um, "forest": forest}
            write = partial(Reconstruction.write, out=out, name=name, swc_unit=unit, forest=forest)
            if on_disk(volume, box):
                result = reconstruct_on_disk(
                    network, volume, out / f"{name}_probability.zarr", run=process, write=write, **options
                )
            else:
                result = run(network, volume, **options)
                write(result)
            if result is None:
                continue  # another process traces and writes it
            told = {"neurites": result.polarity, "review": len(result.reviews)}
            rows.append({"name": name, **summary(result.tree), **told})
        except (ValueError, OSError, MemoryError) as error:
            if len(stacks) == 1 and path == stack:
                raise
            failures.append(f"{path.name} failed: {sentence(error)}")
    _conclude(rows, failures, out)


def _conclude(rows: list[dict], failures: list[str], out: Path) -> None:
    if rows:
        typer.echo(as_table(rows))
        typer.echo(f"SWC, probability, picture and the list of places to review are in {out}/.", err=True)
    _refuse(failures)


def _refuse(failures: list[str]) -> None:
    """Exit status 2 where there are any, after all that could be done."""
    for failure in failures:
        _complain(failure)
    if failures:
        raise typer.Exit(2)


@app.command()
def segment(
    stack: Annotated[str, typer.Argument(help="A stack; for OUT.zarr one of any size, or its URL.")],
    out: Annotated[
        Path | None,
        typer.Argument(help="The probability: a float32 TIFF, or OUT.zarr, computed out of core and resumed."),
    ] = None,
    model: Model = "vit3d-tiny",
    spacing: Spacing = None,
    channel: Channel = None,
    polarity: Polarity = "auto",
    device: Device = "auto",
    crop: Annotated[
        str | None,
        typer.Option(help="OUT.tif: box z0:z1,y0:y1,x0:x1 in voxels to segment alone; OUT.tif is that box."),
    ] = None,
    level: Level = None,
    memory_budget: Annotated[
        float | None, typer.Option(help="OUT.zarr: GiB that this process may use; default 4.")
    ] = None,
    box: Annotated[str | None, typer.Option(help="OUT.zarr: write box Z,Y,X, in multiples of 64.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="OUT.zarr: CPU threads of the network.")] = None,
    missing_as_fill: MissingAsFill = False,
    force: Annotated[
        bool, typer.Option("--force", help="OUT.zarr: go on with what another kind of machine began.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Only name what is damaged in the one store given.")] = False,
):
    """Stack -> probability that each voxel belongs to a neurite.

    OUT.zarr may be computed by many processes: `accelerate launch -m vit3d.segmentation IN.zarr OUT.zarr`, torchrun,
    srun, or the same command started several times. Started again, it goes on; a finished store is verified, and what
    was damaged since is computed again.
    """
    if verify:
        if out is not None:
            raise ValueError(f"--verify takes the one store that is looked at, got {stack} and {out}.")
        return _verify(Path(stack))
    if out is None:
        raise ValueError("`vit3d segment` needs the name of what is written: STACK OUT.tif or STACK OUT.zarr.")
    if out.suffix == ".zarr":
        from .blockwise.out_of_core import RunOptions
        from .blockwise.segmentation_job import segment_path

        if crop is not None:
            raise ValueError("--crop is for TIFF; a store is segmented as a whole.")
        budget = bytes_of(4.0 if memory_budget is None else memory_budget)
        options = RunOptions(budget, write_box_of(box), threads, force, **launched(os.environ))
        reading = {"spacing_um": triple(spacing, "--spacing"), "channel": channel, "level": level}
        reading["missing_as_fill"] = missing_as_fill
        outcome = segment_path(stack, out, model=model, polarity=polarity, device=device, options=options, **reading)
        typer.echo(outcome.said())
        return
    for_stores = {"--memory-budget": memory_budget, "--box": box, "--threads": threads, "--force": force or None}
    if ignored := [flag for flag, value in for_stores.items() if value is not None]:
        raise ValueError(f"{', '.join(ignored)} is for OUT.zarr, got {out}.")
    out = new_file(out, ".tif", ".tiff", source=stack)
    volume = read_stack(Path(stack), spacing, channel, level=level, missing_as_fill=missing_as_fill)
    part = box_of(crop, volume.shape)
    from .checkpoint import load_checkpoint
    from .regridding import warn_of_coarse_voxels
    from .segmentation import segment as run
    from .volume import write_volume

    network, processor = load_checkpoint(model, device, polarity)
    warn_of_coarse_voxels(volume, network.config)
    statistics = processor.measure(volume.voxels)
    probability = run(network, volume.crop(part), processor=processor, statistics=statistics)
    write_volume(probability, make_room(out))


def _verify(store: Path) -> None:
    """Exit status 1 when something is damaged: a script can ask."""
    from .blockwise.segmentation_job import damage_report

    lines = damage_report(store)
    typer.echo("\n".join(lines) or f"{store} is whole.")
    if lines:
        raise typer.Exit(1)


@app.command()
def trace(
    probability: Annotated[Path, typer.Argument(help="A probability, a mask, or a raw stack, of any size.")],
    out: Annotated[
        Path,
        typer.Argument(
            help="The SWC, or OUT.eswc with a confidence per node; OUT_review.csv lists what to proofread first."
        ),
    ],
    spacing: Spacing = None,
    channel: Channel = None,
    level: Level = None,
    polarity: Annotated[str, typer.Option(help="bright, or dark: neurites on a bright ground.")] = "bright",
    threshold: Annotated[
        str,
        typer.Option(
            help="Foreground lies above it: a number, auto, or intensity (grey levels, even from 0 to 1); with "
            "--polarity dark a number counts down from the brightest voxel."
        ),
    ] = "auto",
    crop: Crop = None,
    mask: Mask = None,
    root: Annotated[
        str | None,
        typer.Option(help="Where the tree starts: X,Y,Z in voxels from 0, or a Vaa3D .marker file."),
    ] = None,
    min_branch_um: Annotated[
        float | None,
        typer.Option(
            help="Side branches shorter than this, from their parent's surface on, are left out; default 0 um."
        ),
    ] = None,
    max_gap_um: MaxGap = None,
    step_um: Annotated[float | None, typer.Option(help="Distance between nodes, in um; default about a voxel.")] = None,
    forest: Forest = False,
    swc_unit: SwcUnit = None,
    missing_as_fill: MissingAsFill = False,
    memory_budget: MemoryBudget = 4.0,
):
    """Probability, mask or stack -> SWC; no network, no GPU.

    Voxels that all lie from 0 to 1 are a probability (unless --threshold intensity), two values a mask, anything else
    grey levels.
    """
    from .model.intensity_vit3d import measure as measure_stack
    from .reconstruction import fits_in_memory, reviews_in, trace_part
    from .results import all_or_none, refuse_foreign, swc_files, tell_of_earlier, write_review
    from .tree import write_swc

    if polarity not in ("bright", "dark"):
        raise ValueError(f"--polarity takes bright or dark here, got {polarity!r}.")
    out, cut = new_file(out, ".swc", ".eswc", source=probability), threshold_of(threshold, "intensity")
    refuse_foreign(out, forest, is_named=True)
    budget = bytes_of(memory_budget)
    volume = open_stack(probability, spacing, channel, level, lambda v: not fits_in_memory(v, budget), missing_as_fill)
    unit, box = unit_of(swc_unit, "--swc-unit", volume.spacing_um), box_of(crop, volume.shape)
    tree, reviews = trace_part(
        volume,
        box,
        open_mask(mask, missing_as_fill),
        dark=polarity == "dark",
        threshold=cut,
        root=root_of(root, box, volume.spacing_um),
        min_branch_um=min_branch_um,
        max_gap_um=max_gap_um,
        step_um=step_um,
        forest=forest,
    )
    unit = unit or tree.unit
    with all_or_none(out.parent, out.stem) as whole:
        write_review(reviews_in(unit, reviews, tree), whole / f"{out.stem}_review.csv", unit)
        for path, part in swc_files(tree, whole / out.name, forest):
            write_swc(part, path, unit=unit)
        written = {path.name for path in whole.iterdir()}
    tell_of_earlier(out, written)
    if polarity == "bright" and len(tree) <= 1 and measure_stack(volume.voxels).polarity == "dark":
        warnings.warn("The neurites seem dark on a bright ground: --polarity dark follows them.", stacklevel=1)
    typer.echo(as_table([{"name": out.stem, **summary(tree), "review": len(reviews)}]))


@app.command()
def score(
    predicted: Annotated[Path, typer.Argument(help="An SWC, a mask, or a folder of either.")],
    gold: Annotated[Path, typer.Argument(help="The same for the truth; folders are paired by name.")],
    predicted_unit: PredictedUnit = None,
    gold_unit: GoldUnit = None,
    spacing: Spacing = None,
    threshold: Annotated[
        float | None, typer.Option(help="Trees: points at least so many voxels from the other are wrong; default 2.")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="The stack (or their folder): scores once more against the gold aligned to it."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture (or their folder): missing red, surplus blue, agreed grey.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything, as a JSON list of rows; what is infinite is null.")
    ] = False,
):
    """Tree against tree (precision, recall, F1, ESA, DSA, PDS in voxels), or mask against mask."""
    from .comparison import means
    from .scoring import score_masks

    in_folders, groups, failures = is_folder(predicted), [], []
    # what is wrong for all pairs is said once
    unit_of(predicted_unit, "--predicted-unit"), unit_of(gold_unit, "--gold-unit"), triple(spacing, "--spacing")
    if in_folders and not all(place is None or place.is_dir() for place in (image, plot)):
        raise ValueError("Folders are scored with a folder for --image and one that exists for --plot.")
    if plot is not None and not in_folders:
        new_file(plot, ".png")
    for_trees = {"--threshold": threshold, "--image": image, "--plot": plot}
    for_trees |= {"--predicted-unit": predicted_unit, "--gold-unit": gold_unit}
    for name, first, second in pairs(predicted, gold):
        picture = plot / f"{name}.png" if plot is not None and in_folders else plot
        try:
            if is_swc(first):
                trees = read_trees(first, second, predicted_unit, gold_unit, spacing, several=in_folders)
                far = 2.0 if threshold is None else threshold
                groups.append(_scored(name, *trees, far, stack_named(image, name), spacing, picture))
            elif ignored := [flag for flag, value in for_trees.items() if value is not None]:
                raise ValueError(f"{', '.join(ignored)} is for trees; {first} is none.")
            else:
                masks = (read_stack(path, spacing, notice=False) for path in (first, second))
                groups.append([{"name": name, **score_masks(*masks)}])
        except (ValueError, OSError, MemoryError) as error:
            if not in_folders:
                raise
            failures.append(f"{name} failed: {sentence(error)}")
    rows = [row for group in groups for row in group] + (means(groups) if in_folders and groups else [])
    if rows:
        typer.echo(as_json_text(rows) if as_json else _score_table(rows))
    _refuse(failures)


def _score_table(rows: list[dict]) -> str:
    keys = ["name", *(MAIN_SCORES if "f1" in rows[0] else [key for key in rows[0] if key != "name"])]
    extra = [key for key in ("precision_of_traced", "corrections_per_mm") if any(key in row for row in rows)]
    return as_table([{key: row.get(key, "") for key in keys + extra} for row in rows])


def _scored(name: str, predicted, gold, threshold: float, image, spacing, picture: Path | None) -> list[dict]:
    """Rows of a pair of trees, and its picture."""
    from .comparison import compare, plot_pair

    volume = None if image is None else read_stack(image, spacing, notice=False)
    rows = compare(name, predicted, gold, threshold, volume)
    if picture is not None:
        plot_pair(predicted, gold, make_room(picture), threshold, volume)
    return rows


@app.command()
def measure(
    swcs: Annotated[list[Path], typer.Argument(help="SWC files.")],
    unit: Unit = None,
    sholl_step: Annotated[
        float | None, typer.Option(help="Distance of Sholl spheres; one column of crossings per sphere.")
    ] = None,
):
    """Length, tips, branch points, order, Strahler number, volume, Sholl: one CSV row per SWC.

    In um, the distance of Sholl spheres too, where every SWC is or states the size of its voxels.
    """
    from .morphometry import measure as run
    from .morphometry import sholl

    trees = {path: read_stating(path, unit_of(unit, "--unit"), len(swcs) > 1) for path in swcs}
    if all(tree.unit == "um" or (tree.unit and tree.spacing_um) for tree in trees.values()):
        trees = {path: tree.to("um") for path, tree in trees.items()}
    refuse_mixed_units(trees)
    rows, names = [], [path.stem for path in trees]
    for path, tree in trees.items():
        name = path.stem if names.count(path.stem) == 1 else str(path)
        crossings = zip(*sholl(tree, sholl_step), strict=True) if sholl_step is not None else ()
        rows.append({"name": name, **run(tree), **{f"sholl_{radius:g}": int(n) for radius, n in crossings}})
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(sys.stdout, keys, restval=0, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN.swc")],
    out: Annotated[Path, typer.Argument(metavar="OUT.swc")],
    unit: Unit = None,
    swc_unit: Annotated[str | None, typer.Option(help="Unit of OUT.swc: um or voxel; default that of IN.swc.")] = None,
    spacing: Annotated[
        str | None, typer.Option(help="Voxel size Z,Y,X in um, to go between um and voxel; overrides IN.swc's own.")
    ] = None,
    scale: Annotated[str | None, typer.Option(help="Factor, or factors Z,Y,X.")] = None,
    flip: Annotated[
        str | None, typer.Option(help="AXIS:LAST: x, y or z, and its last voxel centre in the unit of OUT.swc.")
    ] = None,
    resample: Annotated[
        float | None, typer.Option(help="New distance of nodes; tips, branch points and somas stay.")
    ] = None,
    split: Annotated[bool, typer.Option(help="One file per tree: OUT_1.swc, OUT_2.swc, ...")] = False,
):
    """Units, scale, flip, resampling, splitting of an SWC, in this order; parents come before children.

    OUT_1.swc is the tree with most cable.
    """
    from .morphometry import resample as run
    from .results import swc_files, tell_of_earlier
    from .swc import written_here
    from .tree import read_swc, write_swc

    out = new_file(out, ".swc", ".eswc", source=source)
    tree = to_unit(read_swc(source, unit=unit_of(unit, "--unit")), swc_unit, spacing)
    if scale is not None:
        tree = tree.scaled(factors_of(scale))
    if flip is not None:
        tree = tree.flipped(*flip_of(flip))
    if resample is not None:
        tree = run(tree, resample)
    files = dict(swc_files(tree, out, split))
    for path in files if split else ():  # names that nobody gave
        if path.exists() and (path.samefile(source) or not written_here(path)):
            raise ValueError(f"{path} is no result of vit3d, or what is split, and would be lost; choose another name.")
    make_room(out)
    for path, part in files.items():
        write_swc(part, path)
    if split:
        tell_of_earlier(out, {path.name for path in files})


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="The stack, a TIFF; its tree goes beside it as an SWC.")],
    seed: Annotated[int, typer.Option(min=0, help="Which neuron.")] = 0,
    shape: Annotated[str, typer.Option(help="Z,Y,X voxels.")] = "64,256,256",
    spacing: Annotated[str, typer.Option(help="Voxel size Z,Y,X in um.")] = "1,0.33,0.33",
    polarity: Annotated[str, typer.Option(help="bright or dark.")] = "bright",
):
    """A neuron with a known truth, as a microscope would show it."""
    from .simulate import simulate_neuron
    from .swc import written_here
    from .tree import write_swc
    from .volume import stack_name, write_volume

    out, size = new_file(out, ".tif", ".tiff"), shape_of(shape)
    tree_file = out.with_name(f"{stack_name(out)}.swc")
    if tree_file.is_file() and not written_here(tree_file):
        raise ValueError(f"{tree_file}, where the truth goes, is a tree that vit3d did not write; choose another name.")
    volume, tree = simulate_neuron(seed=seed, shape=size, spacing_um=triple(spacing, "--spacing"), polarity=polarity)
    write_volume(volume, make_room(out))
    write_swc(tree, tree_file)
    typer.echo(f"The stack is {out}, its tree {tree_file}.")


@app.command()
def train(
    data: Annotated[
        str,
        typer.Option(
            help="Folder of NAME.tif + NAME.swc, NAME_mask.tif or NAME_label.tif, or gold166 as it unpacks; SWCs are "
            "in voxels where they say no unit. Left out: simulated neurons alone."
        ),
    ] = "",
    init: Annotated[
        str, typer.Option(help="2D ViT to inflate, or a vit3d checkpoint to go on from.")
    ] = "facebook/dino-vitb16",
    out: Annotated[str, typer.Option(help="Folder of the run.")] = "run",
    strategy: Annotated[str | None, typer.Option(help="Of a 2D ViT: center (default), average or random.")] = None,
    prediction: Annotated[
        str | None, typer.Option(help="Of a 2D ViT: volume (default), or center_slice, the paper's mode.")
    ] = None,
    validate: Annotated[
        str, typer.Option(help="Neurons kept out to validate on: names, comma-separated, or a split, such as test.")
    ] = "",
    split_file: Annotated[
        str | None, typer.Option(help='CSV (name,split) or JSON {"train": [names], ...}; only "train" is trained on.')
    ] = None,
    spacing: Spacing = None,
    channel: Channel = None,
    spacing_table: Annotated[
        str | None, typer.Option(help="CSV (name,z_um,y_um,x_um); scaling_gold.csv in the folder is found by itself.")
    ] = None,
    gold: Annotated[
        str | None, typer.Option(help="Pattern of the SWCs to take for golds, such as '*_resampled.swc'.")
    ] = None,
    align: Annotated[bool, typer.Option(help="Move each gold onto its image.")] = True,
    keep_misplaced: Annotated[
        bool, typer.Option("--keep-misplaced", help="Take SWCs that do not lie on their images, too.")
    ] = False,
    simulated: Annotated[int, typer.Option(help="Simulated neurons mixed in.")] = 32,
    max_steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Crops per batch and process.")] = 8,
    accumulation: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    encoder_rate: Annotated[float, typer.Option(help="Peak learning rate of inherited weights.")] = 1e-4,
    head_rate: Annotated[float, typer.Option(help="Peak learning rate of new weights.")] = 1e-3,
    layer_decay: Annotated[float, typer.Option(help="Factor of the rate from a layer to the one below; 1 is off.")] = 1,
    warmup_steps: Annotated[
        int, typer.Option(help="Steps over which rates rise, a quarter of all at most; then they fall as a cosine.")
    ] = 100,
    ema_decay: Annotated[
        float, typer.Option(help="Decay of the moving average of the weights, which is what is saved; 0 turns it off.")
    ] = 0.995,
    cldice_weight: Annotated[float, typer.Option(help="Weight of the soft-clDice loss; 0 turns it off.")] = 0,
    consistency_weight: Annotated[
        float, typer.Option(help="Weight of the loss that makes two overlapping windows agree; 0 turns it off.")
    ] = 0,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    validate_every: Annotated[int, typer.Option(help="Steps between validations.")] = 500,
    save_every: Annotated[int, typer.Option(help="Steps between states that --resume goes on from.")] = 250,
    log_every: Annotated[int, typer.Option(help="Steps between lines of metrics.jsonl.")] = 10,
    log_with: Annotated[str, typer.Option(help="Trackers of Accelerate, such as tensorboard, comma-separated.")] = "",
    num_workers: Annotated[
        int | None, typer.Option(help="Processes that cut crops, per process that trains; default 1, on a GPU up to 8.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Crops and new weights.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, as if never stopped.")] = False,
):
    """Fine-tune on your own stacks; `accelerate launch -m vit3d.training` takes the same flags."""
    from transformers.utils.logging import disable_progress_bar

    from .training import TrainingConfig
    from .training import train as run

    disable_progress_bar()  # one per checkpoint, between the lines of the training's own
    new_folder(Path(out))
    names = tuple(name.strip() for name in validate.split(",") if name.strip())
    config = TrainingConfig(
        data, init, out, strategy, prediction, names, split_file, triple(spacing, "--spacing"), channel,
        gold=gold, spacing_table=spacing_table, align=align, keep_misplaced=keep_misplaced, simulated=simulated,
        max_steps=max_steps, batch_size=batch_size, accumulation=accumulation, encoder_rate=encoder_rate,
        head_rate=head_rate, layer_decay=layer_decay, warmup_steps=warmup_steps, ema_decay=ema_decay,
        cldice_weight=cldice_weight, consistency_weight=consistency_weight,
        gradient_checkpointing=gradient_checkpointing, mixed_precision=mixed_precision,
        validate_every=validate_every, save_every=save_every, log_every=log_every, log_with=log_with,
        num_workers=num_workers, device=device, seed=seed,
    )  # fmt: skip
    checkpoint = run(config, resume)
    if os.environ.get("RANK", "0") == "0":  # one of several processes says it
        typer.echo(f"{checkpoint.name} checkpoint: {checkpoint}")


@app.command()
def share(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Checkpoint that train wrote (RUN/best), or a shipped name; with --dataset a folder of pairs."
        ),
    ],
    repo_id: Annotated[str, typer.Argument(help="NAMESPACE/NAME on the Hub.")],
    private: Annotated[bool, typer.Option(help="Visible to you alone.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Prepare and list the files, upload nothing.")] = False,
    dataset: Annotated[bool, typer.Option(help="Share what a folder of stacks and SWCs consists of.")] = False,
    licence: Annotated[
        str | None, typer.Option(help="Of the weights or the data, as the Hub calls it: mit, ...")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the 2D source, where it is not on file.")] = None,
    card: Annotated[
        Path | None, typer.Option(help="Folder with scores.json, README.md, picture; default: beside the checkpoint.")
    ] = None,
):
    """Publish a checkpoint, or a data set's metadata and checksums, on the Hub in one commit."""
    from .sharing import share as run
    from .sharing import share_dataset

    options = {"private": private, "dry_run": dry_run, "licence": licence}
    if dataset:
        if ignored := [flag for flag, value in (("--card", card), ("--base-model", base_model)) if value is not None]:
            raise ValueError(f"{', '.join(ignored)} is for a checkpoint, and --dataset shares none.")
        lines = share_dataset(checkpoint, repo_id, **options)
    else:
        lines = run(checkpoint, repo_id, **options, card=card, base_model=base_model)
    for line in lines:
        typer.echo(line)


def _complain(what) -> None:
    print(f"vit3d: {what}", file=sys.stderr)


def _warn(message, category, *_) -> None:
    if issubclass(category, UserWarning):  # what a library deprecates concerns nobody here
        _complain(message)


@contextmanager
def _tidying_up() -> Iterator[None]:
    """SIGTERM, with which schedulers and containers stop programs, ends this as Ctrl-C does: no half result stays."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(arguments: list[str] | None = None) -> None:
    """The `vit3d` command: one sentence and exit status 2 for what a person can mend, no traceback."""
    warnings.showwarning = _warn
    is_training = (sys.argv[1:] if arguments is None else arguments)[:1] == ["train"]
    if not is_training:  # which has the machine to itself
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait block another program
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        # a training is never half written, and a process of it that lingered would hold up the others
        with nullcontext() if is_training else _tidying_up():
            sys.exit(app(arguments, prog_name="vit3d", standalone_mode=False))
    except (ValueError, OSError, MemoryError) as error:
        _complain(sentence(error))
    except _UsageError as error:
        if said := " ".join(error.format_message().split()).rstrip("."):  # nothing, where help was shown instead
            _complain(f"{said}; `{error.ctx.command_path if error.ctx else 'vit3d'} --help` shows what it takes.")
    finally:
        if zarr_store := sys.modules.get(f"{__package__}.formats.zarr_store"):  # nothing is loaded for it
            zarr_store.end_reads()
    sys.exit(2)


if __name__ == "__main__":
    main()
