"""Retention: linear attention whose heads each forget at a fixed rate, with rotated queries and keys (arXiv 2307.08621)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, divides
from ..ops.backend import accumulate_dtype
from ..ops.outer import outer
from ..span import Span, positions
from ..state import State
from .attention import rotate
from .base import Mixer


class RetNetState(State):
    seen: Tensor  # [B] int64, tokens read in the current document: the position of the next one
    memory: Tensor  # [B, H, K, V] float32


@system(
    "retnet",
    kind="mixer",
    paper="arXiv:2307.08621",
    year=2023,
    name="RetNet",
    state="H K V = expand_v D^2 / H",
    parity="the T x T sum of fla's naive_retention, derived anew",
    claim="Its recurrent, chunked and parallel forms agree to 1e-5; recall (MQAR) is clearly worse than attention's.",
)
class RetNet(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is H matrices of K x V, K = dim / heads, V = expand_v K, whatever the length.

        o_t = sum_{s <= t} gamma_h^(t - s) (q_t . k_s) v_s    gamma_h = 1 - 2^(-5 - h), h = 0 .. H - 1, fixed
        y = W_o (Norm(o) * SiLU(W_g x))                       q = K^-0.5 rotate(W_q x)    k = rotate(W_k x)

    rotate is the rotary embedding; with the decay gamma it is the paper's xPos, which fla writes apart in the same way. Norm is over each
    head's V numbers, without weights as in the paper, whose other normalisations of o it would undo.
    """

    def __init__(self, dim: int, heads: int = 4, expand_v: float = 2.0, theta: float = 10000.0, backend: str = "auto"):
        super().__init__()
        divides("heads", heads, "dim", dim)
        self.heads, self.theta, self.backend = heads, theta, backend
        self.key_dim, self.value_dim = dim // heads, int(expand_v * (dim // heads))
        if self.key_dim % 2 or self.value_dim < 1:
            raise UsageError(f"dim={dim} with heads={heads} and expand_v={expand_v}: dim / heads must be even and expand_v times it >= 1.")
        self.sizes = [dim, dim, heads * self.value_dim]
        self.to_qkv = nn.Linear(dim, sum(self.sizes), bias=False)
        self.to_gate = nn.Linear(dim, heads * self.value_dim, bias=False)
        self.out = nn.Linear(heads * self.value_dim, dim, bias=False)
        self.log_gamma = [math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)]

    def retain(self, x: Tensor, state: RetNetState | None, span: Span | None) -> tuple[Tensor, RetNetState]:
        """o [B, T, H, V], before the norm, and the new state."""
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        at = positions(seen, x.shape[1], span)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.to_qkv(x).split(self.sizes, -1))  # [B, T, H, K or V]
        q, k = (rotate(part, at, self.theta, self.key_dim) for part in (q * self.key_dim**-0.5, k))
        log_decay = torch.tensor(self.log_gamma, dtype=accumulate_dtype(x), device=x.device).expand(*x.shape[:2], -1)
        o, memory = outer(q, k, v, log_decay, state and state.memory, span, self.backend)
        return o, RetNetState(seen=at[:, -1] + 1, memory=memory)

    def forward(self, x: Tensor, state: RetNetState | None = None, span: Span | None = None) -> tuple[Tensor, RetNetState]:
        o, new = self.retain(x, state, span)
        o = F.rms_norm(o, o.shape[-1:], None, 1e-5).flatten(2)
        return self.out(o * F.silu(self.to_gate(x))), new
