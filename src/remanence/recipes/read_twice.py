"""read-twice: a bounded memory that reads its input twice knows, the second time, what it must keep (arXiv 2407.05483).

Set disjointness with the long list first, the hard order for a stream: which of its tokens comes again in the short one? Each mixer is
trained on inputs told once and told twice; nothing else differs. `remanence train read-twice`; one cell: `--mixers based@times=2`.

Not the published sweep: a vocabulary of 128, long lists of 4 to 32 tokens, one learning rate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..tasks import set_disjointness
from ..tasks.base import IGNORE
from ..tasks.symbols import Arrays
from ._grid import Cell, Grid, draw, grid_recipe
from ._results import Row, lines

VOCAB = 128
SHORT = 4
STAGES = (4, 8, 16, 32)
SETTINGS = {"based": {"feature_dim": 4}, "linear-attention": {"heads": 16}, "mamba2": {"state_size": 8}}
"""Small states: one that holds the long list whole has no use for reading it again."""
MIXERS = {slug: tuple({"times": times, **setting} for times in (1, 2)) for slug, setting in SETTINGS.items()}


def make(rng: np.random.Generator, rows: int, size: int, times: int) -> Arrays:
    """Rows of a list of `size` tokens and one of SHORT, told `times` times over; the answer is asked for after the last."""
    ids, targets = set_disjointness.batch(rng, rows, size, SHORT, VOCAB)
    silent = np.full_like(targets, IGNORE)
    return np.concatenate([ids] * times, 1), np.concatenate([*[silent] * (times - 1), targets], 1)


def figure(rows: list[Row], path: Path) -> None:
    """Accuracy over the length of the long list, a line a cell."""
    curves = lines(rows, lambda row: f"{row['mixer']}, told {'twice' if row['times'] == 2 else 'once'}", "list")
    draw(path, curves, f"tokens in the first list (the second has {SHORT})", "accuracy", 1 / SHORT)


def grid(cells: list[Cell], steps: int | None, fast: bool, **where: Any) -> Grid:
    """The recipe's grid; where: seed and device."""
    return Grid(
        "read-twice", "set-disjointness", cells, make, VOCAB, STAGES[:2] if fast else STAGES,
        STAGES[:2] if fast else STAGES, "list", figure, steps or (4 if fast else 2500), {"times": 1},
        n=16 if fast else 512, rows=4 if fast else 64, lr=4e-3, **where,
    )  # fmt: skip


recipe = grid_recipe(grid, MIXERS, "read-twice makes its own sequences")
