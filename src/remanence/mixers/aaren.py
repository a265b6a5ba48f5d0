"""Aaren: attention as a recurrence, because the query is learned and the same for every token (arXiv 2405.13956)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import divides
from ..ops.backend import accumulate_dtype
from ..ops.expsum import average, expsum
from ..span import Span, advance
from ..state import State
from .base import Mixer


class AarenState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    largest: Tensor  # [B, H] float32, the largest score
    total: Tensor  # [B, H] float32, the sum of exp(score - largest)
    weighted: Tensor  # [B, H, D] float32, the sum of exp(score - largest) v


@system(
    "aaren",
    kind="mixer",
    paper="arXiv:2405.13956",
    year=2024,
    name="Aaren (attention as an RNN)",
    state="H (D / H + 2)",
    parity="causal softmax attention with the query broadcast to all rows (torch)",
    claim="Comparable to Transformers on 38 small datasets (RL, events, forecasting, classification) at O(1) an update.",
)
class Aaren(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is H running averages, D = dim // heads numbers each, with their weight and scale.

        o_t = sum_{s<=t} e^{q.k_s} v_s / sum_{s<=t} e^{q.k_s}        q = D^-0.5 W_q token        k, v = W x        y = W_o o

    heads: H. `token` is learned and not read from x, so a query sees no position: what a token weighs does not depend on who asks, or when.
    Written from the paper's equations (no official code was found); as there, positions are left to the caller.
    """

    def __init__(self, dim: int, heads: int = 4, backend: str = "auto"):
        super().__init__()
        divides("heads", heads, "dim", dim)
        self.heads, self.backend = heads, backend
        self.token = nn.Parameter(torch.randn(dim))
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, state: AarenState | None = None, span: Span | None = None) -> tuple[Tensor, AarenState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        q = self.to_q(self.token).view(self.heads, -1, 1) * (x.shape[-1] // self.heads) ** -0.5  # [H, D, 1]
        # q.k = (W_k^T q).x: one vector a head instead of a projection of every token
        score = (x @ (self.to_k.weight.unflatten(0, (self.heads, -1)).mT @ q)[..., 0].T).to(accumulate_dtype(x))  # [B, T, H]
        v = self.to_v(x).unflatten(-1, (self.heads, -1))  # [B, T, H, D]
        initial = (state.largest, state.total, state.weighted) if state else None
        (_, den, num), (m, total, weighted) = expsum(score, v, None, initial, span, self.backend)
        y = self.out(average(den, num).to(x.dtype).flatten(2))
        seen = advance(seen, x.shape[1], span)
        return y, AarenState(seen=seen, largest=m, total=total, weighted=weighted)
