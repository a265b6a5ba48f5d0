"""Nonlinear cells with heads: Elman, LSTM, GRU and sLSTM, one after another in time; and Newton's method for those that are diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ShapeError, unknown
from ...span import Span
from ..backend import accumulate_dtype, pick
from .loop import loop
from .naive import naive
from .step import GATES, STATES, States, step

__all__ = ["GATES", "STATES", "cell", "loop", "naive", "step"]


def cell(
    kind: str,
    wx: Tensor,
    R: Tensor,
    initial: States | None = None,
    inner: Tensor | None = None,
    span: Span | None = None,
    backend: str = "auto",
) -> tuple[Tensor, States]:
    """(y, ...)_t = cell(wx_t + y_{t-1} R, (y, ...)_{t-1}); the equations are in `step`.

    kind 'elman', 'lstm', 'gru' or 'slstm'; wx [B, T, H, G, D], biases included; R [H, D, G, D]; initial, one [B, H, D] for each name in
    STATES[kind], or None (zeros); inner [H, D], the gru's bias on the product inside its reset gate. G and the order of the gates: GATES.
    Returns y [B, T, H, D] in wx's dtype, zero at padding, and the last states in float32 at least. Padding in `span` changes nothing; a
    reset starts from zeros. Raises UnknownName on another kind and ShapeError if the shapes do not fit.
    """
    if kind not in GATES:
        raise unknown("cell", kind, GATES)
    heads, size = R.shape[:2]
    if wx.ndim != 5 or wx.shape[2:] != (heads, GATES[kind], size) or R.shape != (heads, size, GATES[kind], size):
        expected = f"[B, T, H, {GATES[kind]}, D] and [H, D, {GATES[kind]}, D]"
        raise ShapeError(f"wx and R have shapes {list(wx.shape)} and {list(R.shape)}; a {kind} expects {expected}.")
    if initial is None:
        initial = (wx.new_zeros(len(wx), heads, size),) * len(STATES[kind])
    dtype = accumulate_dtype(wx, R, *initial)
    form = pick(backend, wx.shape[1])
    order, out = None, wx.dtype
    if span is not None:
        span.check(*wx.shape[:2])
        if span.valid is not None:
            wx = wx.masked_fill(~span.valid[..., None, None, None], 0)
        if form == "chunk":
            span, order = span.right_padded()
            if order is not None:
                wx = wx.gather(1, order[..., None, None, None].expand_as(wx))
    wx, R, initial = wx.to(dtype), R.to(dtype), tuple(state.to(dtype) for state in initial)
    inner = None if inner is None else inner.to(dtype)
    reset = None if span is None else span.reset
    if form == "chunk":
        y, final = loop(kind, wx, R, initial, inner, None if span is None else span.lengths(), reset)
        if order is not None:
            y = torch.zeros_like(y).scatter(1, order[..., None, None].expand_as(y), y)
    elif form == "step" and span is None:
        final = step(kind, wx[:, 0], R, initial, inner)
        y = final[0][:, None]
    else:
        y, final = naive(kind, wx, R, initial, inner, None if span is None else span.valid, reset)
    if kind == "slstm":
        final = (*final[:3], final[3].detach())  # in every form
    return y.to(out), final
