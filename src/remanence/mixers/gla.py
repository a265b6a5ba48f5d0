"""Gated linear attention: a matrix memory whose every key channel forgets at a rate that the input sets (arXiv 2312.06635)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..ops.backend import accumulate_dtype
from ..ops.outer import outer
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .parts import RMSNorm


class GLAState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, H, K, V] float32


def head_dim(name: str, expand: float, dim: int, heads: int) -> int:
    """int(dim * expand) / heads. Raises UsageError unless it is a whole number >= 1."""
    inner = int(dim * expand)
    if inner < 1 or inner % heads:
        raise UsageError(f"{name}={expand} of dim={dim} is {inner} channels, which heads={heads} does not divide.")
    return inner // heads


@system(
    "gla",
    kind="mixer",
    paper="arXiv:2312.06635",
    year=2023,
    name="Gated Linear Attention",
    state="H K V = expand_k expand_v D^2 / H",
    parity="the per-token loop of fla's naive_recurrent_gla, derived anew",
    claim="A gate per key channel learns associative recall that a fixed decay (RetNet) does not, at the same state size.",
)
class GLA(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is H matrices of K x V, whatever the length.

        S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = K^-0.5 S_t^T q_t        log a = logsigmoid(W_2 W_1 x + b) / 16
        y = W_o (RMSNorm(o) * SiLU(W_g x))

    q, k, v are linear in x. K = expand_k dim / heads, V = expand_v dim / heads; W_1 maps to gate_rank channels; gate_normalizer: the 16.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        backend: str = "auto",
    ):
        super().__init__()
        self.heads, self.backend = heads, backend
        self.key_dim, self.value_dim = head_dim("expand_k", expand_k, dim, heads), head_dim("expand_v", expand_v, dim, heads)
        if not gate_normalizer > 0:
            raise UsageError(f"gate_normalizer is {gate_normalizer}; it must be above 0.")
        self.gate_normalizer = gate_normalizer
        inner_k, inner_v = heads * self.key_dim, heads * self.value_dim
        self.sizes = [inner_k, inner_k, inner_v]
        self.to_qkv = nn.Linear(dim, sum(self.sizes), bias=False)
        self.to_decay = nn.Sequential(nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, inner_k))
        self.to_gate = nn.Linear(dim, inner_v, bias=False)
        self.norm = RMSNorm(self.value_dim)
        self.out = nn.Linear(inner_v, dim, bias=False)

    def forward(self, x: Tensor, state: GLAState | None = None, span: Span | None = None) -> tuple[Tensor, GLAState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.to_qkv(x).split(self.sizes, -1))  # [B, T, H, K or V]
        log_decay = F.logsigmoid(self.to_decay(x).to(accumulate_dtype(x))) / self.gate_normalizer
        log_decay = log_decay.unflatten(-1, (self.heads, -1))  # [B, T, H, K]
        o, memory = outer(q * self.key_dim**-0.5, k, v, log_decay, state and state.memory, span, self.backend)
        y = self.out((self.norm(o) * F.silu(self.to_gate(x)).unflatten(-1, (self.heads, -1))).flatten(2))
        return y, GLAState(seen=advance(seen, x.shape[1], span), memory=memory)
