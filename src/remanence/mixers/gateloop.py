"""GateLoop: a complex linear recurrence whose magnitude and phase are both set by the input (arXiv 2311.01927)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..ops.backend import accumulate_dtype
from ..ops.scan import scan
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .parts import RMSNorm


class GateLoopState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    hidden: Tensor  # [B, D, 2] float32, real and imaginary parts


@system(
    "gateloop",
    kind="mixer",
    paper="arXiv:2311.01927",
    year=2023,
    name="GateLoop",
    state="2 D",
    parity="its limits: linear attention and retention (constant real gates), a convolution with powers (constant complex ones)",
    claim="Data-controlled gates solve the memory-horizon task (inputs since the last reset token), a constant decay fails.",
)
class GateLoop(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is one vector of dim complex numbers.

        h_t = a_t h_{t-1} + k_t v_t        o_t = Re(q_t h_t)        a = sigmoid(W_a x + b_a) exp(i (W_b x + b_b))
        y = W_o (RMSNorm(o) * SiLU(W_g x))

    q, k, v are linear in x. The paper's S_t = diag(a_t) S_{t-1} + k_t v_t^T with as many heads as channels ("maximally headed", its best).
    Biases, norm and initial values (torch's) are our reading; the authors' code at hand is of a later, real layer.
    """

    def __init__(self, dim: int, backend: str = "auto"):
        super().__init__()
        self.backend = backend
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_a = nn.Linear(dim, 2 * dim)  # magnitude before the sigmoid | phase
        self.to_gate = nn.Linear(dim, dim, bias=False)
        self.norm = RMSNorm(dim)
        self.out = nn.Linear(dim, dim, bias=False)

    def loop(self, x: Tensor, state: GateLoopState | None, span: Span | None) -> tuple[Tensor, GateLoopState]:
        """o [B, T, D], before the norm, in float32 at least; and the new state."""
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        full = accumulate_dtype(x)
        q, k, v = self.to_qkv(x).to(full).chunk(3, -1)
        magnitude, phase = self.to_a(x).to(full).chunk(2, -1)
        start = torch.view_as_complex(state.hidden.contiguous()) if state else None
        h, last = scan(torch.complex(F.logsigmoid(magnitude), phase), k * v, start, span, self.backend)
        return q * h.real, GateLoopState(seen=advance(seen, x.shape[1], span), hidden=torch.view_as_real(last))

    def forward(self, x: Tensor, state: GateLoopState | None = None, span: Span | None = None) -> tuple[Tensor, GateLoopState]:
        o, new = self.loop(x, state, span)
        return self.out(self.norm(o.to(x.dtype)) * F.silu(self.to_gate(x))), new
