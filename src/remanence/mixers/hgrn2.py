"""HGRN2: HGRN with its state expanded to a matrix by outer products, the forget gate doubling as the key (arXiv 2404.07904)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import divides
from ..ops.backend import accumulate_dtype
from ..ops.outer import outer
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .hgrn import LowerBound
from .parts import RMSNorm


class HGRN2State(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, H, K, V] float32


@system(
    "hgrn2",
    kind="mixer",
    paper="arXiv:2404.07904",
    year=2024,
    name="HGRN2",
    example={"key_dim": 8, "layer": 2, "layers": 3},
    state="H K V = D K",
    parity="the per-token loop of fla's gates and naive_recurrent_gla, derived anew; HGRN where K = 1",
    claim="State expansion without new parameters: better perplexity and recall than HGRN at the same size.",
)
class HGRN2(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is H = dim / K matrices of K x K, K = key_dim, whatever the length.

        S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T        o_t = S_t^T q_t        y = W_o RMSNorm(o), over all dim numbers
        f = gamma + (1 - gamma) sigmoid(W_f x)           q = SiLU(W_q x)        v = W_i x

    key_dim: the expand ratio, default 128, or dim where that is smaller. gamma grows with depth: see `hgrn.LowerBound`, and
    `hgrn.tie_lower_bounds`, which shares its parameter between layers. fla also scales q by K^-0.5, which the norm undoes.
    """

    def __init__(self, dim: int, key_dim: int | None = None, layer: int = 1, layers: int = 1, backend: str = "auto"):
        super().__init__()
        key_dim = key_dim or min(128, dim)
        divides("key_dim", key_dim, "dim", dim)
        self.heads, self.backend = dim // key_dim, backend
        self.to_qfv = nn.Linear(dim, 3 * dim, bias=False)
        self.bound = LowerBound(dim, layer, layers)
        self.norm = RMSNorm(dim)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, state: HGRN2State | None = None, span: Span | None = None) -> tuple[Tensor, HGRN2State]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        q, f, v = self.to_qfv(x).chunk(3, -1)
        log_f, k = self.bound(f.to(accumulate_dtype(x)))  # [B, T, D]
        q, k, v, log_f = (part.unflatten(-1, (self.heads, -1)) for part in (F.silu(q), k, v, log_f))  # [B, T, H, K]
        o, memory = outer(q, k, v, log_f, state and state.memory, span, self.backend)
        return self.out(self.norm(o.flatten(2))), HGRN2State(seen=advance(seen, x.shape[1], span), memory=memory)
