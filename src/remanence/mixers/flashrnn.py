"""FlashRNN: the traditional recurrent networks, with heads (arXiv 2412.07752)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import divides, positive, unknown
from ..ops.cell import GATES, cell
from ..ops.cell.fused import fused, usable
from ..span import Span, advance
from ..state import State
from .base import Mixer


class FlashRNNState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    cell: tuple  # y, then c (lstm), then n and m (slstm), each [B, H, D] float32


@system(
    "flashrnn",
    kind="serving",
    paper="arXiv:2412.07752",
    year=2024,
    name="FlashRNN (LSTM, GRU, Elman, sLSTM with heads)",
    state="S E, with S = 1 (elman, gru), 2 (lstm), 4 (slstm)",
    parity="torch.nn.LSTM, GRU and RNN at heads=1; NX-AI/flashrnn's equations",
    claim="H heads cut the recurrent product by H at a similar loss, and LSTM and sLSTM track states that linear recurrences cannot.",
)
class FlashRNN(Mixer):
    """x [B, T, dim] -> y [B, T, dim] by a nonlinear recurrence, whose product with R is one block per head.

        a_t = W x_t + b + y_{t-1} R        y_t, c_t = cell(a_t, y_{t-1}, c_{t-1})        out = W_o y

    cell: "lstm" (gates i, f, z, o), "gru" (r, z, n; torch's form, its bias inside the reset gate), "elman" (tanh), "slstm" (i, f, z, o);
    equations in ops/cell/step.py. heads: blocks of R. inner: E = heads x head size, default dim. At heads=1 an lstm, gru or elman is
    torch's own (there b is the sum of torch's two; the paper's code orders the gru's recurrent rows g, r, z and its biases g, r, z, n).
    """

    def __init__(self, dim: int, cell: str = "lstm", heads: int = 4, inner: int | None = None, backend: str = "auto"):
        super().__init__()
        size = inner or dim
        positive(inner=size)
        if cell not in GATES:
            raise unknown("cell", cell, GATES)
        divides("heads", heads, "inner", size)
        self.cell, self.heads, self.backend = cell, heads, backend
        head, gates = size // heads, GATES[cell]
        bound = head**-0.5  # as torch draws them
        self.to_gates = nn.Linear(dim, gates * size)  # [H, G, D] outputs
        self.recurrent = nn.Parameter(torch.empty(heads, head, gates, head).uniform_(-bound, bound))
        self.inner_bias = nn.Parameter(torch.empty(heads, head).uniform_(-bound, bound)) if cell == "gru" else None
        self.out = nn.Linear(size, dim, bias=False)
        with torch.no_grad():
            bias = self.to_gates.bias.view(heads, gates, head)
            bias.uniform_(-bound, bound)
            if cell in ("lstm", "slstm"):
                bias[:, 1] += 1  # remember at first (Jozefowicz et al. 2015)

    def forward(self, x: Tensor, state: FlashRNNState | None = None, span: Span | None = None) -> tuple[Tensor, FlashRNNState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        held = state.cell if state else None
        if usable(self.cell, x, span, self.backend):
            y, held = fused(x, self.to_gates.weight, self.to_gates.bias, self.recurrent, held)
        else:
            wx = self.to_gates(x).unflatten(-1, (self.heads, GATES[self.cell], -1))  # [B, T, H, G, D]
            y, held = cell(self.cell, wx, self.recurrent, held, self.inner_bias, span, self.backend)
        return self.out(y.flatten(2)), FlashRNNState(seen=advance(seen, x.shape[1], span), cell=tuple(held))
