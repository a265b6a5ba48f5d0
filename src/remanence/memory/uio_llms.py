"""UIO-LLMs: a model compresses each segment into memory tokens of every layer, and reads all of them as a prefix (arXiv 2406.18173)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..catalog import system
from ..errors import UsageError, divides
from ..models.base import Model
from ..models.decoder import Decoder
from ..state import State
from .base import Piece, Run, SegmentMemory
from .parts import LowRank, OpenSegment, hold, packed, prefill, run_layers, slots_of
from .rmt import memory_prompt


class UIOMemory(State):
    real: Tensor  # [B, M] bool, which places hold a memory
    bank: tuple  # of each layer, its inputs at the memory tokens of all segments so far [B, M, dim]


@system(
    "uio-llms",
    kind="segment-memory",
    paper="arXiv:2406.18173",
    year=2024,
    name="UIO-LLMs",
    example={"segment": 8, "slots": 2, "rank": 2, "train_base": True},
    state="L n dim a segment, and S dim and the backbone's state within one",
    parity="one masked pass of the encoder, as in wenhaoli-xmu/UIO-LLMs",
    claim="The randomised incremental gradient is the full one where no segment is dropped, and its expectation is near it elsewhere.",
)
class UIOLLMs(SegmentMemory):
    """ids [B, T] -> logits; the state between segments is, for every layer, n vectors a segment.

        encode   memory token i of a segment sees its first (i + 1) S / n tokens and itself, at the position that follows; no text sees it.
                 What enters layer l at the memory tokens is kept, [n, dim].
        read     layer l: keys and values of [all that is kept for l | the segment], positions from 0

    One backbone does both: encoding, and reading what is kept, with W + B A in the mixers' projections (all but the one back), the text of
    the open segment with W. A mixer that is no attention reads the prefix as tokens, and for it too a memory token is read from the state
    after the tokens that it sees, which nothing else goes on from. The state grows by n vectors a segment and layer. The paper's randomised
    incremental back-propagation is `remanence.train.uio`, which calls `compress` and `read`. backbone: a Decoder. slots: n, dividing the
    segment. rank, alpha: of LoRA. train_base: else the backbone's parameters are frozen in place, as in the paper.
    """

    kind = "uio-llms"
    backbone: Decoder

    def __init__(
        self,
        backbone: Model,
        segment: int = 128,
        slots: int = 8,
        rank: int = 8,
        alpha: float = 16.0,
        train_base: bool = False,
    ):
        super().__init__(backbone, segment, slots=slots, rank=rank, alpha=alpha, train_base=train_base)
        if not isinstance(backbone, Decoder):
            raise UsageError(f"backbone is a {type(backbone).__name__}; uio-llms works between the layers of a Decoder.")
        self.slots = slots_of(slots, 1)
        divides("slots", slots, "segment", segment)
        self.prompt = memory_prompt(backbone, slots, segment)
        names = {name for block in backbone.blocks for name, module in block.mixer.named_modules() if hasattr(module, "in_features")}  # type: ignore[union-attr]
        self.lora = LowRank(backbone, rank, alpha, sorted(name for name in names if name != "out"))
        backbone.requires_grad_(train_base)

    def initial(self, h: Tensor) -> UIOMemory:
        bank = tuple(h.new_zeros(len(h), 0, self.dim) for _ in self.backbone.blocks)
        return UIOMemory(real=torch.zeros(len(h), 0, dtype=torch.bool, device=h.device), bank=bank)

    def restart(self, rows: Tensor, memory: UIOMemory, h: Tensor) -> UIOMemory:
        """Rows forget what they hold; the others' entries stay where they are."""
        return memory.replace(real=memory.real & ~rows[:, None])

    def compress(self, h: Tensor) -> tuple[Tensor, ...]:
        """The embeddings of one segment [B, S, dim] -> what enters each layer at its memory tokens, [B, n, dim] each."""
        layers = list(self.lora.layers(self.backbone))
        states: Sequence[State | None] = [None] * len(layers)
        kept: list[list[Tensor]] = [[] for _ in layers]

        def keep(layer: int, x: Tensor) -> Tensor:
            kept[layer].append(x)
            return x

        for part, token in zip(h.split(self.segment // self.slots, 1), self.prompt.to(h.dtype).split(1)):
            _, states = run_layers(layers, part, states, [None] * len(layers))
            run_layers(layers, token.expand(len(h), 1, -1), states, [None] * len(layers), keep)
        return tuple(torch.cat(vectors, 1) for vectors in kept)

    def read(self, ids: Tensor, memories: Sequence[Sequence[Tensor]]) -> Tensor:
        """Logits of one segment's ids [B, <= S] after the memories of earlier segments, as `compress` gave them; no state is made."""
        piece, state = Piece(True, False), None
        if memories:
            bank = [torch.cat(list(layer), 1) for layer in zip(*memories, strict=True)]
            state, _ = prefill(self.backbone, bank, None, None, piece, self.lora.mixer(self.backbone))
        return self.head(self.backbone.encode(self.embed(ids), state)[0])

    def advance(self, h: Tensor, memory: UIOMemory, open: OpenSegment | None, piece: Piece) -> tuple[Tensor, State, State | None]:
        base, reset = open.base if open else None, False
        if piece.any_starts:
            real = None if bool(memory.real.all()) else memory.real
            base, reset = prefill(self.backbone, memory.bank, real, base, piece, self.lora.mixer(self.backbone))  # type: ignore[arg-type]
        run = Run(piece, h, reset=reset if isinstance(reset, Tensor) else bool(reset and open))
        hidden, base = self.backbone.encode(run.x, base, run.span)  # type: ignore[arg-type]
        open = OpenSegment(base=base, kept=hold(open, [h], piece, self.segment))
        if piece.any_ends:
            memory = self._keep(memory, open.kept[0], piece)
        return run.split(hidden)[1], memory, open

    def _keep(self, memory: UIOMemory, tokens: Tensor, piece: Piece) -> UIOMemory:
        """The bank with the memory tokens of rows that end a segment; tokens [B, S, dim]."""
        if piece.valid is None:
            new, ends = self.compress(tokens), torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        else:
            ends = piece.ends
            rows = ends.nonzero()[:, 0]  # type: ignore[union-attr]
            empty = tokens.new_zeros(len(tokens), self.slots, self.dim)
            new = tuple(empty.index_copy(0, rows, x) for x in self.compress(tokens[rows]))
        real = torch.cat([memory.real, ends[:, None].expand(-1, self.slots)], 1)  # type: ignore[index]
        bank = tuple(torch.cat(pair, 1) for pair in zip(memory.bank, new, strict=True))
        if piece.valid is not None:
            real, *bank = packed(real, *bank)
        return UIOMemory(real=real, bank=tuple(bank))
