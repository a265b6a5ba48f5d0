"""mLSTM: a matrix memory with exponential gates, as in xLSTM 7B (arXiv 2503.13427) and in the first xLSTM (arXiv 2405.04517)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, divides
from ..ops.backend import accumulate_dtype
from ..ops.expsum import log_keep, running_max
from ..ops.outer import outer
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .parts import ShortConv

EPS = 1e-6
"""Added to the cell's normaliser."""
BLOCK = 4
"""Width of the blocks of q, k and v projections in the 2024 block."""


class MLSTMState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, H, K, V] float32, C
    normalizer: Tensor  # [B, H, K] float32, n
    largest: Tensor  # [B, H] float32, m: C and n are in units of exp(m)
    conv: Tensor | None  # [B, W - 1, E] in the 2024 block, the last inputs of its convolution


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap tanh(x / cap): x where it is small, never beyond cap; x as it is if cap is None."""
    return x if cap is None else cap * torch.tanh(x / cap)


def cell(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, initial: tuple[Tensor, Tensor, Tensor] | None, span: Span | None, backend: str
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The mLSTM cell, stabilised: h [B, T, H, V] in v's dtype and the last (C, n, m), of q, k [B, T, H, K], v [B, T, H, V], i, f [B, T, H].

        m_t = max(logsigmoid(f_t) + m_{t-1}, i_t)                           f'_t = exp(logsigmoid(f_t) + m_{t-1} - m_t)
        C_t = f'_t C_{t-1} + i'_t k_t v_t^T    n_t likewise with v = 1      i'_t = exp(i_t - m_t)
        h_t = C_t^T q_t / (max(|n_t . q_t|, exp(-m_t)) + eps)               q scaled by K^-0.5

    n is one more column of C. m is no part of the gradient: h does not depend on it, but for eps. It starts at 0, as in the authors' code.
    """
    dtype = accumulate_dtype(q, k, v, i, f)
    i, log_f, reset = i.to(dtype), F.logsigmoid(f.to(dtype)), None
    if span is not None:
        reset = span.reset
        if span.valid is not None:
            padding = ~span.valid[..., None]
            i, log_f = i.masked_fill(padding, -torch.inf), log_f.masked_fill(padding, 0)
    m0 = i.new_zeros(i[:, 0].shape) if initial is None else initial[2].detach().to(dtype)
    m = running_max(i, log_f, m0, reset, start=0.0)  # [B, T, H]
    S = None if initial is None else torch.cat([initial[0], initial[1][..., None]], -1)
    k = k * (i - m).exp()[..., None]
    o, S = outer(q * q.shape[-1] ** -0.5, k, F.pad(v.to(dtype), (0, 1), value=1.0), log_keep(m, m0, log_f, reset), S, span, backend)
    h = o[..., :-1] / (torch.maximum(o[..., -1:].abs(), (-m).exp()[..., None]) + EPS)
    return h.to(v.dtype), (S[..., :-1], S[..., -1], m[:, -1])


