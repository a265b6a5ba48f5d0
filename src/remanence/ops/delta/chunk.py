"""The gated delta rule in chunks of matrix products (the WY / UT form), with a hand-written backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..outer.chunk import decays, documents, join, split

CHUNK = 64
LEAF = 16


def inverse(L: Tensor) -> Tensor:
    """(I + A)^-1 for A the strictly lower triangle of L [..., C, C]; the rest of L is not read.

    Forward substitution in blocks of 16, then [[P, 0], [A, Q]]^-1 = [[P', 0], [-Q' A P', Q']] by matrix products: as accurate as
    substitution throughout. (A power series of A is not: with near-equal keys its terms cancel.)
    """
    size = L.shape[-1]
    if size <= LEAF:
        eye = torch.eye(size, dtype=L.dtype, device=L.device)
        return torch.linalg.solve_triangular(L, eye, upper=False, unitriangular=True)
    half = size // 2
    P, Q = inverse(L[..., :half, :half]), inverse(L[..., half:, half:])
    out = torch.zeros_like(L)
    out[..., :half, :half], out[..., half:, half:] = P, Q
    out[..., half:, :half] = -(Q @ (L[..., half:, :half] @ P))
    return out


class _Chunks(torch.autograd.Function):
    """q, k [N, M, C, K], v [N, M, C, V], running log decays g and beta b [N, M, C], S [M, K, V] with M = B H -> o like v, final S.

    The equations are those of `chunk`. V' solves a triangular system, so that its gradient needs only the same inverse, transposed:
    p = (I + b A)^-T dV' is the gradient of the right side and -p V'^T that of b A. `read` is the gradient of b k where it reads the
    memory, `write` that of k where it is written. Those of g need no pass over [C, C]: g_i scales all that token i reads and -g_i all
    that it writes, so they are <q, dq> + <b k, read> - <k, write>, and <S, dS> of the state after it for a chunk's last token.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, S: Tensor, document: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        within, from_start, to_end, across = decays(g, document)
        b, from_start, to_end, across = b[..., None], from_start[..., None], to_end[..., None], across[..., None, None]
        X = inverse((k @ k.mT).mul_(within).mul_(b))
        targets, readers, writers = v * b, k * (b * from_start), (k * to_end).mT
        states, news = [S], []
        for n in range(len(q)):
            news.append(X[n] @ torch.baddbmm(targets[n], readers[n], S, alpha=-1))  # [M, C, V], what is written
            S = torch.baddbmm(S * across[n], writers[n], news[n])
            states.append(S)
        states, news = torch.stack(states), torch.stack(news)
        attention = (q @ k.mT).mul_(within)
        o = (q @ states[:-1]).mul_(from_start).add_(attention @ news)
        ctx.save_for_backward(q, k, v, b, within, from_start, to_end, across, X, states, news, attention)
        return o, S.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dS: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, b, within, from_start, to_end, across, X, states, news, attention = ctx.saved_tensors
        do_read = do * from_start
        d_news, d_reads = attention.mT @ do, q.mT @ do_read
        readers, writers = (k * (b * from_start)).mT, k * to_end
        d_states, ps = [dS], []
        for n in reversed(range(len(q))):
            ps.append(X[n].mT @ torch.baddbmm(d_news[n], writers[n], dS))
            dS = torch.baddbmm(torch.addcmul(d_reads[n], dS, across[n]), readers[n], ps[-1], alpha=-1)
            d_states.append(dS)
        p, d_states = torch.stack(ps[::-1]), torch.stack(d_states[-2::-1])  # of the state after each chunk
        before = states[:-1].mT
        d_scores = (do @ news.mT).mul_(within)
        dA = (p @ news.mT).mul_(within)
        dA.diagonal(dim1=-2, dim2=-1).zero_()
        dq = (do_read @ before).add_(d_scores @ k)
        read = (p @ before).mul_(from_start).add_(dA @ k).neg_()
        write = (news @ d_states.mT).mul_(to_end).add_(d_scores.mT @ q).sub_(dA.mT @ (b * k))
        k_read = (k * read).sum(-1)
        db = (p * v).sum(-1) + k_read
        dg = (q * dq).sum(-1) + b[..., 0] * k_read - (k * write).sum(-1)
        dg[..., -1] += (states[1:] * d_states).sum((-2, -1))
        return dq, torch.addcmul(write, b, read), p * b, dg, db, dS, None


def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """As `naive`, any T. With g the running sum of log decays inside a chunk of C tokens and G_ij = exp(g_i - g_j) for i >= j:

        A = strict_tril(K K^T * G)      V' = (I + b A)^-1 b (V - exp(g) K S)
        O = exp(g) (Q S) + (Q K^T * G) V'      S <- exp(g_C) S + (exp(g_C - g) K)^T V'

    Everything but the three products that need S is done for all chunks at once. A reset cuts G (no product crosses it) and drops the
    carried S, so no decay has to be -inf. First-order gradients only.
    """
    batch, length, heads, _ = q.shape
    size = min(size, length)
    S = v.new_zeros(batch, heads, q.shape[-1], v.shape[-1]) if initial is None else initial

    def rows(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [N, B H, C, ...]
        return split(x, size).transpose(2, 3).flatten(1, 2).contiguous()

    document = documents(reset, size)
    document = None if document is None else document.expand(-1, -1, heads, -1).flatten(1, 2)
    with torch.autocast(v.device.type, enabled=False):
        o, S = _Chunks.apply(rows(q), rows(k), rows(v), rows(log_decay).cumsum(-1), rows(beta), S.flatten(0, 1), document)
    return join(o.unflatten(1, (batch, heads)).transpose(2, 3), length), S.unflatten(0, (batch, heads))
