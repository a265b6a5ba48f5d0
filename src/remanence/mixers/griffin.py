"""Griffin's recurrent block: the real-gated linear recurrent unit (RG-LRU) between two branches (arXiv 2402.19427)."""

from __future__ import annotations

from typing import Any

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
from .parts import ShortConv, no_decay

C = 8.0
"""The constant c of a = exp(-c r softplus(Lambda))."""
MAX_SLOPE = 1000.0
"""Largest derivative of the square root of 1 - a^2, which has none at a = 1."""


class GriffinState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    hidden: Tensor  # [B, R] float32
    conv: Tensor  # [B, W - 1, R], the last inputs of the short convolution


class BoundedSqrt(torch.autograd.Function):
    """sqrt(x), whose derivative 1 / (2 sqrt(x)) is at most MAX_SLOPE."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        root = x.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return grad / (2 * root).clamp(min=1 / MAX_SLOPE)


def lambda_init(size: int, init: str) -> Tensor:
    """Lambda such that exp(-softplus(Lambda)) is sqrt(u), u ~ U(0.9^2, 0.999^2) ("released"), or u^(1/c), u ~ U(0.9, 0.999) ("paper").

    The released code's channels forget faster: at r = 1 they keep sqrt(u)^8 (0.43 .. 0.99) a token, the paper's 0.9 .. 0.999.
    """
    if init not in ("released", "paper"):
        raise UsageError(f"init is {init!r}; it may be 'released' or 'paper'.")
    if init == "released":
        log_keep = torch.empty(size).uniform_(0.9**2, 0.999**2).log() / 2
    else:
        log_keep = torch.empty(size).uniform_(0.9, 0.999).log() / C
    return torch.expm1(-log_keep).log()


@system(
    "griffin", kind="mixer", paper="arXiv:2402.19427", year=2024, name="Griffin (RG-LRU recurrent block)",
    state="E + (W - 1) E", parity="transformers RecurrentGemmaRecurrentBlock",
    claim="Extrapolates to longer sequences than a Transformer on induction and selective copying",
)  # fmt: skip
class Griffin(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is one vector of R = width numbers and the tail of a convolution.

        u = conv(W_x x)      r, i = sigmoid(BlockDiag(u))      log a = -8 r softplus(Lambda)
        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t)          y = W_o (GELU(W_y x) * h)

    The first token of a document has factor 1 instead of sqrt(1 - a^2). Stacked with a gated-GELU feed-forward this is Hawk; with every
    third layer local attention (`attention` with a window, kv_heads=1, rope=0.5) it is Griffin.
    width: R, default dim as in the released models (the paper: about 4/3 dim). heads: blocks of the gates, dividing R.
    init: of Lambda, "released" or "paper".
    """

    def __init__(
        self,
        dim: int,
        width: int | None = None,
        heads: int = 4,
        conv_width: int = 4,
        init: str = "released",
        backend: str = "auto",
    ):
        super().__init__()
        inner = width or dim
        divides("heads", heads, "width", inner)
        self.heads, self.backend = heads, backend
        self.to_x, self.to_y, self.out = nn.Linear(dim, inner), nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.conv = ShortConv(inner, conv_width, bias=True)
        block = inner // heads
        self.gate_weight = nn.Parameter(torch.randn(heads, block, 2 * block) * (0.01 / block) ** 0.5)  # input gate | recurrence gate
        self.gate_bias = nn.Parameter(torch.zeros(heads, 2 * block))
        self.Lambda = no_decay(nn.Parameter(lambda_init(inner, init)))
        for linear in (self.to_x, self.to_y, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, state: GriffinState | None = None, span: Span | None = None) -> tuple[Tensor, GriffinState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        at = positions(seen, x.shape[1], span)
        dtype = accumulate_dtype(x)
        u, conv = self.conv(self.to_x(x), state and state.conv, span)  # [B, T, R]
        gates = torch.einsum("bthi,hij->bthj", u.unflatten(-1, (self.heads, -1)), self.gate_weight) + self.gate_bias
        i, r = (gate.flatten(2) for gate in gates.to(dtype).sigmoid().chunk(2, -1))
        log_a = -C * r * F.softplus(self.Lambda.to(dtype))  # [B, T, R], <= 0
        factor = BoundedSqrt.apply(-torch.expm1(2 * log_a))  # 1 - a^2 without the cancellation
        factor = torch.where(at[..., None] == 0, 1.0, factor)
        h, hidden = scan(log_a, factor * i * u, state and state.hidden, span, self.backend)
        y = self.out(F.gelu(self.to_y(x), approximate="tanh") * h.to(u.dtype))
        return y, GriffinState(seen=at[:, -1] + 1, hidden=hidden, conv=conv)
