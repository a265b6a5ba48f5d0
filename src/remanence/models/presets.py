"""Decoders that have a name: `rm.model("hybrid", vocab=256)`."""

from __future__ import annotations

from ..catalog import system
from .decoder import Decoder, ModelConfig


@system("transformer", kind="model", paper="arXiv:1706.03762", year=2017, name="Transformer", example={"vocab": 64, "dim": 32})
def transformer(
    vocab: int, dim: int = 256, repeat: int = 4, heads: int = 4, window: int | None = None, ffn: float = 2.0, tie: bool = True
) -> Decoder:
    """`repeat` blocks of attention with rotary positions; with a `window` a token sees that many tokens and the state is bounded."""
    layer = {"mixer": "attention", "heads": heads} | ({} if window is None else {"window": window})
    return Decoder(ModelConfig(vocab=vocab, dim=dim, layers=[layer], repeat=repeat, ffn=ffn, tie=tie))


@system(
    "hybrid",
    kind="model",
    paper="arXiv:2412.06464",
    year=2024,
    name="Hybrid: 3 gated-deltanet : 1 attention",
    example={"vocab": 64, "dim": 32},
)
def hybrid(
    vocab: int, dim: int = 256, repeat: int = 1, heads: int = 4, window: int | None = None, ffn: float = 2.0, tie: bool = True
) -> Decoder:
    """`repeat` times three blocks of gated-deltanet and one of attention; with a `window` the state is bounded."""
    recall = {"mixer": "attention", "heads": heads} | ({} if window is None else {"window": window})
    layers = [{"mixer": "gated-deltanet", "times": 3, "heads": heads}, recall]
    return Decoder(ModelConfig(vocab=vocab, dim=dim, layers=layers, repeat=repeat, ffn=ffn, tie=tie))
