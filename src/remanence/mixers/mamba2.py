"""Mamba-2: a state-space layer whose decay is one number per head and token, hence linear attention with a gate (arXiv 2405.21060)."""

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
from .parts import RMSNorm, ShortConv, dt_bias_init, no_decay


class Mamba2State(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, H, N, P] float32
    conv: Tensor  # [B, W - 1, E + 2 G N], the last inputs of the short convolution


@system(
    "mamba2", kind="mixer", paper="arXiv:2405.21060", year=2024, name="Mamba-2", example={"head_dim": 8, "state_size": 8},
    state="H P N + (W - 1) (E + 2 G N)", parity="transformers Mamba2Mixer",
    claim="Recall (MQAR) rises with the state size N", recipe="mqar",
)  # fmt: skip
class Mamba2(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is H matrices of N x P, whatever the length.

        h_t = exp(-exp(A_log) dt_t) h_{t-1} + B_t (dt_t x_t)^T        o_t = h_t^T C_t + D x_t
        z, xBC, dt = W_in u    x, B, C = SiLU(conv(xBC))    dt = softplus(dt + dt_bias)    y = W_out RMSNorm(o * SiLU(z))

    E = expand dim is the inner width, in H = E / P heads of P = head_dim; N = state_size; the heads of each of `groups` G share B and C,
    and the norm is over the E / G numbers of a group. The weights are laid out as in the authors' code and transformers' Mamba2Mixer.
    """

    def __init__(
        self,
        dim: int,
        expand: int = 2,
        head_dim: int = 64,
        state_size: int = 128,
        groups: int = 1,
        conv_width: int = 4,
        backend: str = "auto",
    ):
        super().__init__()
        inner = expand * dim
        divides("head_dim", head_dim, "expand * dim", inner)
        self.heads, self.head_dim, self.groups, self.backend = inner // head_dim, head_dim, groups, backend
        divides("groups", groups, "heads", self.heads)
        self.sizes = [inner, groups * state_size, groups * state_size]  # x, B, C
        self.to_zxbcdt = nn.Linear(dim, inner + sum(self.sizes) + self.heads, bias=False)
        self.conv = ShortConv(sum(self.sizes), conv_width, bias=True)
        self.A_log = no_decay(nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log()))
        self.dt_bias = no_decay(nn.Parameter(dt_bias_init(self.heads)))
        self.D = no_decay(nn.Parameter(torch.ones(self.heads)))
        self.norm = RMSNorm(inner)
        self.out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, state: Mamba2State | None = None, span: Span | None = None) -> tuple[Tensor, Mamba2State]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        z, xbc, dt = self.to_zxbcdt(x).split([self.sizes[0], sum(self.sizes), self.heads], -1)
        xbc, conv = self.conv(xbc, state and state.conv, span)
        u, B, C = F.silu(xbc).split(self.sizes, -1)
        u = u.unflatten(-1, (self.heads, -1))  # [B, T, H, P]
        B, C = B.unflatten(-1, (self.groups, -1)), C.unflatten(-1, (self.groups, -1))  # [B, T, G, N]
        full = accumulate_dtype(dt)
        dt = F.softplus(dt.to(full) + self.dt_bias.to(full))  # [B, T, H]
        o, memory = outer(C, B, u * dt[..., None], -self.A_log.to(full).exp() * dt, state and state.memory, span, self.backend)
        o = torch.addcmul(o, u, self.D[:, None]).to(x.dtype).flatten(2) * F.silu(z)
        y = self.out(self._normalize(o))
        return y, Mamba2State(seen=advance(seen, x.shape[1], span), memory=memory, conv=conv)

    def _normalize(self, o: Tensor) -> Tensor:
        """RMSNorm over each group's share of the inner width."""
        if self.groups == 1:
            return self.norm(o)
        o = o.unflatten(-1, (self.groups, -1))
        return F.rms_norm(o, o.shape[-1:], None, self.norm.eps).flatten(-2) * self.norm.weight
