"""LM2: a bank of slots that every block reads through an output gate, written by input and forget gates (arXiv 2502.06049)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..models.base import Model
from ..ops.backend import accumulate_dtype
from ..state import State
from .base import Piece, Run, SegmentMemory
from .parts import LSTMGate, OpenSegment, depth, hold, slots_of


class LM2Memory(State):
    banks: tuple  # of each layer, or one for all, M [B, N, dim] float32


class MemoryBlock(nn.Module):
    """One layer's reads of a bank and its writes to it."""

    def __init__(self, dim: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_gate = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.update = LSTMGate(dim, 0.0, 1.0, squash=True)

    def scores(self, e: Tensor, bank: Tensor) -> Tensor:
        """Q(E) K(M)^T / sqrt(dim): [B, T, N]."""
        return self.to_q(e) @ self.to_k(bank).mT * e.shape[-1] ** -0.5

    def read(self, e: Tensor, bank: Tensor) -> Tensor:
        """E_mem = softmax(Q(E) K(M)^T / sqrt(dim)) V(M): [B, T, dim]."""
        return self.scores(e, bank).softmax(-1) @ self.to_v(bank)

    def write(self, e: Tensor, bank: Tensor) -> Tensor:
        """The next bank from the segment's E [B, S, dim]; the same scores, over the tokens, pool E and E_mem to the slots."""
        low = bank.to(e.dtype)
        scores = self.scores(e, low)
        pool = scores.softmax(1).mT  # [B, N, S]
        read = pool @ (scores.softmax(-1) @ self.to_v(low))
        return self.update(bank, read, take=pool @ e, keep=read)


@system(
    "lm2",
    kind="segment-memory",
    paper="arXiv:2502.06049",
    year=2025,
    name="LM2 (Large Memory Models)",
    example={"segment": 8, "slots": 5},
    state="L N dim (N dim if shared), and L S dim and the backbone's state within a segment",
    parity="the paper's equations in a loop; no public code runs",
    claim="On BABILong qa1 in a stream it is above the same model without memory.",
)
class LM2(SegmentMemory):
    """ids [B, T] -> logits; the state is N slots in every layer, or N for all of them (memory_scope="shared").

        read    E_mem = softmax(Q(E) K(M)^T / sqrt(dim)) V(M)        h <- h + sigmoid(E_mem W_out) * E_mem        E [B, T, dim]: h
        write   M' = sigmoid(E' W_in) * tanh(E'_mem) + sigmoid(E'_mem W_f + 1) * M        M_0: the identity, repeated downwards

    Our reading: E' and E'_mem [B, N, dim] are a segment's E and E_mem, pooled by attention from slots to tokens with the scores of the
    read; the bank is updated once a segment and a segment reads the old one, because a bank that had read the segment would show its
    future. What is read is added to the block's input, where the paper adds it to the output of its attention: a backbone stays as it is.
    With a shared bank the layers update it one after the other, bottom up. The public code runs only where the length, the slots and the
    width are equal, and is not followed. backbone: a Decoder, or a wrapped model with layers to work between.
    """

    kind = "lm2"

    def __init__(self, backbone: Model, segment: int = 128, slots: int = 64, memory_scope: str = "layer"):
        super().__init__(backbone, segment, slots=slots, memory_scope=memory_scope)
        layers = depth(backbone, self.kind)
        self.slots = slots_of(slots, 1)
        if memory_scope not in ("layer", "shared"):
            raise UsageError(f"memory_scope is {memory_scope!r}; it may be 'layer' or 'shared'.")
        self.banks = layers if memory_scope == "layer" else 1
        self.blocks = nn.ModuleList(MemoryBlock(backbone.dim) for _ in range(layers))
        self.blocks.to(next(backbone.parameters()))

    def initial(self, h: Tensor) -> LM2Memory:
        at = torch.arange(self.slots, device=h.device) % self.dim
        eye = torch.eye(self.dim, device=h.device, dtype=accumulate_dtype(h))[at]
        return LM2Memory(banks=tuple(eye.expand(len(h), -1, -1) for _ in range(self.banks)))

    def advance(self, h: Tensor, memory: LM2Memory, open: OpenSegment | None, piece: Piece) -> tuple[Tensor, State, State | None]:
        run, inputs = Run(piece, h, reset=open is not None), []

        def read(layer: int, x: Tensor) -> Tensor:
            inputs.append(run.split(x)[1])
            block = self.blocks[layer]
            found = block.read(x, memory.banks[layer % self.banks].to(x.dtype))  # type: ignore[operator]
            return x + block.to_gate(found).sigmoid() * found  # type: ignore[operator]

        hidden, base = self.backbone.encode(run.x, open and open.base, run.span, before=read)  # type: ignore[call-arg]
        open = OpenSegment(base=base, kept=hold(open, inputs, piece, self.segment))
        if piece.any_ends:
            banks = list(memory.banks)
            for layer, e in enumerate(open.kept):
                banks[layer % self.banks] = self.blocks[layer].write(e, banks[layer % self.banks])  # type: ignore[operator]
            memory = piece.commit(LM2Memory(banks=tuple(banks)), memory)  # type: ignore[assignment]
        return run.split(hidden)[1], memory, open
