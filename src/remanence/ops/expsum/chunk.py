"""The (max, sum, weighted sum) recurrence for all tokens: the maxima first, without gradient, then one linear scan."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...span import Span
from ..scan import scan
from .naive import FLOOR, Sums, fresh


def running_max(
    score: Tensor, log_decay: Tensor | None = None, initial: Tensor | None = None, reset: Tensor | None = None, start: float = FLOOR
) -> Tensor:
    """m_t = max(m_{t-1} + g_t, s_t), [B, T, H], without gradient: it is the scale of sums that do not depend on it.

    score s [B, T, H]; log_decay g, the same or None (0); initial [B, H] or None, which is `start`, as is m before a token of reset
    [B, T]. Two levels as in ops.scan, hence about 3 sqrt(T) tensor operations, and as exact: no running sum of decays is taken.
    """
    score = score.detach()
    g = score.new_zeros(()).expand_as(score) if log_decay is None else log_decay.detach().to(score.dtype).expand_as(score)
    first = torch.full_like(score[:, 0], start) if initial is None else initial.detach().to(score.dtype)
    if reset is not None:
        at = reset[..., None]
        score, g = torch.where(at, torch.maximum(score, g + start), score), g.masked_fill(at, -torch.inf)
    return _max_plus(score, g, first)


def _sweep(score: Tensor, g: Tensor, m: Tensor, carry: Tensor) -> Tensor:
    """Run every chunk from its `carry` [B, N, H], writing m; return the last. score, g, m [B, N, C, H]."""
    for s_t, g_t, m_t in zip(score.unbind(2), g.unbind(2), m.unbind(2)):
        carry = torch.maximum(carry + g_t, s_t, out=m_t)
    return carry


@torch.library.custom_op("remanence::running_max", mutates_args=(), schema="(Tensor score, Tensor g, Tensor initial) -> Tensor")
def _max_plus(score: Tensor, g: Tensor, initial: Tensor) -> Tensor:
    """m [B, T, H] of score, g [B, T, H] and initial [B, H]. An operator of its own, so that torch.compile keeps it whole."""
    length = score.shape[1]
    size = math.isqrt(length)
    count = length // size
    body, tail = slice(0, size * count), slice(size * count, length)
    m = torch.empty_like(score, memory_format=torch.contiguous_format)
    score_n, g_n, m_n = (x[:, body].unflatten(1, (count, size)) for x in (score, g, m))
    nothing = torch.full_like(score_n[:, :, 0], -torch.inf)
    end = _sweep(score_n, g_n, nothing.clone()[:, :, None].expand_as(score_n), nothing)
    total, carry, carries = g_n.sum(2), initial, []
    for n in range(count):
        carries.append(carry)
        carry = torch.maximum(carry + total[:, n], end[:, n])
    _sweep(score_n, g_n, m_n, torch.stack(carries, 1))
    if size * count < length:
        _sweep(score[:, None, tail], g[:, None, tail], m[:, None, tail], carry[:, None])
    return m


@_max_plus.register_fake
def _(score: Tensor, g: Tensor, initial: Tensor) -> Tensor:
    return torch.empty_like(score, memory_format=torch.contiguous_format)


def log_keep(m: Tensor, before: Tensor, log_decay: Tensor | None, reset: Tensor | None) -> Tensor:
    """What sums of scale e^{m_{t-1}} decay by to be of scale e^{m_t}: g_t + m_{t-1} - m_t [B, T, H], 0 where a reset ends them anyway.

    m [B, T, H]; before [B, H]: m before the first token. The maxima are subtracted first: their rounding then cancels.
    """
    keep = torch.cat([before[:, None], m[:, :-1]], 1) - m
    if log_decay is not None:
        keep = keep + log_decay
    return keep if reset is None else keep.masked_fill(reset[..., None], 0)


def chunk(score: Tensor, v: Tensor, log_decay: Tensor, initial: Sums | None = None, reset: Tensor | None = None) -> tuple[Sums, Sums]:
    """As `naive`, any T: with m known, [den, num] is a linear recurrence whose decay log a = m_{t-1} + g_t - m_t is <= 0."""
    m0, den0, num0 = fresh(score, v) if initial is None else initial
    m = running_max(score, log_decay, m0, reset)
    log_a = log_keep(m, m0, log_decay, reset)
    weight = (score - m).exp()[..., None]  # [B, T, H, 1], <= 1
    b = torch.cat([weight, weight * v], -1)  # [B, T, H, 1 + V]
    h0 = torch.cat([den0[..., None], num0], -1).flatten(1)
    h, last = scan(log_a[..., None].expand_as(b).flatten(2), b.flatten(2), h0, None if reset is None else Span(reset=reset))
    h, last = h.view_as(b), last.view_as(b[:, 0])
    return (m, h[..., 0], h[..., 1:]), (m[:, -1], last[..., 0], last[..., 1:])
