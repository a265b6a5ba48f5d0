"""MCSD: channels that weigh the past by a slope and by a decay, fixed for each of them (arXiv 2406.12230; our reading)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, divides
from ..ops.backend import accumulate_dtype
from ..ops.scan import scan
from ..span import Span, positions
from ..state import State
from .base import Mixer


class MCSDState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    sums: Tensor  # [B, 2 D] float32, the slope section's running sums and the decay section's


@system(
    "mcsd", kind="mixer", paper="arXiv:2406.12230", year=2024, name="MCSD", state="2 D",
    parity="none public; the weights written out, and decay 0",
    claim="throughput and memory flat in the length at decoding",
)  # fmt: skip
class MCSD(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is two running sums a feature.

        slope   s_t = sum_{i<=t} e^{-m (t-i)} v_i / sum_{i<=t} e^{-m (t-i)}        decay   r_t = gamma r_{t-1} + (1 - gamma) v'_t
        y = W_o (SiLU(W_g x) * (u * s + u' * r))        u, v, u', v': linear within each of H channels

    m = 2^(-8 h / H) and gamma = 1 - 2^(-5 - 3 (h - 1) / max(H - 1, 1)) for channel h = 1 .. H, or as given in `slopes` and `decays`.
    Only the abstract's parts are fixed by what is public: exponential slopes (so that the state is O(1)), no queries and keys, and the
    sum of the two sections are our reading. The normaliser of the slope is a function of the position, so it takes no state.
    """

    def __init__(
        self,
        dim: int,
        channels: int = 4,
        slopes: Sequence[float] | None = None,
        decays: Sequence[float] | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        divides("channels", channels, "dim", dim)
        self.channels, self.backend = channels, backend
        h = range(1, channels + 1)
        self.slopes = list(slopes or [2 ** (-8 * n / channels) for n in h])
        self.decays = list(decays or [1 - 2 ** (-5 - 3 * (n - 1) / max(channels - 1, 1)) for n in h])
        if len(self.slopes) != channels or not min(self.slopes) > 0:
            raise UsageError(f"slopes are {self.slopes}; {channels} numbers above 0 are needed, one a channel.")
        if len(self.decays) != channels or not all(0 <= decay < 1 for decay in self.decays):
            raise UsageError(f"decays are {self.decays}; {channels} numbers in 0..1 (1 excluded) are needed, one a channel.")
        width = dim // channels
        self.weight = nn.Parameter(torch.randn(channels, width, 4 * width) * width**-0.5)  # u, v, u', v'
        self.to_gate = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, state: MCSDState | None = None, span: Span | None = None) -> tuple[Tensor, MCSDState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        at, dtype = positions(seen, x.shape[1], span), accumulate_dtype(x)
        mixed = torch.einsum("bthi,hij->bthj", x.unflatten(-1, (self.channels, -1)), self.weight)
        u, v, u_decay, v_decay = (part.flatten(2) for part in mixed.chunk(4, -1))  # [B, T, D]
        slope, gamma = (
            torch.tensor(values, dtype=dtype, device=x.device).repeat_interleave(x.shape[-1] // self.channels)
            for values in (self.slopes, self.decays)
        )
        log_a = torch.cat([-slope, gamma.log()]).expand(*x.shape[:2], -1)
        sums, last = scan(log_a, torch.cat([v, (1 - gamma) * v_decay], -1).to(dtype), state and state.sums, span, self.backend)
        s, r = sums.chunk(2, -1)
        total = torch.expm1(-slope * (at[..., None].clamp(min=0) + 1)) / torch.expm1(-slope)  # sum of the slope's weights
        o = u * (s / total).to(x.dtype) + u_decay * r.to(x.dtype)
        y = self.out(F.silu(self.to_gate(x)) * o)
        return y, MCSDState(seen=at[:, -1] + 1, sums=last)
