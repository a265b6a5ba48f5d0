"""SRU: the simple recurrent unit, a gated recurrence with a highway around it (arXiv 1709.02755)."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..ops.backend import accumulate_dtype
from ..ops.cell.newton import before, newton
from ..ops.scan import scan
from ..span import Span, advance
from ..state import State
from .base import Mixer


class SRUState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    hidden: Tensor  # [B, dim] float32


def sru(c: Tensor, u: Tensor, slope: bool, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """c [..., 1, D], u [..., 2, D] (candidate, forget gate), v [D] -> f c + (1 - f) u_0, f = sigmoid(u_1 + v c); its derivative by c."""
    c = c.squeeze(-2)
    f = (u[..., 1, :] + v * c).sigmoid()
    gap = c - u[..., 0, :]
    new = (u[..., 0, :] + f * gap).unsqueeze(-2)
    return new, (f + gap * f * (1 - f) * v)[..., None, None, :] if slope else None


@system(
    "sru",
    kind="mixer",
    paper="arXiv:1709.02755",
    year=2017,
    name="SRU",
    state="D",
    parity="the loop of the paper's equations",
)
class SRU(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is one vector.

        f_t = sigmoid(W_f x + v_f c_{t-1} + b_f)     c_t = f_t c_{t-1} + (1 - f_t) W x
        r_t = sigmoid(W_r x + v_r c_{t-1} + b_r)     h_t = r_t c_t + (1 - r_t) alpha x        y = W_o h

    peephole=False: v = 0, the paper's first version, a linear recurrence run as a scan; else Newton's method (ops/cell/newton.py).
    alpha = sqrt(3), or sqrt(1 + 2 exp(b)) for gate biases that start at b. W_o is ours, for the residual stream.
    """

    def __init__(self, dim: int, peephole: bool = True, bias: float = 0.0, backend: str = "auto"):
        super().__init__()
        self.backend, self.alpha = backend, math.sqrt(1 + 2 * math.exp(bias))
        self.to_gates = nn.Linear(dim, 3 * dim)  # candidate, f, r
        self.v = nn.Parameter(torch.empty(2, dim).uniform_(-(dim**-0.5), dim**-0.5)) if peephole else None
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.uniform_(self.to_gates.weight, -((3 / dim) ** 0.5), (3 / dim) ** 0.5)  # variance 1 / dim
        with torch.no_grad():
            self.to_gates.bias.zero_()
            self.to_gates.bias[dim:] = bias

    def forward(self, x: Tensor, state: SRUState | None = None, span: Span | None = None) -> tuple[Tensor, SRUState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        dtype = accumulate_dtype(x)
        gates = self.to_gates(x).to(dtype).unflatten(-1, (3, -1))  # [B, T, 3, dim]
        candidate, f, r = gates.unbind(2)
        start = state.hidden if state else x.new_zeros(x[:, 0].shape, dtype=dtype)
        if self.v is None:
            c, hidden = scan(F.logsigmoid(f), torch.sigmoid(-f) * candidate, start, span, self.backend)
        else:
            h, last = newton(functools.partial(sru, v=self.v[0].to(dtype)), gates[:, :, :2], start[:, None], span, backend=self.backend)
            r = r + self.v[1].to(dtype) * before(h, start[:, None], None if span is None else span.reset)[:, :, 0]
            c, hidden = h[:, :, 0], last[:, 0]
        r = r.sigmoid()
        y = self.out((r * c + (1 - r) * self.alpha * x).to(x.dtype))
        return y, SRUState(seen=advance(seen, x.shape[1], span), hidden=hidden)
