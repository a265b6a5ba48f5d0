"""MemBART: a stream of memory slots that runs beside the text, layer by layer, and is gated into the old one (arXiv 2209.07634)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..models.base import Model
from ..models.decoder import Decoder
from ..ops.backend import accumulate_dtype
from ..state import State
from .base import Piece, Run, SegmentMemory
from .parts import ConvexGate, OpenSegment, SlotAttention, hold, prefill, slots_of


class MemBARTMemory(State):
    slots: Tensor  # [B, k, dim] float32


class MemoryLayer(nn.Module):
    """One layer of the memory's stream, post-norm: M <- LN(M + slots(M, X)); M <- LN(M + ffn(M))."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attention = SlotAttention(dim, heads)
        self.norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, slots: Tensor, x: Tensor) -> Tensor:
        slots = self.norm(slots + self.attention(slots, x))
        return self.ffn_norm(slots + self.down(F.gelu(self.up(slots))))


@system(
    "membart",
    kind="segment-memory",
    paper="arXiv:2209.07634",
    year=2022,
    name="MemBART",
    example={"segment": 8, "slots": 3},
    state="k dim, and L S dim and the backbone's state within a segment",
    parity="the memory's stream and gate of qywu/memformers in a loop",
    claim="A fact of the first turn of a dialogue is answered at turn n.",
)
class MemBART(SegmentMemory):
    """ids [B, T] -> logits; a segment is a turn, and the state between turns is k slots.

        M_in = LN(M_t + b), M_0 = 0        text: layer l attends to [A_l M_in | X_l], causally in X_l
        memory, when the turn is read: layer l, slot i attends to {itself} and all of X_l; residual, LN, feed-forward, residual, LN
        a = sigmoid(w . GELU(W M_out))     M_{t+1} = a M_out + (1 - a) M_in

    X_l [B, S, dim]: what enters the backbone's layer l. Our reading: the published encoder is bidirectional and its text reads the memory's
    layer l, which has already seen the whole turn; a causal backbone must not, so its text reads M_in at every layer, through A_l (at first
    the identity) and the layer's own norm and mixer, as a prefix. The decoder is left out: the backbone predicts. slots=0 is the backbone
    on each segment by itself. backbone: a Decoder.
    """

    kind = "membart"
    backbone: Decoder

    def __init__(self, backbone: Model, segment: int = 128, slots: int = 16, heads: int = 4):
        super().__init__(backbone, segment, slots=slots, heads=heads)
        if not isinstance(backbone, Decoder):
            raise UsageError(f"backbone is a {type(backbone).__name__}; membart works between the layers of a Decoder.")
        self.slots, dim = slots_of(slots), backbone.dim
        self.bias = nn.Parameter(torch.randn(slots, dim) * 0.02)
        self.norm, self.gate = nn.LayerNorm(dim), ConvexGate(dim)
        self.prefixes = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in backbone.blocks)
        self.stream = nn.ModuleList(MemoryLayer(dim, heads) for _ in backbone.blocks)
        for prefix in self.prefixes:
            nn.init.eye_(prefix.weight)  # type: ignore[arg-type]
        self.to(next(backbone.parameters()))

    def initial(self, h: Tensor) -> MemBARTMemory:
        return MemBARTMemory(slots=h.new_zeros(len(h), self.slots, self.dim, dtype=accumulate_dtype(h)))

    def advance(self, h: Tensor, memory: MemBARTMemory, open: OpenSegment | None, piece: Piece) -> tuple[Tensor, State, State | None]:
        slots = self.norm((memory.slots + self.bias).to(h.dtype))  # M_in
        base, reset = open.base if open else None, False
        if piece.any_starts:
            base, reset = prefill(self.backbone, [prefix(slots) for prefix in self.prefixes], None, base, piece)  # type: ignore[arg-type]
        run, inputs = Run(piece, h, reset=reset if isinstance(reset, Tensor) else bool(reset and open)), []

        def keep(layer: int, x: Tensor) -> Tensor:
            inputs.append(run.split(x)[1])
            return x

        hidden, base = self.backbone.encode(run.x, base, run.span, before=keep)  # type: ignore[arg-type]
        open = OpenSegment(base=base, kept=hold(open, inputs, piece, self.segment))
        if piece.any_ends:
            out = slots
            for layer, x in zip(self.stream, open.kept, strict=True):
                out = layer(out, x)
            new = MemBARTMemory(slots=self.gate(slots.to(memory.slots.dtype), out))
            memory = piece.commit(new, memory)  # type: ignore[assignment]
        return run.split(hidden)[1], memory, open
