"""read-twice: a bounded memory that reads its input twice knows, the second time, what it must keep (arXiv 2407.05483).

Set disjointness with the long list first, the hard order for a stream: which of its tokens comes again in the short one? Each mixer is
trained on inputs told once and told twice; nothing else differs. `remanence train read-twice`; one cell: `--mixers based@times=2`.

Not the published sweep: a vocabulary of 128, long lists of 4 to 32 tokens, one learning rate.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..tasks import set_disjointness
from ..tasks.base import IGNORE
from ..tasks.symbols import Arrays
from ._grid import Grid, draw, parse_cells
from ._results import Row

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
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(f"{row['mixer']}, told {'twice' if row['times'] == 2 else 'once'}", []).append((row["list"], row["accuracy"]))
    draw(path, curves, f"tokens in the first list (the second has {SHORT})", "accuracy", 1 / SHORT)


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
        raise UsageError(f"data is {str(data)!r}; read-twice makes its own sequences and reads no folder.")
    return Grid(
        "read-twice", "set-disjointness", parse_cells(memory, MIXERS), make, VOCAB, STAGES[:2] if fast else STAGES,
        STAGES[:2] if fast else STAGES, "list", figure, steps or (4 if fast else 2500), {"times": 1},
        n=16 if fast else 512, rows=4 if fast else 64, lr=4e-3, seed=seed, device=device,
    )  # fmt: skip
