"""Nonlinear recurrences that are diagonal, for all tokens at once: Newton's method over the linear scan (ParaRNN, arXiv 2510.21450).

What is solved is h_t - f(h_{t-1}, x_t) = 0 for all t. From the guess h_t = f(0, x_t), one iteration is

    r_t = f(h_{t-1}, x_t) - h_t        d_t = J_t d_{t-1} + r_t (a linear scan)        h_t <- h_t + d_t        J_t = df/dh at h_{t-1}

Each unit has S numbers of state (1, or 2 for an LSTM's c and h) and does not see the others, so J is S x S blocks on a diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...errors import UsageError
from ...span import Span
from ..backend import accumulate_dtype, pick
from ..scan.chunk import two_levels

Rule = Callable[[Tensor, Tensor, bool], tuple[Tensor, Any]]
"""f(h, u, slope): the next states [..., S, D] from the states [..., S, D] and the inputs [..., G, D], each token and unit on its own; and,
if slope, their Jacobian [..., S, S, D], entry [a, b] being d f_a / d h_b (else None)."""
MOST = 12
"""Iterations before the loop is run instead."""


def linear(J: Tensor, r: Tensor, reverse: bool = False) -> Tensor:
    """d_t = J_t d_{t-1} + r_t from zero; reverse, its transpose d_t = J_{t+1}^T d_{t+1} + r_t. J [B, T, S, S, D]; r [B, T, S, D].

    In two levels, chunks of about sqrt(T) tokens side by side and then from chunk to chunk, like ops/scan, which does it where S is 1.
    """
    batch, length, S, D = r.shape
    if S == 1:
        return two_levels(J[:, :, 0, 0], r[:, :, 0], r.new_zeros(batch, D), reverse)[0][:, :, None]
    if reverse:  # the same sweep over the tokens in reverse order
        J = torch.cat([torch.zeros_like(J[:, :1]), J[:, 1:].flip(1).transpose(2, 3)], 1)
        return linear(J, r.flip(1)).flip(1)
    size = math.isqrt(length - 1) + 1
    short = -length % size
    J, r = (torch.cat([x, x.new_zeros(batch, short, *x.shape[2:])], 1).unflatten(1, (-1, size)) for x in (J, r))  # [B, N, C, ...]

    def apply(J: Tensor, d: Tensor) -> Tensor:
        return (J * d.unsqueeze(-3)).sum(-2)

    end, product = r[:, :, 0], J[:, :, 0]  # of each chunk from a zero start: its last d, and J_C ... J_1
    for t in range(1, size):
        end = apply(J[:, :, t], end) + r[:, :, t]
        product = (J[:, :, t].unsqueeze(-2) * product.unsqueeze(-4)).sum(-3)  # [B, N, S, S, D]
    carry, starts = torch.zeros_like(end[:, 0]), []
    for n in range(r.shape[1]):
        starts.append(carry)
        carry = apply(product[:, n], carry) + end[:, n]
    d, out = torch.stack(starts, 1), []
    for t in range(size):
        d = apply(J[:, :, t], d) + r[:, :, t]
        out.append(d)
    return torch.stack(out, 2).flatten(1, 2)[:, :length]


def before(h: Tensor, initial: Tensor, reset: Tensor | None) -> Tensor:
    """The state that every token starts from: h [B, T, S, D] shifted by one, zero at a reset."""
    shifted = torch.cat([initial[:, None], h[:, :-1]], 1)
    return shifted if reset is None else shifted.masked_fill(reset[..., None, None], 0)


def solve(
    f: Rule, u: Tensor, initial: Tensor, reset: Tensor | None = None, most: int = MOST, residuals: list[float] | None = None
) -> Tensor | None:
    """h [B, T, S, D] by at most `most` iterations, or None if they do not converge. Appends max |r| before each one to `residuals`.

    The error after an iteration is of the order of the square of the residual before it, so the last one is that whose residual is below
    a tenth of the square root of the precision. With `residuals` given every iteration is made.
    """
    enough = 0.1 * torch.finfo(u.dtype).eps ** 0.5
    h, _ = f(torch.zeros_like(initial)[:, None].expand(-1, u.shape[1], -1, -1), u, False)
    for _ in range(most):
        new, J = f(before(h, initial, reset), u, True)
        if reset is not None:
            J = J.masked_fill(reset[..., None, None, None], 0)
        r = new - h
        largest = r.detach().abs().amax().item()
        if residuals is not None:
            residuals.append(largest)
        h = h + linear(J, r)
        if not math.isfinite(largest):
            return None
        if largest <= enough and residuals is None:
            return h
    return None if residuals is None else h


def loop(f: Rule, u: Tensor, initial: Tensor, reset: Tensor | None = None) -> Tensor:
    """The recurrence token by token, differentiable by autograd: h [B, T, S, D]."""
    h, out = initial, []
    for t in range(u.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None, None], 0.0, h)
        h, _ = f(h, u[:, t], False)
        out.append(h)
    return torch.stack(out, 1)


class _Adjoint(torch.autograd.Function):
    """Nothing forward; backward, from the gradient at every h_t by itself to that through all later tokens: one reverse scan.

    lambda_t = g_t + J_{t+1}^T lambda_{t+1}. What f then makes of lambda is the exact gradient, and no iteration is unrolled.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, J: Tensor) -> Tensor:
        ctx.save_for_backward(J)
        return h.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return linear(ctx.saved_tensors[0], grad, reverse=True), None


