"""The diagonal recurrence in two levels: chunks of about sqrt(T) tokens side by side, then from chunk to chunk."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def chunk(log_a: Tensor, b: Tensor, initial: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `naive`, any T, in about 3 sqrt(T) tensor operations and with no exponent that could overflow; differentiable any number of times.

    With N chunks of C tokens, E_n the state at the end of chunk n when it starts from zero and P_n the product of its a:

        H_n = P_n H_{n-1} + E_n        and then inside every chunk, from H_{n-1},  h_t = a_t h_{t-1} + b_t

    The second sweep repeats the first from the right start, which costs less than keeping running products. A reset is a = 0.
    """
    return recurrence(two_levels, log_a, b, initial, reset)


def recurrence(op: Any, log_a: Tensor, b: Tensor, initial: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recurrence by an operator of SCHEMA."""
    a = log_a.exp()
    if reset is not None:
        a = a.masked_fill(reset[..., None], 0)
    return op(a, b, torch.zeros_like(b[:, 0]) if initial is None else initial, False)


def sweep(a: Tensor, b: Tensor, h: Tensor, carry: Tensor | None, reverse: bool) -> Tensor:
    """Run every chunk from its `carry` [B, N, D] (None: zero), writing h; return what each hands on, [B, N, D]. a, b, h [B, N, C, D].

    Forward h_t = a_t h_{t-1} + b_t, handing on the last h. Reverse, its transpose, h_t = a_{t+1} h_{t+1} + b_t, handing on a_0 h_0.
    """
    a_t, b_t, h_t = a.unbind(2), b.unbind(2), h.unbind(2)
    last = len(b_t) - 1
    if reverse:
        now = h_t[last].copy_(b_t[last]) if carry is None else torch.add(b_t[last], carry, out=h_t[last])
        for t in range(last - 1, -1, -1):
            now = torch.addcmul(b_t[t], a_t[t + 1], now, out=h_t[t])
        return a_t[0] * now
    now = h_t[0].copy_(b_t[0]) if carry is None else torch.addcmul(b_t[0], a_t[0], carry, out=h_t[0])
    for t in range(1, last + 1):
        now = torch.addcmul(b_t[t], a_t[t], now, out=h_t[t])
    return now


SCHEMA = "(Tensor a, Tensor b, Tensor initial, bool reverse) -> (Tensor, Tensor)"


@torch.library.custom_op("remanence::scan", mutates_args=(), schema=SCHEMA)
def two_levels(a: Tensor, b: Tensor, initial: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and what is handed on [B, D], by `sweep` one way. An operator of its own, so that torch.compile keeps it whole."""
    length = b.shape[1]
    size = math.isqrt(length)
    count = length // size
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    body, tail = slice(0, size * count), slice(size * count, length)  # the tail is shorter than a chunk

    def run_tail(carry: Tensor) -> Tensor:
        if size * count == length:
            return carry
        return sweep(a[:, None, tail], b[:, None, tail], h[:, None, tail], carry[:, None], reverse)[:, 0]

    a_n, b_n, h_n = (x[:, body].unflatten(1, (count, size)) for x in (a, b, h))
    carry = run_tail(initial) if reverse else initial
    scratch = torch.empty_like(b_n[:, :, 0])
    end = sweep(a_n, b_n, scratch[:, :, None].expand_as(b_n), None, reverse).unbind(1)
    product = a_n.prod(2).unbind(1)
    carries: list[Tensor] = [carry] * count
    for n in range(count - 1, -1, -1) if reverse else range(count):
        carries[n] = carry
        carry = torch.addcmul(end[n], product[n], carry)
    sweep(a_n, b_n, h_n, torch.stack(carries, 1), reverse)
    if not reverse:
        run_tail(carry)
    return h, a[:, 0] * h[:, 0] if reverse else h[:, -1].clone()  # an operator may not return two views of one tensor


def transposable(op: Any) -> None:
    """Give an operator of SCHEMA the shapes of its results and its gradient, which is the transposed recurrence: itself, the other way."""

    def fake(a: Tensor, b: Tensor, initial: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        return torch.empty_like(b, memory_format=torch.contiguous_format), torch.empty_like(initial, memory_format=torch.contiguous_format)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        a, _, initial, ctx.reverse = inputs
        ctx.save_for_backward(a, initial, output[0])

    def backward(ctx: Any, dh: Tensor, dlast: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """a gets (what it multiplied) x (what came back)."""
        a, initial, h = ctx.saved_tensors
        db, dinitial = op(a.conj().resolve_conj(), dh, dlast, not ctx.reverse)
        if ctx.reverse:
            return torch.cat([dlast[:, None], db[:, :-1]], 1) * h.conj(), db, dinitial, None
        return torch.cat([initial[:, None], h[:, :-1]], 1).conj() * db, db, dinitial, None

    op.register_fake(fake)
    op.register_autograd(backward, setup_context=save)


transposable(two_levels)
