"""Synaptic Resonance: attention whose projections carry a decaying Hebbian trace of what agrees with the context (arXiv 2502.10699)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..ops.backend import accumulate_dtype
from ..ops.outer import outer
from ..ops.scan import scan
from ..span import Span
from ..state import State
from .attention import Attention
from .parts import l2_normalize


class SynapticResonanceState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    attention: State
    mean: Tensor  # [B, dim] float32, the running mean of x
    trace: Tensor  # [B, dim, O] float32, F transposed, its columns not yet scaled


class Projected(nn.Linear):
    """A linear layer whose result has been computed already and stands behind its input."""

    def forward(self, input: Tensor) -> Tensor:
        return input[..., self.in_features :]


@system(
    "synaptic-resonance", kind="mixer", paper="arXiv:2502.10699", year=2025, name="Synaptic Resonance", example={"window": 20},
    state="dim (H D + 2 G D) + dim, and the attention's", parity="the equation in a loop; eta=0 is attention",
    claim="",
)  # fmt: skip
class SynapticResonance(Attention):
    """x [B, T, dim] -> y [B, T, dim]; attention with q, k, v = (W + eta F_t) x_t.

        F_t = lam F_{t-1} + (1 - lam) r_t y_t x_t^T        y_t = W x_t        r_t = cos(x_t, running mean of the x before)

    Our reading throughout, from the abstract. F is a decayed outer-product memory that the token itself reads (ops.outer, one head); r is
    what writes. y and x are taken at norm 1 and row i of F is scaled by |W_i|, so that it never exceeds that of W: to normalise each row
    to |W_i|, F would be needed at every token. The running mean decays by lam too. eta=0 is attention. eta, decay (lam): numbers. The other
    hyper-parameters are attention's; with a window the state is bounded.
    """

    def __init__(
        self,
        dim: int,
        eta: float = 0.1,
        decay: float = 0.95,
        heads: int = 4,
        kv_heads: int | None = None,
        window: int | None = None,
        rope: float = 1.0,
        backend: str = "auto",
    ):
        super().__init__(dim, heads, kv_heads, window=window, rope=rope)
        if not 0 < decay < 1:
            raise UsageError(f"decay is {decay!r}; it must be in (0, 1).")
        if not math.isfinite(eta):
            raise UsageError(f"eta is {eta!r}; it must be a finite number.")
        self.eta, self.decay, self.backend = eta, decay, backend
        self.to_qkv = Projected(dim, sum(self.sizes), bias=False)

    def forward(  # type: ignore[override]
        self, x: Tensor, state: SynapticResonanceState | None = None, span: Span | None = None
    ) -> tuple[Tensor, SynapticResonanceState]:
        dtype, log_decay = accumulate_dtype(x), math.log(self.decay)
        wide = x.to(dtype)
        means, mean = scan(torch.full_like(wide, log_decay), (1 - self.decay) * wide, state and state.mean, span, self.backend)
        first = state.mean if state else torch.zeros_like(mean)
        context = torch.cat([first[:, None], means[:, :-1]], 1)
        if span is not None and span.reset is not None:
            context = context.masked_fill(span.reset[..., None], 0)
        unit = l2_normalize(wide)
        resonance = (unit * l2_normalize(context)).sum(-1, keepdim=True)  # [B, T, 1]
        slow = F.linear(x, self.to_qkv.weight)  # [B, T, O]
        write = (1 - self.decay) * resonance * l2_normalize(slow.to(dtype))
        g = torch.full_like(resonance, log_decay)  # [B, T, 1]
        fast, trace = outer(wide[:, :, None], unit[:, :, None], write[:, :, None], g, state and state.trace[:, None], span, self.backend)
        scale = self.eta * self.to_qkv.weight.to(dtype).norm(dim=1)  # [O]
        qkv = slow + (fast[:, :, 0] * scale).to(x.dtype)
        y, attention = super().forward(torch.cat([x, qkv], -1), state.attention if state else None, span)  # type: ignore[arg-type]
        return y, SynapticResonanceState(seen=attention.seen, attention=attention, mean=mean, trace=trace[:, 0])
