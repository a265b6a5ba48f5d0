"""The gated outer-product state: a key-value matrix that decays and is added to (linear attention, retention, Mamba-2, GLA, RWKV-6)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ShapeError
from ...span import Span
from ..backend import KERNELS, accumulate_dtype, no_fla, pick
from . import keys
from .chunk import chunk
from .naive import naive
from .step import step

__all__ = ["chunk", "keys", "naive", "outer", "read_before", "step"]


def outer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial: Tensor | None = None,
    span: Span | None = None,
    backend: str = "auto",
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t; with a bonus u, o_t = S_{t-1}^T q_t + (q_t . (u * k_t)) v_t.

    q, k [B, T, G, K] with G dividing H (the heads of a group share them); v [B, T, H, V]; log_decay g <= 0: [B, T, H], or [B, T, H, K]
    with one for every key channel (then G = H), or None (no decay); initial [B, H, K, V] or None; bonus [H, K] or None.
    Returns o [B, T, H, V] in v's dtype and the final S in float32 at least.
    Padding in `span` neither decays nor writes; a reset starts from zero. Raises ShapeError if the shapes do not fit.
    """
    if q.shape != k.shape or q.shape[:2] != v.shape[:2] or v.shape[2] % q.shape[2]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ShapeError(f"q, k, v have shapes {shapes}; expected [B, T, G, K] twice and [B, T, H, V] with G dividing H.")
    if log_decay is not None and log_decay.shape not in (v.shape[:3], (*v.shape[:3], q.shape[3])):
        raise ShapeError(f"log_decay has shape {list(log_decay.shape)}; expected [B, T, H] = {list(v.shape[:3])}, or that and K.")
    by_key = log_decay is not None and log_decay.ndim == 4
    if by_key and q.shape[2] != v.shape[2]:
        raise ShapeError(f"log_decay is per key channel, q has G={q.shape[2]} groups and v H={v.shape[2]} heads; then G must be H.")
    if bonus is not None and bonus.shape != (v.shape[2], q.shape[3]):
        raise ShapeError(f"bonus has shape {list(bonus.shape)}; expected [H, K] = [{v.shape[2]}, {q.shape[3]}].")
    dtype = accumulate_dtype(q, k, v)
    out = v.dtype
    g = v.new_zeros(v.shape[:3]) if log_decay is None else log_decay
    reset = None
    if span is not None:
        reset = span.reset
        if span.valid is not None:
            real = span.valid[..., None]
            g, k = g * (real[..., None] if by_key else real), k * real[..., None]
    no_triton = "its triton form takes one decay a head, not one for every key channel" if by_key else ""
    form = pick(backend, q.shape[1], v.device, {"triton": no_triton, "fla": no_fla(reset)})
    g, initial, bonus = g.to(dtype), None if initial is None else initial.to(dtype), None if bonus is None else bonus.to(dtype)
    if form not in KERNELS or bonus is not None:  # kernels take them as they come
        q, k, v = (x.to(dtype) for x in (q, k, v))
    if form in ("naive", "step"):
        rule = naive if form == "naive" else step
        o, S = rule(q, k, v, g, initial, reset, bonus)
        return o.to(out), S
    if form in KERNELS:
        from . import triton

        rule = triton.fla if form == "fla" else triton.chunk
    else:
        rule = keys.chunk if by_key else chunk
    o, S = rule(q, k, v, g, initial, reset) if bonus is None else read_before(rule, q, k, v, g, bonus, initial, reset)
    return o.to(out), S


def read_before(
    rule: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    bonus: Tensor,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`naive` with a bonus, by a chunk form without: the state before token t is the one after token t - 1.

    So queries read a sequence of writes and decays that is one token late, and the last token is then added by hand.
    """

    def late(x: Tensor) -> Tensor:
        return F.pad(x[:, :-1], (0, 0) * (x.ndim - 2) + (1, 0))

    k_late = late(k)
    if reset is not None:  # what came before a document's first token is not its
        k_late = k_late.masked_fill(reset[..., None, None], 0)
    o, S = rule(q, k_late, late(v), late(g), initial, reset)
    _, S = step(q[:, -1:], k[:, -1:], v[:, -1:], g[:, -1:], S)
    own = torch.einsum("btgk,grk->btgr", q * k, bonus.unflatten(0, (q.shape[2], -1))).flatten(2)
    return torch.addcmul(o, own[..., None], v), S
