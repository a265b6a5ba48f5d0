"""The gated outer-product state in chunks of matrix products, with a hand-written backward. Its parts serve the other chunk forms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 64


def split(x: Tensor, size: int) -> Tensor:
    """[B, T, ...] -> [N, B, C, ...] with C = size; zeros after the end, which neither decay nor write."""
    pad = -x.shape[1] % size
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad)) if pad else x
    return x.unflatten(1, (-1, size)).transpose(0, 1)


def join(x: Tensor, length: int) -> Tensor:
    """[N, B, C, ...] -> [B, T, ...]: the inverse of `split`."""
    return x.transpose(0, 1).flatten(1, 2)[:, :length]


class Decays(NamedTuple):
    """Products of decays inside every chunk; zero wherever a document starts in between, so that no decay has to be -inf."""

    within: Tensor  # [N, B, H, C, C], from token j to token i >= j; zero above the diagonal
    from_start: Tensor  # [N, B, H, C], from the carried state to token i
    to_end: Tensor  # [N, B, H, C], from token j to the chunk's last
    across: Tensor  # [N, B, H], over the whole chunk


def decays(g: Tensor, document: Tensor | None) -> Decays:
    """g [N, B, H, C]: running sums of log decays inside each chunk; document [N, B, 1, C]: resets so far inside the chunk, or None."""
    size = g.shape[-1]
    same = torch.ones(size, size, dtype=torch.bool, device=g.device).tril()
    from_start, to_end = g.exp(), (g[..., -1:] - g).exp()
    if document is not None:
        same = same & (document[..., :, None] == document[..., None, :])
        from_start, to_end = from_start * (document == 0), to_end * (document == document[..., -1:])
    # exponentials only where they are <= 1: the upper triangle would overflow
    within = (g[..., :, None] - g[..., None, :]).masked_fill_(~same, -torch.inf).exp_()
    return Decays(within, from_start, to_end, from_start[..., -1])


def documents(reset: Tensor | None, size: int) -> Tensor | None:
    """Number of resets up to each token of its chunk, [N, B, 1, C], from reset [B, T]."""
    return None if reset is None else split(reset.to(torch.int32), size).cumsum(-1)[:, :, None]


class _Chunks(torch.autograd.Function):
    """q, k [N, B, G, C, K], v [N, B, G, C, R, V], running log decays g [N, B, G, R, C], S [B, G, K, R, V] -> o like v, final S.

    The R heads of a group share q and k, so q k^T is taken once a group and products with the state run over R V columns at once.
    Gradients of g need no pass over [C, C]: g_i scales everything that o_i reads and g_j divides everything that v_j writes, so they
    are <o_i, do_i> - <v_j, dv_j>, and <S, dS> for a chunk's last token.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor, document: Tensor | None) -> tuple[Tensor, Tensor]:
        decay = decays(g.flatten(2, 3), document)
        within, from_start, to_end, across = (x.unflatten(2, g.shape[2:4]) for x in decay)
        attention = (q @ k.mT)[:, :, :, None] * within  # [N, B, G, R, C, C]
        states = k.mT @ (v * to_end.mT[..., None]).flatten(-2)  # what each chunk writes, [N, B, G, K, R V]
        states = torch.cat([S.flatten(-2)[None], states]).unflatten(-1, v.shape[-2:])  # [N + 1, B, G, K, R, V]
        across = across[:, :, :, None, :, None]
        for n in range(len(q)):
            states[n + 1].addcmul_(states[n], across[n])
        o = (q @ states[:-1].flatten(-2)).unflatten(-1, v.shape[-2:]) * from_start.mT[..., None]
        o += (attention @ v.transpose(-3, -2)).transpose(-3, -2)
        ctx.save_for_backward(q, k, v, o, states, attention, within, from_start, to_end, across)
        return o, states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dS: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, states, attention, within, from_start, to_end, across = ctx.saved_tensors
        do_read = (do * from_start.mT[..., None]).flatten(-2)
        d_states = torch.cat([(q.mT @ do_read).unflatten(-1, v.shape[-2:]), dS[None]])  # of the state before each chunk, and of the last
        for n in reversed(range(len(q))):
            d_states[n].addcmul_(d_states[n + 1], across[n])
        dv = (k @ d_states[1:].flatten(-2)).unflatten(-1, v.shape[-2:]) * to_end.mT[..., None]
        do_heads = do.transpose(-3, -2).contiguous()  # [N, B, G, R, C, V]
        dv += (attention.mT @ do_heads).transpose(-3, -2)
        d_scores = ((do_heads @ v.transpose(-3, -2).mT).mul_(within)).sum(3)  # [N, B, G, C, C]
        dq = d_scores @ k + do_read @ states[:-1].flatten(-2).mT
        dk = d_scores.mT @ q + (v * to_end.mT[..., None]).flatten(-2) @ d_states[1:].flatten(-2).mT
        dg = ((o * do).sum(-1) - (v * dv).sum(-1)).mT  # [N, B, G, R, C]
        dg[..., -1] += (states[1:] * d_states[1:]).sum((-3, -1))
        return dq, dk, dv, dg, d_states[0], None


def chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial: Tensor | None = None, reset: Tensor | None = None, size: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """As `naive`, any T. With g the running sum of log decays inside a chunk of C tokens and G_ij = exp(g_i - g_j) for i >= j:

        O = exp(g) (Q S) + (Q K^T * G) V          S <- exp(g_C) S + K^T (exp(g_C - g) V)

    Matrix products for all chunks at once; only the last line's recurrence goes chunk by chunk. First-order gradients only.
    """
    batch, length, heads, width = v.shape
    groups = q.shape[2]
    size = min(size, length)
    S = v.new_zeros(batch, heads, q.shape[-1], width) if initial is None else initial
    S = S.unflatten(1, (groups, -1)).transpose(2, 3)  # [B, G, K, R, V]
    q, k = (split(x, size).transpose(2, 3).contiguous() for x in (q, k))  # [N, B, G, C, K]
    v = split(v, size).unflatten(3, (groups, -1)).transpose(2, 3).contiguous()  # [N, B, G, C, R, V]
    g = split(log_decay, size).cumsum(2).unflatten(3, (groups, -1)).movedim(2, -1)  # [N, B, G, R, C]
    with torch.autocast(v.device.type, enabled=False):
        o, S = _Chunks.apply(q, k, v, g, S, documents(reset, size))
    return join(o.transpose(2, 3).flatten(3, 4), length), S.transpose(2, 3).flatten(1, 2)
