"""Infini-attention: causal attention within a segment, and a linear-attention matrix of all segments before (arXiv 2404.07143)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, even_heads
from ..ops.backend import accumulate_dtype
from ..state import State
from .attention import rotate
from .parts import no_decay
from .segmented import Part, SegmentMixer

EPS = 1e-10
"""Least denominator of a read: that of an empty matrix, which gives 0."""


class InfiniState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    matrix: Tensor  # [B, H, D, D] float32, A after the last whole segment
    norm: Tensor  # [B, H, D] float32, z
    matrix_next: Tensor  # what the open segment adds to A so far
    norm_next: Tensor  # and to z
    keys: Tensor  # [B, S, H, D] of the open segment, rotated; 0 where no token is yet
    values: Tensor  # [B, S, H, D]


@system(
    "infini-attention",
    kind="segment-memory",
    paper="arXiv:2404.07143",
    year=2024,
    name="Infini-attention",
    example={"segment": 8},
    state="2 H (D^2 + D) + 2 S H D",
    parity="the pure-torch layer of lucidrains/infini-transformer-pytorch, re-derived; softmax and linear attention at the limits",
    claim="Passkeys and pairs two to eight segments back: better than attention within segments, and worse the more was compressed since.",
)
class InfiniAttention(SegmentMixer):
    """x [B, T, dim] -> y [B, T, dim]; a segment's tokens read the matrix that the segments before it wrote.

        o_mem = s(q) A / (s(q) . z)        s(a) = elu(a) + 1, of queries and keys that are not rotated
        o = sigmoid(beta_h) o_mem + (1 - sigmoid(beta_h)) o_dot        o_dot: causal softmax within the segment, with RoPE
        at the segment's end, over its tokens     A <- A + sum s(k) (v - r)^T        z <- z + sum s(k)        A = z = 0 at the start
        r = 0 with rule="linear", s(k) A / (s(k) . z) of the old A with rule="delta"

    o_mem is 0 in the first segment. beta starts at 0 and has no weight decay; replications found that it hardly moves and wants a larger
    learning rate. A and z are float32 and never forget. heads: H. segment: S.
    """

    def __init__(self, dim: int, heads: int = 4, segment: int = 128, rule: str = "linear", theta: float = 10000.0):
        super().__init__()
        even_heads(heads, dim)
        if rule not in ("linear", "delta"):
            raise UsageError(f"rule is {rule!r}; it may be 'linear' or 'delta'.")
        self.heads, self.segment, self.rule, self.theta = heads, segment, rule, theta
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.beta = no_decay(nn.Parameter(torch.zeros(heads)))
        self.out = nn.Linear(dim, dim, bias=False)

    def fresh(self, x: Tensor) -> InfiniState:
        size = x.shape[2] // self.heads
        matrix = x.new_zeros(len(x), self.heads, size, size, dtype=accumulate_dtype(x))
        norm, open = matrix[..., 0], x.new_zeros(len(x), self.segment, self.heads, size)
        seen = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return InfiniState(seen=seen, matrix=matrix, norm=norm, matrix_next=matrix, norm_next=norm, keys=open, values=open)

    def project(self, x: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        qk, v = self.to_qkv(x).unflatten(-1, (3 * self.heads, -1)).split([2 * self.heads, self.heads], 2)
        rotated = rotate(qk, at % self.segment, self.theta, qk.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            features = F.elu(qk.to(accumulate_dtype(x))) + 1
        return *rotated.chunk(2, 2), v, *features.chunk(2, 2)

    def advance(self, parts: tuple[Tensor, ...], state: InfiniState, part: Part) -> tuple[Tensor, InfiniState]:
        q, k, v, sq, sk = parts  # [B, n, H, D]
        keys, values = part.place(state.keys, k), part.place(state.values, v)
        o = part.attend(q, keys, values)
        with torch.autocast(q.device.type, enabled=False):
            recalled = self._read(sq, state)
            gate = self.beta.to(recalled.dtype).sigmoid()[:, None]
            o = gate * recalled + (1 - gate) * o.to(recalled.dtype)
            if part.valid is not None:
                sk = sk * part.valid[..., None, None]
            new = v.to(sk.dtype) - (self._read(sk, state) if self.rule == "delta" else 0)
            matrix = state.matrix_next + torch.einsum("bnhk,bnhv->bhkv", sk, new)
            norm = state.norm_next + sk.sum(1)
        return o.to(q.dtype), state.replace(
            matrix=part.commit(state.matrix + matrix, state.matrix),
            norm=part.commit(state.norm + norm, state.norm),
            matrix_next=part.reopen(matrix),
            norm_next=part.reopen(norm),
            keys=part.reopen(keys),
            values=part.reopen(values),
        )

    @staticmethod
    def _read(features: Tensor, state: InfiniState) -> Tensor:
        """s A / (s . z) for s [B, n, H, D]; 0 while A is."""
        top = torch.einsum("bnhk,bhkv->bnhv", features, state.matrix)
        return top / torch.einsum("bnhk,bhk->bnh", features, state.norm).clamp(min=EPS)[..., None]
