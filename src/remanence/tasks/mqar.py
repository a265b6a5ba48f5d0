"""Multi-query associative recall: pairs of key and value, then every key again, to be answered by its value (arXiv 2312.04927)."""

from __future__ import annotations

import numpy as np

from ..catalog import system
from ..errors import UsageError, positive
from .base import IGNORE, TokenExample
from .symbols import Arrays, SymbolTask


def batch(
    rng: np.random.Generator,
    n: int,
    pairs: int = 8,
    length: int = 128,
    vocab: int = 8192,
    passes: int = 1,
    power: float = 0.01,
    random_non_queries: bool = True,
) -> Arrays:
    """n sequences -> ids and targets, int64 [n, length]; the distribution of HazyResearch/zoology's `multiquery_ar`.

    The context k1 v1 k2 v2 ... is told `passes` times: `pairs` different keys of 1 .. vocab/2 - 1 and different values of
    vocab/2 .. vocab - 1. Then (length - context) / 2 slots of two tokens; each key stands once at the start of one of them, where its
    value is the target. Slots are drawn one after the other without replacement with p(i) proportional to i^(power - 1), so that short
    gaps are likelier; power = 1 is uniform. All that is left is a random token, or 0.
    """
    positive(n=n, pairs=pairs, length=length, vocab=vocab, passes=passes)
    context = 2 * pairs * passes
    if length % 2 or context + 2 * pairs > length:
        raise UsageError(f"length is {length}; {pairs} pairs told {passes} times need an even length >= {context + 2 * pairs}.")
    if pairs > vocab // 2 - 1:
        raise UsageError(f"pairs is {pairs}; a vocabulary of {vocab} has {max(0, vocab // 2 - 1)} keys.")
    half = vocab // 2
    keys = 1 + np.stack([rng.choice(half - 1, pairs, replace=False) for _ in range(n)])
    values = half + np.stack([rng.choice(vocab - half, pairs, replace=False) for _ in range(n)])
    weight = np.arange(1, (length - context) // 2 + 1) ** (power - 1.0)
    # the order in which exponential clocks of these rates ring is that of drawing without replacement
    slots = (rng.standard_exponential((n, len(weight))) / weight).argsort(1)[:, :pairs]

    ids, targets = np.zeros((n, length), np.int64), np.full((n, length), IGNORE)
    ids[:, :context] = np.tile(np.stack([keys, values], 2).reshape(n, -1), passes)
    np.put_along_axis(ids, context + 2 * slots, keys, 1)
    np.put_along_axis(targets, context + 2 * slots, values, 1)
    if random_non_queries:
        ids = np.where(ids == 0, rng.integers(vocab, size=ids.shape), ids)
    return ids, targets


@system("mqar", kind="benchmark", paper="arXiv:2312.04927", year=2023, name="MQAR", aliases=("multi-query-associative-recall",))
class MQAR(SymbolTask):
    """Which value came with this key, asked for every key of the sequence: how much a state can hold."""

    batch = staticmethod(batch)
    vocab_size = 8192
    chance = 1 / 4096
    """Of a guess of one value of the default vocabulary; 2 / vocab of another."""

    def sample(
        self,
        seed: int = 0,
        n: int = 8,
        length: int = 128,
        pairs: int = 8,
        vocab: int = 8192,
        passes: int = 1,
        power: float = 0.01,
        random_non_queries: bool = True,
    ) -> list[TokenExample]:
        """n sequences; see `batch`. The published sweep has (length, pairs) = (64, 4), (128, 8), (256, 16), (512, 64)."""
        return self._examples(batch(np.random.default_rng(seed), n, pairs, length, vocab, passes, power, random_non_queries))

    def oracle(self, example: TokenExample) -> np.ndarray:
        """The predictions at every position [T]: what first followed the token at an even position, 0 where that is no key."""
        ids = example.ids.tolist()
        known: dict[int, int] = {}
        for key, value in zip(ids[::2], ids[1::2], strict=True):
            known.setdefault(key, value)
        return np.array([known.get(token, 0) for token in ids])
