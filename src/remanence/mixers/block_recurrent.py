"""Block-Recurrent Transformer: a sliding-window layer with a set of state vectors that every block rewrites (arXiv 2203.07852)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, divides
from ..ops.softmax import attend
from ..state import State
from .parts import RMSNorm, l2_normalize, no_decay
from .segmented import Part, SegmentMixer

GATES = ("bias", "lstm")
BUCKETS, FARTHEST = 32, 128
"""Of the relative biases: their number a head, and the distance from which on there is one bias for all."""


class BlockRecurrentState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    slots: Tensor  # [B, N, dim], C of the blocks before
    keys: Tensor  # [B, 2 W, H, D], normalised: the block before, then the open one; 0 where no token is
    values: Tensor  # [B, 2 W, H, D]


def bucket(distance: Tensor) -> Tensor:
    """T5's bucket of a distance >= 0 (arXiv 1910.10683): one each up to BUCKETS / 2, then in equal ratios up to FARTHEST."""
    exact = BUCKETS // 2
    ratio = (distance.clamp(min=1).double() / exact).log() / math.log(FARTHEST / exact)
    far = exact + (ratio * (BUCKETS - exact) + 1e-9).long()
    return torch.where(distance < exact, distance.clamp(min=0), far.clamp(max=BUCKETS - 1))


