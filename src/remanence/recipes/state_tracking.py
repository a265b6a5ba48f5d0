"""state-tracking: does the memory compute, or only add? Words over a finite group, tested at lengths that no training word had.

Trained on words of at most 40 elements, tested up to 256; the groups are parity and S3 (arXiv 2404.08819; 2405.04517; 2411.12537).
A cell's training ends early once it is right at 128 elements, because a rule that is right at 40 need not last.
`remanence train state-tracking`; one cell: `--mixers slstm@group=s3`. Other groups: s5, a5, z60.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..tasks import state_tracking
from ..tasks.symbols import Arrays
from ._grid import Cell, Grid, draw, grid_recipe
from ._results import Row, lines

VOCAB = 120
STAGES = (4, 8, 16, 24, 40)
TESTED = (40, 64, 128, 256)
SETTINGS: dict[str, dict[str, Any]] = {
    "slstm": {},
    "flashrnn": {},
    "pararnn": {},
    "gated-deltanet": {"negative_eigenvalues": True},
    "mamba2": {},
    "gla": {},
    "mingru": {},
}
MIXERS = {slug: tuple({"group": group, **setting} for group in ("parity", "s3")) for slug, setting in SETTINGS.items()}


def make(rng: np.random.Generator, rows: int, length: int, group: str) -> Arrays:
    """Words of that many elements."""
    return state_tracking.batch(rng, rows, length, group)


def figure(rows: list[Row], path: Path) -> None:
    """Accuracy over length, a line a cell."""
    curves = lines(rows, lambda row: f"{row['mixer']}, {row['group']}", "length")
    draw(path, curves, f"elements of the word (trained on at most {STAGES[-1]})", "accuracy", 1 / 2)


def grid(cells: list[Cell], steps: int | None, fast: bool, **where: Any) -> Grid:
    """The recipe's grid; where: seed and device."""
    tested = TESTED[:2] if fast else TESTED
    return Grid(
        "state-tracking", "state-tracking", cells, make, VOCAB, STAGES[:2] if fast else STAGES, tested, "length",
        figure, steps or (4 if fast else 2000), {"group": "parity"},
        n=16 if fast else 256, rows=4 if fast else 32, lr=4e-3, goal=0.999, stop_at=tested[-2], vary=True, **where,
    )  # fmt: skip


recipe = grid_recipe(grid, MIXERS, "state-tracking makes its own words")
