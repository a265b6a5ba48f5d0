"""RWKV-7 "Goose": a key-value memory that decays by channel and replaces along one key by another (arXiv 2503.14456)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, divides
from ..ops.backend import accumulate_dtype
from ..ops.dplr import dplr
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .parts import no_decay
from .token_shift import token_shift

STREAMS = ("r", "w", "k", "v", "a", "g")
"""What has a mix of the current and the previous token of its own."""
SHIFT_POWERS = (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)


class RWKV7State(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, H, K, K] float32
    before: Tensor  # [B, 1, dim], the last input


class LowRank(nn.Module):
    """act(x W_1) W_2 + bias, W_1 starting at zero so that the bias alone speaks at first."""

    def __init__(self, dim: int, factor: float, activation: str, bias: Tensor | None):
        super().__init__()
        rank = max(32, round(factor * dim**0.5 / 32) * 32)
        self.down, self.up = nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False)
        self.bias = None if bias is None else no_decay(nn.Parameter(bias))
        self.activation = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "none": lambda x: x}[activation]
        nn.init.zeros_(self.down.weight)
        nn.init.orthogonal_(self.up.weight, gain=0.1 * max(1.0, (rank / dim) ** 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.activation(self.down(x)))
        return x if self.bias is None else x + self.bias


@system(
    "rwkv7",
    kind="mixer",
    paper="arXiv:2503.14456",
    year=2025,
    name="RWKV-7 Goose (time mixing)",
    aliases=("rwkv-7",),
    state="D^2 / H + D",
    parity="the equations of BlinkDL/RWKV-LM's numpy and training code, token by token",
    claim="Tracks the state of group multiplication (S5 too) over longer sequences and with fewer layers than a transformer, Mamba or S4.",
)
class RWKV7(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is H matrices of K x K, K = dim // heads, and one token, whatever the length.

        S_t = diag(w_t) S_{t-1} - (a_t * kk_t) (kk_t^T S_{t-1}) + k~_t v_t^T        o_t = S_t^T r_t
        w = exp(-e^-0.5 sigmoid(w_0 + tanh(x_w W_1) W_2))      a = sigmoid(a_0 + x_a A_1 A_2)      g = sigmoid(x_g G_1) G_2
        kk = L2norm(k * xi)      k~ = k (1 + (a - 1) alpha)      y = W_o (g * (GroupNorm(o) + (r . (rho * k~)) v))

    r, k, v = W x_r, W x_k, W x_v, and x_c = x_t + mu_c (x_{t-1} - x_t) for each of r, w, k, v, a, g. This is the layer of the first block:
    in later ones v is also mixed with the first block's v, which a mixer that sees only its own input does not have; it is left out.
    Initial values as in the authors' training code (they depend on `layer` of `layers`, 1-based): `out` and the low ranks start at zero.
    The block's channel mixing is not part of it. heads: H; the authors use K = 64.
    """

    def __init__(self, dim: int, heads: int = 4, layer: int = 1, layers: int = 1, backend: str = "auto"):
        super().__init__()
        divides("heads", heads, "dim", dim)
        if layer > layers:
            raise UsageError(f"layer is {layer} of layers={layers}; it may be 1..{layers}.")
        self.heads, self.backend = heads, backend
        size = dim // heads
        depth, left = (layer - 1) / max(layers - 1, 1), 1 - (layer - 1) / layers
        at = torch.arange(dim) / max(dim - 1, 1)  # 0 .. 1 over the channels
        zigzag = 2 * (torch.arange(dim) % size) / max(size - 1, 1) - 1  # -1 .. 1 over those of a head
        zigzag = zigzag * zigzag.abs()
        self.mix = no_decay(nn.Parameter(torch.stack([1 - (torch.arange(dim) / dim) ** (power * left) for power in SHIFT_POWERS])))
        self.to_r, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_w = LowRank(dim, 2.5, "tanh", -5.5 + 6 * at ** (1 + depth**0.3) + 2.5 * zigzag)
        self.to_a = LowRank(dim, 2.5, "none", -0.19 + 0.3 * zigzag + 0.4 * (at - 0.5))
        self.to_g = LowRank(dim, 5, "sigmoid", None)
        self.removal = no_decay(nn.Parameter(0.71 - 0.1 * (at - 0.5)))  # xi
        self.replacement = no_decay(nn.Parameter(torch.full((dim,), 1.02)))  # alpha
        self.bonus = no_decay(nn.Parameter(torch.full((heads, size), -0.04)))  # rho
        self.norm = nn.GroupNorm(heads, dim, eps=1e-5 * size)
        self.out = nn.Linear(dim, dim, bias=False)
        for linear, scale in ((self.to_r, 0.5), (self.to_k, 0.05), (self.to_v, 0.5)):
            nn.init.uniform_(linear.weight, -scale / dim**0.5, scale / dim**0.5)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.norm.weight, (layer / layers) ** 0.7)

    def forward(self, x: Tensor, state: RWKV7State | None = None, span: Span | None = None) -> tuple[Tensor, RWKV7State]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        previous, before = token_shift(x, state and state.before, span)
        mixed = dict(zip(STREAMS, (torch.lerp(x, previous, mu) for mu in self.mix)))
        r, k, v = self.to_r(mixed["r"]), self.to_k(mixed["k"]), self.to_v(mixed["v"])  # [B, T, dim]
        dtype = accumulate_dtype(x)
        log_w = -math.exp(-0.5) * self.to_w(mixed["w"]).to(dtype).sigmoid()
        a, g = self.to_a(mixed["a"]).sigmoid(), self.to_g(mixed["g"])
        kk = k * self.removal
        k = k * (1 + (a - 1) * self.replacement)
        r, k, v, a, kk, log_w = (part.unflatten(-1, (self.heads, -1)) for part in (r, k, v, a, kk, log_w))  # [B, T, H, K]
        kk = F.normalize(kk.to(dtype), dim=-1)
        o, memory = dplr(r, k, v, -a * kk, kk, log_w, state and state.memory, span, self.backend)
        o = self.norm(o.flatten(0, 1).flatten(1)).view_as(v) + (r * k * self.bonus).sum(-1, keepdim=True) * v
        y = self.out(o.flatten(2) * g)
        return y, RWKV7State(seen=advance(seen, x.shape[1], span), memory=memory, before=before)
