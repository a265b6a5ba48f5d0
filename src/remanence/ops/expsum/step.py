"""The (max, sum, weighted sum) recurrence for one token."""

from __future__ import annotations

import torch
from torch import Tensor

from .naive import FLOOR, Sums


def step(score: Tensor, v: Tensor, log_decay: Tensor, initial: Sums | None = None, reset: Tensor | None = None) -> tuple[Sums, Sums]:
    """As `naive`, for T == 1."""
    s, g = score[:, 0], log_decay[:, 0]
    if initial is None:
        m = s.detach().clamp(min=FLOOR)
        weight = (s - m).exp()
        last = m, weight, weight[..., None] * v[:, 0]
    else:
        m, den, num = initial
        if reset is not None:  # [B, 1] here
            m, den, num = m.masked_fill(reset, FLOOR), den.masked_fill(reset, 0), num.masked_fill(reset[..., None], 0)
        top = torch.maximum(m + g, s).detach()
        keep, weight = (g + (m - top)).exp(), (s - top).exp()
        last = top, keep * den + weight, keep[..., None] * num + weight[..., None] * v[:, 0]
    return (last[0][:, None], last[1][:, None], last[2][:, None]), last
