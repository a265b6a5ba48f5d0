"""Linear time-invariant memories: diagonal (S4D, an EMA) or dense (HiPPO, LMU), and the tools that make them.

`chunk` is the default form of both rules. With spans it lays every document out from the start of a chunk, so it stays one form for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ShapeError
from ...span import Span
from ..backend import accumulate_dtype, pick
from . import chunk, hippo, naive, step
from .dilated import dilated
from .fft import convolve

__all__ = ["chunk", "convolve", "dense", "diagonal", "dilated", "hippo", "naive", "step"]

_FORMS = {"naive": naive, "step": step, "chunk": chunk}


def _masks(span: Span | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if span is None else (span.valid, span.reset)


def _quiet(y: Tensor, span: Span | None) -> Tensor:
    """Zero at padding, where the forms would say different things."""
    return y if span is None or span.valid is None else y * span.valid.reshape(*span.valid.shape, *[1] * (y.ndim - 2)).to(y.dtype)


def diagonal(
    log_a: Tensor, b: Tensor, c: Tensor, u: Tensor, initial: Tensor | None = None, span: Span | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x_t = exp(log_a) x_{t-1} + b u_t and y_t = 2 Re sum_m c_m x_t[m] (sum_m c_m x_t[m] if log_a, b and c are real).

    log_a (real part <= 0), b, c [D, M]; u [B, T, D] real; initial [B, D, M] or None (zeros). A complex system is half of N = 2 M conjugate
    modes. Returns y [B, T, D] in u's dtype and the last x [B, D, M], in float32 (complex64) at least. Padding in `span`, which must be on
    the right, neither decays nor adds and has y = 0; a reset starts from zero. Raises ShapeError if the shapes do not fit.
    """
    dim, modes = log_a.shape
    if b.shape != log_a.shape or c.shape != log_a.shape or u.shape[-1] != dim:
        shapes = [list(x.shape) for x in (log_a, b, c)]
        raise ShapeError(f"log_a, b, c have shapes {shapes} and u {list(u.shape)}; expected [D, M] each and u [B, T, D].")
    dtype = accumulate_dtype(u, log_a.real)
    inner = torch.promote_types(log_a.dtype, b.dtype)
    inner = dtype.to_complex() if torch.promote_types(inner, c.dtype).is_complex else dtype
    form = pick(backend, u.shape[1])
    if initial is None and form != "chunk":
        initial = log_a.new_zeros(len(u), dim, modes, dtype=inner)
    initial = None if initial is None else initial.to(inner)
    y, last = _FORMS[form].diagonal(log_a.to(inner), b.to(inner), c.to(inner), u.to(dtype), initial, *_masks(span))
    return _quiet(y.to(u.dtype), span), last


def dense(
    a: Tensor, b: Tensor, u: Tensor, c: Tensor | None = None, initial: Tensor | None = None, span: Span | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """m_t = A m_{t-1} + b u_t and y_t = C m_t, or m_t where C is None.

    a [N, N], b [N], c [O, N]: one system for all D features; or a [D, N, N], b [D, N], c [D, O, N]: one each. u [B, T, D]; initial
    [B, D, N] or None (zeros). Returns y [B, T, D, O] in u's dtype and the last m [B, D, N] in float32 at least. Computes in u's precision
    (float32 at least) from a table of powers in float64, so give a, b in float64. `span` as in `diagonal`. Raises ShapeError.
    """
    if a.ndim == 2:
        a, b, c = a[None], b[None], None if c is None else c[None]
    groups, order = a.shape[0], a.shape[-1]
    fits = a.shape == (groups, order, order) and b.shape == (groups, order) and groups in (1, u.shape[-1])
    if not fits or (c is not None and (c.ndim != 3 or c.shape[0] != groups or c.shape[2] != order)):
        shapes = [list(x.shape) for x in (a, b, *([] if c is None else [c]))]
        raise ShapeError(f"the system has shapes {shapes} and u {list(u.shape)}; expected A [D, N, N], b [D, N], C [D, O, N], u [B, T, D].")
    dtype = accumulate_dtype(u)
    form = pick(backend, u.shape[1])
    if form != "chunk":
        a, b, c = a.to(dtype), b.to(dtype), None if c is None else c.to(dtype)
        initial = u.new_zeros(len(u), u.shape[-1], order, dtype=dtype) if initial is None else initial
    initial = None if initial is None else initial.to(dtype)
    y, last = _FORMS[form].dense(a, b, c, u.to(dtype), initial, *_masks(span))
    return _quiet(y.to(u.dtype), span), last
