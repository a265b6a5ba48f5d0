"""LaMemo: a Transformer-XL whose cached tokens look ahead and are brought up to date before they are read (arXiv 2204.07341)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..mixers.relative_attention import RelativeAttention, sinusoids
from ..models.base import Model
from ..models.decoder import Block, Decoder
from ..ops.backend import accumulate_dtype
from ..span import Span, last_inputs
from ..state import State
from .base import Piece, SegmentMemory

EPS = 1e-6


class LaMemoMemory(State):
    size: Tensor  # [B] int64, how many of the M entries hold a token of the current document, the newest last
    embeddings: Tensor  # [B, M, dim], what entered the lowest layer
    past: tuple  # of each layer that looks ahead, what the tokens attended to so far, before the projection, [B, M, H, D]
    norm: tuple  # and the logarithm of their softmax's sum, [B, M, H] float32


class LookAheadState(State):
    keys: Tensor  # [B, M + S, H, D]: of the refreshed memory, then of the open segment; 0 where no token is
    values: Tensor  # [B, M + S, H, D]


class LaMemoOpen(State):
    held: Tensor  # [B] int64, how many of the M entries the open segment sees
    count: Tensor  # [B] int64, tokens of the open segment
    layers: tuple  # LookAheadState, or another mixer's own state


class Now(NamedTuple):
    """Where the rows are. starts [B]: whether a segment starts; held, count: as in LaMemoOpen, before the piece; valid: the piece's."""

    starts: Tensor
    held: Tensor
    count: Tensor
    valid: Tensor | None


