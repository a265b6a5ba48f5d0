"""Diagonal linear recurrences, real or complex: every channel forgets and adds on its own."""

from __future__ import annotations

from torch import Tensor

from ...span import Span
from ..backend import KERNELS, accumulate_dtype, no_fla, pick
from .chunk import chunk
from .naive import naive
from .step import step

__all__ = ["chunk", "naive", "scan", "step"]


def scan(log_a: Tensor, b: Tensor, initial: Tensor | None = None, span: Span | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """h_t = exp(log_a_t) h_{t-1} + b_t.

    log_a, real part <= 0, and b [B, T, D]; initial [B, D] or None (zeros). Returns h [B, T, D] in b's dtype (complex if log_a or initial
    is) and the last h [B, D] in float32 at least. Padding in `span` neither decays nor adds; a reset starts from zero.
    """
    dtype = accumulate_dtype(log_a, b, *([] if initial is None else [initial]))
    out = b.dtype if b.is_complex() or not dtype.is_complex else dtype
    reset = None
    if span is not None:
        reset = span.reset
        if span.valid is not None:
            padding = ~span.valid[..., None]
            log_a, b = log_a.masked_fill(padding, 0), b.masked_fill(padding, 0)
    real_only = "fla's kernel is for real numbers" if dtype.is_complex else ""
    form = pick(backend, b.shape[1], b.device, {"triton": "", "fla": real_only or no_fla(reset)})
    if form in KERNELS:
        from . import triton

        rule = triton.fla if form == "fla" else triton.chunk
    else:
        rule = {"naive": naive, "step": step, "chunk": chunk}[form]
    h, last = rule(log_a.to(dtype), b.to(dtype), None if initial is None else initial.to(dtype), reset)
    return h.to(out), last
