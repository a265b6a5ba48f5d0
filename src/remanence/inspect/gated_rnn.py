"""Linear attention inside a gated RNN: the exact weights that make one out of the other (arXiv 2309.01775)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import ShapeError
from ..mixers import Mixer
from ..ops.backend import accumulate_dtype
from ..ops.scan import scan
from ..span import Span, advance
from ..state import State


class GatedRNNState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    hidden: Tensor  # [B, N] float32


@system(
    "gated-rnn-attention",
    kind="interpretability",
    paper="arXiv:2309.01775",
    year=2023,
    name="Gated linear RNN that can be linear attention",
    state="N",
    parity="linear attention",
    claim="The construction equals linear self-attention; trained on in-context regression it reaches the loss of one gradient step.",
)
class GatedRNN(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; a diagonal linear recurrence of N = state_size units between two bilinear gates.

        h_t = l h_{t-1} + (W_m x_t + b_m) * (W_x x_t + b_x)        y_t = W_o ((U_m h_t) * (U_x h_t))        l = sigmoid(decay)

    Both gates multiply what they read, as in the paper; l is one number a unit, whatever the input. products: the width between U and
    W_o, default N. `linear_attention_to_gated_rnn` gives the weights of which y is linear self-attention.
    """

    def __init__(self, dim: int, state_size: int | None = None, products: int | None = None, backend: str = "auto"):
        super().__init__()
        state_size = state_size or 2 * dim
        products = products or state_size
        self.backend = backend
        self.to_input = nn.Linear(dim, 2 * state_size)
        self.decay = nn.Parameter(torch.empty(state_size).uniform_(0, 6))  # l from 0.5 to 0.9975
        self.read = nn.Linear(state_size, 2 * products, bias=False)
        self.out = nn.Linear(products, dim, bias=False)

    def forward(self, x: Tensor, state: GatedRNNState | None = None, span: Span | None = None) -> tuple[Tensor, GatedRNNState]:
        dtype = accumulate_dtype(x)
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        m, gate = self.to_input(x).to(dtype).chunk(2, -1)  # [B, T, N]
        log_decay = F.logsigmoid(self.decay.to(dtype)).expand_as(m)
        h, hidden = scan(log_decay, m * gate, state and state.hidden, span, self.backend)
        m, gate = self.read(h.to(x.dtype)).chunk(2, -1)  # [B, T, P]
        return self.out(m * gate), GatedRNNState(seen=advance(seen, x.shape[1], span), hidden=hidden)


@torch.no_grad()
def linear_attention_to_gated_rnn(w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor | None = None) -> GatedRNN:
    """The gated RNN that computes y_t = W_o sum_{s <= t} (W_v x_s) (W_k x_s . W_q x_t), exactly.

    w_q, w_k [K, dim], w_v [V, dim], w_o [dim, V] (None: the identity, V = dim). V K units with l = 1 integrate the products v_i k_j, which
    the input gate forms; K units with l = 0 hold the current q, times a gate that is constantly 1; the output gate multiplies the sum of
    v_i k_j by q_j, and W_o adds over j. Raises ShapeError unless the shapes fit.
    """
    keys, dim = w_k.shape
    values = len(w_v)
    if w_o is None:
        w_o = torch.eye(values, dtype=w_v.dtype, device=w_v.device)
    if w_q.shape != (keys, dim) or w_v.shape != (values, dim) or w_o.shape != (dim, values):
        shapes = ", ".join(str(list(w.shape)) for w in (w_q, w_k, w_v, w_o))
        raise ShapeError(f"w_q, w_k, w_v, w_o have shapes {shapes}; expected [K, dim], [K, dim], [V, dim], [dim, V].")
    pairs = values * keys
    rnn = GatedRNN(dim, state_size=pairs + keys, products=pairs).to(w_v.dtype).to(w_v.device)
    for parameter in rnn.parameters():
        parameter.zero_()
    m, gate = rnn.to_input.weight.chunk(2)  # views: unit i K + j is v_i k_j, unit V K + j is q_j
    m[:pairs], gate[:pairs] = w_v.repeat_interleave(keys, 0), w_k.repeat(values, 1)
    m[pairs:], rnn.to_input.bias[-keys:] = w_q, 1
    rnn.decay[:pairs], rnn.decay[pairs:] = float("inf"), float("-inf")  # l = 1 and l = 0
    m, gate = rnn.read.weight.chunk(2)  # [V K, V K + K]
    eye = torch.eye(keys, dtype=w_v.dtype, device=w_v.device)
    m[:, :pairs], gate[:, pairs:] = torch.eye(pairs, dtype=w_v.dtype, device=w_v.device), eye.repeat(values, 1)
    rnn.out.weight.copy_(w_o.repeat_interleave(keys, 1))
    return rnn
