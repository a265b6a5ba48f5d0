"""Diagonal plus low rank: a key-value matrix whose every key decays by a rate of its own and which is corrected along one direction."""

from __future__ import annotations

from torch import Tensor

from ...errors import ShapeError
from ...span import Span
from ..backend import accumulate_dtype, pick
from .chunk import chunk
from .naive import naive
from .step import step

__all__ = ["chunk", "dplr", "naive", "step"]


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor,
    log_decay: Tensor,
    initial: Tensor | None = None,
    span: Span | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + a_t (b_t^T S_{t-1}) + k_t v_t^T, o_t = S_t^T q_t.

    q, k, a, b and log_decay g <= 0 [B, T, H, K]; v [B, T, H, V]; initial [B, H, K, V] or None. a None stands for -k, the delta rule
    S_t = diag(exp(g_t)) S_{t-1} + k_t (v_t - S_{t-1}^T b_t)^T, at half the cost. Returns o [B, T, H, V] in v's dtype and the final S in
    float32 at least. b^T a should be in (-2, 0) where the decay is 1, for the state to stay bounded. Padding in `span` neither decays nor
    writes; a reset starts from zero. Raises ShapeError if the shapes do not fit.
    """
    keys = [q, k, b, log_decay, *([] if a is None else [a])]
    if any(x.shape != q.shape for x in keys) or q.ndim != 4 or q.shape[:3] != v.shape[:3]:
        shapes = ", ".join(str(list(x.shape)) for x in (*keys, v))
        raise ShapeError(f"q, k, b, log_decay, (a,) v have shapes {shapes}; expected [B, T, H, K] for all but v [B, T, H, V].")
    dtype = accumulate_dtype(q, k, v)
    out = v.dtype
    reset = None
    if span is not None:
        reset = span.reset
        if span.valid is not None:
            real = span.valid[..., None, None]
            k, log_decay = k * real, log_decay * real
            a = None if a is None else a * real
    q, k, v, b, log_decay = (x.to(dtype) for x in (q, k, v, b, log_decay))
    a = None if a is None else a.to(dtype)
    rule = {"naive": naive, "step": step, "chunk": chunk}[pick(backend, q.shape[1])]
    o, S = rule(q, k, v, a, b, log_decay, None if initial is None else initial.to(dtype), reset)
    return o.to(out), S
