"""chomsky: which network goes on with what it learned on short inputs? One task for each level of the hierarchy (arXiv 2207.02098).

Parity (regular), reversing (context-free) and duplicating (context-sensitive) a string, trained on inputs of 1 .. 40 symbols and tested up
to 200; the published score is the mean over the untrained lengths. `remanence train chomsky`; one cell: `--mixers
tape-rnn@problem=duplicate-string+slots=256`. Other tasks: the keys of tasks.chomsky.PROBLEMS; compute=1 gives as much time to compute
after the input as it is long.

Not the published sweep in three ways, each for a budget of minutes: 64 units for 256, one learning rate, thousands of steps for a million;
and the layers are those of a Decoder (norm, residual, feed-forward).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..mixers.tape_rnn import TapeRNN
from ..models import Decoder, ModelConfig
from ..models.base import Output
from ..models.decoder import DecoderState
from ..span import Span
from ..state import State
from ..tasks import chomsky
from ..tasks.symbols import Arrays
from ._grid import Cell, Grid, draw, grid_recipe
from ._results import Row, lines

LONGEST = 40
TESTED = (20, 40, 41, 60, 80, 100, 150, 200)
TASKS = ("parity-check", "reverse-string", "duplicate-string")
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("flashrnn", {"cell": "elman", "heads": 1, "depth": 1}),
    ("flashrnn", {"cell": "lstm", "heads": 1, "depth": 1}),
    ("attention", {}),
    ("stack-rnn", {"slots": 256, "depth": 1}),
    ("tape-rnn", {"slots": 256, "depth": 1}),
)
MIXERS = {slug: tuple({"problem": task, **setting} for name, setting in SETTINGS if name == slug for task in TASKS) for slug, _ in SETTINGS}


class Told(Decoder):
    """A Decoder of tape-rnn layers whose tapes know how long each row's input is, as the published ones do."""

    def forward(
        self, ids: Tensor, state: State | None = None, span: Span | None = None, targets: Tensor | None = None, logits: str = "all"
    ) -> Output:
        if state is None:
            inputs = (ids < chomsky.EMPTY).sum(1)
            tapes = [block.mixer for block in self.blocks]
            layers = tuple(tape.start(inputs.clamp(min=1)) for tape in tapes if isinstance(tape, TapeRNN))
            state = DecoderState(seen=torch.zeros_like(inputs), layers=layers).stamp(*self.header)
        return super().forward(ids, state, span, targets, logits)


class ChomskyGrid(Grid):
    """A Grid whose tape-rnn cells are Told, and whose tests count as published."""

    def examples(self, cell: Cell, size: int, seed: int, n: int) -> Arrays:
        """Sequences whose targets go up to the END of answers that have one."""
        ids, targets = super().examples(cell, size, seed, n)
        return ids, chomsky.counted(targets) if chomsky.problem(self.chosen(cell)["problem"]).ends else targets

    def build(self, cell: Cell) -> Decoder:
        plain = super().build(cell)
        if cell.mixer != "tape-rnn":
            return plain
        told = Told(ModelConfig(**plain.config))
        told.load_state_dict(plain.state_dict())
        return told


def make(rng: np.random.Generator, rows: int, length: int, problem: str, compute: int) -> Arrays:
    """Inputs of that many symbols, and as many EMPTY tokens as their answers have."""
    return chomsky.batch(rng, rows, length, problem, compute)


def figure(rows: list[Row], path: Path) -> None:
    """Accuracy over the input's length, a line a cell."""
    draw(path, lines(rows, lambda row: row["memory"], "length"), f"symbols of the input (trained on at most {LONGEST})", "accuracy", 1 / 2)


def grid(cells: list[Cell], steps: int | None, fast: bool, **where: Any) -> Grid:
    """The recipe's grid; where: seed and device."""
    tested = (4, 8) if fast else TESTED
    return ChomskyGrid(
        "chomsky", "chomsky", cells, make, chomsky.VOCAB_SIZE, (4,) if fast else (LONGEST,), tested, "length", figure,
        steps or (4 if fast else 2000), {"problem": "parity-check", "compute": 0},
        n=16 if fast else 256, rows=4 if fast else 32, lr=1e-3, goal=0.999, stop_at=tested[-2], vary=True, **where,
    )  # fmt: skip


recipe = grid_recipe(grid, MIXERS, "chomsky makes its own sequences")
