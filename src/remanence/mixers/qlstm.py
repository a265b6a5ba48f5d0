"""The quantum LSTM: an LSTM whose linear maps are simulated variational circuits (arXiv 2009.01783)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..ops.backend import accumulate_dtype, pick
from ..ops.qubits import Compiled, circuit
from ..span import Span, positions
from ..state import State
from .base import Mixer

MOST_QUBITS = 12
COMPILED = 8
"""The most qubits for which a circuit is turned into a matrix once a call."""


class QLSTMState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    hidden: Tensor  # [B, n] float32
    cell: Tensor  # [B, n] float32


@system(
    "qlstm",
    kind="forecasting",
    paper="arXiv:2009.01783",
    year=2020,
    name="QLSTM (quantum LSTM)",
    state="2 n, n the number of qubits",
    parity="the same circuits from Kronecker products of gates in complex128; PennyLane where installed",
    claim="A damped oscillation or a sine is learned within 30 to 100 epochs.",
)
class QLSTM(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is the hidden and the cell vector of n = qubits numbers each. A loop over tokens.

        v_t = W [h_{t-1}, x_t] + b        f, i, o = sigmoid(Q_1(v)), sigmoid(Q_2(v)), sigmoid(Q_4(v))
        c_t = f c_{t-1} + i tanh(Q_3(v))          h_t = Q_5(o tanh c_t)          y_t = W_o Q_6(o tanh c_t) + b_o

    Q(v) in [-1, 1]^n: every qubit starts as RZ(atan v_i^2) RY(atan v_i) H |0>, then `depth` times CNOT i -> i + 1, CNOT i -> i + 2 around
    the ring and a general rotation of each qubit, whose angles are the weights; read are the <Z_i>. The reduction to n numbers, shared by
    the four gates, and W_o are classical (the paper's inputs are small enough to need neither). Angles start in -1 .. 1: from the whole
    circle it learns more slowly.

    backend "naive" runs gate by gate; the default runs each circuit once on the basis states and then takes two matrix products a token,
    all gates together (gate by gate too beyond 8 qubits).
    """

    def __init__(self, dim: int, qubits: int = 4, depth: int = 2, backend: str = "auto"):
        super().__init__()
        if qubits > MOST_QUBITS:
            raise UsageError(f"qubits is {qubits}; 2^qubits amplitudes are simulated, so it may be at most {MOST_QUBITS}.")
        self.qubits, self.backend = qubits, backend
        self.reduce = nn.Linear(dim, qubits)
        bound = qubits**-0.5
        self.recurrent = nn.Parameter(torch.empty(qubits, qubits).uniform_(-bound, bound))
        self.angles = nn.Parameter(torch.empty(6, depth, qubits, 3).uniform_(-1, 1))  # f, i, candidate, o, h, y
        self.out = nn.Linear(qubits, dim)

    def forward(self, x: Tensor, state: QLSTMState | None = None, span: Span | None = None) -> tuple[Tensor, QLSTMState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        at = positions(seen, x.shape[1], span)
        dtype = accumulate_dtype(x)
        wx, R, angles = self.reduce(x).to(dtype), self.recurrent.to(dtype), self.angles.to(dtype)
        if pick(self.backend, x.shape[1]) == "naive" or self.qubits > COMPILED:
            gates, to_h, to_y = (functools.partial(circuit, angles=part) for part in angles.split([4, 1, 1]))
        else:
            gates, to_h, to_y = (Compiled(part) for part in angles.split([4, 1, 1]))
        h, c = (state.hidden, state.cell) if state else (wx.new_zeros(len(x), self.qubits),) * 2
        exposed = []
        for t in range(x.shape[1]):
            if span is not None and span.reset is not None:
                fresh = span.reset[:, t, None]
                h, c = h.masked_fill(fresh, 0), c.masked_fill(fresh, 0)
            a = gates(torch.addmm(wx[:, t], h, R))  # [B, 4, n]
            f, i, z, o = a.unbind(1)
            new = f.sigmoid() * c + i.sigmoid() * z.tanh()
            seen_by_all = o.sigmoid() * new.tanh()
            output = to_h(seen_by_all)[:, 0]
            if span is not None and span.valid is not None:
                real = span.valid[:, t, None]
                output, new = torch.where(real, output, h), torch.where(real, new, c)
            h, c = output, new
            exposed.append(seen_by_all)
        y = to_y(torch.stack(exposed, 1))[:, :, 0]  # the sixth circuit is not in the loop
        return self.out(y.to(x.dtype)), QLSTMState(seen=at[:, -1] + 1, hidden=h, cell=c)
