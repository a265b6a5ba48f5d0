"""The Based model: gated short convolutions, a few Taylor linear attentions, a few sliding windows (arXiv 2402.18668)."""

from __future__ import annotations

from ..catalog import system
from .decoder import Decoder, ModelConfig


@system(
    "based-stack",
    kind="model",
    paper="arXiv:2402.18668",
    year=2024,
    name="Based model",
    example={"vocab": 64, "dim": 32, "feature_dim": 6, "window": 20, "ffn": 1},
    state="3 layers of (W - 1) E, one of H F (D + 1), one window of 2 dim a token, times repeat",
)
def based_stack(
    vocab: int,
    dim: int = 256,
    repeat: int = 1,
    heads: int = 4,
    feature_dim: int = 16,
    window: int = 64,
    mixer: str = "based",
    ffn: float = 2.0,
    tie: bool = True,
) -> Decoder:
    """`repeat` times five blocks: base-conv, Taylor linear attention, attention in a window, base-conv, base-conv.

    The order is that of the released 360M model, whose layers 2, 7, 12 ... of 27 are linear and 3, 8, 13 ... windowed (256 tokens there;
    the paper has 64 to 128). Rotary positions are in the window layers alone. mixer: "based", or "jrt" for JRT-RNN.
    """
    conv = {"mixer": "base-conv"}
    linear = {"mixer": mixer, "heads": heads, "feature_dim": feature_dim}
    layers = [conv, linear, {"mixer": "attention", "heads": heads, "window": window}, conv, conv]
    return Decoder(ModelConfig(vocab=vocab, dim=dim, layers=layers, repeat=repeat, ffn=ffn, tie=tie))
