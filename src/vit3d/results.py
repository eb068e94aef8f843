"""The files that come of a stack: which they are, whose they are, and how they are written."""

import codecs
import csv
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import tifffile
from PIL import Image

from .blockwise.leases import is_dead, this_process
from .formats.appearing import appearing
from .formats.tiff import SOFTWARE
from .swc import review_of, written_here
from .tracing import Review
from .tree import NeuronTree

WRITTEN_BESIDE = (".png", "_probability.tif")  # the tree NAME.swc, NAME with these endings
_REVIEW_STARTS = b"kind,x_"
# the list first, by which a run after a kill knows its own; trees last: then all is there
_ORDER = (".csv", ".tif", ".png", ".swc", ".eswc")
_OWNER = "owner.json"
_SILENT_S = 24 * 3600.0  # a picture of a stack on disk is drawn for hours without a word


def refuse_foreign(swc: Path, forest: bool, beside: tuple[str, ...] = (), *, is_named: bool = False) -> None:
    """ValueError where what no earlier run wrote lies in a result's place: a gold beside its stack must not go.

    swc: the tree, by whose name the others are called. beside: endings of what is written with it and the list of
    places to review. is_named: somebody asked for a file of this very name, and may have it replaced.
    """
    trees = [path for path in _trees(swc) if (path != swc) == forest and not (is_named and path == swc)]
    has_results = review_of(swc).is_file() and is_ours(review_of(swc))
    foreign = [path for path in trees if not has_results or _has_stack_of_its_own(path, swc) or not is_ours(path)]
    others = [review_of(swc), *(swc.with_name(swc.stem + end) for end in beside)]
    for path in foreign + [path for path in others if path.exists() and not is_ours(path)]:
        raise ValueError(
            f"{path} is no result of an earlier run and would be lost; choose another place for what is written."
        )


@contextmanager
def all_or_none(out: Path, name: str) -> Iterator[Path]:
    """A hidden folder for the results of the stack `name`: they get into the folder `out` when all are written.

    What processes that were killed left of their own such folders is cleared.
    """
    with _made(out):
        _clear_abandoned(out, name)
        with TemporaryDirectory(prefix=f".{name}.", suffix=".partial", dir=out) as folder:
            Path(folder, _OWNER).write_text(json.dumps(this_process()))
            whole = Path(folder, "results")
            whole.mkdir()
            yield whole
            for path in sorted(whole.iterdir(), key=lambda path: _ORDER.index(path.suffix.lower())):
                os.replace(path, out / path.name)


def _clear_abandoned(out: Path, name: str) -> None:
    hidden = re.compile(rf"\.{re.escape(name)}\.\w+\.partial")
    for folder in out.iterdir():
        if hidden.fullmatch(folder.name) and _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Whether its process is known to be dead or, where nobody here can know, wrote nothing for long."""
    try:
        owner = json.loads((folder / _OWNER).read_text())
        silent_s = time.time() - max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except (OSError, ValueError):  # it is being made, or going, just now
        return False
    return is_dead(owner) or silent_s > _SILENT_S


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder; a new one goes again where nothing came into it."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


def tell_of_earlier(swc: Path, written: set[str], beside: tuple[str, ...] = ()) -> None:
    """A warning where results of an earlier run stay among the new ones, whose names are `written`."""
    trees = [path for path in _trees(swc) if path.name not in written and not _has_stack_of_its_own(path, swc)]
    stale = [path.name for path in trees if is_ours(path)]
    stale += [swc.stem + end for end in beside if swc.with_name(swc.stem + end).exists()]
    if stale:
        warnings.warn(f"Left by an earlier run, and not of this one: {', '.join(stale)}.", stacklevel=3)


def is_ours(path: Path) -> bool:
    """Whether this package wrote an SWC, a list of places to review, a picture or a TIFF, as the file itself says."""
    if path.suffix == ".png":
        with suppress(OSError), Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
        return False
    if path.suffix in (".tif", ".tiff"):
        with suppress(OSError, ValueError), tifffile.TiffFile(path) as tiff:
            return tiff.pages.first.software == SOFTWARE
        return False
    if path.suffix == ".csv":
        with path.open("rb") as file:
            return file.read(20).removeprefix(codecs.BOM_UTF8).startswith(_REVIEW_STARTS)
    return written_here(path)


def _trees(swc: Path) -> list[Path]:
    """`NAME.swc` and `NAME_1.swc`, `NAME_2.swc`, ..., as far as they are there."""
    name = re.compile(re.escape(swc.stem) + r"(_\d+)?")
    return sorted(path for path in swc.parent.glob(f"*{swc.suffix}") if name.fullmatch(path.stem))


def _has_stack_of_its_own(path: Path, swc: Path) -> bool:
    """Whether one of `_trees` is another stack's: NAME_1.swc that of NAME_1.tif, or NAME.swc one of its several."""
    if path != swc:
        return review_of(path).is_file()
    before = re.fullmatch(r"(.+)_\d+", path.stem)
    return before is not None and path.with_name(f"{before[1]}_review.csv").is_file()


def swc_files(tree: NeuronTree, path: Path, forest: bool) -> Iterator[tuple[Path, NeuronTree]]:
    """The SWC `path`, or with `forest` one per tree: `NAME_1.swc` with most cable, `NAME_2.swc`, ..."""
    if not forest:
        yield path, tree
        return
    trees = sorted(tree.split(), key=lambda part: -part.cable_length) or [tree]
    for number, part in enumerate(trees, start=1):
        yield path.with_name(f"{path.stem}_{number}{path.suffix}"), part


def write_review(reviews: list[Review], path: Path, unit: str | None) -> None:
    """One row per place to look at, in their order (see `trace_with_review`): kind, x, y, z and length in `unit`,
    confidence."""
    unit = "vox" if unit == "voxel" else unit
    with appearing(path) as hidden, hidden.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", *(f"{axis}_{unit}" for axis in "xyz"), f"length_{unit}", "confidence"])
        for review in reviews:
            z, y, x = review.point
            writer.writerow([review.kind, *(f"{v:.2f}" for v in (x, y, z, review.length)), f"{review.confidence:.3f}"])
