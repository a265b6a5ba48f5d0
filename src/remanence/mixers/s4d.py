"""S4D: a diagonal state space for every feature, the simplest of the S4 family (arXiv 2206.11893)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..ops.backend import accumulate_dtype
from ..ops.lti import diagonal
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .parts import no_decay


class S4DState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, D, N / 2, 2] float32, real and imaginary part of one mode of each conjugate pair


def frequencies(init: str, half: int) -> Tensor:
    """Im A_n, n = 0 .. N / 2 - 1: "lin" pi n, "inv" (N / pi) (N / (2 n + 1) - 1)."""
    n, order = torch.arange(half), 2 * half
    if init not in ("lin", "inv"):
        raise UsageError(f"init is {init!r}; it may be 'lin' or 'inv'.")
    return torch.pi * n if init == "lin" else order / torch.pi * (order / (2 * n + 1) - 1)


def log_steps(dim: int, low: float, high: float) -> Tensor:
    """log of a time step for every feature, uniform between the logs. Raises UsageError unless 0 < low <= high."""
    if not 0 < low <= high:
        raise UsageError(f"dt_min is {low} and dt_max {high}; 0 < dt_min <= dt_max is needed.")
    return torch.empty(dim).uniform_(math.log(low), math.log(high))


def half_order(order: int) -> int:
    """N / 2. Raises UsageError unless N is even: modes come in conjugate pairs."""
    if order % 2:
        raise UsageError(f"order is {order}; it must be even, for conjugate pairs.")
    return order // 2


def complex_randn(*shape: int) -> Tensor:
    """Standard complex normal numbers as [..., 2] real ones: half of the variance in each part."""
    return torch.randn(*shape, 2) * 0.5**0.5


class DiagonalSSM(nn.Module):
    """s_t = exp(dt A) s_{t-1} + A^-1 (exp(dt A) - 1) u_t and o_t = 2 Re sum_n C_n s_t[n], N / 2 complex modes a feature.

    Re A = -exp(.), one dt a feature; the zero-order hold has B = 1, as C can hold its factor. Its state is memory [B, D, N / 2, 2].
    """

    def __init__(self, dim: int, order: int, init: str, dt_min: float, dt_max: float, backend: str):
        super().__init__()
        half = half_order(order)
        self.backend = backend
        self.log_dt = no_decay(nn.Parameter(log_steps(dim, dt_min, dt_max)))
        self.A_log = no_decay(nn.Parameter(torch.full((dim, half), math.log(0.5))))  # log of -Re A
        self.A_imag = no_decay(nn.Parameter(frequencies(init, half).expand(dim, -1).clone()))
        self.C = nn.Parameter(complex_randn(dim, half))

    def discrete(self) -> tuple[Tensor, Tensor]:
        """dt A and A^-1 (exp(dt A) - 1), complex128 [D, N / 2]."""
        a = torch.complex(-self.A_log.double().exp(), self.A_imag.double())
        log_a = a * self.log_dt.double().exp()[:, None]
        return log_a, torch.expm1(log_a) / a

    def forward(self, u: Tensor, memory: Tensor | None, span: Span | None) -> tuple[Tensor, Tensor]:
        kind = accumulate_dtype(u).to_complex()
        log_a, b = self.discrete()
        c = torch.view_as_complex(self.C.double())
        held = None if memory is None else torch.view_as_complex(memory)
        o, last = diagonal(log_a.to(kind), b.to(kind), c.to(kind), u, held, span, self.backend)
        return o, torch.view_as_real(last)


@system(
    "s4d", kind="mixer", paper="arXiv:2206.11893", year=2022, name="S4D", example={"order": 8}, state="D N",
    parity="the equation in a loop; ZOH by matrix exponential",
    claim="sequential MNIST above 99% with 4 layers of 128",
)  # fmt: skip
class S4D(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is N numbers a feature.

        o = DiagonalSSM(x) + skip x        y = GLU(W_o GELU(o))

    order: N, real numbers of state a feature, N / 2 complex modes. init: of Im A, "lin" or "inv". dt_min, dt_max: log dt is drawn
    uniformly between their logs.
    """

    def __init__(
        self, dim: int, order: int = 64, init: str = "lin", dt_min: float = 1e-3, dt_max: float = 1e-1, backend: str = "auto"
    ):
        super().__init__()
        self.ssm = DiagonalSSM(dim, order, init, dt_min, dt_max, backend)
        self.skip = nn.Parameter(torch.randn(dim))
        self.out = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, state: S4DState | None = None, span: Span | None = None) -> tuple[Tensor, S4DState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        o, memory = self.ssm(x, state and state.memory, span)
        y = F.glu(self.out(F.gelu(o + self.skip * x)), -1)
        return y, S4DState(seen=advance(seen, x.shape[1], span), memory=memory)
