"""Longhorn: a state that solves an online regression at every token; writing is what makes it forget (arXiv 2407.14207)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..catalog import system
from ..ops.selective import selective
from ..span import Span
from .mamba import SelectiveMixer


@system(
    "longhorn",
    kind="mixer",
    paper="arXiv:2407.14207",
    year=2024,
    name="Longhorn",
    state="E N + 3 E",
    parity="the authors' step function, re-derived; the delta rule on one-hot keys, where the diagonal form is exact",
    claim="Multi-query associative recall above Mamba's at equal state (N = 16).",
)
class Longhorn(SelectiveMixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is E vectors of N numbers, whatever the length.

        h_t[e, n] = (1 - eps_t[e] k_t[n]^2) h_{t-1}[e, n] + eps_t[e] x_t[e] k_t[n]        o_t[e] = sum_n q_t[n] h_t[e, n] + D[e] x_t[e]
        [x, z] = W_in u    x = SiLU(conv(x))    [r, k, q] = W_x x    b = sigmoid(W_dt r + c)    eps = b / (1 + b |k|^2)

    For one channel, h_t = argmin_h |h - h_{t-1}|^2 + b (h . k_t - x_t)^2 in closed form, with the diagonal of k k^T in its place: exact
    where only one k[n] is not 0. There is no forget gate: forgetting comes with writing. y = W_out (o * SiLU(z)); E, N, R are Mamba's.
    """

    def __init__(
        self, dim: int, expand: int = 2, state_size: int = 16, dt_rank: int | None = None, conv_width: int = 4, backend: str = "auto"
    ):
        super().__init__(dim, expand, state_size, dt_rank, conv_width, backend)
        nn.init.zeros_(self.to_dt.bias)

    def recur(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, span: Span | None) -> tuple[Tensor, Tensor]:
        beta, share = dt.sigmoid(), B.to(dt.dtype).square()  # [B, T, E], [B, T, N]
        rate = beta / torch.addcmul(beta.new_ones(()), beta, share.sum(-1, keepdim=True))
        return selective(rate, share, rate * x, B, C, initial, span, "complement", self.backend)
