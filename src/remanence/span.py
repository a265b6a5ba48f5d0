"""Span: what a call knows about its tokens: which are real (the rest is padding) and where documents start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from .errors import ShapeError, UsageError


class Span:
    """valid [B, T] bool, False where a position is padding; reset [B, T] bool, True on a document's first token. None means all / none.

    A padded position changes nothing. At a reset the state is that of a fresh start before the token is read; the first token of a call
    continues the state given unless it is marked. Documents packed in one row are marked by resets, or given as `from_cu_seqlens`.
    """

    def __init__(self, valid: Tensor | None = None, reset: Tensor | None = None):
        for name, mask in (("valid", valid), ("reset", reset)):
            if mask is not None and (mask.dtype != torch.bool or mask.ndim != 2):
                raise ShapeError(f"span.{name} is {mask.dtype} with shape {list(mask.shape)}; it must be bool [B, T].")
        if valid is not None and reset is not None:
            if valid.shape != reset.shape:
                raise ShapeError(f"span.valid has shape {list(valid.shape)} and span.reset {list(reset.shape)}; they must agree.")
            reset = reset & valid
        self.valid, self.reset = valid, reset

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Sequence[int] | Tensor, device: torch.device | str | None = None) -> Self:
        """One row that packs documents [cu[i], cu[i + 1]): the convention of variable-length attention kernels."""
        cu = torch.as_tensor(cu_seqlens, dtype=torch.long, device=device)
        if cu.ndim != 1 or len(cu) < 2 or int(cu[0]) != 0 or bool((cu.diff() <= 0).any()):
            raise UsageError(f"cu_seqlens is {cu.tolist()}; it must start at 0 and increase.")
        reset = torch.zeros(1, int(cu[-1]), dtype=torch.bool, device=cu.device)
        reset[0, cu[:-1]] = True
        return cls(reset=reset)

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int] | Tensor, total: int, side: str = "right", device: torch.device | str | None = None
    ) -> Self:
        """Rows of `lengths` real tokens, padded to `total` on the `side` named ('left' or 'right')."""
        if side not in ("left", "right"):
            raise UsageError(f"side is {side!r}; it must be 'left' or 'right'.")
        size = torch.as_tensor(lengths, dtype=torch.long, device=device)[:, None]
        if bool((size < 0).any()) or bool((size > total).any()):
            raise UsageError(f"lengths are {size[:, 0].tolist()}; each must be in 0..{total}.")
        at = torch.arange(total, device=size.device)
        return cls(valid=at < size if side == "right" else at >= total - size)

    def check(self, batch: int, length: int) -> None:
        """Raise ShapeError unless the masks are [batch, length]."""
        for name, mask in (("valid", self.valid), ("reset", self.reset)):
            if mask is not None and mask.shape != (batch, length):
                raise ShapeError(f"span.{name} has shape {list(mask.shape)}; the input has [B, T] = [{batch}, {length}].")

    def __getitem__(self, part: slice) -> Span:
        """The span of tokens `part` of the call."""
        return Span(None if self.valid is None else self.valid[:, part], None if self.reset is None else self.reset[:, part])

    def lengths(self) -> Tensor | None:
        """Number of real tokens of each row, [B], or None if all are."""
        return None if self.valid is None else self.valid.sum(1)

    def right_padded(self) -> tuple[Span, Tensor | None]:
        """The same tokens with the padding moved to the right, and the order [B, T] that moves them (None if nothing moves)."""
        if self.valid is None:
            return self, None
        padding = (~self.valid).to(torch.int8)
        if bool((padding[:, 1:] >= padding[:, :-1]).all()):
            return self, None
        order = padding.argsort(dim=1, stable=True)
        reset = None if self.reset is None else self.reset.gather(1, order)
        return Span(self.valid.gather(1, order), reset), order


def positions(seen: Tensor, length: int, span: Span | None) -> Tensor:
    """Position of every token in its document, [B, T] int64; a padded position repeats the one before it. seen [B]: tokens already read."""
    if span is None or (span.valid is None and span.reset is None):
        return seen[:, None] + torch.arange(length, device=seen.device)
    valid = span.valid if span.valid is not None else torch.ones(len(seen), length, dtype=torch.bool, device=seen.device)
    count = valid.cumsum(1) - 1  # index among the row's real tokens
    if span.reset is None:
        return seen[:, None] + count
    start = torch.where(span.reset, count, -seen[:, None]).cummax(1).values
    return count - start


def advance(seen: Tensor, length: int, span: Span | None) -> Tensor:
    """`seen` [B] after `length` more positions: what a state that counts its tokens holds next."""
    return seen + length if span is None else positions(seen, length, span)[:, -1] + 1


def documents(span: Span | None) -> Tensor | None:
    """Index of the document of every token of the call, [B, T]: 0 continues the state given. None if there is no reset."""
    return None if span is None or span.reset is None else span.reset.cumsum(1)


def last_inputs(before: Tensor, x: Tensor, span: Span | None) -> Tensor:
    """The last W - 1 real inputs of each row's current document, zeros where there are fewer: [B, W - 1, C].

    before [B, W - 1, C]: those of the state given; x [B, T, C], right-padded. This is the state of a causal convolution.
    """
    keep = before.shape[1]
    both = torch.cat([before, x], 1)
    if span is None or (span.valid is None and span.reset is None):
        return both[:, both.shape[1] - keep :]
    end = span.lengths()
    if end is None:
        end = torch.full((len(x),), x.shape[1], device=x.device)
    index = end[:, None] + torch.arange(keep, device=x.device)  # rows of `both`, oldest first
    tail = both.gather(1, index[..., None].expand(-1, -1, both.shape[2]))
    if span.reset is None:
        return tail
    at = torch.arange(1, x.shape[1] + 1, device=x.device) * span.reset  # 1 + index of a reset, else 0
    start = at.amax(1) - 1 + keep  # first row of `both` that is in the current document; keep - 1 if none, where all are
    alive = (index >= start[:, None]) | (start[:, None] < keep)
    return tail * alive[..., None].to(tail.dtype)
