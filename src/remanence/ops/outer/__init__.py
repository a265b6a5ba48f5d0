"""The gated outer-product state: a key-value matrix that decays and is added to (linear attention, retention, Mamba-2)."""

from __future__ import annotations

from torch import Tensor

from ...errors import ShapeError
from ...span import Span
from ..backend import accumulate_dtype, pick
from .chunk import chunk
from .naive import naive
from .step import step

__all__ = ["chunk", "naive", "outer", "step"]


def outer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial: Tensor | None = None,
    span: Span | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t.

    q, k [B, T, G, K] with G dividing H (the heads of a group share them); v [B, T, H, V]; log_decay g <= 0 [B, T, H] or None (no decay);
    initial [B, H, K, V] or None. Returns o [B, T, H, V] in v's dtype and the final S in float32 at least.
    Padding in `span` neither decays nor writes; a reset starts from zero. Raises ShapeError if the shapes do not fit.
    """
    if q.shape != k.shape or q.shape[:2] != v.shape[:2] or v.shape[2] % q.shape[2]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ShapeError(f"q, k, v have shapes {shapes}; expected [B, T, G, K] twice and [B, T, H, V] with G dividing H.")
    if log_decay is not None and log_decay.shape != v.shape[:3]:
        raise ShapeError(f"log_decay has shape {list(log_decay.shape)}; expected [B, T, H] = {list(v.shape[:3])}.")
    dtype = accumulate_dtype(q, k, v)
    out = v.dtype
    g = v.new_zeros(v.shape[:3]) if log_decay is None else log_decay
    reset = None
    if span is not None:
        reset = span.reset
        if span.valid is not None:
            real = span.valid[..., None]
            g, k = g * real, k * real[..., None]
    q, k, v, g = (x.to(dtype) for x in (q, k, v, g))
    rule = {"naive": naive, "step": step, "chunk": chunk}[pick(backend, q.shape[1])]
    o, S = rule(q, k, v, g, None if initial is None else initial.to(dtype), reset)
    return o.to(out), S
