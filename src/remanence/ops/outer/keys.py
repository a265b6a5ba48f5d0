"""The outer-product state with a decay of its own for every key channel, in chunks of matrix products (gated linear attention)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..pairs import gradients, scores
from .chunk import CHUNK, documents, join, split

FLOOR = -60.0
"""The strongest log decay of one token that is told apart: e^-60 is nothing, and without a floor running sums would lose their digits."""


class _Keys(torch.autograd.Function):
    """q, k, running log decays g [N, M, C, K], v [N, M, C, V], S [M, K, V] with M = B H -> o like v, final S.

    document [N, M, C]: resets so far inside the chunk, or None. Gradients of g need no pass over pairs: g_i scales what q_i scales and
    divides what k_i scales, channel by channel, so they are q dq - k dk, and <S, dS> over V for a chunk's last token.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor, document: Tensor | None) -> tuple[Tensor, Tensor]:
        from_start, to_end = g.exp(), (g[..., -1:, :] - g).exp()
        attention, same = scores(q, k, g, g), None
        if document is not None:
            same = document[..., :, None] == document[..., None, :]
            from_start, to_end = from_start * (document == 0)[..., None], to_end * (document == document[..., -1:])[..., None]
            attention = attention * same
        across = from_start[..., -1, :, None]  # [N, M, K, 1]
        states = torch.cat([S[None], (k * to_end).mT @ v])  # of each chunk's own writing, until the next line
        for n in range(len(q)):
            states[n + 1].addcmul_(states[n], across[n])
        ctx.save_for_backward(q, k, v, g, same, states, attention, from_start, to_end, across)
        return ((q * from_start) @ states[:-1]).add_(attention @ v), states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dS: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, same, states, attention, from_start, to_end, across = ctx.saved_tensors
        d_states = torch.cat([(q * from_start).mT @ do, dS[None]])  # of the state before each chunk, and of the last
        for n in reversed(range(len(q))):
            d_states[n].addcmul_(d_states[n + 1], across[n])
        dv = (attention.mT @ do).add_((k * to_end) @ d_states[1:])
        dA = do @ v.mT
        dq, dk = gradients(q, k, g, g, dA if same is None else dA * same)
        dq = torch.addcmul(dq, do @ states[:-1].mT, from_start)
        dk = torch.addcmul(dk, v @ d_states[1:].mT, to_end)
        dg = (q * dq).addcmul_(k, dk, value=-1)
        dg[..., -1, :] += (states[1:] * d_states[1:]).sum(-1)
        return dq, dk, dv, dg, d_states[0], None


def chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial: Tensor | None = None, reset: Tensor | None = None, size: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """As `naive` with log_decay [B, T, H, K], any T. With g the running sum of log decays inside a chunk of C tokens:

        A_ij = sum_c q_ic k_jc exp(g_ic - g_jc), i >= j        O = (q exp(g)) S + A V        S <- exp(g_C) S + (k exp(g_C - g))^T V

    No exponent is above 0, however strong the decay (see `pairs`); below -60 a log decay, which may be -inf, counts as -60. First-order
    gradients only. Yang et al. 2023 (arXiv 2312.06635), section 4.
    """
    batch, length, heads, _ = q.shape
    size = min(size, length)
    S = v.new_zeros(batch, heads, q.shape[-1], v.shape[-1]) if initial is None else initial

    def rows(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [N, B H, C, ...]
        return split(x, size).transpose(2, 3).flatten(1, 2).contiguous()

    document = documents(reset, size)
    document = None if document is None else document.expand(-1, -1, heads, -1).flatten(1, 2)
    with torch.autocast(v.device.type, enabled=False):
        g = rows(log_decay).clamp(min=FLOOR).cumsum(-2)
        o, S = _Keys.apply(rows(q), rows(k), rows(v), g, S.flatten(0, 1), document)
    return join(o.unflatten(1, (batch, heads)).transpose(2, 3), length), S.unflatten(0, (batch, heads))
