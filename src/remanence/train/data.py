"""What the training loop reads: pieces of batches, and text as endless contiguous rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import ShapeError, UsageError, positive
from ..span import Span
from ..tasks.base import IGNORE


@dataclass(frozen=True)
class Piece:
    """One call's worth of a batch: ids [B, T], targets [B, T] (-100 where nothing is to be predicted) or None, and a Span or None."""

    ids: Tensor
    targets: Tensor | None = None
    span: Span | None = None

    @property
    def count(self) -> int:
        """Number of targets."""
        return 0 if self.targets is None else int((self.targets != IGNORE).sum())

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return self.ids.numel() if self.span is None or self.span.valid is None else int(self.span.valid.sum())

    def to(self, device: torch.device | str) -> Piece:
        move = lambda t: None if t is None else t.to(device)  # noqa: E731
        span = self.span and Span(move(self.span.valid), move(self.span.reset))
        return Piece(self.ids.to(device), move(self.targets), span)


class Data(Protocol):
    """`batch(seed, index)` must be a pure function of its arguments and of `state()`: that is what makes an exact resume possible.

    Only `batch` is required. carries: row b of batch i + 1 continues row b of batch i, so the model's state is carried over.
    observe(metrics): called after every step with its metrics; what it returns goes into the metrics row. state(), restore(state): what the
    data itself remembers (a curriculum's stage), as plain JSON data; it is part of a checkpoint.
    """

    carries: bool

    def batch(self, seed: int, index: int) -> Any:
        """A Piece, (ids, targets), or a list of these, which the model reads in order with its state carried."""
        ...

    def observe(self, metrics: dict[str, float]) -> dict[str, Any]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


def as_pieces(batch: Any) -> list[Piece]:
    """A batch in any of the forms that `Data.batch` may return, as a list of pieces. Raises UsageError on an empty or unknown one."""
    items = batch if isinstance(batch, list) else [batch]
    pieces = [item if isinstance(item, Piece) else Piece(*item) for item in items if isinstance(item, (Piece, tuple))]
    if not pieces or len(pieces) != len(items):
        raise UsageError(f"a batch is {str(batch)[:60]!r}; it must be a Piece, (ids, targets) or a non-empty list of these.")
    return pieces


def cut(ids: Tensor, targets: Tensor, length: int) -> list[Piece]:
    """ids and targets [B, T] cut into pieces of `length` tokens (the last may be shorter)."""
    if ids.shape != targets.shape:
        raise ShapeError(f"targets have shape {list(targets.shape)} and ids {list(ids.shape)}; they must agree.")
    positive(length=length)
    return [Piece(a, b) for a, b in zip(ids.split(length, 1), targets.split(length, 1))]


class Stream:
    """Documents as `rows` endless contiguous streams: row b of batch i + 1 goes on where row b of batch i ended.

    The documents lie on a circle of N tokens; row b starts at b N / rows (plus an offset from the seed) and every batch reads the next
    pieces x length tokens. A document's first token is a reset and is never a target. Every token of the circle is read once every
    N / (rows x pieces x length) batches.
    """

    carries = True

    def __init__(self, documents: Sequence[Sequence[int] | np.ndarray], rows: int, length: int, pieces: int = 1):
        positive(rows=rows, length=length, pieces=pieces)
        arrays = [np.asarray(document, np.int64) for document in documents if len(document)]
        total = sum(map(len, arrays))
        if total <= length * rows:
            raise UsageError(f"the documents hold {total} tokens; {rows} rows of {length} tokens need more than {rows * length}.")
        self.ids = np.concatenate(arrays)
        self.starts = np.zeros(len(self.ids), bool)
        self.starts[np.cumsum([0, *map(len, arrays[:-1])])] = True
        self.rows, self.length, self.pieces = rows, length, pieces

    def batch(self, seed: int, index: int) -> list[Piece]:
        size, read = len(self.ids), self.length * self.pieces
        first = np.arange(self.rows) * size // self.rows + int(np.random.default_rng(seed).integers(size)) + index * read
        at = (first[:, None] + np.arange(read + 1)) % size  # [rows, read + 1]
        ids, starts = self.ids[at], self.starts[at]
        targets = np.where(starts[:, 1:], IGNORE, ids[:, 1:])
        out = []
        for start in range(0, read, self.length):
            part = slice(start, start + self.length)
            reset = torch.from_numpy(starts[:, :-1][:, part].copy())
            span = Span(reset=reset) if bool(reset.any()) else None
            out.append(Piece(torch.from_numpy(ids[:, :-1][:, part].copy()), torch.from_numpy(targets[:, part].copy()), span))
        return out
