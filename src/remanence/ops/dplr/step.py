"""The diagonal-plus-low-rank rule for one token: matrix-vector products only."""

from __future__ import annotations

import torch
from torch import Tensor


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor,
    log_decay: Tensor,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `naive`, for T == 1."""
    q, k, v, b, g = q[:, 0], k[:, 0], v[:, 0], b[:, 0], log_decay[:, 0]
    if initial is None:
        S = k[..., None] * v[..., None, :]
    else:
        before = initial if reset is None else torch.where(reset[:, 0, None, None, None], 0.0, initial)
        read = b[..., None, :] @ before  # [B, H, 1, V]
        S = torch.addcmul(before * g.exp()[..., None], k[..., None], v[..., None, :] if a is not None else v[..., None, :] - read)
        if a is not None:
            S = torch.addcmul(S, a[:, 0, ..., None], read)
    return (q[..., None, :] @ S).transpose(1, 2), S
