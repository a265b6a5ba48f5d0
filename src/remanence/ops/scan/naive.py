"""The diagonal recurrence from its equation: the ground truth of this folder."""

from __future__ import annotations

import torch
from torch import Tensor


def naive(log_a: Tensor, b: Tensor, initial: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token at a time, every channel on its own:

        h_t = exp(log_a_t) h_{t-1} + b_t

    log_a (real part <= 0) and b [B, T, D], real or complex; initial [B, D] or None (zeros); reset [B, T] bool: h starts from zero at this
    token. Returns h [B, T, D] and the last h [B, D]. Computes in the inputs' dtype: pass float64 or complex128 to use it as a reference.
    """
    h = torch.zeros_like(b[:, 0]) if initial is None else initial
    outputs = []
    for t in range(b.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None], 0.0, h)
        h = log_a[:, t].exp() * h + b[:, t]
        outputs.append(h)
    return torch.stack(outputs, 1), h
