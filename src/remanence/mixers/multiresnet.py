"""MultiresNet: a learned wavelet tree as a memory, fine in the near past and coarse in the far (arXiv 2305.01638)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..ops.lti import dilated
from ..span import Span, advance
from ..state import State
from .base import Mixer


class MultiresNetState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    levels: tuple  # level j's last (k - 1) 2^j inputs, [B, (k - 1) 2^j, D]


def uniform(size: float, *shape: int) -> nn.Parameter:
    """U(-size, size)."""
    return nn.Parameter(torch.empty(*shape).uniform_(-size, size))


@system(
    "multiresnet", kind="mixer", paper="arXiv:2305.01638", year=2023, name="MultiresNet", example={"length": 32},
    state="D (k - 1) (2^J - 1)", parity="the published layer, re-derived with torch's conv1d; the undecimated Haar transform",
    claim="sequential MNIST above 99% with fewer parameters than S4",
)  # fmt: skip
class MultiresNet(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is what the tree's dilated convolutions still see, about `length` tokens.

        a^0 = x        b^j = h1 * a^{j-1}, a^j = h0 * a^{j-1}, causal with dilation 2^{j-1}, j = 1 .. J
        o = sum_j w_j b^j + w_0 a^J + w_res x        y = GLU(W_o GELU(o))

    h0, h1 (width k taps a feature) are shared by the levels; J = ceil(log2((length - 1) / (k - 1) + 1)) is enough to see `length` tokens
    (the paper's "fading" choice of the tree). init: "uniform", or "haar", the wavelet, of width 2.
    """

    def __init__(self, dim: int, width: int = 2, length: int = 1024, init: str = "uniform"):
        super().__init__()
        if width < 2 or length < 2:
            raise UsageError(f"width is {width} and length {length}; each must be at least 2.")
        if init not in ("uniform", "haar"):
            raise UsageError(f"init is {init!r}; it may be 'uniform' or 'haar'.")
        if init == "haar" and width != 2:
            raise UsageError(f"width is {width}; the Haar wavelet has 2 taps.")
        self.depth = math.ceil(math.log2((length - 1) / (width - 1) + 1))
        self.low, self.high = uniform(width**-0.5, dim, width), uniform(width**-0.5, dim, width)
        if init == "haar":
            with torch.no_grad():
                self.low.fill_(0.5**0.5)
                self.high.copy_(torch.tensor([0.5**0.5, -(0.5**0.5)]).expand(dim, -1))
        self.weight = uniform((self.depth + 2) ** -0.5, dim, self.depth + 2)  # a^J, b^J .. b^1, x, as in the published layer
        self.out = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, state: MultiresNetState | None = None, span: Span | None = None) -> tuple[Tensor, MultiresNetState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        low, o, levels = x, x * self.weight[:, -1], []
        for j in range(self.depth):
            (low, high), held = dilated(low, (self.low, self.high), 2**j, state and state.levels[j], span)
            o = torch.addcmul(o, high, self.weight[:, self.depth - j])
            levels.append(held)
        o = torch.addcmul(o, low, self.weight[:, 0])
        y = F.glu(self.out(F.gelu(o)), -1)
        return y, MultiresNetState(seen=advance(seen, x.shape[1], span), levels=tuple(levels))
