"""Reactive Transformer: every layer's short-term memory is read by cross-attention and updated after the turn (arXiv 2510.03561)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..mixers.parts import RMSNorm
from ..models.base import Model
from ..ops.backend import accumulate_dtype
from ..state import State
from .base import Piece, Run, SegmentMemory
from .parts import CrossAttention, OpenSegment, ResidualGate, depth, hold, slots_of

MIXES = ("none", "self", "interlayer")


class RxTMemory(State):
    slots: tuple  # of each layer, its short-term memory [B, N, dim] float32


@system(
    "rxt",
    kind="segment-memory",
    paper="arXiv:2510.03561",
    year=2025,
    name="Reactive Transformer",
    example={"segment": 8, "slots": 3},
    state="L N dim, and L S dim and the backbone's state within a segment",
    parity="the memory attention and gates of RxAI-dev/rxlm in a loop",
    claim="A fact of the first turn is answered at turn 8 at constant cost a turn; a stateless model of equal size is at chance.",
)
class RxT(SegmentMemory):
    """ids [B, T] -> logits; a segment is a turn, and the state between turns is N slots in every layer.

        layer l   x <- x + attention(norm x -> STM_l), at its input
        after     new = attention(norm STM_l -> norm E_l)        STM_l <- gate(STM_l, new)

    STM starts as N(0, 1), drawn once and not trained. Gates: see `ResidualGate`; 'none' adds, and so grows in norm. mix: before that, slots
    of a layer may read each other ('self') or the mean over the layers ('interlayer'), through a gate of their own.
    Our reading: the published encoder, which reads query and answer after the turn, is here the causal pass itself, and E_l [B, S, dim]
    what leaves its layer l. The training stages are not part of this. backbone: a Decoder, or a wrapped model with layers to work between.
    """

    kind = "rxt"
    start: Tensor

    def __init__(
        self,
        backbone: Model,
        segment: int = 128,
        slots: int = 16,
        heads: int = 4,
        gate: str = "static",
        gate_activation: str = "sigmoid",
        mix: str = "none",
    ):
        super().__init__(backbone, segment, slots=slots, heads=heads, gate=gate, gate_activation=gate_activation, mix=mix)
        layers, dim = range(depth(backbone, self.kind)), backbone.dim
        slots_of(slots, 1)
        if mix not in MIXES:
            raise UsageError(f"mix is {mix!r}; it may be {', '.join(MIXES)}.")
        self.mix = mix
        self.register_buffer("start", torch.randn(len(layers), slots, dim))
        self.reads = nn.ModuleList(CrossAttention(dim, heads) for _ in layers)
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in layers)
        self.writes = nn.ModuleList(CrossAttention(dim, heads, silent=False) for _ in layers)
        self.slot_norms = nn.ModuleList(RMSNorm(dim) for _ in layers)
        self.encoded_norms = nn.ModuleList(RMSNorm(dim) for _ in layers)
        self.gates = nn.ModuleList(ResidualGate(slots, gate, gate_activation) for _ in layers)
        self.mixes = nn.ModuleList(CrossAttention(dim, heads, silent=False) for _ in layers if mix != "none")
        self.mix_gates = nn.ModuleList(ResidualGate(slots, gate, gate_activation) for _ in layers if mix != "none")
        self.to(next(backbone.parameters()))

    def initial(self, h: Tensor) -> RxTMemory:
        return RxTMemory(slots=tuple(start.expand(len(h), -1, -1) for start in self.start.to(accumulate_dtype(h))))

    def advance(self, h: Tensor, memory: RxTMemory, open: OpenSegment | None, piece: Piece) -> tuple[Tensor, State, State | None]:
        run, encoded = Run(piece, h, reset=open is not None), []

        def read(layer: int, x: Tensor) -> Tensor:
            return x + self.reads[layer](self.norms[layer](x), memory.slots[layer].to(x.dtype))

        def keep(layer: int, x: Tensor) -> Tensor:
            encoded.append(run.split(x)[1])
            return x

        hidden, base = self.backbone.encode(run.x, open and open.base, run.span, before=read, after=keep)  # type: ignore[call-arg]
        open = OpenSegment(base=base, kept=hold(open, encoded, piece, self.segment))
        if piece.any_ends:
            memory = piece.commit(RxTMemory(slots=self.update(memory.slots, open.kept)), memory)  # type: ignore[assignment]
        return run.split(hidden)[1], memory, open

    def update(self, slots: tuple[Tensor, ...], encoded: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Every layer's next slots [B, N, dim] from what its block gave in the turn, [B, S, dim] each."""
        new, mean = [], torch.stack(slots).mean(0)
        for layer, (stm, e) in enumerate(zip(slots, encoded, strict=True)):
            norm = self.slot_norms[layer]
            if self.mix != "none":
                other = norm((stm if self.mix == "self" else mean).to(e.dtype))
                stm = self.mix_gates[layer](stm, self.mixes[layer](norm(stm.to(e.dtype)), other))
            made = self.writes[layer](norm(stm.to(e.dtype)), self.encoded_norms[layer](e))
            new.append(self.gates[layer](stm, made))
        return tuple(new)
