"""What mixers that read in segments share: the loop over segments, each row at its own pace, and the open segment's buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.softmax import attend
from ..span import Span, positions
from ..state import select_rows
from .base import Mixer


class Part:
    """Tokens of one round: in each row, part or all of one segment of `segment` tokens.

    begin [B]: position in its document of the row's first token here. phase, size: how many tokens of the segment came before, and how
    many are here: ints when all rows are in step, else [B]. valid: None in step, else [B, n] bool, which of the n positions are real.
    """

    def __init__(self, segment: int, begin: Tensor, phase: int | Tensor, size: int | Tensor, valid: Tensor | None = None):
        self.segment, self.phase, self.valid = segment, phase, valid
        self.count = size if isinstance(size, int) else valid.shape[1]  # type: ignore[union-attr]
        self.before = begin - phase
        """[B], how many tokens of the document are in earlier segments."""
        self.ends = (phase + size == segment) & (True if isinstance(size, int) else size > 0)
        self.any_ends = self.ends if isinstance(self.ends, bool) else bool(self.ends.any())

    def slots(self, device: torch.device) -> Tensor:
        """Place of each token in its segment, [1 or B, n]."""
        phase = self.phase if isinstance(self.phase, int) else self.phase[:, None]
        return phase + torch.arange(self.count, device=device)[None]

    def place(self, buffer: Tensor, new: Tensor) -> Tensor:
        """A copy of buffer [B, segment, ...] with the part's tokens new [B, n, ...] in their places; never a view of `new`."""
        if isinstance(self.phase, int):
            return torch.cat([buffer[:, : self.phase], new, buffer[:, self.phase + self.count :]], 1)
        slot = torch.where(self.valid, self.slots(new.device), self.segment)  # type: ignore[arg-type]
        index = slot.reshape(*slot.shape, *[1] * (new.ndim - 2)).expand_as(new)
        return torch.cat([buffer, torch.zeros_like(buffer[:, :1])], 1).scatter(1, index, new)[:, :-1]

    def commit(self, new: Tensor, old: Tensor) -> Tensor:
        """`new` in the rows whose segment ends here, `old` in the others."""
        if isinstance(self.ends, bool):
            return new if self.ends else old
        return torch.where(self.ends.reshape(-1, *[1] * (new.ndim - 1)), new, old) if self.any_ends else old

    def reopen(self, buffer: Tensor) -> Tensor:
        """What an open segment's buffer holds next: nothing in the rows whose segment ends here."""
        return self.commit(torch.zeros_like(buffer), buffer)

    def mask(self, earlier: Tensor) -> Tensor:
        """[B, n, E + segment] bool: the earlier keys that a row may see, [B, E], then those of its segment up to each token itself."""
        causal = torch.arange(self.segment, device=earlier.device) <= self.slots(earlier.device)[..., None]
        return torch.cat([earlier[:, None].expand(-1, self.count, -1), causal.expand(len(earlier), -1, -1)], 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, earlier: Tensor | None = None) -> Tensor:
        """Softmax attention of q [B, n, H, D] over k, v [B, E + segment, H, D]: E earlier keys, then the segment, causal.

        earlier: which of the E keys a row may see, [B, E]; None if there are none.
        """
        scale = q.shape[-1] ** -0.5
        if isinstance(self.phase, int):  # the rest of the segment is not there yet
            size = k.shape[1] - self.segment + self.phase + self.count
            k, v = k[:, :size], v[:, :size]
            if earlier is None and self.phase == 0:
                return attend(q, k, v, None, scale)
        mask = self.mask(q.new_zeros(len(q), 0, dtype=torch.bool) if earlier is None else earlier)
        return attend(q, k, v, mask[:, :, : k.shape[1]], scale)


def newest(buffer: Tensor, count: Tensor) -> Tensor:
    """Which entries of a buffer [B, E, ...] are there when it holds `count` [B], the newest last: [B, E] bool."""
    return torch.arange(buffer.shape[1], device=buffer.device) >= buffer.shape[1] - count[:, None]


