"""Hierarchical Memory Transformer: a segment recalls from a queue of earlier segments' embeddings (arXiv 2405.06067)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, positive
from ..models.base import Model
from ..span import Span, last_inputs
from ..state import State
from .base import Piece, SegmentMemory
from .parts import Mask, Weave
from .rmt import memory_prompt


class HMTMemory(State):
    size: Tensor  # [B] int64, how many of the N places hold an embedding
    queue: Tensor  # [B, N, dim], the memory embeddings of the last N segments, the newest last
    tail: Tensor  # [B, k, dim], the last k token embeddings of the segment before


class HMTOpen(State):
    base: State  # the backbone's own state in the open segment
    count: Tensor  # [B] int64, tokens of the segment read
    prompt: Tensor  # [B, 1, dim], what stands behind the segment
    kept: Tensor  # [B, w, dim], the segment's token embeddings so far in the last places, w = max(j, k)


@system(
    "hmt",
    kind="segment-memory",
    paper="arXiv:2405.06067",
    year=2024,
    name="Hierarchical Memory Transformer",
    example={"segment": 16, "queue": 4, "sensory": 3},
    state="(N + k) dim, and (max(j, k) + 1) dim and the backbone's state within a segment",
    parity="the recall and the passes of OswaldHe/HMT-pytorch in a loop; recall=False is rmt with one token",
    claim="Where segments alternate between 4 topics, each with a fact of its own, it recalls more than rmt with one memory token.",
)
class HMT(SegmentMemory):
    """ids [B, T] -> logits; the state is a queue of N memory embeddings, one a segment, and the last k tokens of the segment before.

        query    s_n = backbone([t | x_1 .. x_j | t])[last]                               t [dim] learned, j = S // 2
        recall   p_n = softmax((s_n W_q) (M W_k)^T / sqrt(dim)) M                         M: the queue; a learned vector if it is empty
        main     [m_{n-1} | last k tokens of segment n - 1 | x_1 .. x_j | p_n | x_{j+1} .. x_S | p_n] -> logits at x_n, m_n at the end

    Our reading of where p_n stands: the paper puts it in front of the segment whose first half it is made from, so that a token there sees
    its own future. Here p_n stands where its query is known, after the j-th token, and in front stands the newest embedding. With
    recall=False (the paper's first stage of training) it stands at both ends: rmt with one memory token, if sensory is None. The queue of
    the published training is detached; here `state.detach()` between calls does that. backbone: any Model. query: j. sensory: k, at most
    the segment; the paper's is 32 and its code's 0, here None. queue: N.
    """

    kind = "hmt"

    def __init__(
        self,
        backbone: Model,
        segment: int = 128,
        queue: int = 300,
        sensory: int | None = None,
        query: int | None = None,
        recall: bool = True,
    ):
        super().__init__(backbone, segment, queue=queue, sensory=sensory, query=query, recall=recall)
        positive(queue=queue)
        self.queue, self.sensory, self.query, self.recall = queue, sensory or 0, query or max(segment // 2, 1), recall
        if not 1 <= self.query <= segment:
            raise UsageError(f"query is {query} and segment {segment}; it reads the segment's first tokens.")
        if not 0 <= self.sensory <= segment:
            raise UsageError(f"sensory is {sensory} and segment {segment}; it is the end of a segment.")
        self.width, dim = max(self.query, self.sensory), backbone.dim
        self.topic, self.start = memory_prompt(backbone, 1, segment), memory_prompt(backbone, 1, segment)
        self.to_q, self.to_k = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.to(next(backbone.parameters()))

    def initial(self, h: Tensor) -> HMTMemory:
        size = torch.zeros(len(h), dtype=torch.long, device=h.device)
        return HMTMemory(size=size, queue=h.new_zeros(len(h), self.queue, self.dim), tail=h.new_zeros(len(h), self.sensory, self.dim))

    def advance(self, h: Tensor, memory: HMTMemory, open: HMTOpen | None, piece: Piece) -> tuple[Tensor, State, State | None]:
        starts = torch.as_tensor(piece.starts, device=h.device).expand(len(h))
        read = torch.full_like(memory.size, h.shape[1]) if piece.valid is None else piece.valid.sum(1)
        count, kept, prompt = torch.zeros_like(memory.size), h.new_zeros(len(h), self.width, self.dim), self._newest(memory, h)
        if open is not None:
            count, kept = torch.where(starts, 0, open.count), open.kept
            prompt = torch.where(starts[:, None, None], prompt, open.prompt)
        front = prompt
        crosses = (count < self.query) & (count + read >= self.query) & self.recall  # [B]
        if bool(crosses.any()):
            prompt = torch.where(crosses[:, None, None], self._recall(torch.cat([kept, h], 1), count, memory, crosses), prompt)
        run = Weave(self._parts(h, memory, piece, count, crosses, front, prompt), piece.starts if open is not None else False)
        hidden, base = self.backbone.encode(run.x, open and open.base, run.span)
        _, _, before, _, after, back = run.split(hidden)
        out = torch.cat([before, after], 1) if piece.valid is None else before + after
        kept = last_inputs(kept, h, None if piece.valid is None else Span(piece.valid))
        open = HMTOpen(base=base, count=count + read, prompt=prompt, kept=kept)
        if piece.any_ends:
            new = HMTMemory(
                size=(memory.size + 1).clamp(max=self.queue),
                queue=torch.cat([memory.queue[:, 1:], back], 1),
                tail=kept[:, self.width - self.sensory :],
            )
            memory = piece.commit(new, memory)  # type: ignore[assignment]
        return out, memory, open

    def _newest(self, memory: HMTMemory, h: Tensor) -> Tensor:
        """m_{n-1}, or the learned vector if there is none: [B, 1, dim]."""
        return torch.where((memory.size > 0)[:, None, None], memory.queue[:, -1:], self.start.to(h.dtype))

    def _parts(
        self, h: Tensor, memory: HMTMemory, piece: Piece, count: Tensor, crosses: Tensor, front: Tensor, prompt: Tensor
    ) -> list[tuple[Tensor, Mask]]:
        """[front | tail | tokens up to the j-th | p | the others | p] with what of it is there in which rows."""
        seasoned = (memory.size > 0) & piece.starts
        some = bool(seasoned.any())
        tail: Mask = seasoned if some and not bool(seasoned.all()) else some
        if piece.valid is None:
            at = self.query - int(count[0]) if bool(crosses[0]) else h.shape[1]
            tokens = (h[:, :at], True), (prompt, bool(crosses[0])), (h[:, at:], True)
        else:
            early = torch.arange(h.shape[1], device=h.device) < (self.query - count)[:, None]
            early = early | ~crosses[:, None]
            tokens = (h, piece.valid & early), (prompt, crosses), (h, piece.valid & ~early)
        return [(front, piece.starts), (memory.tail, tail), *tokens, (prompt, piece.ends)]

    def _recall(self, tokens: Tensor, count: Tensor, memory: HMTMemory, crosses: Tensor) -> Tensor:
        """p_n [B, 1, dim] in rows that cross; tokens [B, w + n, dim]: `kept`, then the piece."""
        rows = crosses.nonzero()[:, 0]
        at = self.width - count[rows, None] + torch.arange(self.query, device=tokens.device)
        first = tokens[rows].gather(1, at[..., None].expand(-1, -1, self.dim))
        topic = self.topic.to(tokens.dtype).expand(len(rows), 1, -1)
        hidden, _ = self.backbone.encode(torch.cat([topic, first, topic], 1))  # type: ignore[call-arg]
        queue, size = memory.queue[rows], memory.size[rows, None, None]
        score = self.to_q(hidden[:, -1:]) @ self.to_k(queue).mT * self.dim**-0.5  # [B', 1, N]
        empty = torch.arange(self.queue, device=tokens.device) < self.queue - size
        found = score.masked_fill(empty & (size > 0), -torch.inf).softmax(-1) @ queue
        found = torch.where(size > 0, found, self.start.to(found.dtype))
        return torch.zeros_like(tokens[:, :1]).index_copy(0, rows, found)
