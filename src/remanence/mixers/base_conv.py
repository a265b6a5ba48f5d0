"""BaseConv: the gated short convolution of Based, which compares tokens with their neighbours exactly (arXiv 2402.18668)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .parts import ShortConv


class BaseConvState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    conv: Tensor  # [B, W - 1, E], the last inputs of the convolution


@system(
    "base-conv",
    kind="mixer",
    paper="arXiv:2402.18668",
    year=2024,
    name="BaseConv (gated short convolution)",
    state="(W - 1) E, E = expand dim",
    parity="the sum over W shifted inputs, in a loop",
)
class BaseConv(Mixer):
    """x [B, T, dim] -> y [B, T, dim]: y = W_o (SiLU(conv(W_1 x)) * (W_2 x)); the state is the tail of the convolution.

    conv_width: W, 3 as published. expand: E = expand dim inner channels, 2 as in the released models. The SiLU and W_o, which the paper's
    formula (conv(x W_1)) * (x W_2) does not show, are those of the released code (HazyResearch/based, BaseConv).
    """

    def __init__(self, dim: int, conv_width: int = 3, expand: int = 2):
        super().__init__()
        self.to_uv = nn.Linear(dim, 2 * expand * dim)
        self.conv = ShortConv(expand * dim, conv_width)
        self.out = nn.Linear(expand * dim, dim)

    def forward(self, x: Tensor, state: BaseConvState | None = None, span: Span | None = None) -> tuple[Tensor, BaseConvState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        u, v = self.to_uv(x).chunk(2, -1)  # [B, T, E]
        u, conv = self.conv(u, state and state.conv, span)
        return self.out(F.silu(u) * v), BaseConvState(seen=advance(seen, x.shape[1], span), conv=conv)