@system(
    "mlstm-7b",
    kind="mixer",
    paper="arXiv:2503.13427",
    year=2025,
    name="mLSTM (xLSTM 7B)",
    aliases=("mlstm",),
    state="H (K V + K + 1)",
    parity="transformers' xLSTM layer, chunkwise and recurrent (copied weights); the parallel form of the 2024 paper, re-derived",
    claim="The three forms agree to 1e-4; multi-query associative recall is solved at modest width.",
)
class MLSTM(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is H matrices of K x V with their normaliser and scale, whatever the length.

    The cell is `cell`, h its output, LN a LayerNorm for each head. block="7b":
        q, k, v = W x     i, f = cap(W x + b)     y = W_o (sigmoid(W_g x) * LN(h))     cap(u) = 15 tanh(u / 15)
    block="2024", inside an up-projection to E = expand dim and without feed-forward after it (ffn=0 in a Decoder):
        u, z = W x     c = SiLU(conv(u))     q, k = BlockDiag(c)     v = BlockDiag(u)     i, f = W [q, k, v] + b
        y = W_o ((LN(h) + skip * c) * SiLU(z))

    heads: H. qk_factor: H K as a multiple of dim, for "7b" only (H V = dim; K = V = E / H in "2024"). gate_cap: of i and f, default 15 in
    "7b" and none in "2024". The gates start as biases: f linspace(3, 6) over heads, i at -10 ("7b") or N(0, 0.1^2) ("2024").
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        block: str = "7b",
        qk_factor: float = 0.5,
        gate_cap: float | None = None,
        expand: int = 2,
        conv_width: int = 4,
        backend: str = "auto",
    ):
        super().__init__()
        if block not in ("7b", "2024"):
            raise UsageError(f"block is {block!r}; it may be '7b' or '2024'.")
        if gate_cap is not None and not gate_cap > 0:
            raise UsageError(f"gate_cap is {gate_cap}; it must be above 0, or None for the block's default.")
        self.heads, self.block, self.backend = heads, block, backend
        inner = dim if block == "7b" else expand * dim
        divides("heads", heads, "dim" if block == "7b" else "expand * dim", inner)
        self.inner = inner
        if block == "7b":
            self.cap, keys = gate_cap or 15.0, int(dim * qk_factor)
            if keys < heads or keys % heads:
                raise UsageError(f"qk_factor={qk_factor} makes {keys} key channels of dim={dim}; heads={heads} must divide them.")
            self.sizes = [keys, keys, inner, inner]  # q, k, v, output gate
            self.to_qkvg = nn.Linear(dim, sum(self.sizes), bias=False)
            self.to_gates = nn.Linear(dim, 2 * heads)
        else:
            self.cap = gate_cap
            divides("block of projections", BLOCK, "expand * dim", inner)
            self.to_uz = nn.Linear(dim, 2 * inner, bias=False)
            self.conv = ShortConv(inner, conv_width, bias=True)
            self.to_qkv = nn.Parameter(torch.randn(3, inner // BLOCK, BLOCK, BLOCK) * (2 / (5 * dim)) ** 0.5)
            self.to_gates = nn.Linear(3 * inner, 2 * heads)
            self.skip = nn.Parameter(torch.ones(inner))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, dim, bias=False)
        with torch.no_grad():
            self.to_gates.weight.zero_()
            i, f = self.to_gates.bias.chunk(2)
            f.copy_(torch.linspace(3, 6, heads))
            i.fill_(-10) if block == "7b" else i.normal_(std=0.1)

    def forward(self, x: Tensor, state: MLSTMState | None = None, span: Span | None = None) -> tuple[Tensor, MLSTMState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        initial = (state.memory, state.normalizer, state.largest) if state else None
        c = z = conv = None
        if self.block == "7b":
            q, k, v, gate = self.to_qkvg(x).split(self.sizes, -1)
            gate, gates = gate.sigmoid(), self.to_gates(x)
        else:
            u, z = self.to_uz(x).chunk(2, -1)
            c, conv = self.conv(u, state and state.conv, span)
            c = F.silu(c)
            q, k, v = (
                torch.einsum("btni,noi->btno", part.unflatten(-1, (-1, BLOCK)), weight).flatten(2)
                for part, weight in zip((c, c, u), self.to_qkv)
            )
            gate, gates = F.silu(z), self.to_gates(torch.cat([q, k, v], -1))
        i, f = soft_cap(gates.to(accumulate_dtype(gates)), self.cap).chunk(2, -1)  # [B, T, H]
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))  # [B, T, H, K or V]
        h, (memory, normalizer, m) = cell(q, k, v, i, f, initial, span, self.backend)
        h = F.layer_norm(h, h.shape[-1:], eps=1e-6 if c is None else 1e-5).flatten(2) * self.norm_weight
        if c is not None:
            h = torch.addcmul(h, self.skip, c)
        seen = advance(seen, x.shape[1], span)
        return self.out(h * gate), MLSTMState(seen=seen, memory=memory, normalizer=normalizer, largest=m, conv=conv)