@system(
    "block-recurrent-transformer",
    kind="segment-memory",
    paper="arXiv:2203.07852",
    year=2022,
    name="Block-Recurrent Transformer",
    aliases=("block-recurrent",),
    example={"segment": 8, "slots": 4},
    state="N dim + 4 W dim, N = slots, W = segment",
    parity="the layer of google-research/meliad, re-derived in a loop over tokens",
    claim="With one such layer a character model is better than a Transformer-XL of twice the window.",
)
class BlockRecurrentTransformer(SegmentMixer):
    """x [B, T, dim] -> y [B, T, dim]; tokens read the state C [N, dim] that the blocks of W tokens before theirs have left.

        y = W_y [attn(q1; k, v) || attn(q2; k_s, v_s)]        q1, q2, k, v = W x        q1_s, q2_s, k_s, v_s = W_s (norm(C) + P)
        at the block's end    a = [attn(q1_s; k_s, v_s) || attn(q2_s; k, v of this block and the one before)]
            gate="bias"       C <- g C + (1 - g) z        g = sigmoid(b)        z = W_z a + b_z
            gate="lstm"       C <- f C + i z        i = sigmoid(W_i a + b_i - 1)        f = sigmoid(W_f a + b_f + 1)

    attn: queries and keys have length 1 and one learned scale |s_h| for each of the four. A token sees the W tokens before it, with T5's
    relative bias, and, as in the published code, not itself: its own value comes by the residual stream. Where that code pads the first
    block with keys of 0, nothing is seen here. The state's update is the paper's best, "skip" (no feed-forward in the recurrence). C
    starts as a learned C_0, P tells its vectors apart: without it they would stay equal. heads: H. segment: W. slots: N.
    """

    def __init__(self, dim: int, heads: int = 4, segment: int = 128, slots: int | None = None, gate: str = "bias"):
        super().__init__()
        divides("heads", heads, "dim", dim)
        if gate not in GATES:
            raise UsageError(f"gate is {gate!r}; it may be {' or '.join(GATES)}.")
        self.heads, self.segment, self.slots = heads, segment, slots or segment
        self.to_qqkv = nn.Linear(dim, 4 * dim, bias=False)
        self.slots_to_qqkv = nn.Linear(dim, 4 * dim, bias=False)
        self.norm = RMSNorm(dim, 1e-6)
        self.initial = nn.Parameter(0.1 * torch.randn(self.slots, dim))
        self.place = nn.Parameter(torch.randn(self.slots, dim))
        self.scale = no_decay(nn.Parameter(torch.ones(4, heads)))  # of q1, q2, q1_s, q2_s
        self.bias = nn.Parameter(torch.randn(heads, BUCKETS) * BUCKETS**-0.5)
        self.candidate = nn.Linear(2 * dim, dim)
        self.gate_bias = nn.Parameter(0.1 * torch.randn(dim if gate == "bias" else 2 * dim))
        self.gate = nn.Linear(2 * dim, 2 * dim, bias=False) if gate == "lstm" else None
        if self.gate is not None:
            nn.init.trunc_normal_(self.gate.weight, std=(0.1 / (2 * dim)) ** 0.5)
        self.out = nn.Linear(2 * dim, dim, bias=False)

    def fresh(self, x: Tensor) -> BlockRecurrentState:
        empty = x.new_zeros(len(x), 2 * self.segment, self.heads, x.shape[2] // self.heads)
        seen = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return BlockRecurrentState(seen=seen, slots=self.initial.to(x.dtype).expand(len(x), -1, -1), keys=empty, values=empty)

    def _queries(self, y: Tensor, scales: Tensor) -> list[Tensor]:
        """q1, q2 [B, T, H, D] of their projection, of length |s_h|."""
        parts = y.unflatten(-1, (2, self.heads, -1)).unbind(2)
        return [l2_normalize(q) * s.abs().to(y.dtype)[:, None] for q, s in zip(parts, scales)]

    def _keys(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """k, of length 1, and v [B, T, H, D] of their projection."""
        k, v = y.unflatten(-1, (2, self.heads, -1)).unbind(2)
        return l2_normalize(k), v

    def project(self, x: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        queries, keys = self.to_qqkv(x).chunk(2, -1)
        return *self._queries(queries, self.scale[:2]), *self._keys(keys)

    def advance(self, parts: tuple[Tensor, ...], state: BlockRecurrentState, part: Part) -> tuple[Tensor, BlockRecurrentState]:
        q1, q2, k, v = parts  # [B, n, H, D]
        W = self.segment
        keys, values = (torch.cat([old[:, :W], part.place(old[:, W:], new)], 1) for old, new in ((state.keys, k), (state.values, v)))
        w_q, w_k = self.slots_to_qqkv.weight.chunk(2)  # the queries of the state wait for the block's end
        normed = self.norm(state.slots) + self.place.to(state.slots.dtype)
        k_s, v_s = self._keys(F.linear(normed, w_k))
        o = torch.cat([self._window(q1, keys, values, part), attend_all(q2, k_s.to(q2.dtype), v_s.to(q2.dtype))], -1)
        slots = state.slots
        if part.any_ends:
            q1_s, q2_s = self._queries(F.linear(normed, w_q), self.scale[2:])
            there = torch.cat([(part.before > 0)[:, None].expand(-1, W), torch.ones_like(keys[:, :W, 0, 0], dtype=torch.bool)], 1)
            a = torch.cat([attend_all(q1_s, k_s, v_s), attend_all(q2_s, keys.to(q2_s.dtype), values.to(q2_s.dtype), there)], -1)
            slots = part.commit(self.rewrite(slots, a.flatten(2)), slots)
            keys, values = (torch.cat([part.commit(y[:, W:], y[:, :W]), part.reopen(y[:, W:])], 1) for y in (keys, values))
        return o, state.replace(slots=slots, keys=keys, values=values)

    def _window(self, q: Tensor, keys: Tensor, values: Tensor, part: Part) -> Tensor:
        """attn(q1; k, v): over the W tokens before each one; 0 where there are none."""
        place = torch.arange(2 * self.segment, device=q.device)
        distance = self.segment + part.slots(q.device)[..., None] - place  # [1 or B, n, 2 W]
        there = (place >= self.segment) | (part.before > 0)[:, None]
        mask = (distance > 0) & (distance <= self.segment) & there[:, None]
        any_key = mask.any(-1, keepdim=True)
        bias = self.bias[:, bucket(distance)].transpose(0, 1).to(q.dtype)  # [1 or B, H, n, 2 W]
        bias = torch.where((mask | ~any_key)[:, None], bias, -torch.inf)
        q, keys, values = (y.transpose(1, 2) for y in (q, keys, values))
        o = F.scaled_dot_product_attention(q, keys, values, bias, scale=1.0).transpose(1, 2)
        return o * any_key[..., None].to(o.dtype)

    def rewrite(self, slots: Tensor, a: Tensor) -> Tensor:
        """The next C of C [B, N, dim] and what its vectors attended to, a [B, N, 2 dim]."""
        z = self.candidate(a)
        if self.gate is None:
            keep = self.gate_bias.sigmoid()
            return (keep * slots + (1 - keep) * z).to(slots.dtype)
        i, f = (self.gate(a) + self.gate_bias).chunk(2, -1)
        return ((f + 1).sigmoid() * slots + (i - 1).sigmoid() * z).to(slots.dtype)


def attend_all(q: Tensor, k: Tensor, v: Tensor, there: Tensor | None = None) -> Tensor:
    """Softmax attention of every query to every key that is there [B, Tk], scores as they are."""
    mask = torch.ones(1, 1, k.shape[1], dtype=torch.bool, device=q.device) if there is None else there[:, None]
    return attend(q, k, v, mask.expand(len(q), q.shape[1], -1), 1.0)
