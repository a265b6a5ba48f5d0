"""mqar: how much does a state hold? Recall against state size, for every kind of memory (arXiv 2312.04927, 2402.18668).

Sequences of 64 tokens tell 16 pairs and ask for all of them. `remanence train mqar`; one cell: `--mixers mamba2@state_size=16`.

Not the published sweep in three ways, each for a budget of minutes: a vocabulary of 128 for 8192, one learning rate for all, and a
curriculum of 2, 4, 8, 16 pairs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..tasks import mqar
from ..tasks.symbols import Arrays
from ._grid import Grid, draw, parse_cells
from ._results import Row

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
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["pairs"] == STAGES[-1]:
            curves.setdefault(row["mixer"], []).append((row["state_bytes"], row["accuracy"]))
    draw(path, curves, "bytes of state a sequence", f"accuracy at {STAGES[-1]} pairs", 2 / VOCAB)


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
        raise UsageError(f"data is {str(data)!r}; mqar makes its own sequences and reads no folder.")
    cells = parse_cells(memory, MIXERS)
    return Grid(
        "mqar", "mqar", cells, make, VOCAB, STAGES, STAGES, "pairs", figure, steps or (4 if fast else 1500),
        n=16 if fast else 512, rows=4 if fast else 32, lr=5e-3, seed=seed, device=device,
    )  # fmt: skip
