"""Recurrent Memory Transformer: memory tokens that each segment reads in front and writes behind (arXiv 2207.06881)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..models.base import Model
from ..state import State
from .base import Piece, Run, SegmentMemory


class RMTMemory(State):
    vectors: Tensor  # [B, m, dim], what the next segment reads


def memory_prompt(backbone: Model, tokens: int, segment: int, wide: bool = False) -> nn.Parameter:
    """Learned memory tokens [m, dim], N(0, 1) times the standard deviation of the token embeddings. Raises UsageError on a bad m."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        raise UsageError(f"tokens is {tokens!r}; it must be an integer >= 0.")
    if tokens > segment and not wide:
        raise UsageError(f"tokens is {tokens} and segment {segment}; a memory is at most as large (rmt takes more with wide=True).")
    with torch.no_grad():
        embedding = backbone.embed(torch.arange(backbone.vocab, device=backbone.device))
        return nn.Parameter(torch.randn(tokens, backbone.dim, device=embedding.device, dtype=embedding.dtype) * embedding.std())


@system(
    "rmt",
    kind="segment-memory",
    paper="arXiv:2207.06881",
    year=2022,
    name="Recurrent Memory Transformer",
    example={"segment": 8, "tokens": 2},
)
class RMT(SegmentMemory):
    """ids [B, T] -> logits; the state is m vectors between segments, and the backbone's own state of one segment within.

        [_ | H | M_{s+1}] = backbone([M_s | x_s | M_s])        logits = head(H)        M_1 = P, learned

    M_{s+1} [B, m, dim] is the backbone's final hidden state at the last m positions, as it is. Memory tokens take ordinary positions.
    backbone: any Model. segment: S. tokens: m, at most S unless wide=True (the associative retrieval of arXiv 2407.04841 gives 32 to
    segments of 5); 0 is the backbone on each segment by itself. memory_mask: only 'causal', in which a read token sees the read tokens
    before it (the paper's Transformer-XL code lets all m see each other). The copy behind is run when the S-th token of a segment is read,
    and not before.
    """

    kind = "rmt"

    def __init__(self, backbone: Model, segment: int = 128, tokens: int = 8, memory_mask: str = "causal", wide: bool = False):
        super().__init__(backbone, segment, tokens=tokens, **({"wide": True} if wide else {}))
        if memory_mask != "causal":
            raise UsageError(f"memory_mask is {memory_mask!r}; only 'causal' is there: a causal backbone has no bidirectional part.")
        self.prompt = memory_prompt(backbone, tokens, segment, wide)

    def initial(self, h: Tensor) -> RMTMemory:
        return RMTMemory(vectors=self.prompt.to(h.dtype).expand(len(h), -1, -1))

    def advance(self, h: Tensor, memory: RMTMemory, open: State | None, piece: Piece) -> tuple[Tensor, State, State | None]:
        run = Run(piece, h, memory.vectors, memory.vectors, reset=open is not None)
        hidden, open = self.backbone.encode(run.x, open, run.span)
        _, out, written = run.split(hidden)
        return out, piece.commit(RMTMemory(vectors=written), memory) if piece.any_ends else memory, open
