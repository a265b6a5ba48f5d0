"""DeltaNet: a key-value memory that overwrites by the delta rule and never forgets otherwise (arXiv 2406.06484)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, divides
from ..ops.backend import accumulate_dtype
from ..ops.delta import delta
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .parts import RMSNorm, ShortConv, l2_normalize


class DeltaNetState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, H, K, K] float32
    conv: Tensor  # [B, W - 1, 3 dim], the last inputs of the short convolution


def attention_matrix(q: Tensor, k: Tensor, beta: Tensor) -> Tensor:
    """What every token takes of every value, A [B, H, T, T] with o = A v: the delta rule from a fresh start as one attention matrix.

        A = tril(Q K^T) (I + strict_tril(diag(b) K K^T))^-1 diag(b)

    q, k [B, T, H, K] as the rule gets them; beta [B, T, H]. O(T^2) memory: to look at, not to train with. At least float32.
    """
    dtype = accumulate_dtype(q, k, beta)
    q, k, beta = q.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2), beta.to(dtype).transpose(1, 2)  # [B, H, T, K], [B, H, T]
    erased = (beta[..., None] * k) @ k.mT
    return torch.linalg.solve_triangular(erased, (q @ k.mT).tril(), upper=False, left=False, unitriangular=True) * beta[..., None, :]


@system(
    "deltanet",
    kind="mixer",
    paper="arXiv:2406.06484",
    year=2024,
    name="DeltaNet",
    state="D^2 / H + 3 (W - 1) D",
    parity="the recurrence of fla's naive delta rule; an exact key-value table on orthonormal keys",
    claim="Recalls about 100% of MQAR's 64 pairs at T = 512 with 2 layers, where Mamba and GLA of that width fail.",
)
class DeltaNet(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is H matrices of K x K, K = dim // heads, whatever the length.

        S_t = S_{t-1} + b_t k_t (v_t - S_{t-1}^T k_t)^T        o_t = K^-0.5 S_t^T q_t        y = W_o RMSNorm(o)
        q, k = L2norm(SiLU(conv(W x)))        v = SiLU(conv(W_v x))        b = sigmoid(W_b x)

    heads: H. norm: of q and k, "l2" as above (the paper's), or "sum" for phi / sum(phi), phi = elu(conv(W x)) + 1, that of the fast weight
    programmers it grew from (arXiv 2102.11174). negative_eigenvalues: b in (0, 2), which lets it track parity.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        conv_width: int = 4,
        norm: str = "l2",
        negative_eigenvalues: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        divides("heads", heads, "dim", dim)
        if norm not in ("l2", "sum"):
            raise UsageError(f"norm is {norm!r}; it may be 'l2' or 'sum'.")
        self.heads, self.key_dim, self.qk_norm = heads, dim // heads, norm
        self.beta_scale, self.backend = 2.0 if negative_eigenvalues else 1.0, backend
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = ShortConv(3 * dim, conv_width)
        self.to_beta = nn.Linear(dim, heads, bias=False)
        self.norm = RMSNorm(self.key_dim)
        self.out = nn.Linear(dim, dim, bias=False)

    def _normalize(self, x: Tensor) -> Tensor:
        if self.qk_norm == "l2":
            return l2_normalize(F.silu(x))
        phi = F.elu(x) + 1
        return phi / phi.sum(-1, keepdim=True)

    def forward(self, x: Tensor, state: DeltaNetState | None = None, span: Span | None = None) -> tuple[Tensor, DeltaNetState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        qkv, conv = self.conv(self.to_qkv(x), state and state.conv, span)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, T, H, K]
        q, k, v = self._normalize(q) * self.key_dim**-0.5, self._normalize(k), F.silu(v)
        beta = self.to_beta(x).sigmoid() * self.beta_scale  # [B, T, H]
        o, memory = delta(q, k, v, None, beta, state and state.memory, span, self.backend)
        y = self.out(self.norm(o).flatten(2))
        return y, DeltaNetState(seen=advance(seen, x.shape[1], span), memory=memory, conv=conv)
