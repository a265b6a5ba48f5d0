"""QRNN: gates from a causal convolution, then a linear recurrence (fo-pooling); the layer of a small hybrid (arXiv 2502.00617)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import positive
from ..ops.backend import accumulate_dtype
from ..ops.scan import scan
from ..span import Span, last_inputs, positions
from ..state import State
from .base import Mixer


class QRNNState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    hidden: Tensor  # [B, E] float32
    inputs: Tensor  # [B, W - 1, dim], the last inputs


@system(
    "qrnn-hybrid",
    kind="mixer",
    paper="arXiv:2502.00617",
    year=2025,
    name="QRNN (hybrid RNN-Transformer)",
    aliases=("qrnn",),
    state="E + (W - 1) D",
    parity="the loop of arXiv 1611.01576; at width 1 the linear SRU without its highway",
    claim="With attention in a few layers only, language modelling at fewer than 50M parameters stays competitive.",
)
class QRNN(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; fo-pooling of arXiv 1611.01576, with window W = width.

        z, f, o = tanh(Z), sigmoid(F), sigmoid(O)        [Z F O]_t = b + sum_{j < W} W_j x_{t-j}
        c_t = f_t c_{t-1} + (1 - f_t) z_t                y_t = W_o (o_t c_t)

    The hybrid is a Decoder whose layers are mostly this, with attention in a few ("3 x qrnn-hybrid, 1 x attention": our reading, the
    paper's order of layers is uncertain). inner: E, default dim.
    """

    def __init__(self, dim: int, inner: int | None = None, width: int = 2, backend: str = "auto"):
        super().__init__()
        size = inner or dim
        positive(inner=size)
        self.width, self.backend = width, backend
        self.to_gates = nn.Linear(width * dim, 3 * size)  # newest input first
        self.out = nn.Linear(size, dim, bias=False)

    def forward(self, x: Tensor, state: QRNNState | None = None, span: Span | None = None) -> tuple[Tensor, QRNNState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        at = positions(seen, x.shape[1], span)
        inputs = state.inputs.to(x.dtype) if state else x.new_zeros(len(x), self.width - 1, x.shape[2])
        padded, shifts = torch.cat([inputs, x], 1), [x]
        for j in range(1, self.width):  # x_{t-j}, zero before the document
            shifted = padded[:, self.width - 1 - j : padded.shape[1] - j]
            shifts.append(shifted.masked_fill((at < j)[..., None], 0))
        z, f, o = self.to_gates(torch.cat(shifts, -1)).to(accumulate_dtype(x)).chunk(3, -1)  # [B, T, E]
        c, hidden = scan(F.logsigmoid(f), torch.sigmoid(-f) * z.tanh(), state and state.hidden, span, self.backend)
        y = self.out((o.sigmoid() * c).to(x.dtype))
        return y, QRNNState(seen=at[:, -1] + 1, hidden=hidden, inputs=last_inputs(inputs, x, span))
