"""The selective recurrence block by block: only the states between blocks are kept, those inside are made again in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..scan.chunk import two_levels

BLOCK = 2**19
"""Numbers of a block's states on a CPU: a few such arrays stay in its cache. Elsewhere 32 times as many, so that kernels are large."""
SHORTEST = 32
"""Tokens in a block at least: the states kept are at most one in this many."""
WIDE = 2048
"""From this many numbers a token on, a CPU runs a block token by token: two levels would go over everything three times to save calls."""


def block_size(batch: int, length: int, numbers: int, device: torch.device) -> int:
    """Tokens in a block, for `numbers` = E N of state a row."""
    budget = BLOCK if device.type == "cpu" else 32 * BLOCK
    return min(max(budget // (batch * numbers), SHORTEST), length)


class Scratch:
    """An array [B, L, N, E] that every block fills anew, and the views of its tokens: making those took a tenth of all time."""

    def __init__(self, like: Tensor, shape: tuple[int, ...]):
        self.data = like.new_empty(shape)
        self.tokens = self.data.flatten(2).unbind(1)


class Blocks:
    """Cuts the sequence into blocks and makes the decays and states of one at a time, with E innermost: every row of memory is E long."""

    def __init__(self, u: Tensor, v: Tensor, w: Tensor, B: Tensor, reset: Tensor | None, exponential: bool):
        self.u, self.v, self.w, self.B, self.reset, self.exponential = u, v, w, B, reset, exponential
        batch, length, channels = w.shape
        numbers = channels * B.shape[2]
        size = block_size(batch, length, numbers, w.device)
        self.parts = [slice(at, min(at + size, length)) for at in range(0, length, size)]
        self.by_token = w.is_cpu and batch * numbers >= WIDE
        self.shape = (batch, size, B.shape[2], channels)
        self.a, self.h = self.scratch(), self.scratch()
        self.one = w.new_ones(())

    def scratch(self) -> Scratch:
        return Scratch(self.w, self.shape)

    def decays(self, part: slice) -> Tensor:
        """a of the tokens of a block, [B, L, N, E]; 0 at a reset."""
        out, u = self.a.data[:, : part.stop - part.start], self.u[:, part, None]
        if self.exponential:
            torch.mul(u, self.v, out=out).exp_()
        else:
            torch.addcmul(self.one, u, self.v[:, part, :, None], value=-1, out=out)
        if self.reset is not None:
            out.masked_fill_(self.reset[:, part, None, None], 0)
        return out

    def scan(self, into: Scratch, part: slice, x: Tensor, y: Tensor, carry: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        """The diagonal scan of x_t[e] y_t[n] by the block's decays from `carry` [B, N, E], by `ops.scan`'s conventions.

        x [B, T, E], y [B, T, N]. Returns [B, L, N, E] and what is handed on [B, N, E], both of which the next call may overwrite.
        """
        length = part.stop - part.start
        added = torch.mul(x[:, part, None], y[:, part, :, None], out=into.data[:, :length])
        now = carry.flatten(1)
        if not self.by_token:
            new, now = two_levels(self.a.data[:, :length].flatten(2), added.flatten(2), now, reverse)
            return new.view(added.shape), now.view(carry.shape)
        a, h = self.a.tokens[:length], into.tokens[:length]
        if reverse:
            now = h[-1].add_(now)
            for a_t, h_t in zip(a[:0:-1], h[-2::-1]):  # a of the token after h's
                now = torch.addcmul(h_t, a_t, now, out=h_t)
            now = a[0] * now
        else:
            for a_t, h_t in zip(a, h):
                now = torch.addcmul(h_t, a_t, now, out=h_t)
        return added, now.view(carry.shape)

    def states(self, part: slice, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a, h [B, L, N, E] and the last h [B, N, E] of a block that starts from `before` [B, N, E]."""
        a = self.decays(part)
        return a, *self.scan(self.h, part, self.w, self.B, before, False)


SCHEMA = "(Tensor u, Tensor v, Tensor w, Tensor B, Tensor C, Tensor initial, Tensor? reset, bool exponential) -> (Tensor, Tensor, Tensor)"


@torch.library.custom_op("remanence::selective", mutates_args=(), schema=SCHEMA)
def blockwise(
    u: Tensor, v: Tensor, w: Tensor, B: Tensor, C: Tensor, initial: Tensor, reset: Tensor | None, exponential: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, E], the last h [B, N, E] and the state before every block [blocks, B, N, E]; v [N, E] or [B, T, N], initial [B, N, E].

    An operator of its own, so that torch.compile keeps it whole.
    """
    with torch.autocast(w.device.type, enabled=False):
        blocks = Blocks(u, v, w, B, reset, exponential)
        y = torch.empty_like(w, memory_format=torch.contiguous_format)
        starts = initial.new_empty(len(blocks.parts), *initial.shape)
        last = initial
        for start, part in zip(starts, blocks.parts):
            start.copy_(last)
            _, h, last = blocks.states(part, start)
            y[:, part] = (C[:, part, None] @ h)[:, :, 0]
        return y, last.clone(), starts


@blockwise.register_fake
def _(
    u: Tensor, v: Tensor, w: Tensor, B: Tensor, C: Tensor, initial: Tensor, reset: Tensor | None, exponential: bool
) -> tuple[Tensor, Tensor, Tensor]:
    size = block_size(w.shape[0], w.shape[1], w.shape[2] * B.shape[2], w.device)
    y, last = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (w, initial))
    return y, last, initial.new_empty(-(-w.shape[1] // size), *initial.shape)


BACKWARD = (
    "(Tensor u, Tensor v, Tensor w, Tensor B, Tensor C, Tensor starts, Tensor? reset, Tensor dy, Tensor dlast, bool exponential)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("remanence::selective_backward", mutates_args=(), schema=BACKWARD)
def backward(
    u: Tensor,
    v: Tensor,
    w: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    reset: Tensor | None,
    dy: Tensor,
    dlast: Tensor,
    exponential: bool,
) -> tuple[Tensor, ...]:
    """Gradients of u, v, w, B, C and the initial h, from the last block to the first. With g_t the gradient of h_t,

        g_t = dy_t C_t + a_{t+1} g_{t+1}        and the gradient of a_t is  h_{t-1} g_t
    """
    with torch.autocast(w.device.type, enabled=False):
        blocks = Blocks(u, v, w, B, reset, exponential)
        du, dw, dB, dC = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, w, B, C))
        dv = torch.zeros_like(v, memory_format=torch.contiguous_format)
        scratch, carry = blocks.scratch(), dlast
        for start, part in zip(reversed(starts.unbind()), reversed(blocks.parts)):
            a, h, _ = blocks.states(part, start)
            dC[:, part] = (dy[:, part, None] @ h.mT)[:, :, 0]
            g, carry = blocks.scan(scratch, part, dy, C, carry, True)
            dB[:, part] = (w[:, part, None] @ g.mT)[:, :, 0]
            dw[:, part] = (B[:, part, None] @ g)[:, :, 0]
            da = g  # [B, L, N, E], in its place
            da[:, 1:].mul_(h[:, :-1])
            da[:, 0].mul_(start)
            u_t = u[:, part, None]
            if exponential:
                da.mul_(a)  # of log a; zero at a reset
                torch.sum(torch.mul(da, v, out=a), 2, out=du[:, part])
                dv += da.mul_(u_t).sum((0, 1))
            else:
                if reset is not None:
                    da.masked_fill_(reset[:, part, None, None], 0)
                du[:, part] = -(v[:, part, None] @ da)[:, :, 0]
                dv[:, part] = -(u_t @ da.mT)[:, :, 0]
        return du, dv, dw, dB, dC, carry.clone()


@backward.register_fake
def _(
    u: Tensor,
    v: Tensor,
    w: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    reset: Tensor | None,
    dy: Tensor,
    dlast: Tensor,
    exponential: bool,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, v, w, B, C, dlast))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, v, w, B, C, _, reset, ctx.exponential = inputs
    ctx.save_for_backward(u, v, w, B, C, output[2], reset)


def _backward(ctx: Any, dy: Tensor, dlast: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, reset = ctx.saved_tensors
    return *backward(*inputs, reset, dy, dlast, ctx.exponential), None, None


blockwise.register_autograd(_backward, setup_context=_save)


def chunk(
    u: Tensor, v: Tensor, w: Tensor, B: Tensor, C: Tensor, initial: Tensor | None = None, reset: Tensor | None = None, decay: str = "exp"
) -> tuple[Tensor, Tensor]:
    """As `naive`, any T. First-order gradients only.

    Blocks of some 64 tokens; within one, decays, outer products and reads are taken for all tokens at once and the states by a diagonal
    scan. What has E N numbers a token lives for one block: [B, T, E, N] is never stored, nor are the states that the backward pass needs.
    """
    exponential = decay == "exp"
    v = v.mT.contiguous() if exponential else v
    if initial is None:
        initial = w.new_zeros(w.shape[0], w.shape[2], B.shape[2])
    y, last, _ = blockwise(u, v, w, B, C, initial.mT.contiguous(), reset, exponential)
    return y, last.mT
