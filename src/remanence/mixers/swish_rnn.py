"""SwishRNN: a soft running maximum, the simple recurrence of masked language models (arXiv 2205.11588)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import positive
from ..ops.backend import accumulate_dtype
from ..ops.cell.newton import newton
from ..span import Span, advance
from ..state import State
from .base import Mixer


class SwishRNNState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    hidden: Tensor  # [B, E] float32


def swish(c: Tensor, u: Tensor, slope: bool, sharp: Tensor) -> tuple[Tensor, Tensor | None]:
    """c, u [..., 1, D], sharp [2, D] (alpha, beta) -> v sigmoid(alpha v + beta) + u with v = c - u, and its derivative by c if asked."""
    gap, (alpha, beta) = c - u, sharp
    gate = (alpha * gap + beta).sigmoid()
    return gap * gate + u, (gate + gap * alpha * gate * (1 - gate)).unsqueeze(-3) if slope else None


@system(
    "simple-recurrence-mlm",
    kind="mixer",
    paper="arXiv:2205.11588",
    year=2022,
    name="SwishRNN",
    aliases=("swish-rnn",),
    state="E",
    parity="the loop; cummax as alpha goes to infinity",
    claim="Next to a narrower feed-forward in each layer of a BERT it lowers the masked-LM loss at equal parameters.",
)
class SwishRNN(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is one vector of E = inner numbers, elementwise in time.

        c_t = swish(c_{t-1} - u_t) + u_t        u = W_1 x        swish(v) = v sigmoid(alpha v + beta)
        y = W_3 ((c + b_c) sigmoid(W_2 x + b_s))

    alpha and beta are learned per channel; a large alpha makes c the running maximum of u and of the zero it starts from. iterations:
    of Newton's method over all tokens at once; None, the default, is a loop of elementwise steps, whose backward pass is a scan all the
    same (a maximum's kinks take Newton dozens of iterations on long inputs, which a CPU does not win back). Reads from the left only:
    in a bidirectional encoder (models/encoder.py, whose placement of it is our reading) attention gives the other direction.
    inner: default dim.
    """

    def __init__(self, dim: int, inner: int | None = None, iterations: int | None = None, backend: str = "auto"):
        super().__init__()
        size = inner or dim
        positive(inner=size)
        self.iterations, self.backend = iterations, backend
        self.to_inputs = nn.Linear(dim, 2 * size, bias=False)  # u, then the output gate's
        self.sharp = nn.Parameter(torch.stack([torch.ones(size), torch.zeros(size)]))  # alpha, beta
        self.shift = nn.Parameter(torch.zeros(2, size))  # b_c, b_s
        self.out = nn.Linear(size, dim, bias=False)

    def forward(self, x: Tensor, state: SwishRNNState | None = None, span: Span | None = None) -> tuple[Tensor, SwishRNNState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        u, gate = self.to_inputs(x).to(accumulate_dtype(x)).chunk(2, -1)  # [B, T, E]
        f = functools.partial(swish, sharp=self.sharp.to(u.dtype))
        c, last = newton(f, u.unsqueeze(2), state and state.hidden[:, None], span, 1, self.iterations, self.backend)
        b_c, b_s = self.shift
        y = self.out(((c[:, :, 0] + b_c) * (gate + b_s).sigmoid()).to(x.dtype))
        return y, SwishRNNState(seen=advance(seen, x.shape[1], span), hidden=last[:, 0])
