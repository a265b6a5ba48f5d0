"""Mixture-of-Memories: several key-value memories, of which a router picks a few for every token (arXiv 2502.13685)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..ops.backend import accumulate_dtype
from ..ops.delta import delta
from ..span import Span, advance, documents
from ..state import State
from .base import Mixer
from .parts import RMSNorm, ShortConv, dt_bias_init, l2_normalize, no_decay


class MoMState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, M (+ 1), H, K, V] float32, the shared one last
    conv: Tensor  # [B, M (+ 1), W - 1, H (2K + V)], the last inputs of each memory's short convolution


@system(
    "mom",
    kind="mixer",
    paper="arXiv:2502.13685",
    year=2025,
    name="Mixture-of-Memories",
    state="(M + 1) (H K V + (W - 1) H (2 K + V))",
    parity="Gated DeltaNet with one memory; every memory run alone on the tokens routed to it, token by token",
    claim="Recalls MQAR with more pairs than one state holds: 4 memories, 2 at a time, beat one state of the active size.",
)
class MoM(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is M (+ 1) Gated DeltaNet memories of H matrices K x V, whatever the length.

        p = softmax(W_r x)      w_m = p_m / (the sum of the topk largest p) for those topk memories, 0 for the others
        S^m_t = a (I - b k k^T) S^m_{t-1} + b k v^T if w_m > 0, else S^m_{t-1}           (k, v, a, b with the memory's own weights)
        o_t = sum_m w_m (S^m_t)^T q_t + (S^shared_t)^T q_t       y = W_o (RMSNorm(o) * SiLU(W_g x))

    Gates, norms and scales are those of `gated-deltanet`; W_q, A_log, dt_bias and the convolution's weights are common to all memories.
    A memory knows the tokens routed to it and no other: its short convolution runs over them, as at inference in the public code, and
    carries its own tail from call to call. (In training that code lets it run on from one memory's tokens into the next one's.)
    Tokens are grouped by memory, so that the cost is that of topk memories if the load is even; `balance_loss` makes it so.

    memories: M. topk: read and written by each token. shared: add a memory that sees every token. heads, key_dim, value_dim: H, K and V,
    as in `gated-deltanet`. The router computes in float32 at least.
    """

    def __init__(
        self,
        dim: int,
        memories: int = 4,
        topk: int = 2,
        shared: bool = True,
        heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv_width: int = 4,
        backend: str = "auto",
    ):
        super().__init__()
        if topk > memories:
            raise UsageError(f"topk is {topk}; it may be 1..{memories}, the number of memories.")
        if key_dim is None and dim % heads:
            raise UsageError(f"heads={heads} does not divide dim={dim}; give key_dim, or heads that do.")
        self.memories, self.topk, self.shared, self.heads, self.backend = memories, topk, shared, heads, backend
        self.key_dim = key_dim or dim // heads
        self.value_dim = value_dim or self.key_dim
        inner_k, inner_v = heads * self.key_dim, heads * self.value_dim
        self.sizes = [inner_k, inner_k, inner_v]
        self.router = nn.Linear(dim, memories, bias=False)
        self.to_q = nn.Linear(dim, inner_k, bias=False)
        self.to_kvba = nn.Parameter(torch.empty(memories + shared, dim, inner_k + inner_v + 2 * heads))  # one matrix per memory
        nn.init.uniform_(self.to_kvba, -(dim**-0.5), dim**-0.5)
        self.conv = ShortConv(sum(self.sizes), conv_width)
        self.A_log = no_decay(nn.Parameter(torch.empty(heads).uniform_(1e-3, 16).log()))
        self.dt_bias = no_decay(nn.Parameter(dt_bias_init(heads)))
        self.to_gate = nn.Linear(dim, inner_v, bias=False)
        self.norm = RMSNorm(self.value_dim)
        self.out = nn.Linear(inner_v, dim, bias=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(probabilities p, weights w that are zero off the topk), both [B, T, M] in float32 at least."""
        dtype = accumulate_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            p = F.linear(x.to(dtype), self.router.weight.to(dtype)).softmax(-1)
        best, which = p.topk(self.topk, -1)
        return p, torch.zeros_like(p).scatter(-1, which, best / best.sum(-1, keepdim=True))

    def balance_loss(self, x: Tensor, span: Span | None = None) -> Tensor:
        """M sum_m f_m P_m: f_m the share of tokens routed to memory m, P_m its mean probability; at its least, topk, when the load is even.

        x [B, T, dim] as the mixer gets it; padding does not count. Add it to the loss with a small weight (public code: 0.01).
        """
        p, w = self.route(x)
        real = torch.ones_like(p[..., 0]) if span is None or span.valid is None else span.valid.to(p.dtype)
        share, probability = (((part * real[..., None]).sum((0, 1)) / real.sum()) for part in ((w > 0).to(p.dtype), p))
        return self.memories * (share * probability).sum()

    def _run(
        self, x: Tensor, q: Tensor, weight: Tensor, memory: Tensor | None, conv: Tensor | None, span: Span | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gated delta memories [R, H, K, V] over rows of tokens x [R, L, dim], q [R, L, H K]; weight [M, dim, E], M dividing R, row r with
        weight[r % M]. Returns o [R, L, H V] and the new memory and tail of the convolution."""
        projected = torch.einsum("bmld,mde->bmle", x.unflatten(0, (-1, len(weight))), weight).flatten(0, 1)
        kv, b, a = projected.split([sum(self.sizes[1:]), self.heads, self.heads], -1)
        qkv, tail = self.conv(torch.cat([q, kv], -1), conv, span)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in F.silu(qkv).split(self.sizes, -1))
        dtype = accumulate_dtype(x)
        log_decay = -self.A_log.to(dtype).exp() * F.softplus(a.to(dtype) + self.dt_bias.to(dtype))
        q, k = l2_normalize(q) * self.key_dim**-0.5, l2_normalize(k)
        o, last = delta(q, k, v, log_decay, b.sigmoid(), memory, span, self.backend)
        return o.flatten(2), last, tail

    def forward(self, x: Tensor, state: MoMState | None = None, span: Span | None = None) -> tuple[Tensor, MoMState]:
        batch, length, _ = x.shape
        M = self.memories
        seen = state.seen if state else torch.zeros(batch, dtype=torch.long, device=x.device)
        q, w = self.to_q(x), self.route(x)[1].mT.flatten(0, 1)  # [B, T, H K], [B M, T]

        # row (b, m) of what follows: the tokens that row b sends to memory m, in order, then as many others as make the rows equally long
        routed = w > 0 if span is None or span.valid is None else (w > 0) & span.valid.repeat_interleave(M, 0)
        longest = max(int(routed.sum(1).max()), 1) if length > 1 else 1
        order = (~routed).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]  # [B M, L]
        valid, w = routed.gather(1, order), w.gather(1, order)
        document = documents(span)
        reset = stale = None
        if document is not None:
            place = document.repeat_interleave(M, 0).gather(1, order) * valid
            reset = valid & (place > F.pad(place, (1, 0))[:, :-1])  # the memory's first token of a document
            stale = place.amax(1) < document[:, -1].repeat_interleave(M)  # it has had none since the last document started
        index = (order + length * torch.arange(batch, device=x.device).repeat_interleave(M)[:, None]).flatten()
        xs, qs = (part.flatten(0, 1).index_select(0, index).unflatten(0, order.shape) for part in (x, q))
        memory, conv = (state.memory[:, :M].flatten(0, 1), state.conv[:, :M].flatten(0, 1)) if state else (None, None)
        o, memory, conv = self._run(xs, qs, self.to_kvba[:M], memory, conv, Span(valid, reset))
        o = o * (w * valid)[..., None].to(o.dtype)
        o = torch.zeros_like(o[0, 0]).expand(batch * length, -1).index_add(0, index, o.flatten(0, 1)).unflatten(0, (batch, length))
        if stale is not None:
            memory, conv = memory.masked_fill(stale[:, None, None, None], 0), conv.masked_fill(stale[:, None, None], 0)
        memory, conv = memory.unflatten(0, (batch, M)), conv.unflatten(0, (batch, M))
        if self.shared:
            before = (state.memory[:, M], state.conv[:, M]) if state else (None, None)
            common, last, tail = self._run(x, q, self.to_kvba[M:], *before, span)
            o, memory, conv = o + common, torch.cat([memory, last[:, None]], 1), torch.cat([conv, tail[:, None]], 1)
        gate = F.silu(self.to_gate(x)).unflatten(-1, (self.heads, -1))
        y = self.out((self.norm(o.unflatten(-1, (self.heads, -1))) * gate).flatten(2))
        return y, MoMState(seen=advance(seen, length, span), memory=memory, conv=conv)
