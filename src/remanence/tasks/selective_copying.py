"""Selective copying: say again, in order, the data tokens that stood among noise (arXiv 2312.00752; the plain form 2111.00396)."""

from __future__ import annotations

import numpy as np

from ..catalog import system
from ..errors import UsageError, positive
from .base import IGNORE, Published, TokenExample
from .symbols import Arrays, SymbolTask

NOISE = 0


def batch(rng: np.random.Generator, n: int, length: int = 256, data: int = 16, vocab: int = 16, selective: bool = True) -> Arrays:
    """n sequences -> ids and targets, int64 [n, length + data].

    `data` tokens, drawn with replacement from 1 .. vocab - 2, stand among length - data noise tokens (0): anywhere, or with
    selective=False at the first positions, so that input and output are always equally far apart. Then the marker vocab - 1 comes `data`
    times, and the targets there are the data tokens in order. (Noise and marker count among the vocab ids, as in the public S4 code.)
    """
    positive(n=n, length=length, data=data, vocab=vocab)
    if vocab < 4:
        raise UsageError(f"vocab is {vocab}; noise, marker and two data tokens need at least 4.")
    if data > length:
        raise UsageError(f"data is {data}; a sequence of length {length} holds at most {length} data tokens.")
    tokens = rng.integers(1, vocab - 1, size=(n, data))
    places = np.sort(rng.random((n, length)).argsort(1)[:, :data], 1) if selective else np.tile(np.arange(data), (n, 1))
    ids, targets = np.full((n, length + data), NOISE, np.int64), np.full((n, length + data), IGNORE)
    np.put_along_axis(ids, places, tokens, 1)
    ids[:, length:] = vocab - 1
    targets[:, length:] = tokens
    return ids, targets


TABLE = "arXiv:2312.00752, Table 1"
LENGTH = 4096


@system("selective-copying", kind="benchmark", paper="arXiv:2312.00752", year=2023, name="Selective copying")
class SelectiveCopying(SymbolTask):
    """Which tokens were data? A rule that treats all tokens alike (LTI) can count them out only if their spacing is fixed."""

    batch = staticmethod(batch)
    vocab_size = 16
    labels = tuple(map(str, range(1, 15)))
    chance = 1 / 14
    """Of a guess of one data token of the default vocabulary; 1 / (vocab - 2) of another."""
    published = (
        Published("S4 (no gate)", "selective", LENGTH, 18.3, TABLE),
        Published("S6 (no gate)", "selective", LENGTH, 97.0, TABLE),
        Published("H3 with S4", "selective", LENGTH, 57.0, TABLE),
        Published("Mamba with S6", "selective", LENGTH, 99.8, TABLE),
        Published("minGRU, 1 layer", "selective", LENGTH, 37.0, "arXiv:2410.01201"),
        Published("minGRU, 3 layers", "selective", LENGTH, 99.5, "arXiv:2410.01201"),
        Published("minLSTM, 3 layers", "selective", LENGTH, 96.0, "arXiv:2410.01201"),
    )

    def sample(
        self, seed: int = 0, n: int = 8, length: int = 256, data: int = 16, vocab: int = 16, variant: str = "selective"
    ) -> list[TokenExample]:
        """n sequences of length + data tokens; see `batch`. variant: "selective", or "copying" with the data at the first positions."""
        if variant not in ("selective", "copying"):
            raise UsageError(f"variant is {variant!r}; it may be 'selective' or 'copying'.")
        return self._examples(batch(np.random.default_rng(seed), n, length, data, vocab, variant == "selective"))

    def oracle(self, example: TokenExample) -> np.ndarray:
        """The predictions at every position [T], 0 before the markers: the tokens that are neither noise nor the marker, in order."""
        ids = example.ids
        tokens = ids[(ids != NOISE) & (ids != ids[-1])]
        return np.concatenate([np.zeros(len(ids) - len(tokens), np.int64), tokens])
