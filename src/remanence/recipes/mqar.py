"""mqar: how much does a state hold? Recall against state size, for every kind of memory (arXiv 2312.04927, 2402.18668).

Sequences of 64 tokens tell 16 pairs and ask for all of them. As published, a decoder is a gated short convolution, which puts a key and
its value together, and then one layer of the mixer, which has to remember them. `remanence train mqar` runs all mixers that train in
minutes; one cell: `--mixers mamba2@state_size=16`.

Not the published sweep in three ways, each for a budget of minutes: a vocabulary of 128 for 8192, one learning rate for all, and a
curriculum of 2, 4, 8, 16 pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
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
SWEPT = {
    "attention": ({"window": 8}, {"window": 24}, {}),
    "based": ({"feature_dim": 4}, {"feature_dim": 8}, {"feature_dim": 16}),
    "gated-deltanet": HEADS,
    "deltanet": HEADS,
    "gla": HEADS,
    "mamba2": ({"state_size": 8}, {"state_size": 32}, {"state_size": 128}),
    "mamba": ({"state_size": 4}, {"state_size": 16}, {"state_size": 32}),
    "mingru": ({"expansion": 1.5}, {"expansion": 6.0}),
    "retnet": HEADS,
    "linear-attention": HEADS,
}
ONCE = [
    "aaren", "agalite", "base-conv", "cottention", "deconstruct", "diff-mamba", "dra", "fanformer", "flashrnn", "gated-rnn-attention",
    "gateloop", "grc-cache", "griffin", "hard-alibi", "hgrn", "hgrn2", "infini-attention", "kda", "latte", "leaky-rnn", "lmuformer",
    "longhorn", "longvq", "lru", "mcsd", "mega", "minlstm", "mlstm-7b", "mom", "multiresnet", "ngram-head", "pararnn", "plstm",
    "qrnn-hybrid", "rat", "relative-attention", "remede", "rwkv4", "rwkv5", "rwkv6", "rwkv7", "s4d", "simple-recurrence-mlm", "slstm",
    "sru", "tcnca",
]  # fmt: skip
"""With the settings that they have by themselves. Left out are those whose step takes seconds, and caches of segments longer than a row."""
MIXERS: dict[str, tuple[dict[str, Any], ...]] = {**SWEPT, **{slug: ({},) for slug in ONCE}}


@dataclass
class Convolved(Grid):
    """A grid whose decoders start with a short convolution; `depth` counts the layers of the mixer."""

    depth: int = 1

    def layers(self, cell: Cell) -> list[dict[str, Any]]:
        """BaseConv, and then the mixer."""
        return [{"mixer": "base-conv"}, *super().layers(cell)]


def make(rng: np.random.Generator, rows: int, pairs: int) -> Arrays:
    """Rows of the shortest length that has room for that many pairs and their questions."""
    return mqar.batch(rng, rows, pairs, 4 * pairs, VOCAB)


def figure(rows: list[Row], path: Path) -> None:
    """Accuracy at the most pairs over the bytes of the state: a line a mixer, a point for each that has one setting."""
    last = [row for row in rows if row["pairs"] == STAGES[-1]]
    curves = lines((row for row in last if row["mixer"] in SWEPT), lambda row: row["mixer"], "state_bytes")
    others = [(row["state_bytes"], row["accuracy"]) for row in last if row["mixer"] not in SWEPT]
    draw(path, curves, "bytes of state a sequence", f"accuracy at {STAGES[-1]} pairs", 2 / VOCAB, points={"other mixers": others})


def grid(cells: list[Cell], steps: int | None, fast: bool, **where: Any) -> Grid:
    """The recipe's grid; where: seed and device."""
    return Convolved(
        "mqar", "mqar", cells, make, VOCAB, STAGES, STAGES, "pairs", figure, steps or (4 if fast else 500),
        n=16 if fast else 512, rows=4 if fast else 16, lr=5e-3, **where,
    )  # fmt: skip


recipe = grid_recipe(grid, MIXERS, "mqar makes its own sequences")
