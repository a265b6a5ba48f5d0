"""The gated outer-product state from its equation: the ground truth of this folder."""

from __future__ import annotations

import torch
from torch import Tensor, einsum


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token at a time:

        S_t = exp(g_t) S_{t-1} + k_t v_t^T          o_t = S_t^T q_t,   or with a bonus u   o_t = S_{t-1}^T q_t + (q_t . (u * k_t)) v_t

    q, k [B, T, G, K] with G dividing H (head h reads group h // (H / G)), v [B, T, H, V], log_decay g [B, T, H], or [B, T, H, K] with one
    for every key channel; initial [B, H, K, V] or None (zeros); reset [B, T] bool: S starts from zero at this token; bonus u [H, K] or
    None. Returns o [B, T, H, V] and the final S. Computes in the inputs' dtype: pass float64 to use it as a reference. Katharopoulos et
    al. 2020 (arXiv 2006.16236), eq. 18 (g = 0); Dao, Gu 2024 (2405.21060); per channel Yang et al. 2023 (2312.06635), eq. 3; with a
    bonus Peng et al. 2024 (2404.05892), eq. 19.
    """
    repeat = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(repeat, 2), k.repeat_interleave(repeat, 2)
    decay = (log_decay if log_decay.ndim == 4 else log_decay[..., None]).exp()
    S = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]) if initial is None else initial
    outputs = []
    for t in range(q.shape[1]):
        if reset is not None:
            S = torch.where(reset[:, t, None, None, None], 0.0, S)
        write = einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        before, S = S, S * decay[:, t, :, :, None] + write
        read = S if bonus is None else before + bonus[..., None] * write
        outputs.append(einsum("bhkv,bhk->bhv", read, q[:, t]))
    return torch.stack(outputs, 1), S
