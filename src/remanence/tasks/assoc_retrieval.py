"""Associative retrieval: pairs of key and value, one to a segment, then a key whose value is asked for (arXiv 2407.04841)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..catalog import system
from ..errors import UsageError, positive
from .base import IGNORE, Task, TokenExample

SYMBOLS = 16
"""Keys and values are digits 0 .. 15; a key is written least significant digit first."""

SEP, GEN, EOS = 100, 101, 102
VOCAB_SIZE = 103


def segment(key_size: int = 1, value_size: int = 1) -> int:
    """Tokens of one pair, key SEP value EOS, and of the question, key GEN value EOS: the segment size of the paper's protocol."""
    return key_size + value_size + 2


def batch(
    rng: np.random.Generator, n: int, pairs: int = 10, key_size: int = 1, value_size: int = 1, rewrite: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """n sequences (key SEP value EOS) x pairs, key GEN value EOS -> ids and targets, int64 [n, (pairs + 1) * segment].

    Targets are the value and EOS after GEN, each at the position before it, and IGNORE elsewhere. The keys of a sequence differ; with
    rewrite they are independent draws, a later value replaces an earlier one, and the question takes one of the distinct keys, uniformly.
    For the paper's varying number of pairs, draw `pairs` for each batch. Raises UsageError where there are fewer keys than pairs.
    """
    positive(n=n, pairs=pairs, key_size=key_size, value_size=value_size)
    if key_size > 15:
        raise UsageError(f"key_size is {key_size}; it must be at most 15, so that a key is a 64-bit integer.")
    keyspace = SYMBOLS**key_size
    if not rewrite and pairs > keyspace:
        raise UsageError(
            f"pairs is {pairs}; keys of size {key_size} are only {keyspace}, so give fewer pairs, a larger key_size, or rewrite=True."
        )
    if rewrite:
        keys = rng.integers(keyspace, size=(n, pairs))
        candidates = _last_of_each_key(keys)
    else:
        keys = np.stack([rng.choice(keyspace, pairs, replace=False) for _ in range(n)])
        candidates = np.ones((n, pairs), bool)
    values = rng.integers(SYMBOLS, size=(n, pairs, value_size))
    asked = (candidates * (1 - rng.random((n, pairs)))).argmax(1)  # 1 - [0, 1) is positive: only a candidate can be the largest

    width, rows = segment(key_size, value_size), np.arange(n)
    ids = np.full((n, pairs + 1, width), EOS)
    ids[:, :, key_size] = SEP
    ids[:, -1, key_size] = GEN
    ids[:, :pairs, :key_size] = keys[:, :, None] // SYMBOLS ** np.arange(key_size) % SYMBOLS
    ids[:, :pairs, key_size + 1 : -1] = values
    ids[:, -1, :key_size] = ids[rows, asked, :key_size]
    ids[:, -1, key_size + 1 : -1] = values[rows, asked]
    ids = ids.reshape(n, -1)
    targets = np.full_like(ids, IGNORE)
    targets[:, -value_size - 2 : -1] = ids[:, -value_size - 1 :]
    return ids, targets


def _last_of_each_key(keys: np.ndarray) -> np.ndarray:
    """Where each distinct key of a row occurs last, bool [n, pairs]."""
    order = np.argsort(keys, axis=1, kind="stable")
    ranked = np.take_along_axis(keys, order, 1)
    last = np.ones(keys.shape, bool)
    last[:, :-1] = ranked[:, 1:] != ranked[:, :-1]
    found = np.empty_like(last)
    np.put_along_axis(found, order, last, 1)
    return found


@system("assoc-retrieval", kind="benchmark", paper="arXiv:2407.04841", year=2024, name="Associative retrieval")
class AssocRetrieval(Task):
    """Which value came with this key? One pair to a segment, so nothing but memory can answer."""

    batch, segment = staticmethod(batch), staticmethod(segment)
    vocab_size = VOCAB_SIZE
    labels = tuple(map(str, range(SYMBOLS)))
    chance = 1 / SYMBOLS
    """Of a guess of one value symbol; a value of v symbols is guessed with probability chance ** v."""

    def sample(
        self,
        seed: int = 0,
        n: int = 8,
        length: int | None = None,
        pairs: int | None = None,
        key_size: int | None = None,
        value_size: int = 1,
        rewrite: bool = False,
    ) -> list[TokenExample]:
        """n sequences of `pairs` (default 10) key-value pairs; see `batch`.

        length: instead of pairs, the most tokens that a sequence may have; it gets as many pairs as fit. key_size: 1 by default; for a
        length, the least that has enough keys. Raises UsageError for a length of less than two segments, or for both pairs and length.
        """
        positive(value_size=value_size, key_size=1 if key_size is None else key_size)
        if length is not None:
            if pairs is not None:
                raise UsageError(f"pairs={pairs} and length={length} are both given; give one of them.")
            if key_size is None:
                key_size = 1
                while not rewrite and length // segment(key_size, value_size) - 1 > SYMBOLS**key_size:
                    key_size += 1
            pairs = length // segment(key_size, value_size) - 1
            if pairs < 1:
                raise UsageError(f"length is {length}; one pair and the question take {2 * segment(key_size, value_size)} tokens.")
        ids, targets = batch(np.random.default_rng(seed), n, 10 if pairs is None else pairs, key_size or 1, value_size, rewrite)
        return [TokenExample(*row) for row in zip(ids, targets, strict=True)]

    def score(self, example: TokenExample, output: Any) -> bool:
        """Exact match of value and EOS. output: the predicted ids, at every position [T] or at the scored ones alone."""
        wanted = example.targets != IGNORE
        output = np.asarray(output)
        if output.shape == wanted.shape:
            output = output[wanted]
        if output.shape != (wanted.sum(),):
            raise UsageError(
                f"output has shape {output.shape}; it must be ({len(wanted)},), or ({wanted.sum()},) for the scored positions alone."
            )
        return bool((output == example.targets[wanted]).all())

    def oracle(self, example: TokenExample) -> np.ndarray:
        """The predictions at every position [T], 0 where nothing is scored: the last value that came with the key of the question."""
        ids = example.ids.tolist()
        ask = ids.index(GEN)
        key_size = ids.index(SEP)
        width = ids.index(EOS) + 1
        key = ids[ask - key_size : ask]
        known = {tuple(ids[at : at + key_size]): ids[at + key_size + 1 : at + width - 1] for at in range(0, ask - key_size, width)}
        output = np.zeros_like(example.ids)
        output[ask : ask + width - key_size - 1] = [*known[tuple(key)], EOS]
        return output
