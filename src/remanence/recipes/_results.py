"""What recipes share: a results file that several memories write into, and its curve."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..evaluate.plots import save_figure
from ..files import write_text

Row = dict[str, Any]


def merge_rows(path: Path, rows: list[Row], memory: str, meta: Row) -> list[Row]:
    """Write {"rows", "meta"} to `path` with the rows of `memory` replaced and those of other memories kept; returns all rows."""
    kept: list[Row] = []
    if path.exists():
        try:
            kept = [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["memory"] != memory]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is not a results file ({type(error).__name__}: {error}); give another folder.") from error
    write_text(path, json.dumps({"rows": [*kept, *rows], "meta": meta}, indent=1) + "\n")
    return [*kept, *rows]


def resumed(
    path: Path, memory: str, key: Row, run: Callable[[], list[Row]], meta: Row, figure: Callable[[list[Row], Path], None], resume: bool
) -> list[Row]:
    """The rows of `memory` with the values of `key` that `path` holds; where there are none, what run() gives, merged in and drawn."""
    rows = merge_rows(path, [], "", meta) if resume else []
    mine = [row for row in rows if row["memory"] == memory and all(row[name] == value for name, value in key.items())]
    if not mine:
        mine = run()
        figure(merge_rows(path, mine, memory, meta), path.with_name("curve.png"))
    return mine


def lines(rows: Iterable[Row], label: Callable[[Row], str], x: str, y: str = "accuracy") -> dict[str, list[tuple[float, float]]]:
    """Columns x and y of the rows as points, a line for each label, in the order of the rows."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(label(row), []).append((row[x], row[y]))
    return curves


def refuse_folder(data: object, why: str) -> None:
    """Raise UsageError if a folder of texts was given to a recipe that reads none; why: what it does instead."""
    if data is not None:
        raise UsageError(f"data is {str(data)!r}; {why} and reads no folder.")


def named_once(text: str, what: str) -> list[str]:
    """The names in "a,b,c". Raises UsageError if one comes twice; what: what they are names of."""
    names = [name.strip() for name in text.split(",")]
    if len(set(names)) != len(names):
        raise UsageError(f"memory is {text!r}; each {what} may be named once.")
    return names


def plot(path: Path, curves: dict[str, list[tuple[float, float]]], x: str, y: str, decorate: Callable[[Any], None] | None = None) -> None:
    """A PNG with one line a curve, x logarithmic, in the style of all figures. decorate(axes) adds what else there is to see."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, points in curves.items():
            axes.plot(*zip(*points), marker="o", label=name)
        axes.set(xscale="log", xlabel=x, ylabel=y)
        if decorate is not None:
            decorate(axes)
        axes.legend()

    save_figure(path, draw)
