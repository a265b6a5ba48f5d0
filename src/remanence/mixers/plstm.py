"""pLSTM on a chain: linear attention whose gates say what enters an edge, what crosses a node, and what a node reads (arXiv 2506.11997)."""

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
from .parts import RMSNorm, ShortConv

DECAY = 5.0
"""T = sigmoid(.)^5: the power spreads decays over the scales that matter."""


class PLSTMState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, H, K, V] float32, on the edge that leaves the last token
    conv: Tensor  # [B, W - 1, D], the last inputs of the short convolution


@system(
    "plstm", kind="mixer", paper="arXiv:2506.11997", year=2025, name="pLSTM",
    example={"gate_bias": -1.0},
    state="H K V + (W - 1) D, with K = V = D / H", parity="the published table of gating matrices; gated linear attention, one decay late",
    claim="Arrow pointing: generalizes to larger pictures (as plstm-vis), where attention does not",
)  # fmt: skip
class PLSTM(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is a matrix of K x V a head, on the edge from one token to the next.

        C_t = T_t C_{t-1} + S_t k_t v_t^T        o_t = M_t C_{t-1}^T q_t + D_t (k_t . q_t) v_t
        S, M, D = sigmoid(W c + b)    T = sigmoid(W_T c + 1)^5    c = conv(x)    q = K^-0.5 W_q c    k = W_k c    v = W_v x
        y = W_o RMSNorm(o) + s * c

    Source, transition, mark and direct gates are scalars per head; a token reads what its predecessors left, so T_t acts on what leaves
    t, and its own value only through D. heads: H. gate_bias: b, where the gates' weights start at zero. The passthrough is the released
    code's scale s per channel, without SiLU, as is the bias 1 of T. Not here: its J x J state tracking matrices and its tanh form of T,
    whose sign no log decay can carry. Ours: b = 0 (the code's -5, without weights) and gates that read the input.
    """

    def __init__(self, dim: int, heads: int = 4, conv_width: int = 4, gate_bias: float = 0.0, backend: str = "auto"):
        super().__init__()
        divides("heads", heads, "dim", dim)
        self.heads, self.backend = heads, backend
        self.conv = ShortConv(dim, conv_width, bias=True)
        self.to_qk = nn.Linear(dim, 2 * dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_gates = nn.Linear(dim, 4 * heads)
        nn.init.zeros_(self.to_gates.weight)
        nn.init.constant_(self.to_gates.bias, gate_bias)
        with torch.no_grad():
            self.to_gates.bias[:heads] = 1.0
        self.norm = RMSNorm(dim // heads)
        self.passthrough = nn.Parameter(torch.ones(dim))
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, state: PLSTMState | None = None, span: Span | None = None) -> tuple[Tensor, PLSTMState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        c, conv = self.conv(x, state and state.conv, span)
        q, k = self.to_qk(c).unflatten(-1, (2, self.heads, -1)).unbind(2)  # [B, T, H, K]
        v = self.to_v(x).unflatten(-1, (self.heads, -1))
        q = q * q.shape[-1] ** -0.5
        transition, *gates = self.to_gates(c).to(accumulate_dtype(x)).chunk(4, -1)  # [B, T, H]
        source, mark, direct = (gate.sigmoid()[..., None] for gate in gates)
        none = q.new_zeros(q.shape[2:])  # a bonus of zero: read before writing, and nothing of the own token
        log_decay = DECAY * F.logsigmoid(transition)
        o, memory = outer((q * mark).to(x.dtype), (k * source).to(x.dtype), v, log_decay, state and state.memory, span, self.backend, none)
        own = (q * k).sum(-1, keepdim=True) * direct
        y = self.out(self.norm((o + own * v).to(x.dtype)).flatten(2)) + self.passthrough * c
        return y, PLSTMState(seen=advance(seen, x.shape[1], span), memory=memory, conv=conv)
