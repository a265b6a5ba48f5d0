"""S4: a HiPPO state space for every feature, kept as diagonal plus low rank (arXiv 2111.00396)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..ops.backend import accumulate_dtype, pick
from ..ops.lti import convolve, dense
from ..ops.lti.hippo import dplr_dense, dplr_kernel, dplr_step, nplr_legs
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .parts import no_decay
from .s4d import complex_randn, half_order, log_steps

KERNELS = ("chunk", "cauchy")


class S4State(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, D, N] float32: real parts of the N / 2 modes, then their imaginary parts


@system(
    "s4", kind="mixer", paper="arXiv:2111.00396", year=2021, name="S4", aliases=("s4-s4d",), example={"order": 8}, state="D N",
    parity="Cauchy kernel against matrix powers; scipy.signal.cont2discrete; HiPPO-LegS by its dense bilinear recurrence",
    claim="sequential MNIST above 99% with 4 layers of 128; Path-X 88-96%",
)  # fmt: skip
class S4(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is N numbers a feature.

        s' = (diag(lam) - p p*) s + B u, by the bilinear rule at one dt a feature        o = 2 Re C s + skip u        y = GLU(W_o GELU(o))

    It starts as HiPPO-LegS in its eigenbasis. order: N. dt_min, dt_max: log dt is drawn uniformly between their logs.
    A single token is one O(N) step by the Woodbury identity. kernel="chunk": more tokens go through the dense real N x N form of the same
    step in chunks, from any state and under any span. kernel="cauchy": a call from a fresh start without a span takes its outputs from
    the paper's kernel, all T frequencies at once, and an FFT; the same numbers by the paper's route, about 4 times slower here on a CPU.
    """

    def __init__(
        self, dim: int, order: int = 64, dt_min: float = 1e-3, dt_max: float = 1e-1, kernel: str = "chunk", backend: str = "auto"
    ):
        super().__init__()
        if kernel not in KERNELS:
            raise UsageError(f"kernel is {kernel!r}; it may be {' or '.join(map(repr, KERNELS))}.")
        half = half_order(order)
        self.kernel, self.backend = kernel, backend
        lam, p, b, _ = nplr_legs(order)

        def per_feature(z: Tensor) -> nn.Parameter:
            return nn.Parameter(z.float().expand(dim, *z.shape).clone())

        self.log_dt = no_decay(nn.Parameter(log_steps(dim, dt_min, dt_max)))
        self.A_log, self.A_imag = no_decay(per_feature((-lam.real).log())), no_decay(per_feature(lam.imag))
        self.P, self.B = no_decay(per_feature(torch.view_as_real(p))), no_decay(per_feature(torch.view_as_real(b)))
        self.C = nn.Parameter(complex_randn(dim, half))
        self.skip = nn.Parameter(torch.randn(dim))
        self.out = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, state: S4State | None = None, span: Span | None = None) -> tuple[Tensor, S4State]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        lam = torch.complex(-self.A_log.double().exp(), self.A_imag.double())
        p, b, c = (torch.view_as_complex(z.double()) for z in (self.P, self.B, self.C))
        dt = self.log_dt.double().exp()
        if pick(self.backend, x.shape[1]) == "step":
            o, memory = self._step(lam, p, b, c, dt, x, state, span)
        else:
            read = 2 * torch.cat([c.real, -c.imag], -1)[:, None]  # [D, 1, N]
            o, memory = dense(*dplr_dense(lam, p, b, dt), x, read, state and state.memory, span, self.backend)
            o = o[..., 0]
            if self.kernel == "cauchy" and state is None and span is None and self.backend != "naive":
                kernel = dplr_kernel(lam, p, b, c, dt, x.shape[1])
                o = convolve(x.to(memory.dtype), kernel.to(memory.dtype)).to(x.dtype)
        y = F.glu(self.out(F.gelu(o + self.skip * x)), -1)
        return y, S4State(seen=advance(seen, x.shape[1], span), memory=memory)

    def _step(self, lam, p, b, c, dt, x, state, span) -> tuple[Tensor, Tensor]:
        """One token from the state, in O(N)."""
        dtype = accumulate_dtype(x)
        kind = dtype.to_complex()
        held = lam.new_zeros(len(x), *lam.shape, dtype=kind) if state is None else torch.complex(*state.memory.chunk(2, -1))
        if span is not None and span.reset is not None:
            held = torch.where(span.reset[..., None], 0.0, held)
        new = dplr_step(lam.to(kind), p.to(kind), b.to(kind), dt.to(dtype), held, x[:, 0].to(dtype))
        if span is not None and span.valid is not None:
            new = torch.where(span.valid[..., None], new, held)
        o = 2 * (c.to(kind) * new).sum(-1).real
        return o[:, None].to(x.dtype), torch.cat([new.real, new.imag], -1)
