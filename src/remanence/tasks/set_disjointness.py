"""Set disjointness: two lists of tokens that share one; which? With the long list first, a stream must remember it (arXiv 2407.05483)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..catalog import system
from ..errors import UsageError, positive
from .base import IGNORE, Task, TokenExample

FIRST, SECOND, ASK = 1, 2, 3
"""Stand before the first list, between the two, and after the second, where the answer is predicted. 0 is a mask token, not used here."""
SPECIAL = 4
VOCAB_SIZE = 2048


def batch(
    rng: np.random.Generator, n: int, first: int = 4, second: int = 16, vocab_size: int = VOCAB_SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """n sequences FIRST list SECOND list ASK, of `first` and `second` tokens, and targets, both int64 [n, first + second + 3].

    Each sequence splits the ids from 4 on into vocab_size // 2 for its first list and the rest for its second, and draws both without
    repeats; then one of the first list, the answer, replaces one of the second. The target is the answer, at ASK alone. Both orders of a
    short and a long list: swap `first` and `second`. Raises UsageError where the vocabulary is too small.
    """
    positive(n=n, first=first, second=second, vocab_size=vocab_size)
    half = vocab_size // 2
    rest = vocab_size - SPECIAL - half
    if first > half or second > rest:
        raise UsageError(
            f"lists of {first} and {second} tokens were asked for; vocab_size={vocab_size} has at most {half} and {max(rest, 0)}."
        )
    ids = np.full((n, first + second + 3), FIRST)
    ids[:, first + 1], ids[:, -1] = SECOND, ASK
    targets = np.full_like(ids, IGNORE)
    for row, target in zip(ids, targets, strict=True):
        drawn = SPECIAL + rng.permutation(vocab_size - SPECIAL)
        row[1 : first + 1], row[first + 2 : -1] = drawn[:first], drawn[half : half + second]
        target[-1] = row[1 + rng.integers(first)]
        row[first + 2 + rng.integers(second)] = target[-1]
    return ids, targets


@system("set-disjointness", kind="benchmark", paper="arXiv:2407.05483", year=2024, name="Set disjointness")
class SetDisjointness(Task):
    """Which token is in both lists? A stream must keep the first one whole, so the order of a short and a long list matters to it."""

    batch = staticmethod(batch)
    vocab_size = VOCAB_SIZE
    chance = 1 / (VOCAB_SIZE - SPECIAL)
    """Of a guess among all tokens. Naming any token of the first list is right once in `first` times."""

    def sample(
        self,
        seed: int = 0,
        n: int = 8,
        length: int | None = None,
        first: int = 4,
        second: int | None = None,
        vocab_size: int = VOCAB_SIZE,
    ) -> list[TokenExample]:
        """n sequences; see `batch`. second: 16 by default. length: instead of it, the tokens of the sequence, of which 3 + first are taken.

        The paper's pairs (first, second), in both orders, are (4, 16), (8, 32), (16, 64), (4, 128), (16, 256), (4, 256), and for testing
        also (1, 32) and long lists of 512 and 768. Raises UsageError for a length that is too short, or for both.
        """
        if length is not None:
            if second is not None:
                raise UsageError(f"second={second} and length={length} are both given; give one of them.")
            second = length - 3 - first
            if second < 1:
                raise UsageError(f"length is {length}; the first list and three marks take {first + 3}, so it must be {first + 4} or more.")
        ids, targets = batch(np.random.default_rng(seed), n, first, 16 if second is None else second, vocab_size)
        return [TokenExample(*row) for row in zip(ids, targets, strict=True)]

    def score(self, example: TokenExample, output: Any) -> bool:
        """Is the predicted answer right? output: the predicted ids at every position [T], or the answer alone."""
        output = np.asarray(output)
        if output.shape not in ((), (1,), example.ids.shape):
            raise UsageError(f"output has shape {output.shape}; it must be ({len(example.ids)},), or (1,) for the answer alone.")
        return bool(output.reshape(-1)[-1] == example.targets[-1])

    def oracle(self, example: TokenExample) -> np.ndarray:
        """The predictions at every position [T], 0 where nothing is scored: the token that stands on both sides of SECOND."""
        between = int(np.flatnonzero(example.ids == SECOND)[0])
        output = np.zeros_like(example.ids)
        output[-1] = np.intersect1d(example.ids[1:between], example.ids[between + 1 : -1])[0]
        return output
