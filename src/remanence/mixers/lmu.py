"""LMU: one input channel remembered as Legendre coefficients of its last theta tokens, as in LMUFormer (arXiv 2402.04882)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..ops.lti import dense
from ..ops.lti.hippo import discretize, hippo
from ..span import Span, advance
from ..state import State
from .base import Mixer


class LMUState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, 1, q] float32


@system(
    "lmuformer", kind="audio", paper="arXiv:2402.04882", year=2024, name="LMUFormer (LMU mixer)", example={"order": 8, "theta": 20.0},
    state="q", parity="the published cell's FFT form, re-derived; scipy.signal.cont2discrete; the Legendre delay line",
    claim="psMNIST above 98%; Speech Commands v2 about 96.5%",
)  # fmt: skip
class LMU(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is q numbers.

        u_t = ReLU(w_u x_t + b_u)        m_t = Abar m_{t-1} + Bbar u_t        y_t = ReLU(W_h [m_t, x_t] + b_h)

    Abar, Bbar: the Legendre memory of the last `theta` tokens, A_ij = (2i + 1) / theta (-1 if i < j else (-1)^(i-j+1)) and
    B_i = (2i + 1) (-1)^i / theta, by zero-order hold; fixed. order: q (the paper: 256 to 512). The recurrence runs in chunks by the
    impulse response, from any state, where the published code has one FFT of the whole sequence from zero.
    """

    def __init__(self, dim: int, order: int = 32, theta: float = 256.0, backend: str = "auto"):
        super().__init__()
        if not theta >= 1:
            raise UsageError(f"theta is {theta}; it must be at least 1, the length in tokens of what is remembered.")
        self.backend = backend
        # not buffers: rounded to bfloat16 with the rest of the model they would be another memory
        self.A, self.B = discretize(*hippo("lmu", order, theta), 1.0, "zoh")
        self.to_u = nn.Linear(dim, 1)
        self.out = nn.Linear(order + dim, dim)

    def forward(self, x: Tensor, state: LMUState | None = None, span: Span | None = None) -> tuple[Tensor, LMUState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        u = F.relu(self.to_u(x))  # [B, T, 1]
        m, memory = dense(self.A.to(x.device), self.B.to(x.device), u, None, state and state.memory, span, self.backend)  # [B, T, 1, q]
        y = F.relu(self.out(torch.cat([m[:, :, 0], x], -1)))
        return y, LMUState(seen=advance(seen, x.shape[1], span), memory=memory)
