"""minLSTM: an LSTM whose gates read the input only and sum to one, so that all of its steps are one linear scan (arXiv 2410.01201)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..ops.backend import accumulate_dtype
from ..ops.scan import scan
from ..span import Span, positions
from ..state import State
from .base import Mixer
from .mingru import g, inner_size


class MinLSTMState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    hidden: Tensor  # [B, E] float32


@system("minlstm", kind="mixer", paper="arXiv:2410.01201", year=2024, name="minLSTM")
class MinLSTM(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is one vector of E = int(dim * expansion) numbers.

        h_t = f'_t h_{t-1} + i'_t g(W_h x_t)      f' = f / (f + i), i' = i / (f + i)      f = sigmoid(W_f x), i = sigmoid(W_i x)
        y = W_o h, or h where expansion is 1

    form: as of minGRU. With d = log i - log f the two gates are f' = sigmoid(-d) and i' = sigmoid(d): no quotient is taken.
    """

    def __init__(self, dim: int, expansion: float = 1.5, form: str = "log", backend: str = "auto"):
        super().__init__()
        inner = inner_size(dim, expansion, form)
        self.form, self.backend = form, backend
        self.to_hidden_gates = nn.Linear(dim, 3 * inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=False) if inner != dim else nn.Identity()

    def forward(self, x: Tensor, state: MinLSTMState | None = None, span: Span | None = None) -> tuple[Tensor, MinLSTMState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        u, f, i = self.to_hidden_gates(x).to(accumulate_dtype(x)).chunk(3, -1)  # [B, T, E]
        d = F.logsigmoid(i) - F.logsigmoid(f)
        candidate = g(u) if self.form == "log" else u
        h, hidden = scan(F.logsigmoid(-d), d.sigmoid() * candidate, state and state.hidden, span, self.backend)
        return self.out(h.to(x.dtype)), MinLSTMState(seen=positions(seen, x.shape[1], span)[:, -1] + 1, hidden=hidden)
