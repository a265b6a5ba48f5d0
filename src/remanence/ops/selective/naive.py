"""The selective recurrence from its equation: the ground truth of this folder."""

from __future__ import annotations

import torch
from torch import Tensor, einsum


def naive(
    u: Tensor, v: Tensor, w: Tensor, B: Tensor, C: Tensor, initial: Tensor | None = None, reset: Tensor | None = None, decay: str = "exp"
) -> tuple[Tensor, Tensor]:
    """One token at a time, every channel e with N numbers of its own:

        h_t[e, n] = a_t[e, n] h_{t-1}[e, n] + w_t[e] B_t[n]        y_t[e] = sum_n C_t[n] h_t[e, n]
        a_t[e, n] = exp(u_t[e] v[e, n])  (decay "exp")             a_t[e, n] = 1 - u_t[e] v_t[n]  (decay "complement")

    u, w [B, T, E]; B, C [B, T, N]; v [E, N] for "exp", [B, T, N] for "complement"; initial [B, E, N] or None (zeros); reset [B, T] bool: h
    starts from zero at this token. Returns y [B, T, E] and the last h [B, E, N]. Computes in the inputs' dtype: pass float64 to use it as a
    reference. Gu, Dao 2023 (arXiv 2312.00752), algorithm 2; Liu et al. 2024 (arXiv 2407.14207).
    """
    h = w.new_zeros(w.shape[0], w.shape[2], B.shape[2]) if initial is None else initial
    outputs = []
    for t in range(w.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None, None], 0.0, h)
        a = (u[:, t, :, None] * v).exp() if decay == "exp" else 1 - einsum("be,bn->ben", u[:, t], v[:, t])
        h = a * h + einsum("be,bn->ben", w[:, t], B[:, t])
        outputs.append(einsum("ben,bn->be", h, C[:, t]))
    return torch.stack(outputs, 1), h
