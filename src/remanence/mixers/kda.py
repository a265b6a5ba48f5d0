"""Kimi Delta Attention: the gated delta rule with a forget gate for every key channel (arXiv 2510.26692)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import divides
from ..ops.backend import accumulate_dtype
from ..ops.dplr import dplr
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .parts import RMSNorm, ShortConv, dt_bias_init, l2_normalize, no_decay


class KDAState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, H, K, K] float32
    conv: Tensor  # [B, W - 1, 3 dim], the last inputs of the short convolution


@system(
    "kda",
    kind="mixer",
    paper="arXiv:2510.26692",
    year=2025,
    name="Kimi Delta Attention",
    aliases=("kimi-delta-attention",),
    state="D^2 / H + 3 (W - 1) D",
    parity="transformers' KimiLinearDeltaAttention",
    claim="Learns palindromes, MQAR and stack tracking at longer lengths than Gated DeltaNet and Mamba-2 with a state of equal size.",
)
class KDA(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is H matrices of K x K, K = dim // heads, whatever the length.

        S_t = (I - b_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + b_t k_t v_t^T        o_t = K^-0.5 S_t^T q_t
        q, k = L2norm(SiLU(conv(W x)))   v = SiLU(conv(W_v x))   b = sigmoid(W_b x)   g = -exp(A_log) softplus(W_f2 W_f1 x + dt_bias)
        y = W_o (RMSNorm(o) * sigmoid(W_g2 W_g1 x))

    A_log is one number per head, dt_bias one per channel; W_f1 and W_g1 have rank K. Gates, norms and initial values as in transformers'
    layer of the released model (fla's adds a bias to W_g2). heads: H. negative_eigenvalues: b in (0, 2).
    """

    def __init__(self, dim: int, heads: int = 4, conv_width: int = 4, negative_eigenvalues: bool = False, backend: str = "auto"):
        super().__init__()
        divides("heads", heads, "dim", dim)
        self.heads, self.key_dim, self.backend = heads, dim // heads, backend
        self.beta_scale = 2.0 if negative_eigenvalues else 1.0
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = ShortConv(3 * dim, conv_width)
        self.to_beta = nn.Linear(dim, heads, bias=False)
        self.to_decay = nn.Sequential(nn.Linear(dim, self.key_dim, bias=False), nn.Linear(self.key_dim, dim, bias=False))
        self.A_log = no_decay(nn.Parameter(torch.empty(heads).uniform_(1, 16).log()))
        self.dt_bias = no_decay(nn.Parameter(dt_bias_init(dim)))
        self.to_gate = nn.Sequential(nn.Linear(dim, self.key_dim, bias=False), nn.Linear(self.key_dim, dim, bias=False))
        self.norm = RMSNorm(self.key_dim)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, state: KDAState | None = None, span: Span | None = None) -> tuple[Tensor, KDAState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        dtype = accumulate_dtype(x)
        qkv, conv = self.conv(self.to_qkv(x), state and state.conv, span)
        q, k, v = F.silu(qkv).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, T, H, K]
        q, k = l2_normalize(q) * self.key_dim**-0.5, l2_normalize(k).to(dtype)
        rate = F.softplus(self.to_decay(x).to(dtype) + self.dt_bias.to(dtype)).unflatten(-1, (self.heads, -1))
        g = -self.A_log.to(dtype).exp()[:, None] * rate  # [B, T, H, K]
        written = k * (self.to_beta(x).to(dtype).sigmoid() * self.beta_scale)[..., None]
        # S_t = diag(exp(g)) S + b k (v - (exp(g) k)^T S)^T, where the key decays in place of the memory it reads
        o, memory = dplr(q, written, v, None, k * g.exp(), g, state and state.memory, span, self.backend)
        gate = self.to_gate(x).sigmoid().unflatten(-1, (self.heads, -1))
        y = self.out((self.norm(o) * gate).flatten(2))
        return y, KDAState(seen=advance(seen, x.shape[1], span), memory=memory, conv=conv)
