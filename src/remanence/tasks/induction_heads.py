"""Induction heads: what came after the special token when it was last seen? (arXiv 2312.00752, after 2212.14052)"""

from __future__ import annotations

import numpy as np

from ..catalog import system
from ..errors import UsageError, positive
from .base import IGNORE, TokenExample
from .symbols import Arrays, SymbolTask


def batch(rng: np.random.Generator, n: int, length: int = 256, vocab: int = 16) -> Arrays:
    """n sequences -> ids and targets, int64 [n, length].

    Ordinary tokens 0 .. vocab - 2 everywhere, the special token vocab - 1 once at a uniform position 0 .. length - 3 and again at the
    end, where the one target is the token that followed it. (That the special token is one of the `vocab` ids is our reading.)
    """
    positive(n=n, length=length, vocab=vocab)
    if length < 3 or vocab < 3:
        raise UsageError(f"length={length} and vocab={vocab}; both must be at least 3.")
    ids, targets = rng.integers(vocab - 1, size=(n, length)), np.full((n, length), IGNORE)
    rows, place = np.arange(n), rng.integers(length - 2, size=n)
    ids[rows, place] = ids[:, -1] = vocab - 1
    targets[:, -1] = ids[rows, place + 1]
    return ids, targets


@system("induction-heads", kind="benchmark", paper="arXiv:2312.00752", year=2023, name="Induction heads")
class InductionHeads(SymbolTask):
    """One fact to keep over any distance: train at 256 tokens, test at any length."""

    batch = staticmethod(batch)
    vocab_size = 16
    labels = tuple(map(str, range(15)))
    chance = 1 / 15

    def sample(self, seed: int = 0, n: int = 8, length: int = 256, vocab: int = 16) -> list[TokenExample]:
        """n sequences; see `batch`."""
        return self._examples(batch(np.random.default_rng(seed), n, length, vocab))

    def oracle(self, example: TokenExample) -> np.ndarray:
        """The predictions at every position [T], 0 but at the last: the token after the first one that equals the last."""
        ids = example.ids.tolist()
        return np.array([0] * (len(ids) - 1) + [ids[ids.index(ids[-1]) + 1]])
