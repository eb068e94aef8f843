"""Rows for people: a plain table, Markdown, JSON; and the sections of a card that scripts fill."""

import json
import math
from pathlib import Path


def summary(tree) -> dict:
    """The columns of a traced tree; the unit ends the name of its cable length."""
    unit = "um" if tree.unit == "um" else "vox"
    return {
        "nodes": len(tree),
        "trees": tree.num_roots,
        f"cable_{unit}": tree.cable_length,
        "tips": tree.num_tips,
        "branch_points": tree.num_branch_points,
    }


def json_lines(path: Path | None) -> list[dict]:
    """The rows of a file, one in each line, without a last one that a kill cut short; none where there is no file."""
    rows, lines = [], path.read_text().splitlines() if path is not None and path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is no JSON.") from None
    return rows


def add_json_line(path: Path, row: dict) -> None:
    """Append a row to such a file, in place of a last line that a kill cut short."""
    before = path.read_bytes() if path.exists() else b""
    end = before.rfind(b"\n") + 1
    with path.open("ab") as file:
        try:
            json.loads(before[end:] or b"{}")
            file.write(b"\n" * (end < len(before)))  # a whole line, of an editor say, that only lacks its end
        except ValueError:
            file.truncate(end)
        file.write((json.dumps(row) + "\n").encode())


def as_table(rows: list[dict]) -> str:
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


def _finite(row: dict) -> dict:
    """JSON knows no infinity."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def as_json_text(rows: list[dict]) -> str:
    return json.dumps([_finite(row) for row in rows], indent=2)


def fill_card(path: str | Path, section: str, text: str) -> None:
    """Replace what stands between `<!-- section -->` and `<!-- /section -->`: numbers in cards are never typed."""
    path = Path(path)
    before, opening, rest = path.read_text().partition(f"<!-- {section} -->")
    _, closing, after = rest.partition(f"<!-- /{section} -->")
    if not closing:
        raise ValueError(f"{path} has no section <!-- {section} --> ... <!-- /{section} -->.")
    path.write_text(f"{before}{opening}\n{text.strip()}\n{closing}{after}")


def markdown_table(rows: list[dict]) -> str:
    """Rows of equal keys as a Markdown table; floats with three digits after the point, small ones with two."""
    keys = list(rows[0])
    cells = [[_digits(row[key]) for key in keys] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [keys, ["---"] * len(keys), *cells])


def _digits(value) -> str:
    return f"{value:.2g}" if isinstance(value, float) and 0 < abs(value) < 1e-3 else _cell(value)
