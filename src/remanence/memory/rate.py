"""RATE: memory tokens, a cache of earlier inputs, and a valve that decides what of the memory is overwritten (arXiv 2306.09459)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, divides, unknown
from ..models.base import Model
from ..models.decoder import DecoderState
from ..span import Span, last_inputs
from ..state import State
from .base import Piece, Run
from .rmt import memory_prompt
from .transformer_xl import TransformerXL, XLMemory

ACTIVATIONS = {"relu": F.relu, "leaky_relu": F.leaky_relu, "elu": F.elu, "tanh": torch.tanh, "none": lambda x: x}


class RATEMemory(XLMemory):
    vectors: Tensor  # [B, m, dim], what the next segment reads


class Valve(nn.Module):
    """Memory Retention Valve: W_o attn(q = M_n, k = v = act(written)), all projections with biases; no residual. [B, m, dim] each."""

    def __init__(self, dim: int, heads: int, activation: str):
        super().__init__()
        divides("valve", heads, "dim", dim)
        self.heads, self.activation = heads, ACTIVATIONS[activation]
        self.to_q, self.to_kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, old: Tensor, written: Tensor) -> Tensor:
        parts = self.to_q(old), *self.to_kv(self.activation(written)).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@system(
    "rate",
    kind="rl",
    paper="arXiv:2306.09459",
    year=2023,
    name="RATE (Recurrent Action Transformer with Memory)",
    example={"segment": 8, "memory": 5, "tokens": 2},
    state="m dim + L M dim, M = memory, and the backbone's own of one segment",
    parity="the published recurrence, re-derived in a loop; rmt without valve and cache; the backbone on windows without memory",
    claim="Trained on T-mazes of three segments it still turns right in corridors several times longer; a decision transformer does not.",
)
class RATE(TransformerXL):
    """ids [B, T] -> logits; the state is m memory vectors, each layer's last M inputs, and the backbone's own state of one segment.

        [_ | H | W] = backbone([M_s | x_s | M_s]) after the cache        logits = head(H)
        M_{s+1} = MHA(q = M_s, k = v = act(W)), the Memory Retention Valve; W itself with valve=0        M_1 = P, learned

    This is the memory of RATE around any Decoder, on embeddings: `encode` takes a trajectory's (return, observation, action) embeddings as
    it takes words, three a step. P starts as one N(0, 1) vector m times, as published: its tokens differ by their positions only. Every
    layer's cache (Transformer-XL's) holds the last M = memory inputs of tokens and passes no gradient; the published one keeps the memory
    tokens' too and hides the cache from them, which a causal backbone cannot. segment: S. tokens: m in 0..S. valve: its heads.
    activation: relu, leaky_relu, elu (broken in the published code), tanh or none.
    """

    kind = "rate"
    role = "segment-memory"

    def __init__(self, backbone: Model, segment: int = 128, memory: int = 128, tokens: int = 8, valve: int = 1, activation: str = "relu"):
        super().__init__(backbone, segment, memory)
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        if isinstance(valve, bool) or not isinstance(valve, int) or valve < 0:
            raise UsageError(f"valve is {valve!r}; it must be an integer >= 0, the heads of the valve's attention.")
        self.config |= {"tokens": tokens, "valve": valve, "activation": activation}
        like = memory_prompt(backbone, tokens, segment)
        self.prompt = nn.Parameter(torch.randn_like(like[:1]).repeat(tokens, 1))
        self.valve = Valve(backbone.dim, valve, activation).to(like) if valve and tokens else None

    def initial(self, h: Tensor) -> RATEMemory:
        start = super().initial(h)
        return RATEMemory(size=start.size, inputs=start.inputs, vectors=self.prompt.to(h.dtype).expand(len(h), -1, -1))

    def advance(self, h: Tensor, memory: RATEMemory, open: DecoderState | None, piece: Piece) -> tuple[Tensor, State, State | None]:  # type: ignore[override]
        reset: Tensor | bool = False
        if piece.any_starts:
            open, reset = self._recall(memory, open, piece)
        run = Run(piece, h, memory.vectors, memory.vectors, reset)
        span = None if piece.valid is None else Span(piece.valid)
        inputs = []

        def keep(layer: int, x: Tensor) -> Tensor:
            inputs.append(last_inputs(memory.inputs[layer], run.split(x)[1].detach(), span))
            return x

        hidden, open = self.backbone.encode(run.x, open, run.span, before=keep)
        _, out, written = run.split(hidden)
        read = h.shape[1] if piece.valid is None else piece.valid.sum(1)
        memory = memory.replace(size=(memory.size + read).clamp(max=self.memory), inputs=tuple(inputs))
        if piece.any_ends:
            vectors = written if self.valve is None else self.valve(memory.vectors, written)
            memory = piece.commit(memory.replace(vectors=vectors), memory)  # type: ignore[assignment]
        return out, memory, open
