"""Causal depthwise convolution with a few taps and a state: the last W - 1 inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...span import Span, last_inputs


def naive(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, reset: Tensor | None = None) -> Tensor:
    """y_t = sum_j w_j x_{t-j} + bias, one token at a time; inputs before a reset count as zero.

    x [B, T, C]; weight [C, W], weight[:, -1] is the current token's (the layout of torch's conv1d); before [B, W - 1, C].
    """
    window, outputs = before, []
    for t in range(x.shape[1]):
        if reset is not None:
            window = torch.where(reset[:, t, None, None], 0.0, window)
        window = torch.cat([window, x[:, t : t + 1]], 1)
        y = (window * weight.T).sum(1)
        outputs.append(y if bias is None else y + bias)
        window = window[:, 1:]
    return torch.stack(outputs, 1)


class _Chunk(torch.autograd.Function):
    """`chunk` with its own backward: autograd's would pad every shifted gradient back to full length.

    fresh [B, T] int64 or None: how many tokens back each token may look.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, fresh: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, before, fresh)
        ctx.biased = bias is not None
        taps = weight.t().contiguous().flip(0)  # taps[j] [C] is for the input j tokens ago
        y = x * taps[0] if bias is None else torch.addcmul(bias, x, taps[0])
        for j, new, old, past in _shifts(x, before):
            tap = taps[j] if fresh is None else taps[j] * (fresh >= j)[..., None]
            y[:, j:].addcmul_(new, tap if fresh is None else tap[:, j:])
            y[:, :past].addcmul_(old, tap if fresh is None else tap[:, :past])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, before, fresh = ctx.saved_tensors
        taps = weight.t().contiguous().flip(0)
        dx, d_before = dy * taps[0], torch.zeros_like(before)
        d_taps = [(dy * x).sum((0, 1))]
        for (j, new, old, past), (_, dx_new, dx_old, _) in zip(_shifts(x, before), _shifts(dx, d_before)):
            d = dy if fresh is None else dy * (fresh >= j)[..., None]
            dx_new.addcmul_(d[:, j:], taps[j])
            dx_old.addcmul_(d[:, :past], taps[j])
            d_taps.append((d[:, j:] * new).sum((0, 1)) + (d[:, :past] * old).sum((0, 1)))
        return dx, torch.stack(d_taps[::-1], 1), dy.sum((0, 1)) if ctx.biased else None, d_before, None


def _shifts(x: Tensor, before: Tensor) -> Iterator[tuple[int, Tensor, Tensor, int]]:
    """For j = 1 .. W - 1: j, the inputs j tokens before tokens j .. of this call, those before its first tokens, and their number."""
    length, width = x.shape[1], before.shape[1] + 1
    for j in range(1, width):
        past = min(j, length)
        yield j, x[:, : length - past], before[:, width - 1 - j : width - 1 - j + past], past


def chunk(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, reset: Tensor | None = None) -> Tensor:
    """As `naive`, all tokens at once: W shifted multiply-adds, which for W <= 4 beat a transposed conv1d on a CPU.

    First-order gradients only.
    """
    fresh = None
    if reset is not None:  # tokens since the document started; as large as can be where it started before this call
        at = torch.arange(x.shape[1], device=x.device)
        fresh = at - torch.where(reset, at, -weight.shape[1]).cummax(1).values
    return _Chunk.apply(x, weight, bias, before, fresh)


def step(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor) -> tuple[Tensor, Tensor]:
    """As `naive`, for T == 1 and no reset; returns the new state too."""
    window = torch.cat([before, x], 1)  # [B, W, C]
    y = (window * weight.t()).sum(1, keepdim=True)
    return y if bias is None else y + bias, window[:, 1:]


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, before: Tensor | None = None, span: Span | None = None
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution of x [B, T, C] with weight [C, W]; returns y [B, T, C] and the new state [B, W - 1, C].

    `before` is the state given, None for a fresh start (zeros). `span` must be right-padded.
    """
    if before is None:
        before = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    before = before.to(x.dtype)
    if x.shape[1] == 1 and span is None:
        return step(x, weight, bias, before)
    y = chunk(x, weight, bias, before, None if span is None else span.reset)
    if span is None:
        x = x[:, -weight.shape[1] :]  # all that the state can hold; spares a copy of the rest
    return y, last_inputs(before, x, span)
