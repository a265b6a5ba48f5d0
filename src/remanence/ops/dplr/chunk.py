"""The diagonal-plus-low-rank rule in chunks of matrix products (the WY / UT form with a decay per key)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..delta.chunk import inverse
from ..outer.chunk import documents, join, split
from ..pairs import pairs

CHUNK = 32


class _Carry(torch.autograd.Function):
    """What is read and written chunk by chunk: L [N, M, C, C], targets T [N, M, C, V], readers R and writers W [N, M, C, K], additions
    F [N, M, K, V] or None, across [N, M, K], S [M, K, V] -> U [N, M, C, V] and S before every chunk and after the last [N + 1, M, K, V].

        U = (I + strict_tril(L))^-1 (T - R S)          S <- across S + W^T U + F

    U solves a triangular system, so that its gradient needs only the same inverse, transposed: p = (I + L)^-T dU is the gradient of the
    right side and -p U^T that of L.
    """

    @staticmethod
    def forward(
        ctx: Any, L: Tensor, T: Tensor, R: Tensor, W: Tensor, F: Tensor | None, across: Tensor, S: Tensor
    ) -> tuple[Tensor, Tensor]:
        X, across = inverse(L), across[..., None]
        states, U = S.new_empty(len(T) + 1, *S.shape), torch.empty_like(T)
        states[0] = S
        for n in range(len(T)):
            torch.bmm(X[n], torch.baddbmm(T[n], R[n], states[n], alpha=-1), out=U[n])
            torch.mul(states[n], across[n], out=states[n + 1]).baddbmm_(W[n].mT, U[n])
            if F is not None:
                states[n + 1].add_(F[n])
        ctx.save_for_backward(X, R, W, across, states, U)
        ctx.adds = F is not None
        return U, states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dU: Tensor, d_states: Tensor) -> tuple[Tensor | None, ...]:
        X, R, W, across, states, U = ctx.saved_tensors
        d_states, p = d_states.clone(), torch.empty_like(U)
        for n in reversed(range(len(U))):
            torch.bmm(X[n].mT, torch.baddbmm(dU[n], W[n], d_states[n + 1]), out=p[n])
            d_states[n].addcmul_(d_states[n + 1], across[n]).baddbmm_(R[n].mT, p[n], alpha=-1)
        dL, after = (p @ U.mT).tril_(-1).neg_(), d_states[1:]
        dR = (p @ states[:-1].mT).neg_()
        return dL, p, dR, U @ after.mT, after if ctx.adds else None, (states[:-1] * after).sum(-1), d_states[0]


def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor,
    log_decay: Tensor,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """As `naive`, any T. With g_i the running sum of log decays inside a chunk of C tokens, g-_i that of the token before, and

        XY_ij = sum_c x_ic y_jc exp(g_ic - g_jc), i >= j; in BA and BK exp(g-_ic - g_jc), i > j
        U = (I - BA)^-1 (BK V + (exp(g-) b) S)          O = (exp(g) q) S + QA U + QK V
        S <- exp(g_C) S + (exp(g_C - g) a)^T U + (exp(g_C - g) k)^T V

    U is what b reads. With a = -k it is U' = V - U that is solved for, (I + BK) U' = V - (exp(g-) b) S, which spares BA and QA.
    Everything but the three products that need S is done for all chunks at once. No exponent above 0 is taken, however strong the decay; a
    reset cuts every product that crosses it and drops the carried S. First-order gradients only.
    """
    batch, length, heads, width = v.shape
    size = min(size, length)
    S = v.new_zeros(batch, heads, q.shape[-1], width) if initial is None else initial

    def rows(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [N, B H, C, ...]
        return split(x, size).transpose(2, 3).flatten(1, 2).contiguous()

    with torch.autocast(v.device.type, enabled=False):
        q, k, v, b, step = rows(q), rows(k), rows(v), rows(b), rows(log_decay)
        a = None if a is None else rows(a)
        g = step.cumsum(-2)
        before = torch.cat([torch.zeros_like(g[..., :1, :]), g[..., :-1, :]], -2)
        last = g[..., -1:, :]
        to_end, across = (last - g).exp(), last[..., 0, :].exp()
        readers, o_readers = b * before.exp(), q * g.exp()
        own = None
        document = documents(reset, size)
        if document is not None:
            document = document.expand(-1, -1, heads, -1).flatten(1, 2)  # [N, B H, C]
            own = (document[..., :, None] == document[..., None, :]).to(v.dtype)
            first, final = (document == 0).to(v.dtype)[..., None], (document == document[..., -1:]).to(v.dtype)[..., None]
            readers, o_readers, to_end, across = readers * first, o_readers * first, to_end * final, across * first[..., -1, :]
        if a is None:
            reads = pairs(torch.stack([q, b]), torch.stack([k, k]), torch.stack([g, before]), torch.stack([g, g]), strict=True)
            QK, BK = reads if own is None else reads * own
            QK = QK + torch.diag_embed((q * k).sum(-1))
            U, states = _Carry.apply(BK, v, readers, k * to_end, None, across, S.flatten(0, 1))
            o = QK @ U
        else:
            # in time: b_i reads, k_i and a_i write, q_i reads. So of 2 C tokens (b_1, k_1), (q_1, a_1), (b_2, k_2) .. each sees the keys
            # before its own; all that lacks is what q_i sees of a_i, and there nothing decays
            reads = pairs(*(torch.stack(x, -2).flatten(-3, -2) for x in ((b, q), (k, a), (before, g), (g, g))), strict=True)
            BK, BA, QK, QA = (reads[..., i::2, j::2] if own is None else reads[..., i::2, j::2] * own for i in (0, 1) for j in (0, 1))
            QA = QA + torch.diag_embed((q * a).sum(-1))
            U, states = _Carry.apply(-BA, BK @ v, -readers, a * to_end, (k * to_end).mT @ v, across, S.flatten(0, 1))
            o = QA @ U + QK @ v
        o = o + o_readers @ states[:-1]
    return join(o.unflatten(1, (batch, heads)).transpose(2, 3), length), states[-1].unflatten(0, (batch, heads))
