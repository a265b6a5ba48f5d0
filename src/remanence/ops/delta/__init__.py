"""The delta rule, gated or not: a key-value matrix that is corrected by what it got wrong."""

from __future__ import annotations

from torch import Tensor

from ...span import Span
from ..backend import KERNELS, WIDEST, accumulate_dtype, no_fla, pick
from .chunk import chunk
from .naive import naive
from .step import step

__all__ = ["chunk", "delta", "naive", "step"]


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    initial: Tensor | None = None,
    span: Span | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = S_t^T q_t.

    q, k [B, T, H, K]; v [B, T, H, V]; log_decay g <= 0 [B, T, H] or None (no decay); beta b [B, T, H]; initial [B, H, K, V] or None.
    Returns o [B, T, H, V] in v's dtype and the final S in float32 at least. Keys should have norm <= 1 for b in (0, 2) to be stable.
    Padding in `span` neither decays nor writes; a reset starts from zero.
    """
    dtype = accumulate_dtype(q, k, v)
    out = v.dtype
    g = beta.new_zeros(beta.shape) if log_decay is None else log_decay
    reset = None
    if span is not None:
        reset = span.reset
        if span.valid is not None:
            real = span.valid[..., None]
            g, beta = g * real, beta * real
    no_triton = f"its triton form takes at most {WIDEST} key channels a head" if q.shape[-1] > WIDEST else ""
    form = pick(backend, q.shape[1], v.device, {"triton": no_triton, "fla": no_fla(reset)})
    g, beta = g.to(dtype), beta.to(dtype)
    if form in KERNELS:  # they take q, k, v as they come
        from . import triton

        rule = triton.fla if form == "fla" else triton.chunk
    else:
        rule = {"naive": naive, "step": step, "chunk": chunk}[form]
        q, k, v = (x.to(dtype) for x in (q, k, v))
    o, S = rule(q, k, v, g, beta, None if initial is None else initial.to(dtype), reset)
    return o.to(out), S
