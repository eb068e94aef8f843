"""Which files are a neuron: stacks paired with their golds, in the layouts people have.

- gold166: `SET/NEURON/IMAGE.v3dpbd` (or v3draw, tif) beside `IMAGE[.ano]_stamp_YYYY_MM_DD_HH_MM.swc`. Sets are
  named with or without `p_`, neuron folders also with `err_`; golds also begin with `sorted_` or `00_sorted_` or
  end in `.eswc`. The newest stamp counts. What was made from a gold (`*_resampled*`, `*_radiusreestimated*`),
  `consensus*` and what tracers wrote is no gold unless asked for.
- a flat folder: `NAME.tif` beside `NAME.swc`.
- voxel by voxel: `NAME.tif` beside `NAME_label.tif` (TRAILMAP's codes, in part) or `NAME_mask.tif`.

Nothing here looks into a stack.
"""

import csv
import hashlib
import io
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..volume import SUFFIXES, stack_name
from .file_facts import stamp

TEST_SHARE = 0.2
SCALING_TABLE = "scaling_gold.csv"  # BigNeuron's own table of voxel sizes
_DEEPEST = 3  # folders below the one that is given: ARCHIVE/SET/NEURON
_SORTED_PREFIX, _SORTED_SUFFIX = r"(?:(?:\d+_)?sorted_)*", r"(?:(?:\.e?swc)?_sorted)*"
_STAMPED = re.compile(
    rf"{_SORTED_PREFIX}(?P<image>.+?)(?:\.(?P<part>neuron\d+))?(?:\.ano)?"
    rf"_stamp_(?P<stamp>\d{{4}}_?\d\d(?:_\d\d){{3,4}}){_SORTED_SUFFIX}\.e?swc",
    re.IGNORECASE,
)
_PLAIN = re.compile(rf"{_SORTED_PREFIX}(?P<image>.+?){_SORTED_SUFFIX}\.e?swc", re.IGNORECASE)
_ANNOTATIONS = ("_label", "_mask")
_SPECIES = {
    **dict.fromkeys(("fly", "fruitfly", "flylight", "flycircuit", "flycirciut", "drosophila"), "fruit fly"),
    **{name: name for name in ("silkmoth", "zebrafish", "mouse", "rat", "human", "frog", "chick")},
}
_LABS = {
    **{"janelia": "Janelia", "taiwan": "Taiwan FlyCircuit", "utokyo": "University of Tokyo"},
    **{"gmu": "George Mason University", "uw": "University of Washington", "korea": "KIST", "allen": "Allen Institute"},
    **{"ugoettingen": "University of Goettingen", "cambridge": "University of Cambridge", "tufts": "Tufts University"},
    **dict.fromkeys(("scripps", "scrippts"), "Scripps"),
}


@dataclass(frozen=True)
class Survey:
    """What a folder holds: `rows` as `find_pairs` gives them, names of stacks without a gold, and every file that
    had a say in it."""

    rows: list[dict]
    alone: list[str]
    files: list[Path]

    @property
    def fingerprint(self) -> str:
        """Changes when a file comes, goes, grows or is written again."""
        facts = [fact for file in self.files for fact in stamp(file)]
        return hashlib.sha256(repr(sorted(facts)).encode()).hexdigest()


def find_pairs(data_dir: str | Path, *, gold: str | None = None, spacing_table: str | Path | None = None) -> list[dict]:
    """Rows of one neuron each, sorted by name; see the module's text for the layouts.

    name: the stack's file name without suffixes (with its folders below `data_dir` where two would have one name).
    neuron: the same without them: what the split goes by. image, swc, label: paths, "" where there is none; a row
    has an swc or a label. spacing_um: (z, y, x) of the table, or None. species, lab: where the set's name or
    the table says them, else "".

    gold: a pattern such as `"*_resampled.swc"`; SWCs of that name are then the golds, whatever they are.
    spacing_table: a CSV with the columns name, z_um, y_um, x_um (species and lab if known), or BigNeuron's
    `scaling_gold.csv`, which is found by itself when it lies in the folder.

    Stacks without a gold are named in a warning. FileNotFoundError: no such folder, or one that holds no pair.
    ValueError: a table that cannot be read, two SWCs that both fit `gold`.
    """
    found = survey(data_dir, gold=gold, spacing_table=spacing_table)
    if found.alone:
        warnings.warn(skipped(found.alone), stacklevel=2)
    return found.rows


def skipped(alone: list[str]) -> str:
    """The sentence that lists stacks without a gold."""
    what = "stack has no gold and is" if len(alone) == 1 else "stacks have no gold and are"
    return f"{len(alone)} {what} skipped: {', '.join(alone)}."


