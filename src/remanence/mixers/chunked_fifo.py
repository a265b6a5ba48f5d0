"""Chunked attention with a first-in first-out memory of gated chunk summaries, beside full attention (arXiv 2507.00453)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..catalog import system
from ..ops.softmax import DEAD, attend
from ..span import Span, documents, positions
from ..state import State
from .attention import Attention, AttentionState
from .segmented import Part, SegmentMixer, newest


class ChunkedFIFOState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    bank: Tensor  # [B, M, dim], summaries of the chunks before, the newest last
    total: Tensor  # [B, dim], sum of the open chunk's inputs
    keys: Tensor  # [B, S, H, D] of the open chunk; 0 where no token is yet
    values: Tensor  # [B, S, H, D]
    everything: AttentionState | None  # the global branch's cache; None without it


@system(
    "chunked-fifo-rmat",
    kind="segment-memory",
    paper="arXiv:2507.00453",
    year=2025,
    name="Chunked attention with a FIFO memory",
    aliases=("rmat",),
    example={"segment": 8, "slots": 3, "heads": 2},
    state="M dim + dim + 2 S dim, and 2 T dim of the global branch unless it is off; M = slots",
    parity="full attention, and attention within chunks, with the gate on one branch; the memory in a loop",
    claim="Chunks and memory without the global branch come near full attention on copying across chunks.",
)
class ChunkedFIFO(SegmentMixer, Attention):
    """x [B, T, dim] -> y [B, T, dim]; three attentions that share the queries, mixed by a softmax w_h, learned for each head.

        o_h = w_h1 chunk + w_h2 memory + w_h3 full
        full: causal over the document        chunk: causal within the token's chunk of S        memory: over the M slots, 0 if empty
        at the chunk's end    s = mean of its inputs        g = sigmoid(W [s, m_last] + b)        push g s + (1 - g) m_last, drop the oldest

    m_last: the newest slot, 0 if there is none. Our reading: there is no public code; the gate's form, the mix and what a slot holds are
    uncertain. Each head has a rotary base of its own, theta^((h + 1) / H); slots have keys and values of their own, without positions.
    full=False leaves the first branch out, and the state is bounded. heads: H. segment: S. slots: M.
    """

    def __init__(self, dim: int, heads: int = 4, segment: int = 128, slots: int = 16, full: bool = True, theta: float = 10000.0):
        super().__init__(dim, heads)
        self.segment, self.slots, self.full, self.theta = segment, slots, full, theta
        self.slot_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.gate = nn.Linear(2 * dim, dim)
        self.mix = nn.Parameter(torch.zeros(heads, 2 + full))

    def fresh(self, x: Tensor) -> ChunkedFIFOState:
        open = x.new_zeros(len(x), self.segment, self.heads, self.head_dim)
        bank = x.new_zeros(len(x), self.slots, x.shape[2])
        seen = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return ChunkedFIFOState(seen=seen, bank=bank, total=bank[:, 0], keys=open, values=open, everything=None)

    def project(self, x: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        qk, v = self.to_qkv(x).unflatten(-1, (3 * self.heads, -1)).split([2 * self.heads, self.heads], 2)
        heads, half = (torch.arange(size, device=x.device, dtype=torch.float64) for size in (self.heads, self.head_dim // 2))
        base = self.theta ** ((heads + 1) / self.heads)
        angle = at[..., None, None] * base[:, None] ** (-2 * half / self.head_dim)  # [B, T, H, D / 2]
        cos, sin = (y.to(v.dtype).repeat(1, 1, 2, 1) for y in (angle.cos(), angle.sin()))  # the same for queries and keys
        a, b = qk.chunk(2, -1)
        q, k = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).chunk(2, 2)
        return x, q, k, v

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, state: ChunkedFIFOState | None = None, span: Span | None = None
    ) -> tuple[Tensor, ChunkedFIFOState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        at = positions(seen, x.shape[1], span)
        inputs = _, q, k, v = self.project(x, at)
        before = None if state is None else state.everything
        branches, new = self.read(x, inputs, at, state.replace(everything=None) if state else self.fresh(x), span)  # [B, T, 2, H, D]
        if self.full:
            k_at = at if span is None or span.valid is None else torch.where(span.valid, at, DEAD)
            o, cache = self._all(q, k, v, at, k_at, documents(span), before, span, self.head_dim**-0.5)
            branches = torch.cat([branches, o[:, :, None]], 2)
            new = new.replace(everything=AttentionState(seen=at[:, -1] + 1, keys=cache[0], values=cache[1], at=cache[2]))
        o = torch.einsum("btnhd,hn->bthd", branches, self.mix.softmax(-1).to(branches.dtype))
        return self.out(o.flatten(2)), new.replace(seen=at[:, -1] + 1)

    def advance(self, parts: tuple[Tensor, ...], state: ChunkedFIFOState, part: Part) -> tuple[Tensor, ChunkedFIFOState]:
        x, q, k, v = parts
        keys, values = part.place(state.keys, k), part.place(state.values, v)
        chunk = part.attend(q, keys, values)
        k_slot, v_slot = self.slot_kv(state.bank).to(q.dtype).unflatten(-1, (2, self.heads, -1)).unbind(2)
        there = newest(state.bank, part.before // self.segment)[:, None]  # [B, 1, M]
        some = there.any(-1, keepdim=True)
        memory = attend(q, k_slot, v_slot, (there | ~some).expand(-1, part.count, -1), self.head_dim**-0.5) * some[..., None].to(q.dtype)
        total = state.total + (x if part.valid is None else x * part.valid[..., None].to(x.dtype)).sum(1)
        bank = part.commit(self.push(state.bank, total / self.segment), state.bank) if part.any_ends else state.bank
        new = state.replace(bank=bank, total=part.reopen(total), keys=part.reopen(keys), values=part.reopen(values))
        return torch.stack([chunk, memory], 2), new

    def push(self, bank: Tensor, summary: Tensor) -> Tensor:
        """The bank [B, M, dim] after a chunk whose inputs have the mean `summary` [B, dim]."""
        last = bank[:, -1]
        gate = self.gate(torch.cat([summary, last], -1)).sigmoid()
        return torch.cat([bank[:, 1:], (gate * summary + (1 - gate) * last).to(bank.dtype)[:, None]], 1)
