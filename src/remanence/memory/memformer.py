"""Memformer: slots that every layer reads by cross-attention and each segment rewrites, apart from each other (arXiv 2010.06891)."""

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
from .parts import BiasedNorm, CrossAttention, GRUGate, OpenSegment, SlotAttention, depth, hold, slots_of


class MemformerMemory(State):
    slots: Tensor  # [B, k, dim] float32


@system(
    "memformer",
    kind="segment-memory",
    paper="arXiv:2010.06891",
    year=2020,
    name="Memformer",
    example={"segment": 8, "slots": 3, "tau": 1.0},
    state="k dim, and S dim and the backbone's state within a segment",
    parity="the slot update of lucidrains/memformer in a loop",
    claim="Memory replay gives the gradients of full back-propagation in memory that does not grow with the segments.",
)
class Memformer(SegmentMemory):
    """ids [B, T] -> logits; the state is k slots between segments.

        read    x <- x + attention(norm x -> norm M_t), at the input of every layer
        write   M'_i = softmax(q_i [k_i | K_H] / (tau sqrt(D))) [v_i | V_H]        H [B, S, dim]: the segment's final hidden states
        forget  M_{t+1,i} = (M'_i + v_i) / |M'_i + v_i|,  M_0 = v_i / |v_i|         update="gru": M_{t+1} = GRU(M', M_t), M_0 learned

    Our reading: the published model is an encoder-decoder whose encoder reads and writes; here the causal backbone does both, and predicts.
    The norm of what is read, with its learned weight, gives unit slots the scale that a dot product needs. The value of tau is uncertain,
    and so is which update the authors ended with ("gru" is that of lucidrains/memformer, whose feed-forward on the slots is left out).
    Memory replay is `remanence.train.replay`. backbone: a Decoder, or a wrapped model with layers to work between. slots: k. heads: of both
    attentions.
    """

    kind = "memformer"

    def __init__(self, backbone: Model, segment: int = 128, slots: int = 16, heads: int = 4, tau: float = 0.25, update: str = "bmn"):
        super().__init__(backbone, segment, slots=slots, heads=heads, tau=tau, update=update)
        layers, dim = range(depth(backbone, self.kind)), backbone.dim
        slots_of(slots, 1)
        if update not in ("bmn", "gru"):
            raise UsageError(f"update is {update!r}; it may be 'bmn' or 'gru'.")
        self.reads = nn.ModuleList(CrossAttention(dim, heads) for _ in layers)
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in layers)
        self.slot_norm, self.write_norm = RMSNorm(dim), RMSNorm(dim)
        self.write = SlotAttention(dim, heads, tau)
        self.update = BiasedNorm(slots, dim) if update == "bmn" else GRUGate(dim)
        self.first = nn.Parameter(torch.randn(slots, dim)) if update == "gru" else None
        self.to(next(backbone.parameters()))

    def initial(self, h: Tensor) -> MemformerMemory:
        first = self.update.initial if isinstance(self.update, BiasedNorm) else self.first
        assert first is not None
        return MemformerMemory(slots=first.to(accumulate_dtype(h)).expand(len(h), -1, -1))

    def advance(self, h: Tensor, memory: MemformerMemory, open: OpenSegment | None, piece: Piece) -> tuple[Tensor, State, State | None]:
        run = Run(piece, h, reset=open is not None)
        slots = self.slot_norm(memory.slots.to(h.dtype))

        def read(layer: int, x: Tensor) -> Tensor:
            return x + self.reads[layer](self.norms[layer](x), slots)

        hidden, base = self.backbone.encode(run.x, open and open.base, run.span, before=read)  # type: ignore[call-arg]
        out = run.split(hidden)[1]
        open = OpenSegment(base=base, kept=hold(open, [out], piece, self.segment))
        if piece.any_ends:
            written = self.write(self.write_norm(memory.slots.to(h.dtype)), open.kept[0])
            memory = piece.commit(MemformerMemory(slots=self.update(memory.slots, written)), memory)  # type: ignore[assignment]
        return out, memory, open