def survey(data_dir: str | Path, *, gold: str | None = None, spacing_table: str | Path | None = None) -> Survey:
    """`find_pairs` without its warning, and with what it left aside."""
    root = Path(data_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder.")
    rows, alone, files = [], [], []
    for part in _walk(root, gold):
        rows += part.rows
        alone += part.alone
        files += part.files
    if not rows:
        left = f" {skipped(alone)}" if alone else ""
        raise FileNotFoundError(
            f"{root} holds no pair of a stack ({', '.join(SUFFIXES)}) and an SWC of the same name.{left}"
        )
    rows = _named(rows, root)
    table = Path(spacing_table) if spacing_table else root / SCALING_TABLE
    if spacing_table or table.is_file():
        spacings, files = SpacingTable.read(table), [*files, table]
        said = [spacings.of(row) for row in rows]
        if spacing_table and not any(said):
            known = "states no whole size of" if spacings.facts.keys() & {row["name"] for row in rows} else "names"
            raise ValueError(f"{table} says nothing of any neuron in {root}: it {known} {_few(spacings.facts)}.")
        rows = [{**row, **facts} for row, facts in zip(rows, said, strict=True)]
    return Survey(rows, sorted(alone), files)


def _few(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"


def split_of(neuron: str) -> str:
    """ "train" or "test", from the neuron's name alone: adding a neuron never moves another."""
    share = int(hashlib.sha256(neuron.encode()).hexdigest()[:8], 16) / 2**32
    return "test" if share < TEST_SHARE else "train"


def split_name(text: str) -> str:
    """ "train" and "test" however they are capitalised; other splits as they are called."""
    return text.lower() if text.lower() in ("train", "test") else text


def splits_of(rows: list[dict], split_file: str | Path | None = None) -> dict[str, str]:
    """A row's name -> its split: the file's, by name or by neuron, else `split_of`.

    ValueError: as `read_split_file`; two neurons of one stack are in two splits, and one would be seen in the other.
    """
    chosen = read_split_file(split_file, rows) if split_file else {}
    splits = {
        row["name"]: chosen.get(row["name"]) or chosen.get(row["neuron"]) or split_of(row["neuron"]) for row in rows
    }
    first = {row["image"]: row["name"] for row in reversed(rows)}
    for row in rows:
        other = first[row["image"]]
        if splits[other] != splits[row["name"]]:
            raise ValueError(
                f"{other} and {row['name']} lie in one stack, and by {split_file} they are in two splits "
                f"({splits[other]} and {splits[row['name']]}); name both, in one."
            )
    return splits


def read_split_file(path: str | Path, rows: list[dict]) -> dict[str, str]:
    """Split by name: JSON `{"train": [names], "test": [names]}`, or a CSV with the columns name, split.

    "train" and "test" are understood in capitals too. ValueError: no such file or columns, a name that no row has, a
    neuron in two splits or in none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the split file {path} does not exist.")
    if path.suffix.lower() == ".json":
        pairs = _json_splits(path)
    else:
        pairs = [(line["name"], line["split"]) for line in _csv_lines(path, {"name", "split"})]
    pairs = [(name, split_name(split)) for name, split in pairs]
    nowhere = sorted(name for name, split in pairs if not split)
    if nowhere:
        raise ValueError(f"{path} puts {', '.join(nowhere)} into no split.")
    splits = dict(pairs)
    twice = sorted({name for name, split in pairs if splits[name] != split})
    if twice:
        raise ValueError(f"{path} puts {', '.join(twice)} into two splits; a neuron belongs to one.")
    unknown = sorted(set(splits) - {row["name"] for row in rows} - {row["neuron"] for row in rows})
    if unknown:
        raise ValueError(f"{path} names {', '.join(unknown)}, which the folder does not hold.")
    return splits


def _json_splits(path: Path) -> list[tuple[str, str]]:
    try:
        splits = json.loads(path.read_text("utf-8-sig"))
        fits = all(
            isinstance(names, list) and all(isinstance(name, str) for name in names) for names in splits.values()
        )
    except (ValueError, AttributeError):
        fits = False
    if not fits:
        form = '{"train": [names], "test": [names]}'
        raise ValueError(f"{path} is no split file: JSON has the form {form}.")
    return [(name, split) for split, names in splits.items() for name in names]


# --- folders ---


def _walk(folder: Path, gold: str | None, above: tuple[str, ...] = ()) -> Iterator[Survey]:
    """One survey per folder that holds stacks. Below a folder with pairs nothing is searched: there lie results."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    stacks = [path for path in entries if path.suffix.lower() in SUFFIXES]
    names = (*above, folder.resolve().name)
    words = set(re.split(r"[\W_]+", "_".join(names).lower()))
    here = _survey_folder(folder, stacks, [path for path in entries if _is_swc(path)], gold, words)
    if stacks:
        yield here
    if not here.rows and len(above) < _DEEPEST:
        for path in entries:
            if path.is_dir() and path not in stacks and path.suffix != ".partial":
                yield from _walk(path, gold, names)


def _is_swc(path: Path) -> bool:
    return path.suffix.lower() in (".swc", ".eswc") and path.is_file()


def _survey_folder(folder: Path, stacks: list[Path], swcs: list[Path], gold: str | None, words: set[str]) -> Survey:
    labels = _labels(stacks)
    images: dict[str, list[Path]] = {}
    for path in stacks:
        if path not in labels.values():
            images.setdefault(stack_name(path), []).append(path)
    golds = _golds(swcs, set(images)) if gold is None else _asked_for(folder, swcs, set(images), gold)
    rows, alone = [], []
    for bare, paths in images.items():
        found = golds.get(bare, {})
        label = next((labels[path] for path in paths if path in labels), None)
        for part, swc in sorted(found.items()):
            tag = f".{part}" if part and len(found) > 1 else ""
            rows.append(_row(words, bare + tag, bare, _image_of(swc, paths), swc=swc))
        if label and not found:
            rows.append(_row(words, bare, bare, paths[0], label=label))
        elif not found:
            alone.append(bare)
    return Survey(rows, alone, [*stacks, *swcs])


def _row(words: set[str], name: str, neuron: str, image: Path, **gold: Path) -> dict:
    species = next((known for word, known in _SPECIES.items() if word in words), "")
    lab = next((known for word, known in _LABS.items() if word in words), "")
    paths = {key: str(gold.get(key, "")) for key in ("swc", "label")}
    return {
        **{"name": name, "neuron": neuron, "image": str(image), **paths},
        **{"spacing_um": None, "species": species, "lab": lab},
    }


def _named(rows: list[dict], root: Path) -> list[dict]:
    """Rows sorted by name; where two have one name, both take the names of their folders below `root` with it."""
    counts = Counter(row["name"] for row in rows)
    for row in rows:
        if counts[row["name"]] > 1:
            row["name"] = (Path(row["image"]).parent.relative_to(root) / row["name"]).as_posix()
    return sorted(rows, key=lambda row: row["name"])


def _labels(stacks: list[Path]) -> dict[Path, Path]:
    """Stack -> its label volume: `NAME_label.tif` or `NAME_mask.tif`, and TRAILMAP's `volume`, `label`."""
    by_name = {stack_name(path): path for path in stacks}
    found = {}
    for name, path in by_name.items():
        wanted = [name + ending for ending in _ANNOTATIONS] + [name.replace("volume", "label")]
        label = next((by_name[other] for other in wanted if other in by_name and other != name), None)
        if label:
            found[path] = label
    return found


def is_mask(label: str | Path) -> bool:
    """Whether a label volume is a whole mask, `NAME_mask.tif`, and no volume of codes."""
    return stack_name(label).endswith("_mask")


# --- golds ---


def _parsed(name: str) -> tuple[str, str, str]:
    """An SWC's file name -> (image's bare name, "neuron2" or "", stamp as digits or "")."""
    match = _STAMPED.fullmatch(name)
    if match:
        return stack_name(match["image"]), match["part"] or "", match["stamp"].replace("_", "")
    return stack_name(_PLAIN.fullmatch(name)["image"]), "", ""


def _newest(swc: Path) -> tuple[str, int, str]:
    """Sort key: the latest stamp last; of one stamp the shortest name, which is the annotator's own file."""
    return _parsed(swc.name)[2], -len(swc.name), swc.name


def _golds(swcs: list[Path], images: set[str]) -> dict[str, dict[str, Path]]:
    """Bare image name -> {part: gold}; parts are the neurons of one stack, "" where it has one."""
    golds: dict[str, dict[str, Path]] = {}
    for swc in sorted(swcs, key=_newest):
        image, part, _ = _parsed(swc.name)
        if image in images:
            golds.setdefault(image, {})[part] = swc
    for parts in golds.values():
        if len(parts) > 1 and "" in parts and not _parsed(parts[""].name)[2]:
            del parts[""]  # an IMAGE.swc beside stamped golds of the stack's single neurons
    return golds


def _asked_for(folder: Path, swcs: list[Path], images: set[str], pattern: str) -> dict[str, dict[str, Path]]:
    fitting = [swc for swc in swcs if fnmatchcase(swc.name, pattern)]
    golds = {}
    for image in images:
        start = re.compile(rf"(?:consensus_)?{_SORTED_PREFIX}{re.escape(image)}(?![A-Za-z0-9])")
        own = sorted((swc for swc in fitting if len(images) == 1 or start.match(swc.name)), key=_newest)
        stamps = [_parsed(swc.name)[2] for swc in own]
        if len(own) > 1 and stamps[-1] == stamps[-2]:
            names = ", ".join(swc.name for swc in own)
            raise ValueError(f"{folder}: several SWCs fit {pattern!r} ({names}); give a narrower pattern.")
        if own:
            golds[image] = {"": own[-1]}
    return golds


def _image_of(swc: Path, paths: list[Path]) -> Path:
    """Of one stack in several formats the one that the gold was drawn on, else the first format in `SUFFIXES`."""
    drawn_on = [path for path in paths if path.name in swc.name]
    if drawn_on:
        return max(drawn_on, key=lambda path: len(path.name))
    return min(paths, key=lambda path: SUFFIXES.index(path.suffix.lower()))


# --- tables ---


@dataclass(frozen=True)
class SpacingTable:
    """Facts by name: spacing_um (z, y, x), species, lab. BigNeuron's table names golds, ours names rows."""

    facts: dict[str, dict]

    @classmethod
    def read(cls, path: str | Path) -> "SpacingTable":
        """ValueError, FileNotFoundError: one sentence with the line."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"the spacing table {path} does not exist.")
        wanted = ({"swc_file", "x_y_pix_size", "z_pix_size"}, {"name", "z_um", "y_um", "x_um"})
        lines = list(_csv_lines(path, *wanted))
        facts: dict[str, dict] = {}
        for number, line in enumerate(lines, start=2):
            is_bigneuron = "swc_file" in line
            columns = ("z_pix_size", *["x_y_pix_size"] * 2) if is_bigneuron else ("z_um", "y_um", "x_um")
            spacing = _spacing([line[column] for column in columns], path, number)
            said = {"spacing_um": spacing, "species": line.get("species"), "lab": line.get("lab")}
            said = {key: value for key, value in said.items() if value}
            names = _gold_names(line["swc_file"]) if is_bigneuron else [line["name"]]
            for name in names:
                # two neurons of one name and two spacings: the name alone says nothing
                facts[name] = {} if facts.get(name, said) != said else said
        return cls(facts)

    def of(self, row: dict) -> dict:
        """What the table says of a row; empty where it says nothing."""
        bare = row["name"].rsplit("/", 1)[-1]
        names = [row["name"], bare, *(_gold_names(row["swc"]) if row["swc"] else []), row["neuron"]]
        return next((self.facts[name] for name in names if self.facts.get(name)), {})


def _gold_names(swc: str) -> list[str]:
    """A gold's identity with its stamp, then the bare name of its image."""
    image, part, stamp = _parsed(swc.replace("\\", "/").rsplit("/", 1)[-1])
    return [f"{image} {part} {stamp}", image] if stamp else [image]


def _spacing(words: list[str], path: Path, number: int) -> tuple[float, ...] | None:
    if {word.strip().upper() for word in words} & {"", "NA", "NAN"}:
        return None
    try:
        spacing = tuple(float(word) for word in words)
    except ValueError:
        spacing = (math.nan,)
    if not all(0 < step < math.inf for step in spacing):
        raise ValueError(f"{path}, line {number}: a voxel size is a positive number of um, got {', '.join(words)}.")
    return spacing


def _csv_lines(path: Path, *wanted: set[str]) -> Iterator[dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8; save it as CSV UTF-8.") from None
    with io.StringIO(text, newline="") as file:
        reader = csv.DictReader(file)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        columns = set(reader.fieldnames)
        if not any(names <= columns for names in wanted):
            names = " or ".join(", ".join(sorted(names)) for names in wanted)
            raise ValueError(f"{path} must have the columns {names}; it has {', '.join(sorted(columns)) or 'none'}.")
        for number, line in enumerate(reader, start=2):
            if None in line.values():
                raise ValueError(f"{path}, line {number} has fewer columns than the first line.")
            if not any(line.values()):  # as spreadsheets leave them
                continue
            yield {column: cell.strip() if isinstance(cell, str) else cell for column, cell in line.items()}