class SegmentMixer(Mixer):
    """A mixer whose memory changes at the end of every `segment` tokens of a document, counted from its start.

    Subclasses give `fresh(x)`, the state of a document that starts, for the batch of x; `project(x, at)`, what can be computed for all
    tokens at once (a tuple of [B, T, ...]; at [B, T]: positions in the document); `advance(parts, state, part) -> (o, state)`, which
    reads one Part of each of these ([B, n, ...]) and gives o [B, n, ...], one vector a token once flattened, for the projection `out`.
    Work is a loop over segments; what is within one is in parallel. Gradients flow through the state; detach it to truncate them.
    """

    segment: int
    out: nn.Linear

    def fresh(self, x: Tensor) -> Any:
        raise NotImplementedError

    def project(self, x: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def advance(self, parts: tuple[Tensor, ...], state: Any, part: Part) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def forward(self, x: Tensor, state: Any = None, span: Span | None = None) -> tuple[Tensor, Any]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        at = positions(seen, x.shape[1], span)
        o, state = self.read(x, self.project(x, at), at, state or self.fresh(x), span)
        return self.out(o.flatten(2)), state.replace(seen=at[:, -1] + 1)

    def read(self, x: Tensor, inputs: tuple[Tensor, ...], at: Tensor, state: Any, span: Span | None) -> tuple[Tensor, Any]:
        """o [B, T, ...] of all tokens, and the state after them (whose `seen` is not yet advanced)."""
        low, high = (int(phase) for phase in (at[:, 0] % self.segment).aminmax())
        plain = span is None or (span.valid is None or bool(span.valid.all())) and (span.reset is None or not bool(span.reset.any()))
        if not plain or low != high:
            return self._ragged(x, inputs, at, state, span)
        outputs, first, phase = [], 0, low
        while first < x.shape[1]:
            size = min(self.segment - phase, x.shape[1] - first)
            part = Part(self.segment, at[:, first], phase, size)
            o, state = self.advance(tuple(y[:, first : first + size] for y in inputs), state, part)
            outputs.append(o)
            first, phase = first + size, 0
        return torch.cat(outputs, 1), state

    def _ragged(self, x: Tensor, inputs: tuple[Tensor, ...], at: Tensor, state: Any, span: Span | None) -> tuple[Tensor, Any]:
        """Each row at its own place: in a round a row reads on to the end of its segment, its document or its input."""
        length = x.shape[1]
        valid = torch.ones_like(at, dtype=torch.bool) if span is None or span.valid is None else span.valid
        opens = valid & (at % self.segment == 0)
        turn = opens.cumsum(1)
        turn = turn - turn[:, :1]
        outputs, place, width = [], torch.zeros_like(at), 0
        for number in range(int(turn.max()) + 1):
            mine = valid & (turn == number)  # [B, T], one run of tokens in each row
            size, first = mine.sum(1), mine.to(torch.int8).argmax(1)
            offset = torch.arange(max(int(size.max()), 1), device=x.device)  # 0 if every row is padding, of which one is read for its shape
            token = (first[:, None] + offset).clamp(max=length - 1)
            begin = at.gather(1, first[:, None])[:, 0]
            if bool((fresh := (size > 0) & (begin == 0)).any()):
                state = select_rows(fresh, self.fresh(x), state)
            part = Part(self.segment, begin, begin % self.segment, size, offset < size[:, None])
            parts = tuple(y.gather(1, token.reshape(*token.shape, *[1] * (y.ndim - 2)).expand(-1, -1, *y.shape[2:])) for y in inputs)
            o, state = self.advance(parts, state, part)
            outputs.append(o)
            place = torch.where(mine, width + torch.arange(length, device=x.device) - first[:, None], place)
            width += len(offset)
        o = torch.cat(outputs, 1)
        return o.gather(1, place.reshape(*place.shape, *[1] * (o.ndim - 2)).expand(-1, -1, *o.shape[2:])), state
