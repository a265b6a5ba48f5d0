"""The gated outer-product state for one token: matrix-vector products only."""

from __future__ import annotations

import torch
from torch import Tensor


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `naive`, for T == 1."""
    batch, _, heads, _ = v.shape
    groups = q.shape[2]
    v = v[:, 0].unflatten(1, (groups, -1))  # [B, G, R, V]
    q = q[:, 0, :, None, None, :]  # [B, G, 1, 1, K]
    S = write = k[:, 0, :, None, :, None] * v[..., None, :]  # [B, G, R, K, V]
    before = None
    if initial is not None:
        before = initial if reset is None else torch.where(reset[:, 0, None, None, None], 0.0, initial)
        decay = log_decay[:, 0, :, None, None] if log_decay.ndim == 3 else log_decay[:, 0, :, :, None]
        S = write + (before * decay.exp()).unflatten(1, (groups, -1))
    if bonus is None:
        read = S
    else:
        read = write * bonus.unflatten(0, (groups, -1))[..., None]
        read = read if before is None else read + before.unflatten(1, (groups, -1))
    o = (q @ read)[..., 0, :]
    return o.reshape(batch, 1, heads, -1), S.flatten(1, 2)
