"""RWKV-5 "Eagle": token shift, a matrix state with a learned decay and a bonus for the present token (arXiv 2404.05892)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, divides
from ..ops.backend import accumulate_dtype
from ..ops.outer import outer
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .parts import no_decay
from .token_shift import token_shift

NORM_EPS = 64e-5
"""The authors divide by 8 before a norm of eps 1e-5; it is the same to raise eps."""


class RWKVState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, H, K, K] float32
    shift: Tensor  # [B, 1, D], the last token's input


class Depths:
    """What the authors' initial values depend on: the depth of a layer and the place of a channel."""

    def __init__(self, dim: int, heads: int, layer: int, layers: int):
        divides("heads", heads, "dim", dim)
        if layer > layers:
            raise UsageError(f"layer={layer} of layers={layers}; layers are counted from 1.")
        self.heads, self.rise, self.fall = heads, (layer - 1) / max(layers - 1, 1), 1 - (layer - 1) / layers
        self.channel = torch.arange(dim)

    def shares(self, names: str) -> Tensor:
        """The share of the present token in each mix named ('k', 'v', 'r', 'g', 'w', 'x'), [n, D]."""
        x = self.channel / len(self.channel)
        slow, fast = x**self.fall, x ** (0.5 * self.fall)
        return torch.stack([{"v": slow + 0.3 * self.rise, "r": fast, "g": fast}.get(name, slow) for name in names])

    def decay(self) -> Tensor:
        """w, where the log decay is -exp(w): from -6 to -1 over the channels, [H, K]."""
        x = self.channel / max(len(self.channel) - 1, 1)
        return (5 * x ** (0.7 + 1.3 * self.rise) - 6).unflatten(0, (self.heads, -1))

    def bonus(self) -> Tensor:
        """u [H, K]: falling over the channels in deep layers, plus a zigzag of 0.1."""
        x = self.channel / max(len(self.channel) - 1, 1)
        return (self.rise * (1 - x) + 0.1 * ((self.channel + 1) % 3 - 1)).unflatten(0, (self.heads, -1))


@system(
    "rwkv5",
    kind="mixer",
    paper="arXiv:2404.05892",
    year=2024,
    name="RWKV-5 (Eagle) time-mix",
    aliases=("eagle",),
    state="H K^2 + D = D^2 / H + D",
    parity="the authors' RWKV_Tmix_x052 and its kernel as a per-token loop, derived anew",
    claim="A matrix state in place of RWKV-4's vector lifts recall and perplexity at equal parameters.",
)
class RWKV5(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is H matrices of K x K, K = dim / heads, and the last input.

        o_t = r_t (S_{t-1} + diag(u) k_t v_t^T)        S_t = diag(exp(-exp(w))) S_{t-1} + k_t v_t^T
        r, k, v = W (mu * x_t + (1 - mu) * x_{t-1}), each with its own W and mu     g alike     y = W_o (GroupNorm_H(o) * SiLU(g))

    This is version 5.2: decay w and bonus u are learned per channel and do not depend on the input. Initial values are the authors' and
    depend on `layer` of `layers`, which Decoder fills in. The channel-mix that RWKV puts after it is a feed-forward of the model's.
    """

    def __init__(self, dim: int, heads: int = 4, layer: int = 1, layers: int = 1, backend: str = "auto"):
        super().__init__()
        depths = Depths(dim, heads, layer, layers)
        self.heads, self.backend = heads, backend
        self.mix = no_decay(nn.Parameter(depths.shares("rkvg")))  # [4, D]
        self.decay = no_decay(nn.Parameter(depths.decay()))  # [H, K]
        self.bonus = no_decay(nn.Parameter(depths.bonus()))  # [H, K]
        self.to_r, self.to_k, self.to_v, self.to_g = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.norm = nn.GroupNorm(heads, dim, eps=NORM_EPS)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, state: RWKVState | None = None, span: Span | None = None) -> tuple[Tensor, RWKVState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        previous, shift = token_shift(x, state and state.shift, span)
        mixed = (torch.lerp(previous, x, mu.to(x.dtype)) for mu in self.mix)
        r, k, v, g = (to(part) for to, part in zip((self.to_r, self.to_k, self.to_v, self.to_g), mixed))
        r, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (r, k, v))  # [B, T, H, K]
        log_decay = -self.decay.to(accumulate_dtype(x)).exp().expand(*x.shape[:2], -1, -1)
        o, memory = outer(r, k, v, log_decay, state and state.memory, span, self.backend, self.bonus)
        y = self.out(self.norm(o.reshape(-1, x.shape[-1])).view_as(x) * F.silu(g))
        return y, RWKVState(seen=advance(seen, x.shape[1], span), memory=memory, shift=shift)
