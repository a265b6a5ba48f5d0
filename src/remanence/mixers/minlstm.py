"""minLSTM: an LSTM whose gates read the input only and sum to one, so that all of its steps are one linear scan (arXiv 2410.01201)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..catalog import system
from .mingru import MinRNN


@system(
    "minlstm", kind="mixer", paper="arXiv:2410.01201", year=2024, name="minLSTM",
    state="E", parity="minGRU-pytorch minLSTM", claim="Three layers solve selective copying.",
)  # fmt: skip
class MinLSTM(MinRNN):
    """x [B, T, dim] -> y [B, T, dim]; the state is one vector of E = int(dim * expansion) numbers.

        h_t = f'_t h_{t-1} + i'_t g(W_h x_t)      f' = f / (f + i), i' = i / (f + i)      f = sigmoid(W_f x), i = sigmoid(W_i x)
        y = W_o h, or h where expansion is 1

    form: as of minGRU. With d = log i - log f the two gates are f' = sigmoid(-d) and i' = sigmoid(d): no quotient is taken.
    """

    gates = 2

    def weights(self, f: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        d = F.logsigmoid(i) - F.logsigmoid(f)
        return F.logsigmoid(-d), d.sigmoid()
