"""selective-copying: can the memory choose what it keeps? 16 data tokens among noise, said again in order (arXiv 2312.00752, 2410.01201).

Sequences of 256 tokens and 16 marks. `remanence train selective-copying`; one cell: `--mixers mingru@depth=3`.

Not the published sweep in two ways, each for a budget of minutes: 256 tokens for 4096, and a curriculum of 2, 4, 8, 16 data tokens, each
among 16 times as many.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..tasks import selective_copying
from ..tasks.symbols import Arrays
from ._grid import Cell, Grid, draw, grid_recipe
from ._results import Row, lines

STAGES = (2, 4, 8, 16)
SPREAD = 16
CHANCE = 1 / 14
MIXERS = {"mamba": ({},), "s4d": ({},), "mingru": ({"depth": 1}, {"depth": 3}), "minlstm": ({"depth": 3},), "gated-deltanet": ({},)}


def make(rng: np.random.Generator, rows: int, data: int) -> Arrays:
    """Rows of `data` tokens among SPREAD times as many, and as many marks."""
    return selective_copying.batch(rng, rows, SPREAD * data, data)


def figure(rows: list[Row], path: Path) -> None:
    """Accuracy over the number of data tokens, a line a cell."""
    draw(path, lines(rows, lambda row: row["memory"], "data"), f"data tokens, among {SPREAD} times as many", "accuracy", CHANCE)


def grid(cells: list[Cell], steps: int | None, fast: bool, **where: Any) -> Grid:
    """The recipe's grid; where: seed and device."""
    return Grid(
        "selective-copying", "selective-copying", cells, make, selective_copying.SelectiveCopying.vocab_size,
        STAGES[:2] if fast else STAGES, STAGES[:2] if fast else STAGES, "data", figure, steps or (4 if fast else 2000),
        n=16 if fast else 256, rows=4 if fast else 8, lr=4e-3, **where,
    )  # fmt: skip


recipe = grid_recipe(grid, MIXERS, "selective-copying makes its own sequences")
