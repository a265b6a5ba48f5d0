"""The selective recurrence for one token."""

from __future__ import annotations

import torch
from torch import Tensor


def step(
    u: Tensor, v: Tensor, w: Tensor, B: Tensor, C: Tensor, initial: Tensor | None = None, reset: Tensor | None = None, decay: str = "exp"
) -> tuple[Tensor, Tensor]:
    """As `naive`, for T == 1."""
    h = w.mT * B  # [B, E, 1] x [B, 1, N]
    if initial is not None:
        if reset is not None:
            initial = torch.where(reset[..., None], 0.0, initial)  # reset is [B, 1] here
        a = (u.mT * v).exp() if decay == "exp" else 1 - u.mT * v
        h = torch.addcmul(h, a, initial)
    return (h @ C.mT).mT, h
