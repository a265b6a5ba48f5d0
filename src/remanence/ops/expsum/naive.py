"""The (max, sum, weighted sum) recurrence from its equation: the ground truth of this folder."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = -1e38
"""The maximum of nothing: finite, so that no difference of two maxima is NaN, and far enough down that exp(FLOOR - m) is 0."""

Sums = tuple[Tensor, Tensor, Tensor]
"""(m, den, num): the sums are exp(m) den and exp(m) num."""


def fresh(score: Tensor, v: Tensor) -> Sums:
    """The state before any token: m [B, H], den [B, H], num [B, H, V]."""
    return torch.full_like(score[:, 0], FLOOR), torch.zeros_like(score[:, 0]), torch.zeros_like(v[:, 0])


def naive(score: Tensor, v: Tensor, log_decay: Tensor, initial: Sums | None = None, reset: Tensor | None = None) -> tuple[Sums, Sums]:
    """One token at a time:

        m_t = max(m_{t-1} + g_t, s_t)      den_t = e^{m_{t-1} + g_t - m_t} den_{t-1} + e^{s_t - m_t}
                                           num_t = e^{m_{t-1} + g_t - m_t} num_{t-1} + e^{s_t - m_t} v_t

    score s, log_decay g [B, T, H], v [B, T, H, V]; initial (m [B, H], den [B, H], num [B, H, V]) or None; reset [B, T] bool: everything
    starts anew at this token. m is a constant to autograd: exp(m) den and exp(m) num do not depend on it. Returns (m, den, num) after
    every token and the last. Computes in the inputs' dtype: pass float64 to use it as a reference.
    """
    start = fresh(score, v)
    m, den, num = start if initial is None else initial
    outputs = []
    for t in range(score.shape[1]):
        s, g = score[:, t], log_decay[:, t]
        if reset is not None:
            at = reset[:, t, None]
            m, den, num = torch.where(at, start[0], m), torch.where(at, 0.0, den), torch.where(at[..., None], 0.0, num)
        top = torch.maximum(m + g, s).detach()
        keep, weight = (g + (m - top)).exp(), (s - top).exp()
        m, den, num = top, keep * den + weight, keep[..., None] * num + weight[..., None] * v[:, t]
        outputs.append((m, den, num))
    m, den, num = (torch.stack(part, 1) for part in zip(*outputs))
    return (m, den, num), outputs[-1]
