"""What tasks on symbols share: batches of ids and targets, exact match, and accuracy over the scored positions."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import UsageError
from .base import IGNORE, Task, TokenExample

Arrays = tuple[np.ndarray, np.ndarray]
"""ids and targets, int64 [n, T]; a target is what to predict AT its position, or IGNORE."""


def outputs_of(example: TokenExample, output: Any) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, wanted) at the scored positions. output: the predicted ids, at every position [T] or at the scored ones alone."""
    wanted = example.targets != IGNORE
    output = np.asarray(output)
    if output.shape == wanted.shape:
        output = output[wanted]
    if output.shape != (wanted.sum(),):
        raise UsageError(
            f"output has shape {output.shape}; it must be ({len(wanted)},), or ({wanted.sum()},) for the scored positions alone."
        )
    return output, example.targets[wanted]


class SymbolTask(Task):
    """A task on sequences of symbols. chance: of a uniform guess at ONE scored position; k positions are all guessed with chance ** k."""

    vocab_size: int

    def score(self, example: TokenExample, output: Any) -> bool:
        """Are all scored positions right? output: predicted ids at every position [T], or at the scored ones alone."""
        got, wanted = outputs_of(example, output)
        return bool((got == wanted).all())

    def accuracy(self, example: TokenExample, output: Any) -> float:
        """The fraction of scored positions that are right: the metric that the literature reports."""
        got, wanted = outputs_of(example, output)
        return float((got == wanted).mean())

    @staticmethod
    def _examples(arrays: Arrays) -> list[TokenExample]:
        return [TokenExample(*row) for row in zip(*arrays, strict=True)]
