"""ParaRNN: a GRU and an LSTM with diagonal recurrent weights, all tokens at once by Newton's method (arXiv 2510.21450)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import divides, positive, unknown
from ..ops.cell.newton import MOST, newton
from ..span import Span, advance
from ..state import State
from .base import Mixer


class ParaRNNState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    hidden: Tensor  # [B, S, E] float32: h (gru), or c and h (lstm)


def gru(h: Tensor, u: Tensor, slope: bool, a: Tensor) -> tuple[Tensor, Tensor | None]:
    """h [..., 1, D], u [..., 3, D] (z, r, c), a [3, D] -> the next h, and its derivative by h if asked:

    (1 - z) + (c - h) a_z z (1 - z) + z (1 - c^2) a_h (r + h a_r r (1 - r)).
    """
    h, a = h.squeeze(-2), a.to(h.dtype)
    z, r = (a[:2] * h.unsqueeze(-2) + u[..., :2, :]).sigmoid().unbind(-2)
    c = torch.tanh(a[2] * h * r + u[..., 2, :])
    new = (h + z * (c - h)).unsqueeze(-2)
    if not slope:
        return new, None
    by_h = (1 - z) + (c - h) * a[0] * z * (1 - z) + z * (1 - c * c) * a[2] * r * (1 + h * a[1] * (1 - r))
    return new, by_h[..., None, None, :]


def lstm(h: Tensor, u: Tensor, slope: bool, a: Tensor) -> tuple[Tensor, Tensor | None]:
    """h [..., 2, D] (c, h), u [..., 3, D] (f, o, g), a [5, D] (the weights of h in f, o, g, and of c in f, o) -> the next c and h.

    If asked, also their 2 x 2 derivatives by c and h.
    """
    a = a.to(h.dtype)
    c, y = h.unbind(-2)
    f = (a[0] * y + a[3] * c + u[..., 0, :]).sigmoid()
    g = (a[2] * y + u[..., 2, :]).tanh()
    new = g + f * (c - g)
    o = (a[1] * y + a[4] * new + u[..., 1, :]).sigmoid()
    squashed = new.tanh()
    both = torch.stack([new, o * squashed], -2)
    if not slope:
        return both, None
    to_f, to_o = (c - g) * f * (1 - f), squashed * o * (1 - o)
    new_by_c = f + to_f * a[3]
    new_by_y = to_f * a[0] + (1 - f) * (1 - g * g) * a[2]
    out_by_new = o * (1 - squashed * squashed) + to_o * a[4]
    rows = (torch.stack([new_by_c, new_by_y], -2), torch.stack([out_by_new * new_by_c, out_by_new * new_by_y + to_o * a[1]], -2))
    return both, torch.stack(rows, -3)


CELLS = {"gru": (gru, 1, 3), "lstm": (lstm, 2, 5)}
"""f, its numbers of state a unit, diagonal weights a unit. Both have three gates."""


@system(
    "pararnn",
    kind="training",
    paper="arXiv:2510.21450",
    year=2025,
    name="ParaRNN (ParaGRU, ParaLSTM)",
    state="S E, with S = 1 (gru), 2 (lstm)",
    parity="the sequential loop, in value and gradient; with a = 0, minGRU with a tanh",
    claim="At T=512 the residual falls quadratically with the Newton iterations, below 1e-6 by the fourth or fifth.",
)
class ParaRNN(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; a nonlinear recurrence without a loop over tokens. With u = B x + b and diagonal weights a:

        gru     z, r = sigmoid(a_z h + u_z), sigmoid(a_r h + u_r)     c = tanh(a_h h r + u_h)     h' = (1 - z) h + z c
        lstm    f = sigmoid(a_f h + C_f c + u_f)    g = tanh(a_g h + u_g)    c' = f c + (1 - f) g
                o = sigmoid(a_o h + C_o c' + u_o)   h' = o tanh(c')                                  y = W_o h

    heads: blocks of B. inner: E, default dim. iterations: of Newton's method, at most; the loop runs if they do not converge. The
    paper's block puts a convolution before and a gated norm after the cell; here the cell is the mixer.
    """

    def __init__(
        self, dim: int, cell: str = "gru", heads: int = 2, inner: int | None = None, iterations: int = MOST, backend: str = "auto"
    ):
        super().__init__()
        size = inner or dim
        positive(inner=size)
        if cell not in CELLS:
            raise unknown("cell", cell, CELLS)
        divides("heads", heads, "dim", dim)
        divides("heads", heads, "inner", size)
        self.cell, self.heads, self.iterations, self.backend = cell, heads, iterations, backend
        bound = (6 * heads / (dim + size)) ** 0.5
        self.to_gates = nn.Parameter(torch.empty(heads, dim // heads, 3, size // heads).uniform_(-bound, bound))
        bias = torch.zeros(3, size)
        bias[0] = -torch.linspace(0, 1, size)
        self.bias = nn.Parameter(bias)
        self.diagonal = nn.Parameter(torch.randn(CELLS[cell][2], size) * 2 / (5 * size) ** 0.5)
        self.out = nn.Linear(size, dim, bias=False)

    def forward(self, x: Tensor, state: ParaRNNState | None = None, span: Span | None = None) -> tuple[Tensor, ParaRNNState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        u = torch.einsum("bthi,higj->btghj", x.unflatten(-1, (self.heads, -1)), self.to_gates).flatten(3) + self.bias  # [B, T, 3, E]
        f, states, _ = CELLS[self.cell]
        h, hidden = newton(functools.partial(f, a=self.diagonal), u, state and state.hidden, span, states, self.iterations, self.backend)
        y = self.out(h[:, :, -1].to(x.dtype))
        return y, ParaRNNState(seen=advance(seen, x.shape[1], span), hidden=hidden)
