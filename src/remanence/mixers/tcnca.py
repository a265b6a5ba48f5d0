"""TCNCA: MEGA's block with a dilated convolution network in the place of its moving average (arXiv 2312.05605)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..ops.lti import dilated
from ..span import Span, positions
from ..state import State
from .mega import GatedChunkAttention


class TCNCAState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    levels: tuple  # level b's last (K - 1) f^b inputs, [B, (K - 1) f^b, D]
    keys: Tensor  # [B, c, Z] of the open chunk, zero where no token is yet
    values: Tensor  # [B, c, E]


@system(
    "tcnca", kind="mixer", paper="arXiv:2312.05605", year=2023, name="TCNCA", example={"chunk": 8, "width": 3, "growth": 2, "levels": 3},
    state="D (K - 1) (f^L - 1) / (f - 1) + c (Z + E)", parity="a truncated EMA as taps gives MEGA",
    claim="convolution forward faster than MEGA's FFT from 4k tokens on",
)  # fmt: skip
class TCNCA(GatedChunkAttention):
    """x [B, T, dim] -> y [B, T, dim]; the state is what the convolutions still see and the open chunk's keys and values.

        a^0 = x        a^b = SiLU(conv_b(a^{b-1})) + a^{b-1}, b < L        move(x) = SiLU(conv_L(a^{L-1}) + omega x)

    conv_b: causal, one filter a feature, K = `width` taps with gaps of growth^{b-1}, weights s v / |v|; `levels` L of them see
    1 + (K - 1) (f^L - 1) / (f - 1) tokens. The attention half and its hyper-parameters are MEGA's. Sizes, and where the residual and
    the activations of the network stand, are our reading; the last level is linear so that one level can be MEGA's EMA, cut off.
    """

    def __init__(
        self,
        dim: int,
        levels: int = 4,
        width: int = 5,
        growth: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        chunk: int = 128,
        attention: str = "softmax",
    ):
        super().__init__()
        if width < 2:
            raise UsageError(f"width is {width}; a convolution along time needs at least 2 taps.")
        self.growth = growth
        self.direction = nn.Parameter(torch.randn(levels, dim, width))
        self.scale = nn.Parameter(torch.ones(levels, dim, 1))
        self.omega = nn.Parameter(torch.randn(dim))
        self.build(dim, key_dim, value_dim, chunk, attention)

    def move(self, x: Tensor, moved: tuple[Tensor, ...] | None, span: Span | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        weight, a, new = self.scale * F.normalize(self.direction, dim=-1), x, []
        for level, taps in enumerate(weight):
            (y,), held = dilated(a, (taps,), self.growth**level, None if moved is None else moved[level], span)
            a = y if level + 1 == len(weight) else F.silu(y) + a
            new.append(held)
        return F.silu(a + self.omega * x), tuple(new)

    def forward(self, x: Tensor, state: TCNCAState | None = None, span: Span | None = None) -> tuple[Tensor, TCNCAState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        at = positions(seen, x.shape[1], span)
        carried = None if state is None else (state.keys, state.values)
        y, levels, (keys, values) = self.mix(x, state and state.levels, at, carried, span)
        return y, TCNCAState(seen=at[:, -1] + 1, levels=levels, keys=keys, values=values)
