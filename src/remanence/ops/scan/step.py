"""The diagonal recurrence for one token."""

from __future__ import annotations

import torch
from torch import Tensor


def step(log_a: Tensor, b: Tensor, initial: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `naive`, for T == 1."""
    if initial is None:
        return b, b[:, 0]
    if reset is not None:
        initial = torch.where(reset, 0.0, initial)  # reset is [B, 1] here
    h = torch.addcmul(b[:, 0], log_a[:, 0].exp(), initial)
    return h[:, None], h
