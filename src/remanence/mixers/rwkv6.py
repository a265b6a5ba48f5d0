"""RWKV-6 "Finch": RWKV-5 whose token shift and decay depend on the input (arXiv 2404.05892)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..ops.backend import accumulate_dtype
from ..ops.outer import outer
from ..span import Span, advance
from .base import Mixer
from .parts import no_decay
from .rwkv5 import NORM_EPS, Depths, RWKVState
from .token_shift import token_shift


@system(
    "rwkv6",
    kind="mixer",
    paper="arXiv:2404.05892",
    year=2024,
    name="RWKV-6 (Finch) time-mix",
    aliases=("finch",),
    example={"mix_rank": 4, "decay_rank": 8},
    state="H K^2 + D = D^2 / H + D",
    parity="the authors' RWKV_Tmix_x060 and its kernel as a per-token loop, derived anew",
    claim="Decays that depend on the input improve on RWKV-5's fixed ones in perplexity and multi-query recall.",
)
class RWKV6(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is H matrices of K x K, K = dim / heads, and the last input.

        o_t = r_t (S_{t-1} + diag(u) k_t v_t^T)        S_t = diag(exp(-exp(w_t))) S_{t-1} + k_t v_t^T
        d = x_{t-1} - x_t      [m_w, m_k, m_v, m_r, m_g] = tanh((x + d mu_x) A) B      x_c = x + d (mu_c + m_c) for c in w, k, v, r, g
        w = w_0 + tanh(x_w W_1) W_2      k, v, r, g = W x_c      y = W_o (GroupNorm_H(o) * SiLU(g))

    mix_rank: the columns of A for each of the five (the authors: 32). decay_rank: those of W_1 (64). Initial values are the authors' and
    depend on `layer` of `layers`, which Decoder fills in. The channel-mix that RWKV puts after it is a feed-forward of the model's.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        mix_rank: int = 32,
        decay_rank: int = 64,
        layer: int = 1,
        layers: int = 1,
        backend: str = "auto",
    ):
        super().__init__()
        depths = Depths(dim, heads, layer, layers)
        self.heads, self.backend = heads, backend
        self.mix_x = no_decay(nn.Parameter(1 - depths.shares("x")[0]))  # [D]
        self.mix = no_decay(nn.Parameter(1 - depths.shares("wkvrg")))  # [5, D]
        self.mix_in = nn.Parameter(torch.zeros(dim, 5 * mix_rank))
        self.mix_out = nn.Parameter(torch.empty(5, mix_rank, dim).uniform_(-0.01, 0.01))
        self.decay = no_decay(nn.Parameter(depths.decay()))  # [H, K]
        self.decay_in = nn.Parameter(torch.zeros(dim, decay_rank))
        self.decay_out = nn.Parameter(torch.empty(decay_rank, dim).uniform_(-0.01, 0.01))
        self.bonus = no_decay(nn.Parameter(depths.bonus()))  # [H, K]
        self.to_k, self.to_v, self.to_r, self.to_g = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.norm = nn.GroupNorm(heads, dim, eps=NORM_EPS)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, state: RWKVState | None = None, span: Span | None = None) -> tuple[Tensor, RWKVState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        previous, shift = token_shift(x, state and state.shift, span)
        d = previous - x
        low = torch.tanh(torch.addcmul(x, d, self.mix_x) @ self.mix_in).unflatten(-1, (5, -1)).movedim(2, 0)  # [5, B, T, R]
        mixes = (low.flatten(1, 2) @ self.mix_out).unflatten(1, x.shape[:2]) + self.mix[:, None, None]  # [5, B, T, D]
        x_w, *others = (torch.addcmul(x, d, mix) for mix in mixes)
        k, v, r, g = (to(part) for to, part in zip((self.to_k, self.to_v, self.to_r, self.to_g), others))
        r, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (r, k, v))  # [B, T, H, K]
        full = accumulate_dtype(x)
        w = (torch.tanh(x_w @ self.decay_in) @ self.decay_out).to(full).unflatten(-1, (self.heads, -1)) + self.decay.to(full)
        o, memory = outer(r, k, v, -w.exp(), state and state.memory, span, self.backend, self.bonus)
        y = self.out(self.norm(o.reshape(-1, x.shape[-1])).view_as(x) * F.silu(g))
        return y, RWKVState(seen=advance(seen, x.shape[1], span), memory=memory, shift=shift)
