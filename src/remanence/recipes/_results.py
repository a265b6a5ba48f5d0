"""What recipes share: a results file that several memories write into, and its curve."""

from __future__ import annotations

import json
from collections.abc import Callable
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
