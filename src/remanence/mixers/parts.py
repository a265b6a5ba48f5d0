"""Small layers that many mixers use: the short convolution with its state, norms, gates and the usual initial values."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.backend import accumulate_dtype
from ..ops.conv import conv
from ..span import Span


class ShortConv(nn.Module):
    """Causal depthwise convolution of [B, T, dim]; its state is the last width - 1 inputs [B, width - 1, dim]."""

    def __init__(self, dim: int, width: int = 4, bias: bool = False):
        super().__init__()
        bound = width**-0.5  # the default of torch's Conv1d for one input channel a group
        self.weight = nn.Parameter(torch.empty(dim, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, before: Tensor | None, span: Span | None) -> tuple[Tensor, Tensor]:
        return conv(x, self.weight, self.bias, before, span)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the mean is taken in float32 at least.

    Written out: torch's own rms_norm is a dozen operations on a CPU, which costs twice the time on long inputs and on single tokens.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(accumulate_dtype(x))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight.to(wide.dtype)).to(x.dtype)


class GatedFFN(nn.Module):
    """(act(x W_gate) * x W_up) W_down: SwiGLU with `silu`, gated GELU with `gelu`."""

    def __init__(self, dim: int, hidden: int, activation: str = "silu"):
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.activation = {"silu": F.silu, "gelu": F.gelu}[activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(self.activation(gate) * up)


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension (eps inside the root, as the published kernels have it)."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def dt_bias_init(size: int, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Tensor:
    """b with softplus(b) log-uniform in [low, high]: the time-step bias of Mamba and of what follows it."""
    dt = torch.exp(torch.rand(size) * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def no_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter that weight decay must not touch (A_log, time-step biases); the optimiser's groups read the mark."""
    parameter.no_weight_decay = True  # type: ignore[attr-defined]
    return parameter
