"""LRU: the linear recurrent unit, a complex diagonal recurrence that does not depend on the input (arXiv 2303.06349)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..ops.backend import accumulate_dtype
from ..ops.scan import scan
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .parts import no_decay


class LRUState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    hidden: Tensor  # [B, N, 2] float32, real and imaginary parts


@system(
    "lru",
    kind="mixer",
    paper="arXiv:2303.06349",
    year=2023,
    name="LRU",
    state="2 N",
    parity="the equation as a per-token loop in complex128",
    claim="A linear recurrence, stably parametrised and normalised, matches deep state-space models on long-range tasks.",
)
class LRU(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is one vector of N = state_size complex numbers, default dim.

        h_t = lambda h_{t-1} + exp(gamma) (B x_t)        y_t = Re(C h_t) + D x_t        lambda = exp(-exp(nu) + i exp(theta))

    nu, theta, gamma are learned; at first lambda is uniform in the ring r_min <= |lambda| <= r_max with a phase in (0, max_phase), and
    exp(gamma) = sqrt(1 - |lambda|^2), which keeps |h| the size of |x|. |lambda| < 1 always. The paper's block puts a norm before it and a
    gated unit after it; those are the model's. `out` is C as a real matrix on [Re h, Im h].
    """

    def __init__(
        self,
        dim: int,
        state_size: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        backend: str = "auto",
    ):
        super().__init__()
        if not 0 <= r_min < r_max <= 1 or not 0 < max_phase <= 2 * math.pi:
            raise UsageError(f"r_min={r_min}, r_max={r_max}, max_phase={max_phase}; need 0 <= r_min < r_max <= 1, 0 < max_phase <= 2 pi.")
        size = state_size or dim
        self.backend = backend
        tiny = torch.finfo(torch.float32).tiny
        log_r = 0.5 * torch.empty(size).uniform_(r_min**2, r_max**2).clamp(tiny, 1 - 1e-6).log()  # uniform in area
        self.nu = no_decay(nn.Parameter((-log_r).log()))
        self.theta = no_decay(nn.Parameter((max_phase * torch.rand(size)).clamp(min=tiny).log()))
        self.gamma = no_decay(nn.Parameter(0.5 * (-torch.expm1(2 * log_r)).log()))
        self.to_h = nn.Linear(dim, 2 * size, bias=False)  # B, real | imaginary
        self.out = nn.Linear(2 * size, dim, bias=False)  # C, real | minus imaginary
        self.D = no_decay(nn.Parameter(torch.randn(dim)))
        nn.init.normal_(self.to_h.weight, std=(2 * dim) ** -0.5)
        nn.init.normal_(self.out.weight, std=size**-0.5)

    def forward(self, x: Tensor, state: LRUState | None = None, span: Span | None = None) -> tuple[Tensor, LRUState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        full = accumulate_dtype(x)
        nu, theta, gamma = (p.to(full).exp() for p in (self.nu, self.theta, self.gamma))
        re, im = self.to_h(x).to(full).chunk(2, -1)  # [B, T, N]
        start = torch.view_as_complex(state.hidden.contiguous()) if state else None
        log_lambda = torch.complex(-nu, theta).expand(re.shape)
        h, last = scan(log_lambda, torch.complex(gamma * re, gamma * im), start, span, self.backend)
        y = self.out(torch.cat([h.real, h.imag], -1).to(x.dtype)) + self.D * x
        return y, LRUState(seen=advance(seen, x.shape[1], span), hidden=torch.view_as_real(last))
