"""Linear controlled differential equations: a selective state-space model whose transitions need not commute (arXiv 2402.19047)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..ops.backend import accumulate_dtype, pick
from ..ops.scan import scan
from ..span import Span, advance
from ..state import State
from .base import Mixer


class LinearCDEState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    hidden: Tensor  # [B, N] float32


def sequential(m: Tensor, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """z_t = m_t z_{t-1} + u_t, one token at a time: m [B, T, N, N], u [B, T, N], z [B, N] -> z_1 .. z_T [B, T, N] and the last, [B, N]."""
    outputs = []
    for t in range(u.shape[1]):
        z = (m[:, t] @ z[..., None])[..., 0] + u[:, t]
        outputs.append(z)
    return torch.stack(outputs, 1), z


def two_levels(m: Tensor, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """As `sequential` in about 3 sqrt(T) matrix products, for small N: chunks side by side from zero, then from chunk to chunk, then
    every chunk again from its true start."""
    batch, length, states = u.shape
    size = math.isqrt(length)
    count = length // size
    body = size * count
    m_c = m[:, :body].reshape(batch * count, size, states, states)
    u_c = u[:, :body].reshape(batch * count, size, states)
    sweep = torch.cat([m_c[:, 0], u_c[:, 0, :, None]], -1)  # [B n, N, N + 1]: the product of a chunk's m, and its end from zero
    for t in range(1, size):
        sweep = m_c[:, t] @ sweep
        sweep = torch.cat([sweep[..., :-1], sweep[..., -1:] + u_c[:, t, :, None]], -1)
    sweep = sweep.unflatten(0, (batch, count))
    starts = []
    for n in range(count):
        starts.append(z)
        z = (sweep[:, n, :, :-1] @ z[..., None])[..., 0] + sweep[:, n, :, -1]
    inside, _ = sequential(m_c, u_c, torch.stack(starts, 1).flatten(0, 1))
    inside = inside.reshape(batch, body, states)
    if body == length:
        return inside, inside[:, -1]
    tail, last = sequential(m[:, body:], u[:, body:], inside[:, -1])
    return torch.cat([inside, tail], 1), last


@system(
    "linear-cde",
    kind="interpretability",
    paper="arXiv:2402.19047",
    year=2024,
    name="Linear CDE",
    aliases=("lin-cde",),
    example={"state_size": 8},
    state="N",
    parity="signatures by iterated sums",
    claim="A dense linear CDE of one layer learns the area and volume of a path; a diagonal one does not.",
)
class LinearCDE(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is one vector of N = state_size numbers.

        Z_t = exp(sum_i A_i dw^i_t) Z_{t-1} + B x_t        dw_t = step (W x_t + b)        y = W_o Z        Z_0 learned

    The increments dw of `channels` control paths are linear in the input, b adds time, and A_i [N, N] starts as N(0, 1 / N). With dense
    A_i that do not commute a linear read-out of Z is universal (a signature kernel); structure="diagonal" is a selective diagonal SSM.
    flow="euler": I + sum_i A_i dw^i in place of the exponential (dense only). Nothing bounds the transitions, so the increments must
    be small, as `step` makes them. A dense layer holds a matrix of N x N for every token, so N is meant to be small (<= 32).
    """

    def __init__(
        self,
        dim: int,
        state_size: int = 16,
        channels: int = 4,
        structure: str = "dense",
        flow: str = "exp",
        step: float = 0.1,
        backend: str = "auto",
    ):
        super().__init__()
        if structure not in ("dense", "diagonal"):
            raise UsageError(f"structure is {structure!r}; it may be 'dense' or 'diagonal'.")
        if flow not in ("exp", "euler") or (structure, flow) == ("diagonal", "euler"):
            raise UsageError(f"flow is {flow!r}; it may be 'exp' or, for dense matrices, 'euler'.")
        if not 0 < step <= 10:
            raise UsageError(f"step is {step!r}; it must be above 0 and at most 10.")
        self.structure, self.flow, self.step, self.backend = structure, flow, step, backend
        self.to_path = nn.Linear(dim, channels)
        self.to_input = nn.Linear(dim, state_size, bias=False)
        size = (state_size, state_size) if structure == "dense" else (state_size,)
        self.A = nn.Parameter(torch.randn(channels, *size) * state_size**-0.5)
        self.start = nn.Parameter(torch.randn(state_size))
        self.out = nn.Linear(state_size, dim, bias=False)

    def forward(self, x: Tensor, state: LinearCDEState | None = None, span: Span | None = None) -> tuple[Tensor, LinearCDEState]:
        dtype = accumulate_dtype(x)
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        start = self.start.to(dtype)
        initial = state.hidden.to(dtype) if state else start.expand(len(x), -1)
        path = self.to_path(x).to(dtype) * self.step
        exponent = torch.einsum("btc,c...->bt...", path, self.A.to(dtype))  # [B, T, N, N] or [B, T, N]
        u = self.to_input(x).to(dtype)
        if self.structure == "diagonal":
            if span is not None and span.reset is not None:  # the scan restarts from zero: what the start leaves is an input
                u = u + span.reset[..., None] * exponent.exp() * start
            z, hidden = scan(exponent, u, initial, span, self.backend)
        else:
            z, hidden = self._dense(exponent, u, initial, start, span)
        return self.out(z.to(x.dtype)), LinearCDEState(seen=advance(seen, x.shape[1], span), hidden=hidden)

    def _dense(self, exponent: Tensor, u: Tensor, initial: Tensor, start: Tensor, span: Span | None) -> tuple[Tensor, Tensor]:
        eye = torch.eye(len(start), dtype=u.dtype, device=u.device)
        m = torch.linalg.matrix_exp(exponent) if self.flow == "exp" else eye + exponent
        if span is not None and span.reset is not None:  # nothing of what was before, and the transition of the start as an input
            reset = span.reset[..., None]
            u = u + reset * (m @ start)
            m = m * ~reset[..., None]
        if span is not None and span.valid is not None:
            m = torch.where(span.valid[..., None, None], m, eye)
            u = u * span.valid[..., None]
        return two_levels(m, u, initial) if pick(self.backend, u.shape[1]) == "chunk" else sequential(m, u, initial)
