"""Based: linear attention whose feature map is the second-order Taylor expansion of the exponential (arXiv 2402.18668)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import divides
from ..ops.backend import accumulate_dtype
from ..ops.outer import outer
from ..span import Span, advance
from ..state import State
from .base import Mixer

EPS = 1e-12
"""Added to the denominator, which is at least half the number of tokens read; it keeps a row that has read nothing from 0 / 0."""


class BasedState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, H, F, D + 1] float32, the sum of phi(k) [v, 1]^T; the last column is the normaliser


def taylor(x: Tensor) -> Tensor:
    """phi with phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(d): [..., d] -> [..., F], F = (d + 1)(d + 2) / 2 (153 for d = 16).

    With u = [1, x / d^(1/4)] these are the products u_i u_j of i <= j, where i = j >= 1 has weight 1 / sqrt 2: the same inner products as
    the paper's map [1, x, x (x) x / sqrt 2] of 1 + d + d^2 entries (273), which lists u_i u_j and u_j u_i both.
    """
    u = F.pad(x * x.shape[-1] ** -0.25, (1, 0), value=1.0)
    rows = [u]
    for i in range(1, u.shape[-1]):
        one = u[..., i : i + 1]
        rows.append(one * torch.cat([one * 0.5**0.5, u[..., i + 1 :]], -1))
    return torch.cat(rows, -1)


@system(
    "based",
    kind="mixer",
    paper="arXiv:2402.18668",
    year=2024,
    name="Based (Taylor linear attention)",
    example={"feature_dim": 6},
    state="H F (D + 1), F = (d + 1)(d + 2) / 2, d = feature_dim, D = dim / H",
    parity="the quadratic 2nd-order Taylor attention, and the map of 1 + d + d^2 features",
    claim="On MQAR it recalls more than Mamba at equal state bytes.",
)
class Based(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is H matrices of F x (D + 1), D = dim // heads, whatever the length.

        o_t = sum_{s <= t} phi(q_t) . phi(k_s) v_s / (sum_{s <= t} phi(q_t) . phi(k_s) + 1e-12)      y = W_o o
        phi(q) . phi(k) = 1 + s + s^2 / 2,  s = q . k / sqrt(d)        (`taylor`)

    heads: H. feature_dim: d, of q and k per head, 16 in the paper. No positions and no decay: the stack (`based-stack`) has them in its
    window and convolution layers. Features and sums are float32 at least. zoology's `forward_mem_save`, a compact map of the same size,
    divides by d where it should by sqrt(d) (it is not the one its layer uses); this one has the inner products of the full map.
    """

    def __init__(self, dim: int, heads: int = 4, feature_dim: int = 16, backend: str = "auto"):
        super().__init__()
        divides("heads", heads, "dim", dim)
        self.heads, self.backend = heads, backend
        self.sizes = [heads * feature_dim, heads * feature_dim, dim]  # q, k, v
        self.to_qkv = nn.Linear(dim, sum(self.sizes), bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, state: BasedState | None = None, span: Span | None = None) -> tuple[Tensor, BasedState]:
        return self.read(x, state and state.seen, state and state.memory, span)

    def read(self, x: Tensor, seen: Tensor | None, memory: Tensor | None, span: Span | None) -> tuple[Tensor, BasedState]:
        """The causal sums, from `memory` [B, H, F, D + 1] on."""
        seen = torch.zeros(len(x), dtype=torch.long, device=x.device) if seen is None else seen
        qkv = self.to_qkv(x)
        qk, v = qkv.to(accumulate_dtype(x)).split([self.sizes[0] + self.sizes[1], self.sizes[2]], -1)
        q, k = taylor(qk.unflatten(-1, (2, self.heads, -1))).unbind(2)  # [B, T, H, F]
        o, memory = outer(q, k, beside_one(v.unflatten(-1, (self.heads, -1))), None, memory, span, self.backend)
        o = (o[..., :-1] / (o[..., -1:] + EPS)).to(qkv.dtype)
        return self.out(o.flatten(2)), BasedState(seen=advance(seen, x.shape[1], span), memory=memory)


def beside_one(v: Tensor) -> Tensor:
    """[..., D] -> [..., D + 1]: the values with a 1 as their last entry, whose sum is the normaliser."""
    return F.pad(v, (0, 1), value=1.0)
