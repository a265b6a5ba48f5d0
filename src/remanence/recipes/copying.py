"""copying: can it say a string again? Attention against recurrences of as many parameters (arXiv 2402.01032).

Trained on strings of at most 20 letters, tested up to 60. `remanence train copying`; one cell: `--mixers mingru@ngrams=3`, which puts
n-gram heads of 1, 2 and 3 tokens after the first layer; `variant=prefix` and the others of the suite go the same way.

Not the published sweep: decoders of 2 layers for 12, and a learning rate for models that small.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models import Decoder, ModelConfig
from ..tasks import copying
from ..tasks.symbols import Arrays
from ._grid import Cell, Grid, draw, filling, grid_recipe, parameters
from ._results import Row, lines

STAGES = (5, 10, 20)
TESTED = (20, 40, 60)
SHORTEST = 7
"""Letters of a string in which an n-gram of 3 can be asked for."""
MIXERS = {
    "attention": ({}, {"rope": 0.0}),
    "hard-alibi": ({},),
    "mamba2": ({},),
    "gated-deltanet": ({},),
    "mingru": ({}, {"ngrams": 3}),
}


@dataclass
class EqualGrid(Grid):
    """A grid whose decoders have as many parameters as one of attention: their feed-forwards are as wide as that leaves room for.

    A cell's setting may have `ngrams`: after the first layer come n-gram heads of 1 .. `ngrams` tokens, without feed-forwards.
    """

    def build(self, cell: Cell) -> Decoder:
        """The decoder of a cell; the same seed gives the same one. No feed-forward at all where the mixers alone are that large."""
        wanted = parameters(super().build(Cell("attention", {"depth": cell.hyper.get("depth", self.depth)})))
        hyper = {name: value for name, value in cell.hyper.items() if name not in self.options and name not in ("depth", "ngrams")}
        depth = cell.hyper.get("depth", self.depth)
        first, *rest = [{"mixer": cell.mixer, **hyper} for _ in range(depth)]
        heads = [{"mixer": "ngram-head", "n": n, "ffn": 0} for n in range(1, cell.hyper.get("ngrams", 0) + 1)]
        bare = ModelConfig(self.vocab, self.dim, [first, *heads, *rest], ffn=0.0, tie=False, embedding_std=self.embedding_std)
        ffn = filling(wanted, parameters(Decoder(bare)), depth, self.dim)
        torch.manual_seed(self.seed)
        return Decoder(replace(bare, ffn=ffn))


def make(rng: np.random.Generator, rows: int, length: int, variant: str) -> Arrays:
    """Strings of that many letters, or as few as the variant allows."""
    return copying.batch(rng, rows, length if variant == "copy" else max(length, SHORTEST), variant)


def figure(rows: list[Row], path: Path) -> None:
    """Accuracy over the length of the string, a line a cell."""
    curves = lines(rows, lambda row: row["memory"], "length")
    draw(path, curves, f"letters of the string (trained on at most {STAGES[-1]})", "accuracy", copying.CopySuite.chance)


def grid(cells: list[Cell], steps: int | None, fast: bool, **where: Any) -> Grid:
    """The recipe's grid; where: seed and device."""
    return EqualGrid(
        "copying", "copy-suite", cells, make, copying.CopySuite.vocab_size, STAGES[:1] if fast else STAGES, STAGES[:1] if fast else TESTED,
        "length", figure, steps or (4 if fast else 2000), {"variant": "copy"},
        n=16 if fast else 256, rows=4 if fast else 32, dim=32 if fast else 128, goal=0.999, lr=1e-3, vary=True, **where,
    )  # fmt: skip


recipe = grid_recipe(grid, MIXERS, "copying makes its own strings")
