"""The text of an SWC file: its header, its columns, the line of a node. Numbers in, numbers out; no tree."""

import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COLUMNS = ("id", "type", "x", "y", "z", "radius", "parent", "confidence")
PLAIN, WITH_CONFIDENCE = " ".join(COLUMNS[:7]), " ".join(COLUMNS)
EMPTY = "no nodes: the tree is empty"
_GENERATOR = "generator: vit3d"
_FIRST_NODE = re.compile(r"^[ \t]*[^#\s]", re.MULTILINE)
_NODE_LINE = re.compile(r"^[ \t]*[^#\s].*", re.MULTILINE)
_DECIMAL_COMMA = re.compile(r"^[ \t]*(?:[^#\s,]+[ \t]+){2}-?\d+,\d+[ \t]", re.MULTILINE)
_UNIT = re.compile(r"^\s*# unit: (um|voxel)\s*$", re.MULTILINE)
_SPACING = re.compile(r"^\s*# spacing_um \(z, y, x\): (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class SwcText:
    """A file's lines, joined by newlines, its columns separated by blanks or tabs."""

    path: Path
    text: str

    @classmethod
    def open(cls, path: Path) -> "SwcText":
        """Any line ending, commas between columns. ValueError, FileNotFoundError: not a text with content."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist or is no file; give the path of an SWC file.")
        data = path.read_bytes()
        if not data.strip():
            raise ValueError(f"{path} is empty; an SWC file has one line per node.")
        if b"\0" in data:
            raise ValueError(f"{path} is binary; an SWC file is text with one line per node.")
        text = data.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
        return cls(path, text)._without_commas()

    def _without_commas(self) -> "SwcText":
        first = _FIRST_NODE.search(self.text)
        if first is None or "," not in self.text[first.start() :]:
            return self
        decimal = _DECIMAL_COMMA.search(self.text)
        if decimal:
            line = self.text.count("\n", 0, decimal.start()) + 1
            raise ValueError(f"{self.path}, line {line} has decimal commas; write decimals with a point.")
        return SwcText(self.path, _NODE_LINE.sub(lambda line: line[0].replace(",", " "), self.text))

    @property
    def _comments(self) -> str:
        return "\n".join(line for line in self.text[:65536].split("\n") if line.lstrip().startswith("#"))

    @property
    def has_nodes(self) -> bool:
        """Whether any line is neither blank nor a comment."""
        return _FIRST_NODE.search(self.text) is not None

    @property
    def says_empty(self) -> bool:
        """Whether the header states that the tree has no nodes, as our own does."""
        return f"# {EMPTY}" in self._comments

    @property
    def says_confidence(self) -> bool:
        """Whether the header names an eighth column `confidence`, as our own does."""
        return f"# {WITH_CONFIDENCE}" in self._comments

    @property
    def unit(self) -> str | None:
        """ "um" or "voxel" as our own header states it, or None."""
        stated = _UNIT.search(self._comments)
        return stated[1] if stated else None

    @property
    def spacing_um(self) -> tuple[float, ...] | None:
        """(z, y, x) as our own header states it, or None."""
        stated = _SPACING.search(self._comments)
        try:
            spacing = tuple(float(word) for word in stated[1].split(",")) if stated else None
        except ValueError:
            spacing = ()
        if spacing is not None and (len(spacing) != 3 or not all(0 < step < math.inf for step in spacing)):
            raise ValueError(f"{self.path} has a header whose spacing is not three positive numbers: {stated[0]!r}.")
        return spacing

    def table(self, columns: int = 7) -> np.ndarray:
        """(N, columns) finite numbers; id, type and parent whole. ValueError: names the first bad line."""
        try:
            table = np.loadtxt(io.StringIO(self.text), usecols=range(columns), ndmin=2)
        except ValueError:
            table = self._table_line_by_line(columns)
        bad = ~np.isfinite(table).all(axis=1)
        if bad.any():
            raise self.error(bad.argmax(), "has NaN or infinity; every column must be a finite number")
        whole = table[:, [0, 1, 6]]
        bad = ((whole % 1 != 0) | (abs(whole) > 2**53)).any(axis=1)
        if bad.any():
            raise self.error(bad.argmax(), "has an id, type or parent that is no whole number")
        return table

    def _table_line_by_line(self, columns: int) -> np.ndarray:
        rows = []
        for number, line in enumerate(self.text.split("\n"), start=1):
            words = line.split("#")[0].split()
            if not words:
                continue
            try:
                row = [float(word) for word in words[:columns]]
            except ValueError:
                what = f"has text where numbers belong: {line[:60]!r}"
                raise ValueError(f"{self.path}, line {number} {what}.") from None
            if len(row) < columns:
                what = f"has {len(row)} columns; a node here has {columns}: {' '.join(COLUMNS[:columns])}"
                raise ValueError(f"{self.path}, line {number} {what}.")
            rows.append(row)
        return np.array(rows)

    def error(self, row: int, what: str) -> ValueError:
        """A sentence about one row of the table: file, line, id and `what`."""
        words = [line.split("#")[0].split() for line in self.text.split("\n")]
        line = [number for number, found in enumerate(words) if found][row]
        return ValueError(f"{self.path}, line {line + 1} (node {words[line][0]}) {what}.")


def review_of(swc: Path) -> Path:
    """Where the places to review of a trace are listed, beside it."""
    return swc.with_name(f"{swc.stem}_review.csv")


def written_here(path: Path) -> bool:
    """Whether this package wrote the file, as its first lines say."""
    with path.open("rb") as file:
        return _GENERATOR.encode() in file.read(4096)


def header(unit: str | None, spacing_um: tuple[float, ...] | None, *, confidence: bool, empty: bool) -> str:
    """The comment lines that `SwcText` reads back."""
    from vit3d import __version__

    lines = [f"{_GENERATOR} {__version__}"]
    lines += [f"unit: {unit}"] if unit else []
    lines += ["spacing_um (z, y, x): " + ", ".join(map(repr, spacing_um))] if spacing_um else []
    lines += [WITH_CONFIDENCE if confidence else PLAIN]
    lines += [EMPTY] if empty else []
    return "".join(f"# {line}\n" for line in lines)


def node_lines(table: np.ndarray, chunk: int = 65536):
    """(N, 7 or 8) numbers as text, many lines at once; lengths to 1e-5 of their unit."""
    line = "%d %d %.5f %.5f %.5f %.5f %d" + " %.4f" * (table.shape[1] - 7) + "\n"
    for start in range(0, len(table), chunk):
        rows = table[start : start + chunk]
        yield (line * len(rows)) % tuple(rows.ravel().tolist())
