"""The gated delta rule for one token: matrix-vector products only."""

from __future__ import annotations

import torch
from torch import Tensor


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, initial: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `naive`, for T == 1."""
    batch, _, heads, _ = k.shape
    q, k, v = (x.reshape(batch * heads, 1, -1) for x in (q, k, v))  # [B H, 1, K or V]
    b, g = beta.reshape(-1, 1, 1), log_decay.reshape(-1, 1, 1)
    if initial is None:
        S = k.mT * (b * v)
    else:
        S = initial if reset is None else torch.where(reset[:, 0, None, None, None], 0.0, initial)
        S = S.flatten(0, 1) * g.exp()
        S = torch.baddbmm(S, k.mT, b * (v - k @ S))
    return (q @ S).view(batch, 1, heads, -1), S.unflatten(0, (batch, heads))
