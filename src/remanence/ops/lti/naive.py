"""Linear time-invariant memories from their equations: the ground truth of this folder."""

from __future__ import annotations

import torch
from torch import Tensor


def diagonal(
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    u: Tensor,
    initial: Tensor,
    valid: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token at a time, D features with M modes each:

        x_t = exp(log_a) x_{t-1} + b u_t        y_t = 2 Re sum_m c_m x_t[m]        (sum_m c_m x_t[m] where everything is real)

    log_a, b, c [D, M]; u [B, T, D]; initial [B, D, M]; valid, reset [B, T] bool. Returns y [B, T, D] and the last x.
    """
    a, x, outputs = log_a.exp(), initial, []
    for t in range(u.shape[1]):
        if reset is not None:
            x = torch.where(reset[:, t, None, None], 0.0, x)
        new = a * x + b * u[:, t, :, None]
        x = new if valid is None else torch.where(valid[:, t, None, None], new, x)
        y = (c * x).sum(-1)
        outputs.append(2 * y.real if y.is_complex() else y)
    return torch.stack(outputs, 1), x


def dense(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    u: Tensor,
    initial: Tensor,
    valid: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token at a time, D features with N numbers each:

        m_t = A m_{t-1} + b u_t        y_t = C m_t, or m_t itself where C is None

    a [D, N, N], b [D, N], c [D, O, N] (their D may be 1: one system for all features); u [B, T, D]; initial [B, D, N]; valid, reset
    [B, T] bool. Returns y [B, T, D, O] and the last m.
    """
    m, outputs = initial, []
    for t in range(u.shape[1]):
        if reset is not None:
            m = torch.where(reset[:, t, None, None], 0.0, m)
        new = (a @ m[..., None])[..., 0] + b * u[:, t, :, None]
        m = new if valid is None else torch.where(valid[:, t, None, None], new, m)
        outputs.append(m if c is None else (c @ m[..., None])[..., 0])
    return torch.stack(outputs, 1), m
