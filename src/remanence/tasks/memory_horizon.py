"""Memory horizon: a function of the inputs since the last reset token, at every position (arXiv 2311.01927).

The paper asks for a function of what came since a reset, so that how far to look back is told by the data. Which function it takes is not
certain; ours are the first, the largest and the sum of the inputs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from ..catalog import system
from ..errors import UsageError, positive, unknown
from .base import IGNORE, TokenExample
from .symbols import Arrays, SymbolTask

FUNCTIONS = ("first", "max", "sum")


@dataclass(frozen=True, eq=False)
class Horizon(TokenExample):
    """A sequence, with the function asked for; the reset token is vocab - 1."""

    function: str
    vocab: int


def batch(rng: np.random.Generator, n: int, length: int = 256, vocab: int = 16, horizon: float = 32, function: str = "first") -> Arrays:
    """n sequences -> ids and targets, int64 [n, length].

    Inputs are uniform in 0 .. vocab - 2; each token is the reset token vocab - 1 instead with probability 1 / horizon, and the first one
    always is. The target at an input is a function of the inputs since the last reset token, itself included: the "first" of them, the
    "max", or the "sum" modulo vocab - 1. Reset tokens have no target.
    """
    positive(n=n, length=length, vocab=vocab)
    if function not in FUNCTIONS:
        raise unknown("function", function, FUNCTIONS)
    if vocab < 3 or not horizon > 1:
        raise UsageError(f"vocab={vocab} and horizon={horizon}; vocab must be at least 3 and horizon above 1.")
    ids = rng.integers(vocab - 1, size=(n, length))
    reset = rng.random((n, length)) < 1 / horizon
    reset[:, 0] = True
    ids[reset] = vocab - 1
    targets = np.full_like(ids, IGNORE)
    held = np.zeros(n, np.int64)
    fresh = np.ones(n, bool)  # is this the first input after a reset?
    for t in range(length):
        now = {"first": held, "max": np.maximum(held, ids[:, t]), "sum": (held + ids[:, t]) % (vocab - 1)}[function]
        now = np.where(fresh, ids[:, t], now)
        targets[:, t] = np.where(reset[:, t], IGNORE, now)
        held, fresh = np.where(reset[:, t], held, now), reset[:, t]
    return ids, targets


@system("memory-horizon", kind="benchmark", paper="arXiv:2311.01927", year=2023, name="Memory horizon")
class MemoryHorizon(SymbolTask):
    """How far back does memory matter? To the last reset token: a gate that reads its input can see it, a fixed decay cannot."""

    batch = staticmethod(batch)
    vocab_size = 16
    labels = tuple(map(str, range(15)))
    chance = 1 / 15

    def sample(
        self, seed: int = 0, n: int = 8, length: int = 256, vocab: int = 16, horizon: float = 32, function: str = "first"
    ) -> list[Horizon]:
        """n sequences; see `batch`."""
        arrays = batch(np.random.default_rng(seed), n, length, vocab, horizon, function)
        return [Horizon(*row, function=function, vocab=vocab) for row in zip(*arrays, strict=True)]

    def oracle(self, example: Horizon) -> np.ndarray:
        """The predictions at every position [T], 0 at a reset token: the function, from its definition, of each stretch."""
        output: list[int] = []
        for is_reset, stretch in itertools.groupby(example.ids.tolist(), lambda token: token == example.vocab - 1):
            inputs = list(stretch)
            for end in range(1, len(inputs) + 1):
                known = inputs[:end]
                value = {"first": known[0], "max": max(known), "sum": sum(known) % (example.vocab - 1)}[example.function]
                output.append(0 if is_reset else value)
        return np.array(output)