def blend(past: Tensor, norm: Tensor, future: Tensor, ahead: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmax averages [.., D] as one, and the logarithm of its sum; norm, ahead [..]: the logarithms of theirs.

    past a + future (1 - a)        a = e^norm / (e^norm + e^ahead + 1e-6), both after their larger one is taken off, as published
    """
    top = torch.maximum(norm, ahead)
    a, b = (norm - top).exp(), (ahead - top).exp()
    alpha = (a / (a + b + EPS))[..., None]
    return past * alpha + future * (1 - alpha), torch.logaddexp(norm, ahead)


def scores(mixer: RelativeAttention, q: Tensor, k: Tensor, place: Tensor, distance: Tensor, table: Tensor) -> Tensor:
    """((q_i + u) . k_j + (q_i + place) . W_r R_d) / sqrt(D) in float32 at least, [B, H, Tq, Tk]. distance [B or 1, Tq, Tk] >= 0."""
    weight = mixer.to_r.weight.to(table.dtype).unflatten(0, (mixer.heads, -1))
    content = torch.einsum("bihd,bjhd->bhij", q + mixer.u.to(q.dtype), k)
    far = torch.einsum("bihd,phd->bhip", q + place.to(q.dtype), torch.einsum("hdc,pc->phd", weight, table).to(q.dtype))
    far = far.gather(3, distance.clamp(0, len(table) - 1)[:, None].expand(len(q), mixer.heads, -1, -1))
    return (content + far).to(accumulate_dtype(q)) * mixer.head_dim**-0.5


def attend(score: Tensor, mask: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(o [B, Tq, H, D], the logarithm of the softmax's sum [B, Tq, H]). mask [B, Tq, Tk], at least one key for each query."""
    score = score.masked_fill(~mask[:, None], -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", score.softmax(-1).to(v.dtype), v), score.logsumexp(-1).transpose(1, 2)


@system(
    "lamemo",
    kind="segment-memory",
    paper="arXiv:2204.07341",
    year=2022,
    name="LaMemo (look-ahead memory)",
    example={"segment": 8, "memory": 12},
    state="M dim + (L - 1) M (dim + H), M = memory, and the keys and values of M + S tokens a layer in the open segment",
    parity="the recurrence of thu-coai/LaMemo in a loop; Transformer-XL without looking ahead; one softmax over both sides",
    claim="At the same memory its loss on words is at most Transformer-XL's.",
)
class LaMemo(SegmentMemory):
    """ids [B, T] -> logits; the memory is the last M tokens, which pass through all layers again at the start of each segment.

    A layer's attention has the segment's tokens read [memory | segment] as in Transformer-XL. The memory's token i attends only to what
    came after it, the later ones and the segment's first token, at most S keys, and adds that to what it attended to before:

        o_i = sg(o_past) a + o_ahead (1 - a)        a: see `blend`        m <- m + W_o o_i, then the feed-forward: the next layer's memory
        score ahead = ((q_i + u) . k_j + (q_i + v_ahead) . W_r R_{j-i}) / sqrt(D)        v_ahead [H, D]: a layer's own, in place of v

    The paper speaks of looking ahead into the segment; its code, followed here, lets the memory see no more than the first token, and
    anything beyond would leak. The top layer's memory, which nothing reads, is left out. o_past, the sums and the embeddings are kept
    without gradient, so gradients end where a segment starts.
    backbone: a Decoder. Its layers of `relative-attention` without a window work as above; any other mixer reads the memory again, in
    order, before the segment. segment: S. memory: M >= 1. look_ahead=False has a = 1, which is Transformer-XL.
    """

    kind = "lamemo"
    backbone: Decoder

    def __init__(self, backbone: Model, segment: int = 128, memory: int = 128, look_ahead: bool = True):
        super().__init__(backbone, segment, memory=memory, look_ahead=look_ahead)
        if not isinstance(backbone, Decoder):
            raise UsageError(f"backbone is a {type(backbone).__name__}; lamemo works between the layers of a Decoder.")
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
            raise UsageError(f"memory is {memory!r}; it must be an integer >= 1, the tokens that are kept.")
        self.memory, self.look_ahead = memory, look_ahead
        mixers = [block.mixer for block in backbone.blocks]
        self.relative = [type(mixer) is RelativeAttention and mixer.window is None for mixer in mixers]
        self.ahead = [layer for layer, relative in enumerate(self.relative[:-1]) if relative]  # nothing reads the top layer's memory
        self.place = nn.ParameterList(torch.randn_like(mixers[layer].v) * 0.02 for layer in self.ahead)  # type: ignore[arg-type]

    def initial(self, h: Tensor) -> LaMemoMemory:
        embeddings = h.new_zeros(len(h), self.memory, self.dim)
        heads = [len(place) for place in self.place]
        return LaMemoMemory(
            size=torch.zeros(len(h), dtype=torch.long, device=h.device),
            embeddings=embeddings,
            past=tuple(embeddings.unflatten(-1, (n, -1)) for n in heads),
            norm=tuple(embeddings[..., :n].to(accumulate_dtype(h)) for n in heads),
        )

    def advance(self, h: Tensor, memory: LaMemoMemory, open: LaMemoOpen | None, piece: Piece) -> tuple[Tensor, State, State | None]:
        high = int(memory.size.max()) if piece.any_starts else 0  # entries before the newest `high` are empty in every row
        zero = torch.zeros_like(memory.size)
        open = open or LaMemoOpen(held=zero, count=zero, layers=(None,) * len(self.relative))
        starts = torch.as_tensor(piece.starts, device=h.device).expand(len(h))
        now = Now(starts, torch.where(starts, memory.size, open.held), torch.where(starts, 0, open.count), piece.valid)
        span = None if piece.valid is None else Span(piece.valid)
        m, embeddings = memory.embeddings[:, self.memory - high :], last_inputs(memory.embeddings, h.detach(), span)
        layers, pasts, norms = [], [], []
        for layer, block in enumerate(self.backbone.blocks):
            x, y, old = block.norm(h), block.norm(m) if high else m, open.layers[layer]  # type: ignore[operator]
            if not self.relative[layer]:
                y, o, new = self._read_again(block, x, y, old, now)  # type: ignore[arg-type]
            else:
                mixer: RelativeAttention = block.mixer  # type: ignore[assignment]
                o, total, new, ahead = self._attend(mixer, x, y, old, now)
                if layer in self.ahead:
                    turn = self.ahead.index(layer)
                    past, norm = memory.past[turn], memory.norm[turn]
                    if high:
                        past, norm = self._refresh(mixer, self.place[turn], past, norm, ahead, now)
                        y = mixer.out(past[:, self.memory - high :].to(h.dtype).flatten(2))
                    pasts.append(last_inputs(past.detach().flatten(2), o.detach().flatten(2), span).unflatten(2, (mixer.heads, -1)))
                    norms.append(last_inputs(norm.detach(), total.detach(), span))
                o = mixer.out(o.flatten(2))
            layers.append(new)
            h, m = feed(block, h + o), feed(block, m + y) if high else m  # type: ignore[arg-type]
        read = h.shape[1] if piece.valid is None else piece.valid.sum(1)
        size = (memory.size + read).clamp(max=self.memory)
        memory = LaMemoMemory(size=size, embeddings=embeddings, past=tuple(pasts), norm=tuple(norms))
        return self.backbone.norm(h), memory, LaMemoOpen(held=now.held, count=now.count + read, layers=tuple(layers))

    def _attend(
        self, mixer: RelativeAttention, x: Tensor, m: Tensor, open: LookAheadState | None, now: Now
    ) -> tuple[Tensor, Tensor, LookAheadState, tuple[Tensor, ...]]:
        """The tokens x [B, n, dim] read [memory | segment]: o [B, n, H, D], the logarithm of the sums [B, n, H], and the layer's state.

        And q of the memory m [B, high, dim], k and v of it and the first token, for the rows that start a segment.
        """
        M, high = self.memory, m.shape[1]
        q, k, v = (part.unflatten(-1, (mixer.heads, -1)) for part in mixer.to_qkv(x).chunk(3, -1))  # [B, n, H, D]
        mq, mk, mv = (part.unflatten(-1, (mixer.heads, -1)) for part in mixer.to_qkv(m).chunk(3, -1))
        slot = now.count[:, None] + torch.arange(x.shape[1], device=x.device)  # [B, n], place in the segment
        target = slot if now.valid is None else torch.where(now.valid, slot, self.segment)
        empty = k.new_zeros(len(k), M + self.segment, *k.shape[2:])
        open = open or LookAheadState(keys=empty, values=empty)
        both = []
        for old, memory, new in ((open.keys, mk, k), (open.values, mv, v)):
            fresh = F.pad(memory, (0, 0, 0, 0, M - high, 0))
            both.append(torch.cat([torch.where(now.starts[:, None, None, None], fresh, old[:, :M]), write(old[:, M:], new, target)], 1))
        keys, values = both
        index = torch.arange(M + self.segment, device=x.device)
        distance = M + slot[..., None] - index  # [B, n, M + S]
        there = (index >= M - now.held[:, None])[:, None] & (distance >= 0)
        table = sinusoids(M + self.segment, self.dim, x.device, x.dtype)
        o, total = attend(scores(mixer, q, keys, mixer.v, distance, table), there, values)
        return o, total, LookAheadState(keys=keys, values=values), (mq, torch.cat([mk, k[:, :1]], 1), torch.cat([mv, v[:, :1]], 1))

    def _refresh(
        self, mixer: RelativeAttention, place: Tensor, past: Tensor, norm: Tensor, ahead: tuple[Tensor, ...], now: Now
    ) -> tuple[Tensor, Tensor]:
        """past [B, M, H, D] and norm [B, M, H] with what the memory sees ahead of it, in the rows that start a segment."""
        if not self.look_ahead:
            return past, norm
        q, k, v = ahead
        high, older = q.shape[1], past.shape[1] - q.shape[1]
        first = max(high - self.segment, 0) + 1  # the keys are the newest S, of which the segment's first token is the last
        i, j = torch.arange(high, device=q.device)[:, None], torch.arange(first, high + 1, device=q.device)
        table = sinusoids(high + 1, self.dim, q.device, q.dtype)
        future, total = attend(scores(mixer, q, k[:, first:], place, (j - i)[None], table), (j > i)[None], v[:, first:])
        seen, total = blend(past[:, older:], norm[:, older:], future, total)
        seen, total = torch.cat([past[:, :older], seen.to(past.dtype)], 1), torch.cat([norm[:, :older], total], 1)
        return torch.where(now.starts[:, None, None, None], seen, past), torch.where(now.starts[:, None, None], total, norm)

    def _read_again(self, block: Block, x: Tensor, m: Tensor, open: State | None, now: Now) -> tuple[Tensor, Tensor, State]:
        """A layer of another mixer: y of m and x. The rows that start a segment read the memory from a fresh state, then the tokens."""
        y, high, stale = m, m.shape[1], open is not None
        if high:
            oldest = (high - now.held)[:, None]
            index = torch.arange(high, device=x.device)
            y, open = block.mixer(m, open, Span(now.starts[:, None] & (index >= oldest), now.starts[:, None] & (index == oldest)))
        reset = F.pad((now.starts & (now.held == 0) & stale)[:, None], (0, x.shape[1] - 1))
        o, new = block.mixer(x, open, None if now.valid is None else Span(now.valid, reset))
        return y, o, new


def feed(block: Block, h: Tensor) -> Tensor:
    """h with the block's feed-forward added."""
    return h if block.ffn is None or block.ffn_norm is None else h + block.ffn(block.ffn_norm(h))


def write(buffer: Tensor, new: Tensor, slot: Tensor) -> Tensor:
    """A copy of buffer [B, S, ...] with new [B, n, ...] at slot [B, n]; what goes to slot S or beyond is dropped."""
    index = slot.clamp(max=buffer.shape[1]).reshape(*slot.shape, *[1] * (new.ndim - 2)).expand_as(new)
    return torch.cat([buffer, torch.zeros_like(buffer[:, :1])], 1).scatter(1, index, new)[:, :-1]
