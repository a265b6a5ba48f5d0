"""The diagonal recurrence on a GPU: chunks of 64 tokens side by side, then from chunk to chunk. Also the door to fla's kernel."""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import fla_documents
from .chunk import SCHEMA, recurrence, transposable

SIZE = 64
"""Tokens of a chunk."""
BLOCK = 128
"""Channels of a program."""


@triton.jit
def _sweep(
    a, b, carry, h, end, product, length, width, chunks,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, COMPLEX: tl.constexpr, FROM_ZERO: tl.constexpr,
):  # fmt: skip
    """One chunk of one row, BLOCK channels: forward h_t = a_t h_{t-1} + b_t, or its transpose h_t = a_{t+1} h_{t+1} + b_t.

    Each hands on `end` [B, N, D]: the last h, or a_0 h_0. FROM_ZERO: nothing is carried in, h is not written, and `product` of the a is.
    Complex numbers are pairs (re, im), which is what COMPLEX doubles offsets for.
    """
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = channel < width
    chunk = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks).to(tl.int64)
    wide = 2 if COMPLEX else 1
    edge = ((row * chunks + chunk) * width + channel) * wide  # of carry, end and product
    x = tl.zeros([BLOCK], dtype=h.dtype.element_ty)  # what is carried, x + i y
    y = tl.zeros([BLOCK], dtype=h.dtype.element_ty)
    p = x + 1  # the product, p + i r
    r = y
    if not FROM_ZERO:
        x = tl.load(carry + edge, mask=there, other=0)
        if COMPLEX:
            y = tl.load(carry + edge + 1, mask=there, other=0)
    first = chunk * SIZE
    count = tl.minimum(SIZE, length - first)
    for i in tl.range(0, count):
        t = first + (count - 1 - i if REVERSE else i)
        at = ((row * length + t) * width + channel) * wide
        a_re = tl.load(a + at, mask=there, other=0)
        b_re = tl.load(b + at, mask=there, other=0)
        if COMPLEX:
            a_im = tl.load(a + at + 1, mask=there, other=0)
            b_im = tl.load(b + at + 1, mask=there, other=0)
            if REVERSE:
                x += b_re
                y += b_im
                h_re, h_im = x, y
                x, y = a_re * x - a_im * y, a_re * y + a_im * x
            else:
                x, y = a_re * x - a_im * y + b_re, a_re * y + a_im * x + b_im
                h_re, h_im = x, y
            if FROM_ZERO:
                p, r = a_re * p - a_im * r, a_re * r + a_im * p
            else:
                tl.store(h + at, h_re, mask=there)
                tl.store(h + at + 1, h_im, mask=there)
        else:
            if REVERSE:
                h_re = x + b_re
                x = a_re * h_re
            else:
                x = a_re * x + b_re
                h_re = x
            if FROM_ZERO:
                p *= a_re
            else:
                tl.store(h + at, h_re, mask=there)
    tl.store(end + edge, x, mask=there)
    if COMPLEX:
        tl.store(end + edge + 1, y, mask=there)
    if FROM_ZERO:
        tl.store(product + edge, p, mask=there)
        if COMPLEX:
            tl.store(product + edge + 1, r, mask=there)


def _launch(a: Tensor, b: Tensor, carry: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """(h, end) from `carry` [B, N, D]; without one (end, product) from zero."""
    batch, length, width = b.shape
    chunks = triton.cdiv(length, SIZE)
    end = b.new_empty(batch, chunks, width)
    other = torch.empty_like(b if carry is not None else end)  # h, or the product
    real = [torch.view_as_real(x) if x.is_complex() else x for x in (a, b, end if carry is None else carry, other, end, other)]
    grid = (batch * chunks, triton.cdiv(width, BLOCK))
    flags = {"REVERSE": reverse, "COMPLEX": b.is_complex(), "FROM_ZERO": carry is None}
    _sweep[grid](*real, length, width, chunks, SIZE=SIZE, BLOCK=BLOCK, **flags)
    return (end, other) if carry is None else (other, end)


def _levels(a: Tensor, b: Tensor, initial: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and what is handed on [B, D]. From chunk to chunk it is the same recurrence, 64 times shorter, solved the same way."""
    carry = initial[:, None]
    if b.shape[1] > SIZE:
        end, product = _launch(a, b, None, reverse)
        if reverse:
            end, product = end.flip(1), product.flip(1)
        handed, _ = _levels(product, end, initial, False)
        carry = torch.cat([carry, handed[:, :-1]], 1)
        carry = carry.flip(1) if reverse else carry
    h, end = _launch(a, b, carry.contiguous(), reverse)
    return h, end[:, 0 if reverse else -1]


@torch.library.custom_op("remanence::scan_triton", mutates_args=(), schema=SCHEMA)
def levels(a: Tensor, b: Tensor, initial: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """As `two_levels` of chunk.py: an operator of its own, so that torch.compile keeps it whole."""
    a, b, initial = (x.resolve_conj().contiguous() for x in (a, b, initial))
    h, end = _levels(a, b, initial, reverse)
    return h, end.clone()


transposable(levels)


def chunk(log_a: Tensor, b: Tensor, initial: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As the `chunk` of torch, any T, real or complex; differentiable any number of times."""
    return recurrence(levels, log_a, b, initial, reset)


def fla(log_a: Tensor, b: Tensor, initial: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """By fla's HGRN kernel, for real numbers; resets only in one row (B == 1). It loops over tokens: one program per block of channels."""
    from fla.ops.hgrn import fused_recurrent_hgrn

    initial, documents = fla_documents(reset, initial)
    h, last = fused_recurrent_hgrn(b.contiguous(), log_a.contiguous(), initial_state=initial, output_final_state=True, **documents)
    return h, last[-1:] if documents else last
