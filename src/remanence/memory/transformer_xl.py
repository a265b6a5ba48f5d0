"""Transformer-XL: each layer also sees its own inputs of the segments before, without gradient (arXiv 1901.02860)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..catalog import system
from ..errors import UsageError
from ..models.base import Model
from ..models.decoder import Decoder, DecoderState
from ..span import Span, last_inputs
from ..state import State
from .base import Piece, Run, SegmentMemory


class XLMemory(State):
    size: Tensor  # [B] int64, how many of the M entries hold a token of the current document
    inputs: tuple  # of each layer, its last M inputs [B, M, dim], the newest last, zeros where there are fewer


@system(
    "transformer-xl",
    kind="segment-memory",
    paper="arXiv:1901.02860",
    year=2019,
    name="Transformer-XL",
    example={"segment": 8, "memory": 12},
)
class TransformerXL(SegmentMemory):
    """ids [B, T] -> logits; the state is each layer's last M inputs, and the backbone's own state of one segment.

        layer l:  q from h, k and v from [sg(m_l) | h]        m_l' = sg([m_l | h][-M:])        h: its input in this segment, [B, S, dim]

    At the start of a segment each layer's mixer first reads the normed m_l from a fresh state, then goes on with the segment. For attention
    that gives the keys and values above, and with `relative-attention` mixers the paper's attention in this library's pre-norm blocks; any
    other mixer gets the same recurrence. Gradients end where a segment starts, however the stream is cut into calls.
    backbone: a Decoder. segment: S. memory: M >= 0, which may be larger than S.
    """

    kind = "transformer-xl"
    backbone: Decoder

    def __init__(self, backbone: Model, segment: int = 128, memory: int = 128):
        super().__init__(backbone, segment, memory=memory)
        if not isinstance(backbone, Decoder):
            raise UsageError(f"backbone is a {type(backbone).__name__}; transformer-xl works between the layers of a Decoder.")
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < 0:
            raise UsageError(f"memory is {memory!r}; it must be an integer >= 0, the tokens that each layer keeps.")
        self.memory = memory

    def initial(self, h: Tensor) -> XLMemory:
        inputs = tuple(h.new_zeros(len(h), self.memory, self.dim) for _ in self.backbone.blocks)
        return XLMemory(size=torch.zeros(len(h), dtype=torch.long, device=h.device), inputs=inputs)

    def advance(self, h: Tensor, memory: XLMemory, open: DecoderState | None, piece: Piece) -> tuple[Tensor, State, State | None]:
        reset: Tensor | bool = False
        if piece.any_starts:
            open, reset = self._recall(memory, open, piece)
        run = Run(piece, h, reset=reset)
        inputs = []

        def keep(layer: int, x: Tensor) -> Tensor:
            inputs.append(last_inputs(memory.inputs[layer], x.detach(), run.span))
            return x

        hidden, open = self.backbone.encode(run.x, open, run.span, before=keep)
        read = h.shape[1] if piece.valid is None else piece.valid.sum(1)
        memory = XLMemory(size=(memory.size + read).clamp(max=self.memory), inputs=tuple(inputs))
        return run.split(hidden)[1], memory, open

    def _recall(self, memory: XLMemory, open: DecoderState | None, piece: Piece) -> tuple[DecoderState | None, Tensor | bool]:
        """The mixers' states after they have read the memory, in rows that start a segment; and the rows whose memory is empty."""
        low, high = (int(size) for size in memory.size.aminmax())
        stale = open is not None  # a row that starts a segment still holds the state of the one before
        empty: Tensor | bool = piece.starts & (memory.size == 0) if stale else False
        if high == 0:
            return open, empty
        first, span = self.memory - high, None  # entries before `first` are empty in every row
        if low != high or stale:
            at = torch.arange(first, self.memory, device=memory.size.device)
            oldest = (self.memory - memory.size)[:, None]
            starts = torch.as_tensor(piece.starts, device=at.device).expand(len(memory.size))[:, None]
            span = Span(starts & (at >= oldest), starts & (at == oldest) if stale else None)
        layers = []
        for index, block in enumerate(self.backbone.blocks):
            x = block.norm(memory.inputs[index][:, first:])  # type: ignore[operator]
            _, new = block.mixer(x, open and open.layers[index], span)  # type: ignore[operator]
            layers.append(new)
        return DecoderState(seen=layers[0].seen, layers=tuple(layers)), empty
