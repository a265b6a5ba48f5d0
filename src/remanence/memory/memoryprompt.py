"""MemoryPrompt: an LSTM beside a frozen language model turns its last hidden state into the next turn's prompt (arXiv 2402.15268)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import positive
from ..models.base import Model
from ..ops.backend import accumulate_dtype
from ..span import Span, last_inputs
from ..state import State
from .base import Piece, SegmentMemory
from .parts import Mask, Weave, slots_of


class MemoryPromptMemory(State):
    turns: Tensor  # [B] int64, turns read: there is no prompt before the first
    hidden: Tensor  # [B, n dim] float32, the LSTM's hidden state: the next prompt
    cell: Tensor  # [B, n dim] float32


@system(
    "memoryprompt",
    kind="segment-memory",
    paper="arXiv:2402.15268",
    year=2024,
    name="MemoryPrompt",
    example={"segment": 8, "slots": 2, "hidden": 24, "train_base": True},
    state="2 n dim, and the backbone's state within a segment",
    parity="ncarraz/MemoryPrompt: torch's LSTM and Linear turn by turn",
    claim="After 10 to 30 updates of a fact the latest value is known; without memory it is not.",
)
class MemoryPrompt(SegmentMemory):
    """ids [B, T] -> logits; a segment is a turn, and the state between turns is that of one LSTM.

        r = backbone([P_t | x_t])[last]     u = W_2 relu(W_1 r)     h_{t+1}, c_{t+1} = LSTM(u, h_t, c_t)     P_{t+1} = h_{t+1} as [n, dim]

    The first turn has no prompt. slots: n; 0 is the backbone on each segment by itself. hidden: width of W_1 and W_2, 1024 in the paper;
    the LSTM has (hidden + n dim) 4 n dim weights. W_1, W_2 start Xavier with gain 1e-4. train_base: else the backbone's parameters are
    frozen in place, as in the paper. backbone: any Model.
    """

    kind = "memoryprompt"

    def __init__(self, backbone: Model, segment: int = 128, slots: int = 5, hidden: int = 1024, train_base: bool = False):
        super().__init__(backbone, segment, slots=slots, hidden=hidden, train_base=train_base)
        positive(hidden=hidden)
        self.slots, width = slots_of(slots), slots * backbone.dim
        self.inner, self.outer = nn.Linear(backbone.dim, hidden), nn.Linear(hidden, hidden)
        for linear in (self.inner, self.outer):
            nn.init.xavier_uniform_(linear.weight, gain=1e-4)
            nn.init.zeros_(linear.bias)
        if slots:
            self.lstm_input, self.lstm_hidden = nn.Linear(hidden, 4 * width), nn.Linear(width, 4 * width)
            for parameter in (*self.lstm_input.parameters(), *self.lstm_hidden.parameters()):
                nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)  # torch's own for an LSTM
        self.to(next(backbone.parameters()))
        backbone.requires_grad_(train_base)

    def initial(self, h: Tensor) -> MemoryPromptMemory:
        zero = h.new_zeros(len(h), self.slots * self.dim, dtype=accumulate_dtype(h))
        return MemoryPromptMemory(turns=torch.zeros(len(h), dtype=torch.long, device=h.device), hidden=zero, cell=zero)

    def advance(self, h: Tensor, memory: MemoryPromptMemory, open: State | None, piece: Piece) -> tuple[Tensor, State, State | None]:
        rows = (memory.turns > 0) & piece.starts  # [B]
        prompt: Mask = bool(self.slots) and bool(rows.any())
        if prompt and not bool(rows.all()):
            prompt = rows
        front = memory.hidden.to(h.dtype).unflatten(1, (self.slots, self.dim)) if self.slots else h[:, :0]
        first = piece.starts if isinstance(piece.starts, Tensor) and open is not None else False
        run = Weave([(front, prompt), (h, True if piece.valid is None else piece.valid)], first)
        hidden, open = self.backbone.encode(run.x, open, run.span)
        out = run.split(hidden)[1]
        if piece.any_ends and self.slots:
            span = None if piece.valid is None else Span(piece.valid)
            last = last_inputs(torch.zeros_like(out[:, :1]), out, span)[:, 0]  # [B, dim]
            memory = piece.commit(self.step(last, memory), memory)  # type: ignore[assignment]
        return out, memory, open

    def step(self, last: Tensor, memory: MemoryPromptMemory) -> MemoryPromptMemory:
        """One step of the LSTM from a turn's last hidden state [B, dim]."""
        u = self.outer(self.inner(last).relu())
        gates = self.lstm_input(u) + self.lstm_hidden(memory.hidden.to(u.dtype))
        i, f, g, o = gates.to(memory.cell.dtype).chunk(4, -1)
        cell = f.sigmoid() * memory.cell + i.sigmoid() * g.tanh()
        return MemoryPromptMemory(turns=memory.turns + 1, hidden=o.sigmoid() * cell.tanh(), cell=cell)
