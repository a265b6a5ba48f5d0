"""Contextual memory reweaving: hidden states captured at a few layers are read back by the tokens of later segments (2025)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, positive
from ..models.base import Model
from ..span import last_inputs
from ..state import State
from .base import Piece, Run, SegmentMemory
from .parts import CrossAttention, OpenSegment, depth, hold


class ReweavingMemory(State):
    size: Tensor  # [B] int64, how many of the N places hold a token of the current document
    buffers: tuple  # of each capture layer, what it gave for the last N tokens [B, N, dim], the newest last


@system(
    "contextual-memory-reweaving",
    kind="segment-memory",
    paper="arXiv:2502.02046",
    year=2025,
    name="Contextual memory reweaving",
    example={"segment": 8, "buffer": 12},
    state="C (N + S) dim for C capture layers, and the backbone's state within a segment",
    parity="the equation in a loop; a shut gate is the backbone",
    claim="An ablation: what reading back captured hidden states adds to segments that stand alone.",
)
class ContextualMemoryReweaving(SegmentMemory):
    """ids [B, T] -> logits; the state is, for each capture layer, what it gave for the last N tokens of earlier segments.

        r = sum_l w_l attention(h -> buffer_l)        h <- h + g_j r after capture layer j        w = softmax, g = sigmoid, both learned

    Our reading throughout, from the abstract: what is captured (a layer's output, before r is added), one attention for each buffer, shared
    by the layers that read, and a segment that reads the buffers of those before it. g starts at sigmoid(-3); g = 0 is the backbone on each
    segment by itself. A buffer that holds nothing gives nothing. layers: capture layers, 1 at the bottom, default the middle and the last
    one. buffer: N. backbone: a Decoder, or a wrapped model with layers to work between.
    """

    kind = "contextual-memory-reweaving"

    def __init__(self, backbone: Model, segment: int = 128, buffer: int = 256, layers: Sequence[int] | None = None, heads: int = 4):
        count = depth(backbone, self.kind)
        chosen = sorted({(count + 1) // 2, count} if layers is None else set(layers))
        super().__init__(backbone, segment, buffer=buffer, layers=chosen, heads=heads)
        if not chosen or not all(isinstance(layer, int) and 1 <= layer <= count for layer in chosen):
            raise UsageError(f"layers is {layers!r}; it must name layers in 1..{count}.")
        positive(buffer=buffer)
        self.size, self.place = buffer, {layer - 1: index for index, layer in enumerate(chosen)}
        self.reads = nn.ModuleList(CrossAttention(backbone.dim, heads, silent=False) for _ in chosen)
        self.weights = nn.Parameter(torch.zeros(len(chosen)))
        self.gates = nn.Parameter(torch.full((len(chosen),), -3.0))
        self.to(next(backbone.parameters()))

    def initial(self, h: Tensor) -> ReweavingMemory:
        buffers = tuple(h.new_zeros(len(h), self.size, self.dim) for _ in self.place)
        return ReweavingMemory(size=torch.zeros(len(h), dtype=torch.long, device=h.device), buffers=buffers)

    def advance(self, h: Tensor, memory: ReweavingMemory, open: OpenSegment | None, piece: Piece) -> tuple[Tensor, State, State | None]:
        run, captured = Run(piece, h, reset=open is not None), []
        held = torch.arange(self.size, device=h.device) >= self.size - memory.size[:, None]  # [B, N]
        some = (memory.size > 0)[:, None, None]
        held = held | ~some[:, 0]  # a row with nothing to read reads zeros: no NaN
        share = self.weights.softmax(0)

        def reweave(layer: int, x: Tensor) -> Tensor:
            if layer not in self.place:
                return x
            captured.append(run.split(x)[1])
            found = sum(w * read(x, past, held) for w, read, past in zip(share, self.reads, memory.buffers, strict=True))
            return x + self.gates[self.place[layer]].sigmoid() * found * some  # type: ignore[operator]

        hidden, base = self.backbone.encode(run.x, open and open.base, run.span, after=reweave)  # type: ignore[call-arg]
        open = OpenSegment(base=base, kept=hold(open, captured, piece, self.segment))
        if piece.any_ends:
            buffers = tuple(last_inputs(past, new, None) for past, new in zip(memory.buffers, open.kept, strict=True))
            size = (memory.size + self.segment).clamp(max=self.size)
            memory = piece.commit(ReweavingMemory(size=size, buffers=buffers), memory)  # type: ignore[assignment]
        return run.split(hidden)[1], memory, open
