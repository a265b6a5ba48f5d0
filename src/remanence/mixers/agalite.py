"""AGaLiTe: gated linear attention whose rows and columns each have a decay, exact and approximate (arXiv 2310.15719)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, divides
from ..ops.backend import accumulate_dtype
from ..ops.scan import scan
from ..span import Span, positions
from ..state import State
from .base import Mixer

EPS = 1e-5


class AGaLiTeState(State):
    seen: Tensor  # [B] int64, tokens read in the current document; the tick of the oscillators
    keys: Tensor | None  # [B, R, H, eta D] float32, oscillating; None in the exact form
    values: Tensor  # [B, R, H, D] float32, oscillating; or C [B, H, D, eta D], the exact form
    normalizer: Tensor  # [B, H, eta D] float32, s


@system(
    "agalite",
    kind="rl",
    paper="arXiv:2310.15719",
    year=2023,
    name="AGaLiTe and GaLiTe (ReLiT)",
    aliases=("galite",),
    example={"eta": 2},
    state="R H D (eta + 1) + H eta D, D the width of a head",
    parity="the authors' JAX layer, re-derived as a loop; GaLiTe as the limit of many oscillators",
    claim="Solves the T-maze at corridors of 50-200 where a window-limited GTrXL fails, at less compute and memory.",
)
class AGaLiTe(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is R oscillating keys and values for every head, whatever the length.

        phi(k) = relu(p1) x relu(k)    phi(q) = relu(p2) x relu(q)    G = sigmoid(p3) x sigmoid(gamma)    b = sigmoid(beta)
        s_t = (1 - G) s_{t-1} + G phi(k)        w_i = linspace(-pi, pi, R)        c_i = cos(w_i tick)
        v~_i <- (1 - b) v~_i + c_i b v          k~_i <- (1 - G) k~_i + c_i G phi(k)
        o_t = sum_i v~_i (k~_i . phi(q)) / (2 R s_t . phi(q) + 1e-5)        y = W_o o

    k, q, v, beta, gamma, p1, p2, p3 = W x + b, x the outer product, flattened to eta D = eta dim // heads numbers. heads: H. eta: the
    length of p1, p2, p3. oscillators: R, 1..7 in the paper. The tick is the position in the document plus 2, as the authors' code counts.
    exact=True is GaLiTe: C_t = ((1 - b)(1 - G)^T) * C_{t-1} + (b v)(G phi(k))^T, o_t = C_t phi(q) / (s_t . phi(q) + 1e-5); it scans all
    eta D^2 numbers of every head and keeps them for the backward pass, so it is for small sizes. The oscillators sum to R / 2 times
    this, hence a large R gives a quarter of it. The block around it (GTrXL's gates) is not part of the mixer.
    """

    def __init__(self, dim: int, heads: int = 4, eta: int = 4, oscillators: int = 2, exact: bool = False, backend: str = "auto"):
        super().__init__()
        divides("heads", heads, "dim", dim)
        if not isinstance(exact, bool):
            raise UsageError(f"exact is {exact!r}; it may be True or False.")
        self.heads, self.eta, self.oscillators, self.exact, self.backend = heads, eta, oscillators, exact, backend
        self.head_dim = dim // heads
        self.to_kqvbg = nn.Linear(dim, 5 * dim)
        self.to_p = nn.Linear(dim, 3 * heads * eta)
        self.out = nn.Linear(dim, dim)
        for linear in (self.to_kqvbg, self.to_p, self.out):
            nn.init.orthogonal_(linear.weight, 2**0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, state: AGaLiTeState | None = None, span: Span | None = None) -> tuple[Tensor, AGaLiTeState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        at = positions(seen, x.shape[1], span)
        full = accumulate_dtype(x)
        k, q, v, beta, gamma = self.to_kqvbg(x).to(full).unflatten(-1, (self.heads, 5, -1)).unbind(-2)  # [B, T, H, D]
        p1, p2, p3 = self.to_p(x).to(full).unflatten(-1, (self.heads, 3, -1)).unbind(-2)  # [B, T, H, eta]
        phi_k, phi_q = (_outer(p.relu(), a.relu()) for p, a in ((p1, k), (p2, q)))  # [B, T, H, eta D]
        added = _outer(p3.sigmoid(), gamma.sigmoid()) * phi_k
        # 1 - sigmoid(a) sigmoid(b) = sigmoid(-a) + sigmoid(a) sigmoid(-b): no cancellation, and never 0
        p3, gamma = p3[..., :, None], gamma[..., None, :]
        log_keep = torch.logaddexp(F.logsigmoid(-p3), F.logsigmoid(p3) + F.logsigmoid(-gamma)).flatten(-2)
        log_keep_v, v = F.logsigmoid(-beta), beta.sigmoid() * v

        s, last_s = self._scan(log_keep, added, state and state.normalizer, span)
        norm = (s * phi_q).sum(-1, keepdim=True)  # [B, T, H, 1]
        if self.exact:
            log_a, kv = log_keep_v[..., None] + log_keep[..., None, :], v[..., None] * added[..., None, :]  # [B, T, H, D, eta D]
            C, values = self._scan(log_a, kv, state and state.values, span)
            keys, o = None, (C @ phi_q[..., None])[..., 0] / (norm + EPS)
        else:
            omega = torch.linspace(-math.pi, math.pi, self.oscillators, dtype=torch.float64, device=x.device)
            c = ((at[..., None] + 2) * omega).cos().to(full)[..., None, None]  # [B, T, R, 1, 1]
            k_t, keys = self._scan(log_keep[:, :, None], c * added[:, :, None], state and state.keys, span)
            v_t, values = self._scan(log_keep_v[:, :, None], c * v[:, :, None], state and state.values, span)
            weight = (k_t * phi_q[:, :, None]).sum(-1, keepdim=True)  # [B, T, R, H, 1]
            o = (v_t * weight).sum(2) / (2 * self.oscillators * norm + EPS)
        y = self.out(o.to(x.dtype).flatten(2))
        return y, AGaLiTeState(seen=at[:, -1] + 1, keys=keys, values=values, normalizer=last_s)

    def _scan(self, log_a: Tensor, b: Tensor, initial: Tensor | None, span: Span | None) -> tuple[Tensor, Tensor]:
        """ops.scan over all numbers of b [B, T, ...]; log_a is broadcast to it."""
        h, last = scan(log_a.expand_as(b).flatten(2), b.flatten(2), None if initial is None else initial.flatten(1), span, self.backend)
        return h.view_as(b), last.view_as(b[:, 0])


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """The outer product of the last dimensions, flattened."""
    return (a[..., :, None] * b[..., None, :]).flatten(-2)
