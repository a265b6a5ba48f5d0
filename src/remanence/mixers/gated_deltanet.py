"""Gated DeltaNet: a key-value memory that forgets by a gate and overwrites by the delta rule (arXiv 2412.06464)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..ops.backend import accumulate_dtype
from ..ops.delta import delta
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .parts import RMSNorm, ShortConv, dt_bias_init, l2_normalize, no_decay


class GatedDeltaNetState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, H, K, V] float32
    conv: Tensor  # [B, W - 1, H (2K + V)], the last inputs of the short convolution


@system(
    "gated-deltanet", kind="mixer", paper="arXiv:2412.06464", year=2024, name="Gated DeltaNet",
    state="H K V + (W - 1) H (2 K + V)", parity="transformers Qwen3NextGatedDeltaNet",
    claim="Overwrites and clears: recall in context with junk, where pure decay and pure delta each fail", recipe="mqar",
)  # fmt: skip
class GatedDeltaNet(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is H matrices of K x V, whatever the length.

        S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T        o_t = K^-0.5 S_t^T q_t
        q, k = L2norm(SiLU(conv(W x)))   v = SiLU(conv(W_v x))   b = sigmoid(W_b x)   log a = -exp(A_log) softplus(W_a x + dt_bias)
        y = W_o (RMSNorm(o) * SiLU(W_g x))

    heads: H. key_dim, value_dim: per head, default dim // heads and the same (the paper: 0.75 dim // heads and twice that).
    negative_eigenvalues: b in (0, 2), which lets it track parity. forget=False: a = 1, DeltaNet's rule.
    write="hard": b = clip(W_b x + c, 0, 1), which can be exactly 0 (ours, not in the paper). With forget=False the memory then stays
    bit for bit the same over any token that is not written, however many: retention has no length limit.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv_width: int = 4,
        negative_eigenvalues: bool = False,
        forget: bool = True,
        write: str = "sigmoid",
        backend: str = "auto",
    ):
        super().__init__()
        if write not in ("sigmoid", "hard"):
            raise UsageError(f"write is {write!r}; it may be 'sigmoid' or 'hard'.")
        if key_dim is None and dim % heads:
            raise UsageError(f"heads={heads} does not divide dim={dim}; give key_dim, or heads that do.")
        self.heads, self.key_dim = heads, key_dim or dim // heads
        self.value_dim = value_dim or self.key_dim
        self.write, self.beta_scale, self.backend = write, 2.0 if negative_eigenvalues else 1.0, backend
        inner_k, inner_v = heads * self.key_dim, heads * self.value_dim
        self.sizes = [2 * inner_k, inner_v]
        self.to_qkv = nn.Linear(dim, sum(self.sizes), bias=False)
        self.conv = ShortConv(sum(self.sizes), conv_width)
        self.to_beta = nn.Linear(dim, heads, bias=write == "hard")
        if write == "hard":
            nn.init.constant_(self.to_beta.bias, 0.5)  # half open at the start, where the gradient is alive
        self.to_decay = nn.Linear(dim, heads, bias=False) if forget else None
        if forget:
            self.A_log = no_decay(nn.Parameter(torch.empty(heads).uniform_(1e-3, 16).log()))
            self.dt_bias = no_decay(nn.Parameter(dt_bias_init(heads)))
        self.to_gate = nn.Linear(dim, inner_v, bias=False)
        self.norm = RMSNorm(self.value_dim)
        self.out = nn.Linear(inner_v, dim, bias=False)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [..., H, K] and v [..., H, V] from the output of the short convolution [..., H (2K + V)]."""
        qk, v = F.silu(qkv).split(self.sizes, -1)
        q, k = l2_normalize(qk.unflatten(-1, (-1, self.key_dim))).chunk(2, -2)
        return q * self.key_dim**-0.5, k, v.unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, state: GatedDeltaNetState | None = None, span: Span | None = None) -> tuple[Tensor, GatedDeltaNetState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        qkv, conv = self.conv(self.to_qkv(x), state and state.conv, span)
        q, k, v = self.split(qkv)
        log_decay = None  # [B, T, H], <= 0
        if self.to_decay is not None:
            dtype = accumulate_dtype(x)
            log_decay = -self.A_log.to(dtype).exp() * F.softplus(self.to_decay(x).to(dtype) + self.dt_bias.to(dtype))
        b = self.to_beta(x)
        beta = (b.sigmoid() if self.write == "sigmoid" else b.clamp(0, 1)) * self.beta_scale  # [B, T, H]
        o, memory = delta(q, k, v, log_decay, beta, state and state.memory, span, self.backend)
        y = self.out((self.norm(o) * F.silu(self.to_gate(x)).unflatten(-1, (self.heads, -1))).flatten(2))
        return y, GatedDeltaNetState(seen=advance(seen, x.shape[1], span), memory=memory, conv=conv)
