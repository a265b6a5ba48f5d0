"""The gated delta rule from its equation: the ground truth of this folder."""

from __future__ import annotations

import torch
from torch import Tensor, einsum


def naive(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, initial: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token at a time:

        S_t = exp(g_t) (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T          o_t = S_t^T q_t

    q, k [B, T, H, K], v [B, T, H, V], log_decay g and beta b [B, T, H]; initial [B, H, K, V] or None (zeros); reset [B, T] bool: S starts
    from zero at this token. Returns o [B, T, H, V] and the final S. Computes in the inputs' dtype: pass float64 to use it as a reference.
    Yang, Kautz, Hatamizadeh 2024 (arXiv 2412.06464), eq. 10; with g = 0 the delta rule of arXiv 2406.06484.
    """
    S = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]) if initial is None else initial
    outputs = []
    for t in range(q.shape[1]):
        if reset is not None:
            S = torch.where(reset[:, t, None, None, None], 0.0, S)
        S = S * log_decay[:, t, :, None, None].exp()
        error = v[:, t] - einsum("bhkv,bhk->bhv", S, k[:, t])  # what the memory got wrong
        S = S + einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(outputs, 1), S
