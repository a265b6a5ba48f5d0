"""xLSTM[a:b]: decoders that stack a layers of mLSTM to b of sLSTM (arXiv 2405.04517), and the all-mLSTM stack of xLSTM 7B (2503.13427)."""

from __future__ import annotations

import re

from ..catalog import system
from ..errors import UsageError, positive
from .decoder import Decoder, ModelConfig

BLOCKS = {"2024": 0.0, "7b": 8 / 3}
"""Blocks of mLSTM and the width of the feed-forward after each: the 2024 block has its own up-projection instead."""


def xlstm_layers(layers: int, ratio: str, heads: int, block: str) -> list[dict[str, object]]:
    """The layer list of xLSTM[a:b], ratio "a:b": in every a + b layers one mLSTM, the b sLSTM, then the other mLSTM, as the authors place
    them. Raises UsageError on a ratio or a block that makes no sense."""
    positive(layers=layers, heads=heads)
    match = re.fullmatch(r"(\d+):(\d+)", ratio) if isinstance(ratio, str) else None
    if match is None or match[1] == match[2] == "0":
        raise UsageError(f"ratio is {ratio!r}; it must be 'a:b', the numbers of mLSTM and sLSTM layers, not both 0.")
    if block not in BLOCKS:
        raise UsageError(f"block is {block!r}; it may be {' or '.join(map(repr, BLOCKS))}.")
    a, b = int(match[1]), int(match[2])
    if layers % (a + b):
        raise UsageError(f"layers={layers} is not a multiple of {a + b}, the layers of one xLSTM[{ratio}] group.")
    mlstm = {"mixer": "mlstm-7b", "heads": heads, "block": block, "ffn": BLOCKS[block]}
    slstm = {"mixer": "slstm", "heads": heads, "ffn": 4 / 3}
    first = min(a, 1)
    return [dict(spec) for spec in [mlstm] * first + [slstm] * b + [mlstm] * (a - first)] * (layers // (a + b))


@system(
    "xlstm",
    kind="model",
    paper="arXiv:2405.04517",
    year=2024,
    name="xLSTM[a:b]",
    example={"vocab": 64, "dim": 32, "layers": 2, "ratio": "1:1"},
    claim="On parity, trained at lengths 3-40 and tested to 256, xLSTM[0:1] is near 100% and mLSTM alone is at chance.",
)
def xlstm(
    vocab: int, dim: int = 256, layers: int = 8, ratio: str = "7:1", heads: int = 4, block: str = "2024", tie: bool = False
) -> Decoder:
    """`layers` layers of xLSTM[ratio]; block="7b" makes the mLSTM layers those of xLSTM 7B, which is ratio="1:0".

    The norms are RMSNorm (the 2024 stack has LayerNorm without bias), the feed-forwards SwiGLU (sLSTM's was gated GELU), and the 7B's
    cap on the logits is left out.
    """
    return Decoder(ModelConfig(vocab=vocab, dim=dim, layers=xlstm_layers(layers, ratio, heads, block), ffn=0, tie=tie))
