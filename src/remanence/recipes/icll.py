"""icll: who learns a language from its words, in context? Attention, recurrences, and these with n-gram heads (arXiv 2401.12973).

Documents of 10 words of small automata (4 to 6 states, 10 letters), new in every batch; tested on automata that no training document had.
The score is how often the likeliest letter is a legal one; the rows also have the total variation to the true distribution, and those of
the n-gram models that back off. All decoders have as many parameters as one of attention. `remanence train icll`; one cell:
`--mixers mingru@ngrams=3`.

Not the published sweep: new documents for 5000 that are read 200 times, and the smaller automata, for a budget of minutes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models import Model
from ..tasks import icll
from ..tasks.base import IGNORE
from ..tasks.symbols import Arrays
from ._grid import Cell, Grid, draw, grid_recipe
from ._results import Row, lines, resumed
from .copying import EqualGrid

STAGES, TESTED = (2, 5, 10), (2, 5, 10)
SMALL: Mapping[str, Any] = {"nodes": 6, "letters": 10}
LONGEST = 24
ORDERS = (2, 3)
RECURRENT = ({}, {"ngrams": 3})
MIXERS = {"attention": ({},), "mingru": RECURRENT, "mamba2": RECURRENT, "gated-deltanet": RECURRENT, "linear-attention": RECURRENT}


def make(rng: np.random.Generator, rows: int, strings: int) -> Arrays:
    """Training documents of that many words."""
    return icll.documents(rng, icll.automata(rng, rows, split="train", **SMALL), strings, LONGEST)


def tests(seed: int, strings: int, n: int) -> list[icll.Document]:
    """Documents of automata of the test set."""
    return icll.ICLL().sample(seed=seed, n=n, strings=strings, longest=LONGEST, split="test", **SMALL)


@torch.no_grad()
def probabilities(model: Model, example: icll.Document) -> np.ndarray:
    """p(next) at every position of a document, float64 [T, VOCAB_SIZE]."""
    logits = model(torch.from_numpy(example.ids)[None].to(model.device)).logits
    return logits[0].double().softmax(-1).cpu().numpy()


@dataclass
class Languages(EqualGrid):
    """A grid that is scored by what is legal, with the n-gram models among its rows."""

    distances: dict[int, float] = field(default_factory=dict)
    """Of the cell tested last, by the number of words."""

    def test(self, model: Model, cell: Cell, size: int, seed: int, n: int) -> tuple[float, int]:
        """Greedy accuracy, and the mean length of the documents."""
        examples = tests(seed, size, n)
        score, self.distances[size] = scores(examples, [probabilities(model, one) for one in examples])
        return score, round(sum(one.ids.size for one in examples) / n)

    def _run(self, cell: Cell, out: Path, resume: bool, quiet: bool) -> list[Row]:
        rows = super()._run(cell, out, resume, quiet)
        return [row | {"distance": self.distances[row["strings"]]} for row in rows]

    def start(self, out: str | Path, resume: bool = True, quiet: bool = False) -> dict[str, Any]:
        """As a Grid's, and the rows of the n-gram models."""
        ends = super().start(out, resume, quiet)
        for order in ORDERS:
            name, key = f"{order}-gram", {"seed": self.seed, "budget": self.steps}
            run = functools.partial(self._ngram, order, name)
            mine = resumed(Path(out) / "results.json", name, key, run, self._meta(), self.figure, resume)
            ends[name] = {row[self.axis]: row["accuracy"] for row in mine}
        return ends

    def _ngram(self, order: int, name: str) -> list[Row]:
        rows: list[Row] = []
        for size in self.tested:
            examples = tests(self.seed + 2, size, self.n)
            score, distance = scores(examples, [icll.ngram_backoff(one.ids, order) for one in examples])
            rows.append(
                {"memory": name, "mixer": name, "task": self.task, "seed": self.seed, "budget": self.steps, self.axis: size, "n": self.n}
                | {"accuracy": score, "distance": distance}
            )
        return rows


def scores(examples: list[icll.Document], said: list[np.ndarray]) -> tuple[float, float]:
    """Greedy accuracy and total variation over all scored positions."""
    task, right, away, total = icll.ICLL(), 0.0, 0.0, 0
    for example, p in zip(examples, said, strict=True):
        count = int((example.targets != IGNORE).sum())
        right += task.accuracy(example, p.argmax(1)) * count
        away += task.distance(example, p) * count
        total += count
    return right / total, away / total


def figure(rows: list[Row], path: Path) -> None:
    """Greedy accuracy over the number of words, a line a model."""
    draw(path, lines(rows, lambda row: row["memory"], "strings"), "words of the document", "legal predictions", 1 / 9)


def grid(cells: list[Cell], steps: int | None, fast: bool, **where: Any) -> Grid:
    """The recipe's grid; where: seed and device."""
    sizes = STAGES[:1] if fast else STAGES
    return Languages(
        "icll", "icll", cells, make, icll.VOCAB_SIZE, sizes, sizes if fast else TESTED, "strings", figure, steps or (4 if fast else 400),
        n=8 if fast else 128, rows=4 if fast else 32, dim=32 if fast else 128, goal=0.995, lr=1e-3, **where,
    )  # fmt: skip


recipe = grid_recipe(grid, MIXERS, "icll makes its own documents")
