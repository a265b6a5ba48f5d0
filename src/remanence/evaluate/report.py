"""One self-contained HTML page: text, tables, and figures inside the file; and such a page made of files of results."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

from ..errors import UnknownName, UsageError
from ..files import write_text
from . import plots
from .longrange import Row, runs_of
from .published import curves


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs of plain text, a table (the first row is its head), a PNG (a file or its bytes) and its caption.

    What is empty is left out.
    """

    title: str
    text: Sequence[str] = ()
    table: Sequence[Sequence[object]] = ()
    image: str | Path | bytes | None = None
    caption: str = ""

    def html(self) -> str:
        parts = [f"<h2>{escape(self.title)}</h2>", *(f"<p>{escape(paragraph)}</p>" for paragraph in self.text)]
        if self.table:
            head, *body = self.table
            parts.append(f"<table><thead>{_row(head, 'th')}</thead><tbody>{''.join(_row(row, 'td') for row in body)}</tbody></table>")
        if self.image is not None:
            png = self.image if isinstance(self.image, bytes) else Path(self.image).read_bytes()
            data = base64.b64encode(png).decode()
            caption = f"<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
            parts.append(f'<figure><img src="data:image/png;base64,{data}" alt="{escape(self.caption or self.title)}">{caption}</figure>')
        return "<section>" + "\n".join(parts) + "</section>"


def _row(cells: Sequence[object], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"


STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2.5rem auto; padding: 0 1rem }
section { overflow-x: auto }
h1 { margin-bottom: .2rem } h2 { margin-top: 2.5rem; font-size: 1.2rem } .lead { font-size: 1.15rem; margin-top: 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8884 }
th:first-child, td:first-child { text-align: left } figure { margin: 1rem 0 } img { max-width: 100%; background: white; border-radius: 4px }
figcaption { font-size: .9rem; opacity: .75 }
"""


def write_report(path: str | Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all. Raises FileError if it cannot be written."""
    body = "\n".join(section.html() for section in sections)
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>"
        f'<p class="lead">{escape(lead)}</p>\n{body}\n</body></html>\n',
    )


def report(files: Sequence[str | Path], out: str | Path, title: str = "Results") -> None:
    """One page of many files of results {"rows", "meta"}: for each its table, a figure of it, and where every number comes from.

    Each row of a table names its run; the table of runs gives command, commit, versions and machine of each. Raises UsageError on a file
    that holds no results, or if none is given, before anything is written; FileError if the page cannot be.
    """
    if not files:
        raise UsageError("files is empty; name at least one file of results.")
    sections = [section for file in files for section in sections_of(Path(file))]
    lead = f"{len(files)} file{'s' if len(files) > 1 else ''} of results; under each, what every number was measured with."
    write_report(out, title, lead, sections)


def sections_of(path: Path) -> list[Section]:
    """The sections of one file: rows with their figure, and provenance. Raises UsageError if it is not a file of results."""
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
        rows, meta = [dict(row) for row in content["rows"]], dict(content.get("meta") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a file of results ({type(error).__name__}: {error}).") from error
    runs = runs_of(meta)
    if not rows:
        return [Section(str(path), ["The file has no rows."]), _provenance(path, raw, meta, runs)]
    for row in rows:
        row["run"] = 1 + int(row.get("run", 0))
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if any(_plain(row.get(name)) for row in rows)]
    differ = [name for name in columns if name == "run" or len({repr(row.get(name)) for row in rows}) > 1 or len(rows) == 1]
    same = [f"{name} {_cell(rows[0].get(name))}" for name in columns if name not in differ]
    table = [differ, *([_cell(row.get(name)) for name in differ] for row in rows)]
    text = [f"In every row: {', '.join(same)}."] if same else []
    image, caption = figure_of(rows)
    return [Section(str(path), text, table, image, caption), _provenance(path, raw, meta, runs)]


def _provenance(path: Path, raw: bytes, meta: Mapping[str, Any], runs: Sequence[Row]) -> Section:
    """What a file's numbers were measured with: its runs as columns, and everything else that it says of itself."""
    names = list(dict.fromkeys(name for run in runs for name in run))
    table = [["run", *range(1, 1 + len(runs))], *([name, *(_cell(run.get(name)) for run in runs)] for name in names)] if runs else []
    said = {name: value for name, value in meta.items() if name not in ("environment", "runs")}
    text = [f"sha256 of the file: {sha256(raw).hexdigest()}"]
    text += [f"{name}: {value if isinstance(value, str) else json.dumps(value, default=str)}" for name, value in said.items()]
    if not runs:
        text.append("The file does not say on which machine, at which commit and by which command it was measured.")
    return Section(f"Provenance of {path.name}", text, table)


