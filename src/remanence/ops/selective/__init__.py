"""The selective state: every channel holds N numbers that forget and are written as the token says (S6, Longhorn)."""

from __future__ import annotations

from torch import Tensor

from ...errors import ShapeError, UsageError
from ...span import Span
from ..backend import accumulate_dtype, pick
from .chunk import chunk
from .naive import naive
from .step import step

__all__ = ["chunk", "naive", "selective", "step"]

DECAYS = ("exp", "complement")


def selective(
    u: Tensor,
    v: Tensor,
    w: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None = None,
    span: Span | None = None,
    decay: str = "exp",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t[e, n] = a_t[e, n] h_{t-1}[e, n] + w_t[e] B_t[n], y_t[e] = sum_n C_t[n] h_t[e, n], with the decay given by its two factors:

        decay="exp":         a_t[e, n] = exp(u_t[e] v[e, n])      u >= 0 [B, T, E], v <= 0 [E, N]
        decay="complement":  a_t[e, n] = 1 - u_t[e] v_t[n]        u >= 0 [B, T, E], v >= 0 [B, T, N], with u v <= 1

    w [B, T, E]; B, C [B, T, N]; initial [B, E, N] or None. Returns y [B, T, E] in w's dtype and the final h [B, E, N] in float32 at least.
    Padding in `span` neither decays nor writes; a reset starts from zero. Raises ShapeError if the shapes do not fit.
    """
    if decay not in DECAYS:
        raise UsageError(f"decay is {decay!r}; it may be {' or '.join(map(repr, DECAYS))}.")
    batch, length, channels = w.shape
    sizes = [channels, B.shape[2]] if decay == "exp" else list(B.shape)  # of v
    if u.shape != w.shape or B.shape != C.shape or B.shape[:2] != w.shape[:2] or list(v.shape) != sizes or not length:
        shapes = ", ".join(str(list(x.shape)) for x in (u, v, w, B, C))
        of_v = "[E, N]" if decay == "exp" else "[B, T, N]"
        raise ShapeError(f"u, v, w, B, C have shapes {shapes}; expected u, w [B, T, E], B, C [B, T, N], v {of_v} and T >= 1.")
    if initial is not None and initial.shape != (batch, channels, B.shape[2]):
        raise ShapeError(f"initial has shape {list(initial.shape)}; expected [B, E, N] = {[batch, channels, B.shape[2]]}.")
    form = pick(backend, length)
    dtype, out = accumulate_dtype(u, v, w, B, C), w.dtype
    reset = None
    if span is not None:
        reset = span.reset
        if span.valid is not None:
            padding = ~span.valid[..., None]
            u, w, B = (x.masked_fill(padding, 0) for x in (u, w, B))
    u, v, w, B, C = (x.to(dtype) for x in (u, v, w, B, C))
    rule = {"naive": naive, "step": step, "chunk": chunk}[form]
    y, h = rule(u, v, w, B, C, None if initial is None else initial.to(dtype), reset, decay)
    return y.to(out), h
