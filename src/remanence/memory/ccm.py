"""Compressed Context Memory: the keys and values of a few tokens stand for a segment, kept one after the other or merged (2312.03414)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..catalog import system
from ..errors import UsageError
from ..mixers.attention import Attention, AttentionState
from ..models.base import Model
from ..models.decoder import Decoder, DecoderState
from ..ops.backend import accumulate_dtype
from ..ops.softmax import DEAD
from ..span import Span
from ..state import Growing, State
from .base import Piece, Run, SegmentMemory
from .parts import LowRank, packed, run_layers, slots_of
from .rmt import memory_prompt


class CCMMemory(State):
    steps: Tensor  # [B] int64, segments compressed
    position: Tensor  # [B] int64, tokens read; the compression tokens do not count
    real: Tensor  # [B, M] bool, which entries hold anything
    keys: tuple  # of each attention layer [B, M, G, D], rotated; float32 where merged
    values: tuple  # of each attention layer [B, M, G, D]


@system(
    "ccm",
    kind="segment-memory",
    paper="arXiv:2312.03414",
    year=2023,
    name="Compressed Context Memory",
    example={"segment": 8, "slots": 2, "rank": 2, "train_base": True},
    state="2 L n G D merged, times the segments concatenated, and the backbone's state within a segment",
    parity="one pass over everything with the block masks of snu-mllab/Context-Memory",
    claim="The masked parallel pass is the recurrence; concatenating is near full context, merging a little lower.",
)
class CCM(SegmentMemory):
    """ids [B, T] -> logits; the state between segments is keys and values of n tokens a segment in every attention layer.

        h(t) = keys and values of the n tokens <COMP> that follow segment t, after attending to [Mem(t - 1) | segment t | themselves]
        mode="concat"   Mem(t) = Mem(t - 1) | h(t)          mode="merge"   Mem(t) = (1 - a_t) Mem(t - 1) + a_t h(t), a_t = 1 / t or `rate`

    The compression tokens are learned and read with weights of their own, W + B A in every projection of the mixers (conditional LoRA);
    text is read with W. They take the positions that follow and do not advance the count; keys are merged as they are, rotated. Mixers
    that are not full attention hold no keys: they start afresh in each segment. With "concat" the state grows by n keys a segment, with
    "merge" it is bounded. backbone: a Decoder with a full attention layer. slots: n. rank, alpha: of LoRA. train_base: else the backbone's
    parameters are frozen in place, as in the paper.
    """

    kind = "ccm"
    backbone: Decoder

    def __init__(
        self,
        backbone: Model,
        segment: int = 128,
        slots: int = 4,
        mode: str = "merge",
        rate: float | None = None,
        rank: int = 8,
        alpha: float = 16.0,
        train_base: bool = False,
    ):
        own = {"slots": slots, "mode": mode, "rate": rate, "rank": rank, "alpha": alpha, "train_base": train_base}
        super().__init__(backbone, segment, **own)
        if not isinstance(backbone, Decoder):
            raise UsageError(f"backbone is a {type(backbone).__name__}; ccm works between the layers of a Decoder.")
        if mode not in ("concat", "merge"):
            raise UsageError(f"mode is {mode!r}; it may be 'concat' or 'merge'.")
        if rate is not None and not 0 < rate <= 1:
            raise UsageError(f"rate is {rate!r}; it must be in (0, 1], or None for the mean.")
        mixers = [block.mixer for block in backbone.blocks]
        self.full = [type(mixer) is Attention and mixer.window is None for mixer in mixers]
        if not any(self.full):
            raise UsageError("the backbone has no layer of full attention; ccm keeps keys and values of such layers.")
        self.slots, self.mode, self.rate = slots_of(slots, 1), mode, rate
        self.comp = memory_prompt(backbone, slots, segment)
        self.lora = LowRank(backbone, rank, alpha)
        backbone.requires_grad_(train_base)

    def initial(self, h: Tensor) -> CCMMemory:
        zero, size = torch.zeros(len(h), dtype=torch.long, device=h.device), self.slots if self.mode == "merge" else 0
        dtype = accumulate_dtype(h) if self.mode == "merge" else h.dtype
        keys = tuple(h.new_zeros(len(h), size, mixer.kv_heads, mixer.head_dim, dtype=dtype) for mixer in self._attention())
        real = torch.zeros(len(h), size, dtype=torch.bool, device=h.device)
        return CCMMemory(steps=zero, position=zero, real=real, keys=keys, values=keys)

    def restart(self, rows: Tensor, memory: CCMMemory, h: Tensor) -> CCMMemory:
        """Rows forget what they hold; the others' entries stay where they are."""
        steps, position = (torch.where(rows, 0, count) for count in (memory.steps, memory.position))
        return memory.replace(steps=steps, position=position, real=memory.real & ~rows[:, None])

    def _attention(self) -> list[Attention]:
        return [block.mixer for block, full in zip(self.backbone.blocks, self.full) if full]  # type: ignore[misc]

    def advance(self, h: Tensor, memory: CCMMemory, open: DecoderState | None, piece: Piece) -> tuple[Tensor, State, State | None]:
        run = Run(piece, h, reset=open is not None)
        states: list[State | None] = list(open.layers) if open else [None] * len(self.full)
        if piece.any_starts:
            states = self._begin(memory, states, piece, h.dtype)
        # attention layers have been given the memory of rows that start, so they must not be reset
        spans = [Span(run.span.valid) if full and run.span is not None else run.span for full in self.full]
        out, layers = run_layers(list(self.backbone.blocks), run.x, states, spans)  # type: ignore[arg-type]
        if piece.any_ends:
            comp = self.comp.to(h.dtype).expand(len(h), -1, -1)
            span = None if piece.valid is None else Span(piece.ends[:, None].expand(-1, self.slots))  # type: ignore[index]
            _, ended = run_layers(list(self.lora.layers(self.backbone)), comp, layers, [span] * len(layers))
            memory = self._keep(memory, [state for state, full in zip(ended, self.full) if full], piece)  # type: ignore[misc]
        state = DecoderState(seen=layers[0].seen, layers=tuple(layers))  # type: ignore[attr-defined]
        return run.split(self.backbone.norm(out))[1], memory, state

    def _begin(self, memory: CCMMemory, states: list[State | None], piece: Piece, dtype: torch.dtype) -> list[State | None]:
        """The layers' states where rows that start hold the memory as their cache."""
        starts = torch.as_tensor(piece.starts, device=memory.real.device).expand(len(memory.real))
        past, begun = zip(memory.keys, memory.values, strict=True), list(states)
        for index, mixer in enumerate(block.mixer for block in self.backbone.blocks):
            if not self.full[index]:
                continue
            keys, values = (x.to(dtype) for x in next(past))
            at, seen, old = torch.where(memory.real, 0, DEAD), memory.position, states[index]  # rotated already: `at` only has to be seen
            if isinstance(old, AttentionState):
                at = torch.cat([torch.where(starts[:, None], at, DEAD), torch.where(starts[:, None], DEAD, old.at.tensor)], 1)  # type: ignore[union-attr]
                both = (torch.cat([new, was.tensor], 1) for new, was in ((keys, old.keys), (values, old.values)))  # type: ignore[union-attr]
                _, at, keys, values = packed(at >= 0, at, *both)
                seen = torch.where(starts, seen, old.seen)
            state = AttentionState(seen=seen, keys=Growing(keys), values=Growing(values), at=Growing(at))
            begun[index] = state.stamp(*mixer.header)  # type: ignore[union-attr]
        return begun

    def _keep(self, memory: CCMMemory, caches: list[AttentionState], piece: Piece) -> CCMMemory:
        """The memory with h(t), the last n keys and values of the caches, in rows that end a segment."""
        ends = torch.as_tensor(piece.ends, device=memory.real.device).expand(len(memory.real))
        new = [[x.tensor[:, -self.slots :] for x in (cache.keys, cache.values)] for cache in caches]  # type: ignore[union-attr]
        old = list(zip(memory.keys, memory.values, strict=True))
        steps, real = memory.steps + ends, torch.cat([memory.real, ends[:, None].expand(-1, self.slots)], 1)
        if self.mode == "merge":
            count = steps.to(memory.keys[0].dtype)
            share = 1 / count.clamp(min=1) if self.rate is None else torch.full_like(count, self.rate).masked_fill(count == 1, 1.0)
            share = (share * ends)[:, None, None, None]
            pairs = [[a + share * (b.to(a.dtype) - a) for a, b in zip(was, now)] for was, now in zip(old, new)]
            real = memory.real | ends[:, None]
        else:
            pairs = [[torch.cat([a, b], 1) for a, b in zip(was, now)] for was, now in zip(old, new)]
            if piece.valid is not None:
                real, *flat = packed(real, *(x for pair in pairs for x in pair))
                pairs = [flat[i : i + 2] for i in range(0, len(flat), 2)]
        keys, values = (tuple(pair[i] for pair in pairs) for i in (0, 1))
        position = memory.position + self.segment * ends
        return CCMMemory(steps=steps, position=position, real=real, keys=keys, values=values)
