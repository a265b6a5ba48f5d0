"""selective-copying: can the memory choose what it keeps? 16 data tokens among noise, said again in order (arXiv 2312.00752, 2410.01201).

Sequences of 256 tokens and 16 marks. `remanence train selective-copying`; one cell: `--mixers mingru@depth=3`.

Not the published sweep in two ways, each for a budget of minutes: 256 tokens for 4096, and a curriculum of 2, 4, 8, 16 data tokens, each
among 16 times as many.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..tasks import selective_copying
from ..tasks.symbols import Arrays
from ._grid import Grid, draw, parse_cells
from ._results import Row

STAGES = (2, 4, 8, 16)
SPREAD = 16
CHANCE = 1 / 14
MIXERS = {"mamba": ({},), "s4d": ({},), "mingru": ({"depth": 1}, {"depth": 3}), "minlstm": ({"depth": 3},), "gated-deltanet": ({},)}


def make(rng: np.random.Generator, rows: int, data: int) -> Arrays:
    """Rows of `data` tokens among SPREAD times as many, and as many marks."""
    return selective_copying.batch(rng, rows, SPREAD * data, data)


def figure(rows: list[Row], path: Path) -> None:
    """Accuracy over the number of data tokens, a line a cell."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(row["memory"], []).append((row["data"], row["accuracy"]))
    draw(path, curves, f"data tokens, among {SPREAD} times as many", "accuracy", CHANCE)


def recipe(
    out: str | Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    device: str = "auto",
    fast: bool = False,
    data: str | Path | None = None,
    memory: str | None = None,
) -> Grid:
    """memory (`--mixers`): cells, separated by commas; see recipes/_grid.py."""
    if data is not None:
        raise UsageError(f"data is {str(data)!r}; selective-copying makes its own sequences and reads no folder.")
    return Grid(
        "selective-copying", "selective-copying", parse_cells(memory, MIXERS), make, selective_copying.SelectiveCopying.vocab_size,
        STAGES[:2] if fast else STAGES, STAGES[:2] if fast else STAGES, "data", figure, steps or (4 if fast else 2000),
        n=16 if fast else 256, rows=4 if fast else 8, lr=4e-3, seed=seed, device=device,
    )  # fmt: skip
