"""Mamba: a state-space layer that chooses, token by token, what to keep (S6, arXiv 2312.00752)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..ops.backend import accumulate_dtype
from ..ops.selective import selective
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .parts import ShortConv, dt_bias_init, no_decay


class MambaState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, E, N] float32
    conv: Tensor  # [B, W - 1, E], the last inputs of the short convolution


class SelectiveMixer(Mixer):
    """What the mixers over the selective state share: two branches, a short convolution, and a read r, B, C of every token.

        [x, z] = W_in u      x = SiLU(conv(x))      [r, B, C] = W_x x      o = recur(x, W_dt r + b, B, C) + D x      y = W_out (o * SiLU(z))

    E = expand dim is the inner width, N = state_size, R = dt_rank (default ceil(dim / 16)) the width of r.
    """

    def __init__(self, dim: int, expand: int, state_size: int, dt_rank: int | None, conv_width: int, backend: str):
        super().__init__()
        inner, rank = expand * dim, dt_rank or -(-dim // 16)
        self.sizes, self.backend = [rank, state_size, state_size], backend
        self.to_xz = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = ShortConv(inner, conv_width, bias=True)
        self.to_rbc = nn.Linear(inner, sum(self.sizes), bias=False)
        self.to_dt = nn.Linear(rank, inner)  # torch's own start, U(-R^-0.5, R^-0.5), is the published one
        no_decay(self.to_dt.bias)
        self.D = no_decay(nn.Parameter(torch.ones(inner)))
        self.out = nn.Linear(inner, dim, bias=False)

    def recur(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, span: Span | None) -> tuple[Tensor, Tensor]:
        """What the state gives, [B, T, E], and the last state [B, E, N]; x, dt [B, T, E] in float32 at least, B, C [B, T, N]."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: MambaState | None = None, span: Span | None = None) -> tuple[Tensor, MambaState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        u, z = self.to_xz(x).chunk(2, -1)  # [B, T, E]
        u, conv = self.conv(u, state and state.conv, span)
        u = F.silu(u)
        r, B, C = self.to_rbc(u).split(self.sizes, -1)
        full = accumulate_dtype(x)
        dt = F.linear(r, self.to_dt.weight).to(full) + self.to_dt.bias.to(full)
        y, memory = self.recur(u.to(full), dt, B, C, state and state.memory, span)
        y = self.out(torch.addcmul(y, u, self.D).to(u.dtype) * F.silu(z))
        return y, MambaState(seen=advance(seen, x.shape[1], span), memory=memory, conv=conv)


@system(
    "mamba",
    kind="mixer",
    paper="arXiv:2312.00752",
    year=2023,
    name="Mamba (S6)",
    state="E N + 3 E",
    parity="transformers MambaMixer (slow path); selective_scan_ref, re-derived",
    claim="Selective copying (16 tokens among 4096): above 97%, where time-invariant state spaces stay at 18-57%.",
)
class Mamba(SelectiveMixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is E vectors of N numbers, whatever the length.

        h_t[e, n] = exp(dt_t[e] A[e, n]) h_{t-1}[e, n] + dt_t[e] x_t[e] B_t[n]        o_t[e] = sum_n C_t[n] h_t[e, n] + D[e] x_t[e]
        [x, z] = W_in u    x = SiLU(conv(x))    [r, B, C] = W_x x    dt = softplus(W_dt r + b)    A = -exp(A_log)    y = W_out (o * SiLU(z))

    E = expand dim is the inner width, N = state_size, R = dt_rank (default ceil(dim / 16)) the width of r. A_log starts at log 1 .. log N.
    The input is discretised by Euler's rule (dt B), as in the authors' code; the paper's text has zero-order hold there. The weights are
    laid out as in that code and transformers' MambaMixer.
    """

    def __init__(
        self, dim: int, expand: int = 2, state_size: int = 16, dt_rank: int | None = None, conv_width: int = 4, backend: str = "auto"
    ):
        super().__init__(dim, expand, state_size, dt_rank, conv_width, backend)
        with torch.no_grad():
            self.to_dt.bias.copy_(dt_bias_init(expand * dim))
        self.A_log = no_decay(nn.Parameter(torch.arange(1, state_size + 1).float().log().repeat(expand * dim, 1)))

    def recur(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, span: Span | None) -> tuple[Tensor, Tensor]:
        dt = F.softplus(dt)
        return selective(dt, -self.A_log.to(dt.dtype).exp(), dt * x, B, C, initial, span, "exp", self.backend)
