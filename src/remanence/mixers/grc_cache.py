"""Gated recurrent cache: attention within a segment mixed with attention to a small cache that a gate rewrites (arXiv 2312.12742)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, even_heads
from ..ops.softmax import attend
from ..state import State
from .attention import rotate
from .segmented import Part, SegmentMixer


class GRCState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    cache: Tensor  # [B, M, C], after the last whole segment
    keys: Tensor  # [B, S, H, D] of the open segment; 0 where no token is yet
    values: Tensor  # [B, S, H, D]
    inputs: Tensor  # [B, S, C], the channels of the open segment's inputs that will be cached


@system(
    "grc-cache",
    kind="segment-memory",
    paper="arXiv:2312.12742",
    year=2023,
    name="Gated recurrent cache",
    aliases=("cached-transformer",),
    example={"segment": 8, "slots": 4},
    state="M C + S (2 dim + C), M = slots, C = ratio dim",
    parity="the update of annosubmission/GRC-Cache, re-derived in a loop; attention within segments at lambda = -inf",
    claim="On short ListOps it is above the same attention without a cache, and emptying the cache shows how much is memory.",
)
class GRCCache(SegmentMixer):
    """x [B, T, dim] -> y [B, T, dim]; a segment's tokens read the cache that the segments before it made.

        o_h = sigmoid(lambda_h) [o_mem | 0] + (1 - sigmoid(lambda_h)) o_self
        o_self: causal attention within the segment, with RoPE        o_mem: attention of x[:C] to the cache C_t, C / H numbers a head
        at the segment's end    x' = x[:C] of the whole segment, resampled to M tokens (the nearest, as the code has it)
            r, u = sigmoid(W [C_t, x'])        c = LN(GELU(W_c [r C_t, x']))        C_{t+1} = (1 - u) C_t + u c        C_0 = 0

    The published layer is bidirectional and for images, so it reads the cache after the update and averages it over the batch; a causal
    one may read only what the segments before have left, and each row has its own. x' is of the layer's input, as in the paper; the
    published code takes the output of its attention. lambda starts at -1. heads: H. segment: S. slots: M <= S. ratio: C / dim.
    """

    def __init__(self, dim: int, heads: int = 4, segment: int = 128, slots: int | None = None, ratio: float = 0.5, theta: float = 10000.0):
        super().__init__()
        even_heads(heads, dim)
        width = int(dim * ratio)
        if not 0 < ratio <= 1 or width % heads or not width:
            raise UsageError(f"ratio={ratio} of dim={dim} is {width} channels; they must be a multiple of heads={heads}, at most dim.")
        self.slots = segment if slots is None else slots
        if self.slots > segment:
            raise UsageError(f"slots={slots} and segment={segment}; a segment is resampled to at most as many tokens as it has.")
        self.heads, self.segment, self.width, self.theta = heads, segment, width, theta
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_q, self.to_kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.gates, self.candidate = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.lam = nn.Parameter(torch.full((heads,), -1.0))
        self.out = nn.Linear(dim, dim, bias=False)

    def fresh(self, x: Tensor) -> GRCState:
        open = x.new_zeros(len(x), self.segment, self.heads, x.shape[2] // self.heads)
        inputs = x.new_zeros(len(x), self.segment, self.width)
        seen = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return GRCState(seen=seen, cache=inputs[:, : self.slots], keys=open, values=open, inputs=inputs)

    def project(self, x: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        qk, v = self.to_qkv(x).unflatten(-1, (3 * self.heads, -1)).split([2 * self.heads, self.heads], 2)
        q, k = rotate(qk, at % self.segment, self.theta, qk.shape[-1]).chunk(2, 2)
        some = x[..., : self.width]
        return q, k, v, self.to_q(some).unflatten(-1, (self.heads, -1)), some

    def advance(self, parts: tuple[Tensor, ...], state: GRCState, part: Part) -> tuple[Tensor, GRCState]:
        q, k, v, q_mem, x = parts
        keys, values, inputs = part.place(state.keys, k), part.place(state.values, v), part.place(state.inputs, x)
        o = part.attend(q, keys, values)  # [B, n, H, D]
        k_mem, v_mem = self.to_kv(state.cache).to(q_mem.dtype).unflatten(-1, (2, self.heads, -1)).unbind(2)
        no_mask = torch.ones(1, 1, self.slots, dtype=torch.bool, device=x.device)
        o_mem = attend(q_mem, k_mem, v_mem, no_mask, q_mem.shape[-1] ** -0.5)
        gate = self.lam.sigmoid().to(o.dtype)[:, None]
        o = gate * F.pad(o_mem, (0, o.shape[-1] - o_mem.shape[-1])) + (1 - gate) * o
        cache = part.commit(self.update(state.cache, inputs), state.cache) if part.any_ends else state.cache
        return o, state.replace(cache=cache, keys=part.reopen(keys), values=part.reopen(values), inputs=part.reopen(inputs))

    def update(self, cache: Tensor, inputs: Tensor) -> Tensor:
        """C_{t+1} [B, M, C] of C_t and a segment's inputs [B, S, C]."""
        nearest = torch.arange(self.slots, device=inputs.device) * self.segment // self.slots
        x = inputs[:, nearest].to(cache.dtype)
        reset, new = self.gates(torch.cat([cache, x], -1)).sigmoid().chunk(2, -1)
        candidate = self.norm(F.gelu(self.candidate(torch.cat([reset * cache, x], -1))))
        return ((1 - new) * cache + new * candidate).to(cache.dtype)
