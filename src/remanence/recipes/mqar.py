"""mqar: how much does a state hold? Recall against state size, for every kind of memory (arXiv 2312.04927, 2402.18668).

Sequences of 64 tokens tell 16 pairs and ask for all of them. `remanence train mqar`; one cell: `--mixers mamba2@state_size=16`.

Not the published sweep in three ways, each for a budget of minutes: a vocabulary of 128 for 8192, one learning rate for all, and a
curriculum of 2, 4, 8, 16 pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..tasks import mqar
from ..tasks.symbols import Arrays
from ._grid import Cell, Grid, draw, grid_recipe
from ._results import Row, lines

VOCAB = 128
STAGES = (2, 4, 8, 16)
HEADS = ({"heads": 16}, {"heads": 4}, {"heads": 1})  # a matrix a head of (dim / heads)^2: fewer heads, more state
MIXERS = {
    "attention": ({"window": 8}, {"window": 24}, {}),
    "based": ({"feature_dim": 4}, {"feature_dim": 8}, {"feature_dim": 16}),
    "gated-deltanet": HEADS,
    "deltanet": HEADS,
    "gla": HEADS,
    "mamba2": ({"state_size": 8}, {"state_size": 32}, {"state_size": 128}),
    "mamba": ({"state_size": 4}, {"state_size": 16}, {"state_size": 32}),
    "mingru": ({"expansion": 1.5}, {"expansion": 6.0}),
    "retnet": HEADS,
    "rwkv7": HEADS,
    "linear-attention": HEADS,
}


def make(rng: np.random.Generator, rows: int, pairs: int) -> Arrays:
    """Rows of the shortest length that has room for that many pairs and their questions."""
    return mqar.batch(rng, rows, pairs, 4 * pairs, VOCAB)


def figure(rows: list[Row], path: Path) -> None:
    """Accuracy at the most pairs over the bytes of the state, a line a mixer."""
    curves = lines((row for row in rows if row["pairs"] == STAGES[-1]), lambda row: row["mixer"], "state_bytes")
    draw(path, curves, "bytes of state a sequence", f"accuracy at {STAGES[-1]} pairs", 2 / VOCAB)


def grid(cells: list[Cell], steps: int | None, fast: bool, **where: Any) -> Grid:
    """The recipe's grid; where: seed and device."""
    return Grid(
        "mqar", "mqar", cells, make, VOCAB, STAGES, STAGES, "pairs", figure, steps or (4 if fast else 1500),
        n=16 if fast else 512, rows=4 if fast else 32, lr=5e-3, **where,
    )  # fmt: skip


recipe = grid_recipe(grid, MIXERS, "mqar makes its own sequences")
