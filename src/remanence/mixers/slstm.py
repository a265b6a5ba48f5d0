"""sLSTM: an LSTM with an exponential input gate, a normaliser and heads; the block of xLSTM around it (arXiv 2405.04517)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, divides
from ..ops.cell import cell
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .parts import ShortConv


class SLSTMState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    cell: tuple  # y, c, n and the stabiliser m, each [B, H, D] float32
    conv: Tensor  # [B, W - 1, dim], the last inputs of the short convolution


def forget_bias(size: int, layer: int, layers: int) -> Tensor:
    """5 - 12 u^(0.3 + 1.3 depth), u over a head's units and depth both in [0, 1]: some units remember, in upper layers more of them."""
    depth = (layer - 1) / max(layers - 1, 1)
    u = torch.arange(size) / max(size - 1, 1)
    return 5.0 - 12.0 * u ** (0.3 + 1.3 * depth)


@system(
    "slstm",
    kind="mixer",
    paper="arXiv:2405.04517",
    year=2024,
    name="sLSTM (xLSTM)",
    aliases=("slstm-xlstm",),
    state="4 D + 3 D",
    parity="the layer of NX-AI/xlstm, its vanilla cell",
    claim="Parity, trained on lengths 3 to 40 and tested up to 256: near 100%, where mLSTM and Mamba are at chance.",
)
class SLSTM(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the sLSTM layer of xLSTM. The block's norm, residual and feed-forward are the Decoder's.

        u = silu(conv(x))     i, f = W_i u, W_f u     z, o = W_z x, W_o x     each W one block per head
        y = GroupNorm(sLSTM(i, f, z, o + y_{t-1} R + b))      one group per head

    The cell is `slstm` of ops/cell/step.py, with log sigmoid(f) as the log of the forget gate, as released (the paper's alternative is
    f itself). layer, layers: where the layer stands, for the initial forget bias. conv_width=None: no convolution. As in the released
    code there is no projection after the norm and R starts at zero; train it at a lower rate than an mLSTM.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        conv_width: int | None = 4,
        layer: int = 1,
        layers: int = 1,
        eps: float = 1e-5,
        backend: str = "auto",
    ):
        super().__init__()
        divides("heads", heads, "dim", dim)
        if layer > layers:
            raise UsageError(f"layer is {layer}; it must be at most layers={layers}.")
        self.heads, self.backend, size = heads, backend, dim // heads
        self.conv = ShortConv(dim, conv_width, bias=True) if conv_width else None
        self.to_gates = nn.Parameter(torch.randn(heads, size, 4, size) * (2 / (5 * dim)) ** 0.5)  # i, f, z, o
        self.recurrent = nn.Parameter(torch.zeros(heads, size, 4, size))
        bias = torch.zeros(heads, 4, size)
        bias[:, 1] = forget_bias(size, layer, layers)
        self.bias = nn.Parameter(bias)
        self.norm = nn.GroupNorm(heads, dim, eps)
        self.norm.register_parameter("bias", None)

    def forward(self, x: Tensor, state: SLSTMState | None = None, span: Span | None = None) -> tuple[Tensor, SLSTMState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        u, conv = x, x.new_zeros(len(x), 0, x.shape[2])
        if self.conv is not None:
            u, conv = self.conv(x, state and state.conv, span)
            u = F.silu(u)
        i_and_f, z_and_o = (
            torch.einsum("bthi,higj->bthgj", inputs.unflatten(-1, (self.heads, -1)), weight)
            for inputs, weight in ((u, self.to_gates[:, :, :2]), (x, self.to_gates[:, :, 2:]))
        )
        wx = torch.cat([i_and_f, z_and_o], 3) + self.bias  # [B, T, H, 4, D]
        y, held = cell("slstm", wx, self.recurrent, state.cell if state else None, None, span, self.backend)
        y = self.norm(y.flatten(0, 1).flatten(1)).unflatten(0, x.shape[:2])  # one row a token
        return y, SLSTMState(seen=advance(seen, x.shape[1], span), cell=held, conv=conv)
