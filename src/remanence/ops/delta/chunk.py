"""The gated delta rule in chunks of matrix products (the WY / UT form), with a hand-written backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..outer.chunk import decays, documents, join, split

CHUNK = {"cpu": 32}
"""Tokens of a chunk, by device; 64 on others, where fewer steps from chunk to chunk count for more than fewer operations."""
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


def add_product(total: Tensor, A: Tensor, B: Tensor, alpha: float = 1) -> Tensor:
    """total + alpha A B, written into `total`; contiguous, with two dimensions of batch."""
    total.view(-1, *total.shape[2:]).baddbmm_(A.flatten(0, 1), B.flatten(0, 1), alpha=alpha)
    return total


class Loops(NamedTuple):
    """What goes from chunk to chunk, as `run` and `run_back` do: all else is done for all chunks at once."""

    forward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]


def run(X: Tensor, news: Tensor, readers: Tensor, writers: Tensor, across: Tensor, states: Tensor) -> None:
    """From states[0]: news[n] <- X (news - readers S), states[n + 1] <- across S + writers news[n], with S = states[n]; in place.

    X [N, M, C, C], news [N, M, C, V], readers [N, M, C, K], writers [N, M, K, C], across [N, M, 1, 1], states [N + 1, M, K, V].
    """
    for R, W, x, new, decay, before, after in zip(readers, writers, X, news, across, states, states[1:]):
        new.copy_(x @ torch.baddbmm(new, R, before, alpha=-1))  # [M, C, V]
        torch.mul(before, decay, out=after).baddbmm_(W, new)


def run_back(X: Tensor, p: Tensor, readers: Tensor, writers: Tensor, across: Tensor, d_states: Tensor) -> None:
    """The transpose, from d_states[N]: p[n] <- X^T (p + writers D), d_states[n] += across D - readers p[n], with D = d_states[n + 1].

    Shapes as in `run`, but readers [N, M, K, C] and writers [N, M, C, K].
    """
    for n in reversed(range(len(X))):
        p[n] = X[n].mT @ torch.baddbmm(p[n], writers[n], d_states[n + 1])
        d_states[n].addcmul_(d_states[n + 1], across[n]).baddbmm_(readers[n], p[n], alpha=-1)


LOOPS = Loops(run, run_back)


class _Chunks(torch.autograd.Function):
    """q, k [N, M, C, K], v [N, M, C, V], running log decays g and beta b [N, M, C], S [M, K, V] with M = B H -> o like v, final S.

    The equations are those of `chunk`. V' solves a triangular system, so that its gradient needs only the same inverse, transposed:
    p = (I + b A)^-T dV' is the gradient of the right side and -p V'^T that of b A. `read` is the gradient of b k where it reads the
    memory, `write` that of k where it is written. Those of g need no pass over [C, C]: g_i scales all that token i reads and -g_i all
    that it writes, so they are <q, dq> + <b k, read> - <k, write>, and <S, dS> of the state after it for a chunk's last token.
    What the loops over chunks make is written where it will be read, and products are added where they belong.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, S: Tensor, document: Tensor | None, loops: Loops
    ) -> tuple[Tensor, Tensor]:
        within, from_start, to_end, across = decays(g, document)
        b, from_start, to_end, across = b[..., None], from_start[..., None], to_end[..., None], across[..., None, None]
        X = inverse((k @ k.mT).mul_(within).mul_(b))
        states, news = S.new_empty(len(q) + 1, *S.shape), v * b  # news: what is to be written, then what is
        states[0] = S
        readers, writers = k * (b * from_start), (k * to_end).mT
        loops.forward(X, news, readers, writers, across, states)
        attention = (q @ k.mT).mul_(within)
        o = (q @ states[:-1]).mul_(from_start)
        add_product(o, attention, news)
        ctx.loops = loops
        ctx.save_for_backward(q, k, v, b, within, from_start, to_end, across, X, states, news, attention)
        return o, states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dS: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, b, within, from_start, to_end, across, X, states, news, attention = ctx.saved_tensors
        do_read, readers, writers = do * from_start, (k * (b * from_start)).mT, k * to_end
        p, d_states = attention.mT @ do, torch.empty_like(states)  # what o alone gives: to news, and to the state before each chunk
        torch.bmm(q.mT.flatten(0, 1), do_read.flatten(0, 1), out=d_states[:-1].flatten(0, 1))
        d_states[-1] = dS
        ctx.loops.backward(X, p, readers, writers, across, d_states)
        before, after = states[:-1].mT, d_states[1:]
        d_scores = (do @ news.mT).mul_(within)
        dA = (p @ news.mT).mul_(within)
        dA.diagonal(dim1=-2, dim2=-1).zero_()
        dq = add_product(do_read @ before, d_scores, k)
        read = add_product((p @ before).mul_(from_start), dA, k).neg_()
        write = add_product((news @ after.mT).mul_(to_end), d_scores.mT, q)
        add_product(write, dA.mT, b * k, -1)
        k_read = (k * read).sum(-1)
        db = (p * v).sum(-1) + k_read
        dg = (q * dq).sum(-1) + b[..., 0] * k_read - (k * write).sum(-1)
        dg[..., -1] += (states[1:] * after).sum((-2, -1))
        return dq, write.addcmul_(b, read), p.mul_(b), dg, db, d_states[0], None, None


def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    size: int | None = None,
    loops: Loops = LOOPS,
) -> tuple[Tensor, Tensor]:
    """As `naive`, any T. With g the running sum of log decays inside a chunk of C tokens and G_ij = exp(g_i - g_j) for i >= j:

        A = strict_tril(K K^T * G)      V' = (I + b A)^-1 b (V - exp(g) K S)
        O = exp(g) (Q S) + (Q K^T * G) V'      S <- exp(g_C) S + (exp(g_C - g) K)^T V'

    Everything but the three products that need S is done for all chunks at once. A reset cuts G (no product crosses it) and drops the
    carried S, so no decay has to be -inf. loops: what goes from chunk to chunk. First-order gradients only.
    """
    batch, length, heads, _ = q.shape
    size = min(size or CHUNK.get(v.device.type, 64), length)
    S = v.new_zeros(batch, heads, q.shape[-1], v.shape[-1]) if initial is None else initial

    def rows(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [N, B H, C, ...]
        return split(x, size).transpose(2, 3).flatten(1, 2).contiguous()

    document = documents(reset, size)
    document = None if document is None else document.expand(-1, -1, heads, -1).flatten(1, 2)
    with torch.autocast(v.device.type, enabled=False):
        o, S = _Chunks.apply(rows(q), rows(k), rows(v), rows(log_decay).cumsum(-1), rows(beta), S.flatten(0, 1), document, loops)
    return join(o.unflatten(1, (batch, heads)).transpose(2, 3), length), S.unflatten(0, (batch, heads))
