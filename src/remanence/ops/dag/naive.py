"""The source-transition-mark rule on any DAG from its equation: the ground truth of this folder."""

from __future__ import annotations

import torch
from torch import Tensor, einsum

from .graph import OUTSIDE, Graph


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor,
    transition: Tensor,
    mark: Tensor,
    direct: Tensor | None,
    graph: Graph,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One node at a time; a state lives on every edge e, and for the edges e out of a node n and e' into it:

        C_e = sum_e' T_{e', e} C_{e'} + S_e k_n v_n^T        o_n = sum_e' M_e' C_e'^T q_n + D_n (k_n . q_n) v_n

    q, k [B, N, H, K], v [B, N, H, V]; source and mark [B, E, H], transition [B, P, H] in the order of `graph.pairs`; direct [B, N, H] or
    None (zero). initial [B, E, H, K, V] or None (zeros): read where an edge comes from outside. Returns o [B, N, H, V] and C
    [B, E, H, K, V]. Computes in the inputs' dtype: pass float64 to use it as a reference. Poeppel et al. 2025 (arXiv 2506.11997), eq. 3-5.
    """
    cross = {pair: transition[:, i, :, None, None] for i, pair in enumerate(graph.pairs)}
    zero = q.new_zeros(len(q), *q.shape[2:], v.shape[-1])
    C = [zero if initial is None else initial[:, e] if graph.edges[e][0] == OUTSIDE else zero for e in range(len(graph.edges))]
    outputs = [zero[..., 0, :]] * graph.nodes
    for node in graph.order:
        write = einsum("bhk,bhv->bhkv", k[:, node], v[:, node])
        for e in graph.out_of[node]:
            crossed = sum((cross[before, e] * C[before] for before in graph.into[node]), zero)
            C[e] = crossed + source[:, e, :, None, None] * write
        read = sum((mark[:, e, :, None, None] * C[e] for e in graph.into[node]), zero)
        if direct is not None:
            read = read + direct[:, node, :, None, None] * write
        outputs[node] = einsum("bhkv,bhk->bhv", read, q[:, node])
    return torch.stack(outputs, 1), torch.stack(C, 1) if C else zero[:, None][:, :0]
