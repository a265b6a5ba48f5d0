"""FANformer: attention whose queries, keys and values read the input through sines and cosines too (arXiv 2502.21309)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..span import Span
from .attention import Attention, AttentionState


@system(
    "fanformer",
    kind="mixer",
    paper="arXiv:2502.21309",
    year=2025,
    name="FANformer (attention on Fourier features)",
    state="2 G D a token, at most `window` of them",
    parity="attention, where period is 0 and W_g the identity",
    claim="On modular addition and periodic regression it extrapolates better than attention.",
)
class FANformer(Attention):
    """x [B, T, dim] -> y [B, T, dim]; Attention over FAN'(x) = [cos(W_p x + b_p), sin(W_p x + b_p), W_g x + b_g], dim numbers in all.

    period: the share of dim that the cosines have, and the sines as much again: 0.25 in the paper, 0.125 by default in the released code
    (YihongDong/FANformer), which also has the bias b_p that the paper's formula leaves out. The other hyper-parameters are Attention's.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        period: float = 0.25,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        sinks: int | None = None,
        rope: float = 1.0,
        theta: float = 10000.0,
    ):
        super().__init__(dim, heads, kv_heads, head_dim, window, sinks, rope, theta)
        if not 0 <= period <= 0.5:
            raise UsageError(f"period is {period}; it must be in 0..0.5, the share of dim={dim} that each of sine and cosine has.")
        self.waves = int(dim * period)
        self.to_features = nn.Linear(dim, dim - self.waves)

    def forward(self, x: Tensor, state: AttentionState | None = None, span: Span | None = None) -> tuple[Tensor, AttentionState]:
        wave, line = self.to_features(x).tensor_split((self.waves,), -1)
        return super().forward(torch.cat([wave.cos(), wave.sin(), line], -1), state, span)
