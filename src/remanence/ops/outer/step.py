"""The gated outer-product state for one token: matrix-vector products only."""

from __future__ import annotations

import torch
from torch import Tensor


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `naive`, for T == 1."""
    batch, _, heads, _ = v.shape
    groups = q.shape[2]
    v = v[:, 0].unflatten(1, (groups, -1))  # [B, G, R, V]
    S = k[:, 0, :, None, :, None] * v[..., None, :]  # [B, G, R, K, V]
    if initial is not None:
        before = initial if reset is None else torch.where(reset[:, 0, None, None, None], 0.0, initial)
        S = S + (before * log_decay[:, 0, :, None, None].exp()).unflatten(1, (groups, -1))
    o = (q[:, 0, :, None, None, :] @ S)[..., 0, :]
    return o.reshape(batch, 1, heads, -1), S.flatten(1, 2)
