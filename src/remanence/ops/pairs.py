"""Scores between the tokens of a chunk when every key channel has a decay of its own; what the chunk forms with such decays share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ShapeError

LEAF = 8


def pairs(q: Tensor, k: Tensor, gq: Tensor, gk: Tensor, strict: bool = False) -> Tensor:
    """A_ij = sum_c q_ic k_jc exp(gq_ic - gk_jc) for i >= j (i > j if `strict`), zero elsewhere; q, k, gq, gk [..., C, K] -> A [..., C, C].

    gq_i - gk_j must be <= 0 for all those i, j; gq and -gk alone may be as large as they like: no exponent that is taken is above 0.
    Computes in the inputs' dtype, whatever autocast says. Documents are the caller's to cut: multiply A by their mask. First-order
    gradients only. Raises ShapeError if the four shapes are not one.

    Halving: the rows of a block's lower half see the columns of its upper half by one matrix product of q exp(gq - m) with k exp(m - gk),
    where m, the largest gq of those rows, makes both exponents <= 0. Diagonal blocks of 8 are summed element by element.
    """
    if not q.shape == k.shape == gq.shape == gk.shape or q.ndim < 2:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, gq, gk))
        raise ShapeError(f"q, k, gq, gk have shapes {shapes}; expected [..., C, K] four times.")
    with torch.autocast(q.device.type, enabled=False):
        return _Pairs.apply(q, k, gq, gk, strict)


def _fill(q: Tensor, k: Tensor, gq: Tensor, gk: Tensor) -> tuple[Tensor, ...]:
    """The four at C = 8 * 2^n. The rows added are zero, and their logs keep every difference <= 0."""
    length = q.shape[-2]
    size = min(LEAF, 1 << (length - 1).bit_length())
    while size < length:
        size *= 2
    if size == length:
        return q, k, gq, gk
    pad = (0, 0, 0, size - length)
    low = torch.minimum(gq.amin(-2, keepdim=True), gk.amin(-2, keepdim=True)).expand(*q.shape[:-2], size - length, -1)
    return F.pad(q, pad), F.pad(k, pad), torch.cat([gq, low], -2), torch.cat([gk, low], -2)


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower halves of the diagonal blocks of 2 `half` rows, each [..., n, half, K]; views."""
    upper, lower = x.unflatten(-2, (-1, 2, half)).unbind(-3)
    return upper, lower


def _corner(A: Tensor, half: int) -> Tensor:
    """Where lower rows meet upper columns in the diagonal blocks of 2 `half`, [..., n, half, half]; a view."""
    blocks = A.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))  # [..., n, 2, half, n, 2, half]
    return blocks[..., 1, :, :, 0, :].diagonal(0, -4, -2).movedim(-1, -3)


def _leaves(x: Tensor) -> Tensor:
    """[..., C, K] -> [..., n, 8, K]"""
    return x.unflatten(-2, (-1, min(LEAF, x.shape[-2])))


def _diagonal(A: Tensor) -> Tensor:
    """The diagonal blocks of 8, [..., n, 8, 8]; a view."""
    size = min(LEAF, A.shape[-1])
    return A.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).diagonal(0, -4, -2).movedim(-1, -3)


def scores(q: Tensor, k: Tensor, gq: Tensor, gk: Tensor, strict: bool = False) -> Tensor:
    """What `pairs` returns, outside autograd."""
    length = q.shape[-2]
    q, k, gq, gk = _fill(q, k, gq, gk)
    A = q.new_zeros(*q.shape[:-1], q.shape[-2])
    half = q.shape[-2] // 2
    while half >= LEAF:
        (_, q_low), (k_up, _), (_, gq_low), (gk_up, _) = (_halves(x, half) for x in (q, k, gq, gk))
        m = gq_low.amax(-2, keepdim=True)
        _corner(A, half).copy_((q_low * (gq_low - m).exp()) @ (k_up * (m - gk_up).exp()).mT)
        half //= 2
    block, (q, k, gq, gk) = _diagonal(A), (_leaves(x) for x in (q, k, gq, gk))
    for j in range(q.shape[-2] - strict):  # a column at a time, from the diagonal down
        i = j + strict
        decay = (gq[..., i:, :] - gk[..., j, None, :]).exp_()
        block[..., i:, j] = (decay.mul_(q[..., i:, :]) @ k[..., j, :, None])[..., 0]
    return A[..., :length, :length].contiguous()


def gradients(q: Tensor, k: Tensor, gq: Tensor, gk: Tensor, dA: Tensor, strict: bool = False) -> tuple[Tensor, Tensor]:
    """(dq, dk) of `scores` for the gradient dA [..., C, C], whose entries outside the triangle are not read.

    Those of the logs need no sums of their own: gq_ic scales what q_ic scales, so dgq = q dq, and dgk = -k dk.
    """
    length = dA.shape[-1]
    q, k, gq, gk = _fill(q, k, gq, gk)
    size = q.shape[-2]
    dA = F.pad(dA, (0, size - length, 0, size - length)) if size != length else dA
    dq, dk = torch.zeros_like(q), torch.zeros_like(k)
    half = size // 2
    while half >= LEAF:
        (_, q_low), (k_up, _), (_, gq_low), (gk_up, _) = (_halves(x, half) for x in (q, k, gq, gk))
        m = gq_low.amax(-2, keepdim=True)
        read, write, d = (gq_low - m).exp(), (m - gk_up).exp(), _corner(dA, half)
        _halves(dq, half)[1].addcmul_(d @ (k_up * write), read)
        _halves(dk, half)[0].addcmul_(d.mT @ (q_low * read), write)
        half //= 2
    block, (q, k, gq, gk, dq_leaf, dk_leaf) = _diagonal(dA), (_leaves(x) for x in (q, k, gq, gk, dq, dk))
    for j in range(q.shape[-2] - strict):
        i = j + strict
        decay = (gq[..., i:, :] - gk[..., j, None, :]).exp_().mul_(block[..., i:, j, None])
        dq_leaf[..., i:, :].addcmul_(decay, k[..., j, None, :])
        dk_leaf[..., j, :].add_(decay.mul_(q[..., i:, :]).sum(-2))
    return dq[..., :length, :], dk[..., :length, :]


class _Pairs(torch.autograd.Function):
    """`scores`, with `gradients` from a second look at the inputs: nothing of [C, C, K] is kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, gq: Tensor, gk: Tensor, strict: bool) -> Tensor:
        ctx.save_for_backward(q, k, gq, gk)
        ctx.strict = strict
        return scores(q, k, gq, gk, strict)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dA: Tensor) -> tuple[Tensor | None, ...]:
        q, k, gq, gk = ctx.saved_tensors
        dq, dk = gradients(q, k, gq, gk, dA, ctx.strict)
        return dq, dk, q * dq, -k * dk, None
