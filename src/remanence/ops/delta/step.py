"""The gated delta rule for one token: matrix-vector products only."""

from __future__ import annotations

import torch
from torch import Tensor


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, initial: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `naive`, for T == 1."""
    q, k, v, g, b = q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], beta[:, 0]
    if initial is None:
        S = (b[..., None] * k)[..., None] * v[..., None, :]
    else:
        S = initial if reset is None else torch.where(reset[:, 0, None, None, None], 0.0, initial)
        S = S * g.exp()[..., None, None]
        error = v - (k[..., None, :] @ S)[..., 0, :]
        S = S + k[..., None] * (b[..., None] * error)[..., None, :]
    return (q[..., None, :] @ S).transpose(1, 2), S
