"""LSSL: a dense HiPPO state space for every feature, S4's predecessor (arXiv 2110.13985)."""

from __future__ import annotations

import math

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
from .parts import no_decay


class LSSLState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, D, N] float32


@system(
    "lssl", kind="mixer", paper="arXiv:2110.13985", year=2021, name="LSSL", example={"order": 6}, state="D N",
    parity="the paper's RNN-gate lemma; HiPPO by its bilinear recurrence",
    claim="sequential MNIST 99.5% and permuted MNIST 98.8%",
)  # fmt: skip
class LSSL(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is N numbers a feature.

        s_t = (I - alpha dt A)^-1 ((I + (1 - alpha) dt A) s_{t-1} + dt B u_t)        o_t = C s_t + skip u_t in M channels
        y = W_o GELU(o)

    A, B: HiPPO of `measure` ("legs", "legt", "lagt"). channels: M. alpha: 1/2 is the bilinear rule, 1 backward Euler. A and dt, which is
    geometric over the features from dt_min to dt_max, are fixed; learn=True trains dt and a dense A shared by the features (our reading:
    the paper trains A through a quasi-separable form). Memory and time grow with D N^2: for small N.
    """

    def __init__(
        self,
        dim: int,
        order: int = 16,
        channels: int = 1,
        measure: str = "legs",
        alpha: float = 0.5,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        learn: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        if not 0 < dt_min <= dt_max:
            raise UsageError(f"dt_min is {dt_min} and dt_max {dt_max}; 0 < dt_min <= dt_max is needed.")
        if not 0.5 <= alpha <= 1:
            raise UsageError(f"alpha is {alpha}; it must be in 0.5..1, where the rule is stable at any step.")
        if measure not in ("legs", "legt", "lagt"):
            raise UsageError(f"measure is {measure!r}; it may be 'legs', 'legt' or 'lagt'.")
        self.alpha, self.backend = alpha, backend
        a, self.pulse = hippo(measure, order)
        log_dt = torch.linspace(math.log(dt_min), math.log(dt_max), dim, dtype=torch.float64)
        self.A = no_decay(nn.Parameter(a.float())) if learn else None
        self.log_dt = no_decay(nn.Parameter(log_dt.float())) if learn else None
        # fixed matrices are not buffers: rounded to bfloat16 with the rest of the model they would be another memory
        self.fixed = None if learn else discretize(a, self.pulse, log_dt.exp(), "bilinear", alpha)
        self.C = nn.Parameter(torch.randn(dim, channels, order) * order**-0.5)
        self.skip = nn.Parameter(torch.randn(dim, channels))
        self.out = nn.Linear(dim * channels, dim)

    def forward(self, x: Tensor, state: LSSLState | None = None, span: Span | None = None) -> tuple[Tensor, LSSLState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        a, b = self.discrete()
        o, memory = dense(a.to(x.device), b.to(x.device), x, self.C, state and state.memory, span, self.backend)  # [B, T, D, M]
        y = self.out(F.gelu(o + self.skip * x[..., None]).flatten(2))
        return y, LSSLState(seen=advance(seen, x.shape[1], span), memory=memory)

    def discrete(self) -> tuple[Tensor, Tensor]:
        """Abar [D, N, N] and Bbar [D, N], float64."""
        if self.A is None or self.log_dt is None:
            return self.fixed  # type: ignore[return-value]
        return discretize(self.A.double(), self.pulse.to(self.A.device), self.log_dt.double().exp(), "bilinear", self.alpha)
