"""TransformerFAM: every layer feeds a few of its own activations back to itself, block after block (arXiv 2404.09173)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..catalog import system
from ..models.base import Model
from ..models.decoder import DecoderState
from ..span import Span, last_inputs
from ..state import State
from .base import Piece, Run
from .rmt import memory_prompt
from .transformer_xl import TransformerXL, XLMemory


class FAMMemory(XLMemory):
    feedback: tuple  # of each layer, F [B, m, dim]


@system(
    "transformer-fam",
    kind="segment-memory",
    paper="arXiv:2404.09173",
    year=2024,
    name="TransformerFAM (feedback attention memory)",
    example={"segment": 8, "memory": 8, "tokens": 2},
    state="L (m + M) dim, M = memory, and the backbone's own of one block",
    parity="the blocks in a loop; Transformer-XL with no feedback",
    claim="It finds passkeys beyond layers times window, where block sliding-window attention is at chance.",
)
class TransformerFAM(TransformerXL):
    """ids [B, T] -> logits; the state is each layer's feedback F_l [m, dim] and last M inputs, and the backbone's own of one block.

        layer l on block s:    [_ | h' | F_l'] = block_l([m_l | F_l | h | F_l])        h' goes up, F_l' is what block s + 1 has as F_l

    So tokens read what the layer itself made of the blocks before (nothing of their own), and the copy behind, run when the block's last
    token is read, takes the next F from the block and from the old one with the layer's own weights, residual and feed-forward. m_l: the
    M = memory inputs of the layer before the block (the paper has the keys of one or two blocks), without gradient. F_l of the first block
    is what enters layer l when the learned prompt P is run alone. Gradients flow through F; detach the state to cut them.

    Our reading: F keeps its layer; it takes ordinary positions; and as a backbone is causal, its queries also see m_l and the copies
    before them (the paper: the block and the old F alone, which is so with memory=0 but for the copies). No weights but P are added.
    backbone: a Decoder. segment: tokens of a block. tokens: m, 0..segment; 0 is Transformer-XL.
    """

    kind = "transformer-fam"

    def __init__(self, backbone: Model, segment: int = 128, memory: int = 128, tokens: int = 8):
        super().__init__(backbone, segment, memory)
        self.config["tokens"] = tokens
        self.prompt = memory_prompt(backbone, tokens, segment)

    def initial(self, h: Tensor) -> FAMMemory:
        start, feedback = super().initial(h), []
        x = self.prompt.to(h.dtype)[None]
        for block in self.backbone.blocks:
            feedback.append(x.expand(len(h), -1, -1))
            x = block(x, None, None)[0] if x.shape[1] else x
        return FAMMemory(size=start.size, inputs=start.inputs, feedback=tuple(feedback))

    def advance(self, h: Tensor, memory: FAMMemory, open: DecoderState | None, piece: Piece) -> tuple[Tensor, State, State | None]:  # type: ignore[override]
        reset: Tensor | bool = False
        if piece.any_starts:
            open, reset = self._recall(memory, open, piece)
        room = torch.zeros_like(memory.feedback[0])  # what stands at the memory's places is the layers' own
        run = Run(piece, h, room, room, reset)
        span = None if piece.valid is None else Span(piece.valid)
        inputs, written = [], []

        def give(layer: int, x: Tensor) -> Tensor:
            front, tokens, back = run.split(x)
            inputs.append(last_inputs(memory.inputs[layer], tokens.detach(), span))
            feedback = memory.feedback[layer]
            x = torch.cat([feedback[:, : front.shape[1]], tokens, feedback[:, : back.shape[1]]], 1)
            return x if run.order is None else x.gather(1, run.order[..., None].expand(-1, -1, x.shape[2]))

        def take(layer: int, x: Tensor) -> Tensor:
            if piece.any_ends:
                written.append(run.split(x)[2])
            return x

        hidden, open = self.backbone.encode(run.x, open, run.span, before=give, after=take)
        read = h.shape[1] if piece.valid is None else piece.valid.sum(1)
        memory = memory.replace(size=(memory.size + read).clamp(max=self.memory), inputs=tuple(inputs))
        new = memory.replace(feedback=tuple(written)) if written else memory
        return run.split(hidden)[1], piece.commit(new, memory), open
