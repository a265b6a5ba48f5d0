"""Differential Mamba: two Mamba-2 mixers, one subtracted from the other so that their common noise cancels (arXiv 2507.06204)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..catalog import system
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .mamba2 import Mamba2, Mamba2State
from .parts import RMSNorm


class DiffMambaState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    first: Mamba2State
    second: Mamba2State


@system(
    "diff-mamba",
    kind="mixer",
    paper="arXiv:2507.06204",
    year=2025,
    name="Differential Mamba",
    example={"head_dim": 8, "state_size": 8},
    state="2 (E N + 3 (E + 2 N)), E = expand dim",
    parity="two transformers Mamba2Mixer, subtracted and normalised; lambda = 0 is RMSNorm(Mamba-2)",
    claim="Language modelling slightly below Mamba's perplexity at equal size, and better retrieval (BABILong, needles).",
)
class DiffMamba(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is that of two Mamba-2 mixers.

        y = (1 - l0) RMSNorm(m1(x) - lambda m2(x))      lambda = sigmoid(sum_i lambda_q[i]) + l0      l0 = 0.8 - 0.6 exp(-0.3 (layer - 1))

    m1, m2 have half of Mamba-2's inner width (expand 1), which keeps the number of parameters; head_dim defaults to 64 or expand dim if
    that is less. layer counts from 1. The norm after the difference is essential. lambda_q starts at N(0, 0.02^2): the authors' code starts
    it at N(0, 1), and a sum of dim of those puts the sigmoid where it has no gradient.
    """

    def __init__(
        self,
        dim: int,
        expand: int = 1,
        head_dim: int | None = None,
        state_size: int = 64,
        groups: int = 1,
        conv_width: int = 4,
        layer: int = 1,
        backend: str = "auto",
    ):
        super().__init__()
        head_dim = head_dim or min(64, expand * dim)
        self.first, self.second = (Mamba2(dim, expand, head_dim, state_size, groups, conv_width, backend) for _ in range(2))
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))
        self.lambda_q = nn.Parameter(0.02 * torch.randn(dim))
        self.norm = RMSNorm(dim)

    def forward(self, x: Tensor, state: DiffMambaState | None = None, span: Span | None = None) -> tuple[Tensor, DiffMambaState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        a, first = self.first(x, state and state.first, span)
        b, second = self.second(x, state and state.second, span)
        scale = self.lambda_q.sum().sigmoid() + self.lambda_init
        y = self.norm(a - scale * b) * (1 - self.lambda_init)
        return y, DiffMambaState(seen=advance(seen, x.shape[1], span), first=first, second=second)
