"""Softmax attention: causal, optionally windowed, with sinks, over keys that carry their positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DEAD = -1
"""Position of a key that no query may see (padding, or an earlier document)."""


def visible(q_pos: Tensor, k_pos: Tensor, q_doc: Tensor | None, k_doc: Tensor | None, window: int | None, sinks: int) -> Tensor:
    """Which key each query may see: [B, Tq, Tk] bool.

    A key is seen if it is alive (position >= 0), of the query's document, not in its future, and within `window` tokens (itself
    included) or among the first `sinks` of the document. q_pos [B, Tq], k_pos [B, Tk] int64; documents likewise or None.
    """
    distance = q_pos[:, :, None] - k_pos[:, None, :]
    seen = (distance >= 0) & (k_pos >= 0)[:, None, :]
    if window is not None:
        near = distance < window
        seen = seen & (near | (k_pos < sinks)[:, None, :] if sinks else near)
    if q_doc is not None and k_doc is not None:
        seen = seen & (q_doc[:, :, None] == k_doc[:, None, :])
    return seen


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """o_i = sum_j softmax_j(scale q_i . k_j) v_j over the visible j; zero where nothing is visible.

    q [B, Tq, H, D], k, v [B, Tk, G, D] with G dividing H (query head h reads key head h // (H / G)); mask [B, Tq, Tk] bool.
    """
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    score = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    score = score.masked_fill(~mask[:, None], -torch.inf)
    weight = score.softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhij,bjhd->bihd", weight, v)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As `naive`, by torch's fused kernel; mask None means causal with Tq == Tk. A query must see at least one key."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    mask = None if mask is None else mask[:, None]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped).transpose(1, 2)


def local(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, q_doc: Tensor | None, k_doc: Tensor | None, window: int, scale: float
) -> Tensor:
    """Windowed attention in blocks: cost T x window instead of T x T. Keys are `window - 1` cached ones, then one per query.

    q [B, T, H, D]; k, v [B, window - 1 + T, G, D]; the other arguments as in `visible`.
    """
    batch, length = q.shape[:2]
    size = min(max(window, 32), length)
    pad = -length % size
    blocks, reach = (length + pad) // size, size + window - 1

    def queries(x: Tensor) -> Tensor:  # [B, T, ...] -> [B * blocks, size, ...]
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad)).unflatten(1, (blocks, size)).flatten(0, 1)

    def keys(x: Tensor, value: int = 0) -> Tensor:  # [B, window - 1 + T, ...] -> [B * blocks, size + window - 1, ...]
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad), value=value)
        return x.unfold(1, reach, size).movedim(-1, 2).flatten(0, 1)

    docs = (None, None) if q_doc is None or k_doc is None else (queries(q_doc), keys(k_doc))
    mask = visible(queries(q_pos), keys(k_pos, DEAD), *docs, window, 0)
    mask = mask | ~mask.any(-1, keepdim=True)  # a padded query sees anything rather than nothing: no NaN
    o = attend(queries(q), keys(k), keys(v), mask, scale)
    return o.unflatten(0, (batch, blocks)).flatten(1, 2)[:, :length]
