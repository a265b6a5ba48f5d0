"""LongMem: a frozen model fills a bank of keys and values, and a small side network learns to read it (arXiv 2306.07174)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, divides, positive
from ..mixers.attention import Attention, rotate
from ..mixers.parts import no_decay
from ..models.base import Model
from ..models.decoder import Block, Decoder, DecoderState
from ..ops.backend import accumulate_dtype
from ..span import Span, advance
from ..state import State
from .log import LogMixer, choose, columns, distances, fetch, joint


class LongMemState(State):
    seen: Tensor  # [B] int64
    base: DecoderState  # the backbone's
    side: tuple  # of each side layer; the memory layer's is a LogState of its own keys and values and of the bank's


class BankAttention(LogMixer):
    """x [B, T, 2 dim], the side layer's input and the bank layer's -> y [B, T, dim]; o = (1 - g_h) o_local + g_h o_mem, then W_o.

    o_local: rotary attention over the last `window` tokens. o_mem: softmax over the tokens of the top / chunk chunks whose mean key fits
    the query best, for each head, among the `memory` tokens before the window; keys and values are the bank layer's, not rotated.
    """

    def __init__(self, dim: int, attention: Attention, window: int, memory: int, chunk: int, top: int):
        super().__init__()
        self.heads, self.theta = attention.heads, attention.theta
        self.window, self.memory, self.chunk, self.top = window, memory, chunk, top
        self.keep, self.unit = window + memory + chunk, chunk
        self.width = dim // 2
        self.bank = copy.deepcopy(attention.to_qkv).requires_grad_(False)  # the bank layer's own, set by LongMem
        self.to_qkv, self.out = copy.deepcopy(attention.to_qkv), copy.deepcopy(attention.out)
        self.gate = no_decay(nn.Parameter(torch.zeros(attention.heads, device=self.out.weight.device, dtype=self.out.weight.dtype)))

    def project(self, x: Tensor, at: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        own, base = x.split(self.width, -1)
        q, k, v = self.to_qkv(own).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, T, H, D]
        _, bank_k, bank_v = self.bank(base).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return (q,), (rotate(k, at, self.theta, k.shape[-1]), v, bank_k, bank_v)

    def attend(self, queries: tuple[Tensor, ...], logs: tuple[Tensor, ...], at: Tensor, first: Tensor) -> Tensor:
        (q,), (keys, values, bank_k, bank_v), dtype = queries, logs, accumulate_dtype(queries[0])
        q = q * q.shape[-1] ** -0.5
        near = columns(at, first, 0, self.window - 1)
        distance = distances(at, first, near)
        score = torch.einsum("bnhd,bjhd->bnhj", rotate(q, at, self.theta, q.shape[-1]), keys[:, near])
        (weight,) = joint([(score, ((distance >= 0) & (distance < self.window))[:, :, None])], dtype)
        o = torch.einsum("bnhj,bjhd->bnhd", weight.to(values.dtype), values[:, near])
        gate = self.gate.to(dtype).sigmoid()[:, None]

        chunks = max(0, int(((at[:, -1] - self.window + 1 - first) // self.chunk).max()))  # those that some query's window has left
        if not chunks:
            return ((1 - gate) * o).to(o.dtype)
        k, v = (log[:, : chunks * self.chunk].unflatten(1, (chunks, self.chunk)) for log in (bank_k, bank_v))
        last = distances(at, first, slice(0, chunks * self.chunk))[..., self.chunk - 1 :: self.chunk]  # how far back a chunk's last is
        can = (last >= self.window) & (last < self.window + self.memory)
        fit = torch.einsum("bnhd,bghd->bhng", q.detach().to(dtype), k.detach().to(dtype).mean(2))
        index, found = choose(fit, can[:, None], self.top // self.chunk)  # [B, n, H, k]
        k, v = (fetch(x.transpose(2, 3), index).flatten(3, 4) for x in (k, v))  # [B, n, H, top, D]
        (weight,) = joint([((q[..., None, :] * k).sum(-1), found.repeat_interleave(self.chunk, 3))], dtype)
        recalled = torch.einsum("bnhk,bnhkd->bnhd", weight.to(v.dtype), v)
        return (gate * recalled + (1 - gate) * o).to(o.dtype)


@system(
    "longmem",
    kind="external-memory",
    paper="arXiv:2306.07174",
    year=2023,
    name="LongMem",
    example={"window": 6, "memory": 24, "chunk": 3, "top": 6, "reduction": 1, "layer": 1},
    state="the backbone's, the side layers', and 4 dim n of the memory layer, n <= 2 (memory + window + chunk)",
    parity="with a side network that adds nothing, the backbone; the memory layer in a loop",
    claim="With two shots in view and 200 in memory, labels are found better than with the two alone.",
)
class LongMem(Model):
    """ids [B, T] -> logits; the backbone does not learn, only the side network does.

        x_{i+1} = x_i + mixer_i(norm x_i) + ffn_i(norm x_i) + (h_{r (i + 1)} - h_{r i})        x_0 = h_0, the embeddings
        logits = head(norm(x_last))        h_l: what leaves the backbone's block l

    Side layer i starts as a copy of block r (i + 1). The one in whose reach the backbone's block `layer` is (default: three quarters up)
    reads that block's keys and values by BankAttention. backbone: a Decoder whose block there, and that side layer's, are attention without
    kv_heads; with windows in all blocks the state is bounded. reduction: r, which divides the number of blocks. The paper's positions are
    ALiBi; here the backbone's rotary ones, and none in the bank. Each row has a bank of its own, of the last `memory` tokens.
    """

    kind = "longmem"

    def __init__(
        self,
        backbone: Decoder,
        layer: int | None = None,
        reduction: int = 2,
        window: int = 1024,
        memory: int = 65536,
        chunk: int = 4,
        top: int = 64,
    ):
        super().__init__()
        if not isinstance(backbone, Decoder):
            raise UsageError(f"backbone is a {type(backbone).__name__}; longmem copies the blocks of a Decoder.")
        depth = len(backbone.blocks)
        layer = layer or max(1, 3 * depth // 4)
        positive(layer=layer, reduction=reduction, window=window, memory=memory, chunk=chunk, top=top)
        divides("reduction", reduction, "the backbone's number of blocks", depth)
        divides("chunk", chunk, "top", top)
        if layer > depth:
            raise UsageError(f"layer is {layer}; the backbone has {depth} blocks.")
        self.backbone = backbone.requires_grad_(False)
        self.vocab, self.dim, self.layer, self.reduction = backbone.vocab, backbone.dim, layer, reduction
        own = {"layer": layer, "reduction": reduction, "window": window, "memory": memory, "chunk": chunk, "top": top}
        self.config = {**own, "backbone": {"kind": backbone.kind, "config": backbone.config}}
        self.reader = (layer - 1) // reduction
        side = [copy.deepcopy(backbone.blocks[i]) for i in range(reduction - 1, depth, reduction)]
        for block, place in ((side[self.reader], f"side layer {self.reader + 1}"), (backbone.blocks[layer - 1], f"block {layer}")):
            mixer = block.mixer
            if not isinstance(mixer, Attention) or mixer.kv_heads != mixer.heads or mixer.rope_dims != mixer.head_dim:
                raise UsageError(f"{place} is not attention with rotary positions and without kv_heads; its keys fill the bank.")
        source: Attention = backbone.blocks[layer - 1].mixer  # type: ignore[assignment]
        reading = BankAttention(2 * self.dim, side[self.reader].mixer, window, memory, chunk, top)  # type: ignore[arg-type]
        reading.bank.load_state_dict(source.to_qkv.state_dict())
        side[self.reader].mixer = reading
        self.side = nn.ModuleList(side).requires_grad_(True)
        reading.bank.requires_grad_(False)

    @classmethod
    def build(cls, config: dict[str, Any]) -> LongMem:
        own = dict(config)
        inner = own.pop("backbone")
        return cls(Decoder.build(inner["config"]), **own)

    def embed(self, ids: Tensor) -> Tensor:
        return self.backbone.embed(ids)

    def head(self, hidden: Tensor) -> Tensor:
        return self.backbone.head(hidden)

    def encode(self, h: Tensor, state: LongMemState | None = None, span: Span | None = None) -> tuple[Tensor, LongMemState]:
        levels = [h]

        def note(_: int, leaving: Tensor) -> Tensor:
            levels.append(leaving)
            return leaving

        _, base = self.backbone.encode(h, state and state.base, span, after=note)
        source: Block = self.backbone.blocks[self.layer - 1]  # type: ignore[assignment]
        x, states = h, []
        for i, block in enumerate(self.side):
            inside = block.norm(x)  # type: ignore[operator]
            if i == self.reader:
                inside = torch.cat([inside, source.norm(levels[self.layer - 1])], -1)
            y, new = block.mixer(inside, state and state.side[i], span)  # type: ignore[operator]
            y = y + block.ffn(block.ffn_norm(x)) if block.ffn is not None else y  # type: ignore[operator]
            x = x + y + levels[(i + 1) * self.reduction] - levels[i * self.reduction]
            states.append(new)
        seen = state.seen if state else torch.zeros(len(h), dtype=torch.long, device=h.device)
        new_state = LongMemState(seen=advance(seen, h.shape[1], span), base=base, side=tuple(states))
        return self.backbone.norm(x), new_state.stamp(*self.header)