def _parallel(f: Rule, u: Tensor, initial: Tensor, reset: Tensor | None, iterations: int | None) -> Tensor:
    """h of all tokens, differentiable once: solved without a graph, then one application of f that has one."""
    with torch.no_grad():
        h = None if iterations is None else solve(f, u, initial, reset, iterations)
        if h is None:
            h = loop(f, u, initial, reset)
        new, J = f(before(h, initial, reset), u, True)
        if not bool((new - h).abs().amax() <= 1e3 * torch.finfo(h.dtype).eps * (1 + h.abs().amax())):
            h = loop(f, u, initial, reset)
            J = f(before(h, initial, reset), u, True)[1]
        if reset is not None:
            J = J.masked_fill(reset[..., None, None, None], 0)
    return _Adjoint.apply(f(before(h, initial, reset), u, False)[0], J)


def newton(
    f: Rule,
    u: Tensor,
    initial: Tensor | None = None,
    span: Span | None = None,
    states: int = 1,
    iterations: int | None = MOST,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = f(h_{t-1}, u_t) for every token: u [B, T, G, D], right-padded; initial [B, S, D] or None (zeros), S = `states`.

    Returns h [B, T, S, D] and the last state [B, S, D], both in float32 at least. `f` may hold parameters; gradients
    reach them, u and initial. Where `iterations` do not converge, or what they find does not satisfy the equation, the loop runs
    instead, without a graph, as it does where `iterations` is None; either way the backward pass is one reverse scan. backend='naive' is
    the loop differentiated by autograd. A padded position changes nothing; a reset starts from zero.
    """
    if iterations is not None and iterations < 1:
        raise UsageError(f"iterations is {iterations}; it must be at least 1.")
    dtype = accumulate_dtype(u, *([] if initial is None else [initial]))
    u = u.to(dtype)
    start = u.new_zeros(len(u), states, u.shape[-1]) if initial is None else initial.to(dtype)
    reset = None if span is None else span.reset
    if span is not None and span.valid is not None:
        u = u.masked_fill(~span.valid[..., None, None], 0)
    form = pick(backend, u.shape[1])
    h = _parallel(f, u, start, reset, iterations) if form == "chunk" else loop(f, u, start, reset)
    lengths = None if span is None else span.lengths()
    if lengths is None:
        return h, h[:, -1]
    last = h[torch.arange(len(h), device=h.device), (lengths - 1).clamp(min=0)]
    return h, torch.where(lengths[:, None, None] == 0, start, last)
