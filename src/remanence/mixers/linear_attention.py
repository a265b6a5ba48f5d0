"""Linear attention: softmax replaced by a feature map, so that attention is a recurrence with a matrix state (arXiv 2006.16236)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, divides
from ..ops.backend import accumulate_dtype
from ..ops.outer import outer
from ..span import Span, advance
from ..state import State
from .base import Mixer


class LinearAttentionState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, H, D, D] float32, the sum of phi(k) v^T
    normalizer: Tensor  # [B, H, D] float32, the sum of phi(k)


@system(
    "linear-attention", kind="mixer", paper="arXiv:2006.16236", year=2020, name="Linear attention",
    state="H K (V + 1)", parity="the equation in a loop",
    claim="Recall is bounded by the size of the state",
)  # fmt: skip
class LinearAttention(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is H matrices of D x D and H vectors, D = dim // heads, whatever the length.

        S_t = S_{t-1} + phi(k_t) v_t^T    z_t = z_{t-1} + phi(k_t)    o_t = S_t^T phi(q_t) / max(phi(q_t) . z_t, 1e-6)    y = W_o o

    heads: H. feature: phi, "elu" (elu(x) + 1, the paper's) or "relu".
    """

    def __init__(self, dim: int, heads: int = 4, feature: str = "elu", backend: str = "auto"):
        super().__init__()
        divides("heads", heads, "dim", dim)
        if feature not in ("elu", "relu"):
            raise UsageError(f"feature is {feature!r}; it may be 'elu' or 'relu'.")
        self.heads, self.feature, self.backend = heads, feature, backend
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def phi(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1 if self.feature == "elu" else F.relu(x)

    def forward(
        self, x: Tensor, state: LinearAttentionState | None = None, span: Span | None = None
    ) -> tuple[Tensor, LinearAttentionState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, T, H, D]
        # z is the sum of phi(k) times the value 1: one more column of the same memory
        v = F.pad(v.to(accumulate_dtype(v)), (0, 1), value=1.0)
        initial = torch.cat([state.memory, state.normalizer[..., None]], -1) if state else None
        o, memory = outer(self.phi(q), self.phi(k), v, None, initial, span, self.backend)
        o = (o[..., :-1] / o[..., -1:].clamp(min=1e-6)).to(x.dtype)
        seen = advance(seen, x.shape[1], span)
        return self.out(o.flatten(2)), LinearAttentionState(seen=seen, memory=memory[..., :-1], normalizer=memory[..., -1])
