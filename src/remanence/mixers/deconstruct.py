"""The deconstructed recurrent network: cell, attention over past states and residual gate, each a switch (arXiv 2410.02654)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, divides, positive, unknown
from ..ops.backend import accumulate_dtype, pick
from ..ops.cell import STATES, cell, step
from ..ops.cell.fused import fused, usable
from ..span import Span, positions
from ..state import State
from .base import Mixer

CELLS = {"rnn": 1, "lstm": 4, "gru": 3, "rhn": 2}
"""Gates of each cell: rnn tanh; lstm i, f, z, o; gru r, z, n; rhn h, t."""
GATES = ("additive", "rate", "input")


class DeconstructState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    cell: tuple  # h, then c (lstm), each [B, E] float32
    past: Tensor  # [B, k, 2 E] float32, keys and values of the last k hidden states, the newest last; k is 0 without attention


class PastAttention(nn.Module):
    """What the last k hidden states say to the next step: [B, E], 0 where there are none.

    a_t = sum_j softmax_j(q . k_j / sqrt(d) + bias_{t - j}) v_j over the k states before t, q from h_{t-1}; the bias is learned, one for
    each distance and head.
    """

    def __init__(self, size: int, window: int, heads: int):
        super().__init__()
        self.window, self.heads = window, heads
        self.to_q, self.to_kv = nn.Linear(size, size, bias=False), nn.Linear(size, 2 * size, bias=False)
        self.bias = nn.Parameter(torch.zeros(heads, window))  # the newest last

    def forward(self, h: Tensor, past: Tensor, at: Tensor) -> Tensor:
        """h [B, E]; past [B, k, 2 E]; at [B], how many states there have been."""
        dtype = h.dtype
        q = (h @ self.to_q.weight.to(dtype).T).unflatten(-1, (self.heads, -1))  # [B, H, d]
        k, v = (part.unflatten(-1, (self.heads, -1)) for part in past.chunk(2, -1))  # [B, k, H, d]
        score = torch.einsum("bhd,bkhd->bhk", q, k) * q.shape[-1] ** -0.5 + self.bias.to(dtype)
        there = torch.arange(self.window, device=h.device) >= self.window - at[:, None]
        score = score.masked_fill(~there[:, None], -1e30)  # not -inf: a first token has nothing to look at, and its 0 must have gradients
        context = torch.einsum("bhk,bkhd->bhd", score.softmax(-1), v).flatten(1)
        return context * (at > 0)[:, None]

    def remember(self, h: Tensor, past: Tensor) -> Tensor:
        return torch.cat([past[:, 1:], (h @ self.to_kv.weight.to(h.dtype).T)[:, None]], 1)


@system(
    "deconstruct",
    kind="forecasting",
    paper="arXiv:2410.02654",
    year=2024,
    name="Deconstructed RNN, LSTM, GRU, RHN (gates, attention)",
    example={"cell": "rhn", "gate": "input", "attention": 6, "heads": 2, "depth": 2},
    state="S E + 2 k E, with S = 2 (lstm) or 1 and k the attention window",
    parity="torch.nn.RNN, LSTM and GRU; RHN of depth 1 as a coupled-gate highway RNN",
    claim="On Kuramoto-Sivashinsky and Lorenz-96 an RHN with gate and attention forecasts furthest; gates and attention help every RNN.",
)
class Deconstruct(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; a recurrent cell with two additions that can be switched on.

        u_t = W_u x_t    h_t = cell(W x_t + W_c a_t + b, h_{t-1})     a_t = attention of h_{t-1} over h_{t-k} .. h_{t-1}
        y_t = W_o G(u_t, h_t)

    cell: "rnn", "lstm", "gru" (ops/cell) or "rhn", whose step is `depth` layers

        s^l = t * tanh(R_h^l s^{l-1} + ...) + (1 - t) * s^{l-1},  t = sigmoid(R_t^l s^{l-1} + ...),  s^0 = h_{t-1}, h_t = s^depth

    with the input at l = 1 only. gate, the residual gate G (None: G = h): "additive" u + h; "rate" u + alpha * h, alpha learned per unit
    from 1e-2; "input" g * h + (1 - g) * u with g = sigmoid(W_g x + b_g). attention: k, or None for none; heads: its heads. Our reading,
    from the abstract: gates are those of residual connections around the cell, not of the recurrence, and what attention finds enters the
    cell as an input. inner: E, default dim. Without attention rnn, lstm and gru are those of ops/cell; else a loop over tokens.
    """

    def __init__(
        self,
        dim: int,
        cell: str = "rhn",
        gate: str | None = None,
        attention: int | None = None,
        heads: int = 4,
        depth: int = 1,
        inner: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        size = inner or dim
        positive(inner=size)
        if cell not in CELLS:
            raise unknown("cell", cell, CELLS)
        if gate is not None and gate not in GATES:
            raise unknown("gate", gate, GATES)
        if depth != 1 and cell != "rhn":
            raise UsageError(f"depth is {depth}; only an rhn has layers inside a step, a {cell} has depth 1.")
        self.kind = "elman" if cell == "rnn" else cell
        self.gate, self.backend, self.size, self.depth = gate, backend, size, depth
        gates, bound = CELLS[cell], size**-0.5
        self.to_gates = nn.Linear(dim, gates * size)  # [G, E] outputs
        self.recurrent = nn.Parameter(torch.empty(depth, size, gates, size).uniform_(-bound, bound))
        self.inner_bias = nn.Parameter(torch.empty(size).uniform_(-bound, bound)) if cell == "gru" else None
        self.depth_bias = nn.Parameter(torch.zeros(depth - 1, gates, size)) if depth > 1 else None
        self.past = self.from_past = None
        if attention is not None:
            divides("heads", heads, "inner", size)
            self.past, self.from_past = PastAttention(size, attention, heads), nn.Linear(size, gates * size, bias=False)
        self.to_skip = nn.Linear(dim, size) if gate else None
        self.to_residual_gate = nn.Linear(dim, size) if gate == "input" else None
        self.rate = nn.Parameter(torch.full((size,), 1e-2)) if gate == "rate" else None
        self.out = nn.Linear(size, dim, bias=False)
        with torch.no_grad():
            bias = self.to_gates.bias.uniform_(-bound, bound).view(gates, size)
            if cell == "lstm":
                bias[1] += 1  # remember at first (Jozefowicz et al. 2015)
            if cell == "rhn":  # carry at first (Zilly et al. 2017)
                bias[1] -= 1
                if self.depth_bias is not None:
                    self.depth_bias[:, 1] -= 1

    def forward(self, x: Tensor, state: DeconstructState | None = None, span: Span | None = None) -> tuple[Tensor, DeconstructState]:
        at = positions(state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device), x.shape[1], span)
        form = pick(self.backend, x.shape[1])
        if self.kind == "rhn" or self.past is not None:
            h, held, past = self.loop(x, state, span, at)
        else:
            before = tuple(part[:, None] for part in state.cell) if state else None  # one head
            if usable(self.kind, x, span, self.backend):
                h, held = fused(x, self.to_gates.weight, self.to_gates.bias, self.recurrent, before)
            else:
                inner = None if self.inner_bias is None else self.inner_bias[None]
                wx = self.to_gates(x).unflatten(-1, (1, -1, self.size))  # [B, T, 1, G, E]
                h, held = cell(self.kind, wx, self.recurrent, before, inner, span, "naive" if form == "naive" else "auto")
            h, held, past = h[:, :, 0], tuple(part[:, 0] for part in held), h.new_zeros(len(x), 0, 2 * self.size)
        y = self.out(self.residual(x, h.to(x.dtype)))
        return y, DeconstructState(seen=at[:, -1] + 1, cell=held, past=past)

    def residual(self, x: Tensor, h: Tensor) -> Tensor:
        """G(u, h)."""
        if self.to_skip is None:
            return h
        u = self.to_skip(x)
        if self.to_residual_gate is not None:
            return u + self.to_residual_gate(x).sigmoid() * (h - u)
        return u + h if self.rate is None else u + self.rate * h

    def loop(
        self, x: Tensor, state: DeconstructState | None, span: Span | None, at: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Token by token: h [B, T, E], the cell's states and the past. at [B, T]: positions."""
        dtype = accumulate_dtype(x)
        wx = self.to_gates(x).to(dtype)
        window = self.past.window if self.past else 0
        if state is not None:
            held, past = state.cell, state.past
        else:
            held = (wx.new_zeros(len(x), self.size),) * len(STATES.get(self.kind, "h"))
            past = wx.new_zeros(len(x), window, 2 * self.size)
        R, hidden = self.recurrent.to(dtype), []
        for t in range(x.shape[1]):
            if span is not None and span.reset is not None:
                fresh = span.reset[:, t, None]
                held, past = tuple(part.masked_fill(fresh, 0) for part in held), past.masked_fill(fresh[..., None], 0)
            a, then = wx[:, t], past
            if self.past is not None and self.from_past is not None:
                a = a + self.past(held[0], past, at[:, t]) @ self.from_past.weight.to(dtype).T
            new = self.cell_step(a.unflatten(-1, (-1, self.size)), held, R)
            if self.past is not None:
                then = self.past.remember(new[0], past)
            if span is not None and span.valid is not None:
                real = span.valid[:, t, None]
                new = tuple(torch.where(real, now, old) for now, old in zip(new, held))
                then = torch.where(real[..., None], then, past)
            held, past = new, then
            hidden.append(held[0])
        return torch.stack(hidden, 1), held, past

    def cell_step(self, a: Tensor, held: tuple[Tensor, ...], R: Tensor) -> tuple[Tensor, ...]:
        """The cell's states after one token. a [B, G, E]; R [depth, E, G, E]."""
        if self.kind != "rhn":
            inner = None if self.inner_bias is None else self.inner_bias.to(a.dtype)[None]
            new = step(self.kind, a[:, None], R, tuple(part[:, None] for part in held), inner)
            return tuple(part[:, 0] for part in new)
        s = held[0]
        for layer in range(self.depth):
            if layer and self.depth_bias is not None:
                a = self.depth_bias[layer - 1].to(a.dtype)
            h, t = (a + (s @ R[layer].flatten(1)).unflatten(-1, (2, -1))).unbind(-2)
            s = s + t.sigmoid() * (h.tanh() - s)
        return (s,)
