"""Cottention: attention by cosine similarity, which without a softmax is a recurrence with a matrix state (arXiv 2409.18747)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import divides
from ..ops.backend import accumulate_dtype
from ..ops.outer import outer
from ..span import Span, positions
from ..state import State
from .attention import rotate
from .base import Mixer
from .parts import no_decay


class CottentionState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, H, D, D] float32, the sum of k^ (v / n^sigmoid(m))^T


@system(
    "cottention",
    kind="mixer",
    paper="arXiv:2409.18747",
    year=2024,
    name="Cottention (cosine attention)",
    state="H D^2, D = dim / H",
    parity="the quadratic form with the released code's normalisation",
    claim="A causal language model's loss is close to that of softmax attention at constant memory.",
)
class Cottention(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is H matrices of D x D, D = dim // heads, whatever the length.

        o_t = sum_{s <= t} (q^_t . k^_s) v_s / s^sigmoid(m)      q^, k^ = L2norm(RoPE(W x))      y = W_o o

    s counts tokens from 1 and m is learned, one number a head, 0.5 at the start. Each VALUE is divided by its own count, as in the
    released code; the paper's text divides each row by t^sigmoid(m), which would be the same in a bidirectional layer and is not here.
    Similarities may be negative. heads: H. rope: fraction of D that is rotated, theta: its base.
    """

    def __init__(self, dim: int, heads: int = 4, rope: float = 1.0, theta: float = 10000.0, backend: str = "auto"):
        super().__init__()
        divides("heads", heads, "dim", dim)
        self.heads, self.theta, self.backend = heads, theta, backend
        self.rope_dims = int(dim // heads * rope) // 2 * 2
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm_power = no_decay(nn.Parameter(torch.full((heads,), 0.5)))
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, state: CottentionState | None = None, span: Span | None = None) -> tuple[Tensor, CottentionState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        at, full = positions(seen, x.shape[1], span), accumulate_dtype(x)
        q, k, v = self.to_qkv(x).to(full).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, T, H, D]
        if self.rope_dims:
            q, k = rotate(q, at, self.theta, self.rope_dims), rotate(k, at, self.theta, self.rope_dims)
        count = (at + 1).clamp(min=1).to(full)[..., None]  # a row of padding has no first token
        v = v * count.pow(-self.norm_power.to(full).sigmoid())[..., None]
        o, memory = outer(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, None, state and state.memory, span, self.backend)
        return self.out(o.to(x.dtype).flatten(2)), CottentionState(seen=at[:, -1] + 1, memory=memory)
