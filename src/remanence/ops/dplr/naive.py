"""The diagonal-plus-low-rank rule from its equation: the ground truth of this folder."""

from __future__ import annotations

import torch
from torch import Tensor, einsum


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor,
    log_decay: Tensor,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token at a time:

        S_t = diag(exp(g_t)) S_{t-1} + a_t (b_t^T S_{t-1}) + k_t v_t^T          o_t = S_t^T q_t

    q, k, a, b and log_decay g [B, T, H, K], v [B, T, H, V]; a None stands for -k; initial [B, H, K, V] or None (zeros); reset [B, T] bool:
    S starts from zero at this token. Returns o [B, T, H, V] and the final S. Computes in the inputs' dtype: pass float64 to use it as a
    reference. Peng et al. 2025 (RWKV-7, arXiv 2503.14456); Kimi Delta Attention (arXiv 2510.26692) is a case of it.
    """
    a = -k if a is None else a
    S = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]) if initial is None else initial
    outputs = []
    for t in range(q.shape[1]):
        if reset is not None:
            S = torch.where(reset[:, t, None, None, None], 0.0, S)
        read = einsum("bhkv,bhk->bhv", S, b[:, t])
        S = S * log_decay[:, t, ..., None].exp() + einsum("bhk,bhv->bhkv", a[:, t], read) + einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(outputs, 1), S