def _plain(value: object) -> bool:
    return isinstance(value, str | int | float | bool) or (isinstance(value, Mapping) and len(value) < 9)


def _cell(value: object) -> str:
    """A value as a cell shows it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(item)}" for name, item in value.items()) or "-"
    return str(value)


MEASURES = (
    "accuracy", "bits_per_byte", "perplexity", "loss", "residual", "ratio", "tokens_per_s", "ms_per_token", "error", "peak_to_bptt",
    "recall", "mse",
)  # fmt: skip
"""What a figure may be of: the first of these that the rows have."""
AXES = (
    "length", "tokens", "pairs", "position", "iteration", "data", "words", "examples", "list", "distance", "steps", "state_bytes",
    "segments", "keys",
)  # fmt: skip
"""What it may be drawn over: the first of these that differs between rows."""
LABELS = ("memory", "mixer", "task", "fix", "way", "form", "pass", "method", "queries")
"""What tells its lines apart."""


def figure_of(rows: Sequence[Row]) -> tuple[bytes | None, str]:
    """A figure of rows, as a PNG, and its caption; (None, "") for rows with nothing to draw.

    Rows of `evaluate` give accuracy by length with published curves (several tasks: a heat map and curves), those of `bench speed` the
    bars of that command, any others the first of MEASURES over the first of AXES, a line for each memory, mixer or task.
    """
    keys = set.intersection(*(set(row) for row in rows))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        caption = ""
        if {"accuracy", "low", "high", "length", "memory", "task"} <= keys:
            caption = draw_accuracy(rows, path)
        elif {"ratio_to_floor", "ratio_to_peer", "pass", "length", "mixer"} <= keys:
            longest = max(row["length"] for row in rows)
            plots.speed(rows, path, longest)
            caption = f"Speed at {longest:,} tokens, in units of two linear layers."
        elif measure := next((name for name in MEASURES if any(_number(row.get(name)) for row in rows)), None):
            caption = _draw_any([row for row in rows if _number(row.get(measure))], measure, path)
        return (path.read_bytes(), caption) if path.is_file() else (None, "")


def draw_accuracy(rows: Sequence[Row], path: str | Path, title: str = "", chance: float | None = None) -> str:
    """The figure of rows of `evaluate`, with the published curves of their tasks; returns its caption."""
    asked = list(dict.fromkeys((str(row["task"]), row.get("qa")) for row in rows))
    told = {f"{task} {qa}" if qa else task: _published(task, qa) for task, qa in asked}
    if len(asked) == 1:
        name = next(iter(told))
        plots.accuracy_by_length(rows, path, told[name], chance, title or name)
    else:
        plots.tasks_by_length(rows, path, told, title)
    sources = sorted({curve.source for found in told.values() for curve in found})
    return "Bars are Wilson's 95 % intervals." + (f" Published: {'; '.join(sources)}." if sources else "")


def _published(task: str, qa: str | None) -> list[Any]:
    try:
        return curves(task, qa)
    except UnknownName:  # a task of an older or newer version
        return []


def _draw_any(rows: Sequence[Row], measure: str, path: Path) -> str:
    axis = next((name for name in AXES if name != measure and len({row[name] for row in rows if _number(row.get(name))}) > 1), None)

    def label(row: Row) -> str:
        told = [str(row[name]) for name in LABELS if row.get(name) is not None]
        parts = [part for part in dict.fromkeys(told) if not any(part in other for other in told if len(other) > len(part))]
        return ", ".join(_differing(parts, rows))

    if axis is None:
        plots.bars([(label(row), row[measure]) for row in rows], path, measure)
        return f"{measure} of each row."
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if _number(row.get(axis)):
            found.setdefault(label(row), []).append((row[axis], row[measure]))
    plots.lines({name: _means(points) for name, points in found.items()}, path, axis, measure)
    return f"{measure} over {axis}; where rows share both name and {axis}, their mean."


def _differing(parts: Sequence[str], rows: Sequence[Row]) -> Sequence[str]:
    """The parts that are not in every row; the first alone if there is none."""
    return [part for part in parts if not all(part in map(str, row.values()) for row in rows)] or parts[:1] or ["all"]


def _means(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    at: dict[float, list[float]] = {}
    for x, y in points:
        at.setdefault(x, []).append(y)
    return [(x, sum(ys) / len(ys)) for x, ys in sorted(at.items())]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
