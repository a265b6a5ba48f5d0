"""Linear-MoE: linear mixers and mixtures of experts, with a layer of softmax attention now and then (arXiv 2503.05447)."""

from __future__ import annotations

from typing import Any

from ..catalog import system
from ..errors import UsageError, positive
from .decoder import Decoder, ModelConfig


@system(
    "linear-moe",
    kind="training",
    paper="arXiv:2503.05447",
    year=2025,
    name="Linear-MoE",
    example={"vocab": 64, "dim": 32, "layers": 4, "pattern": "LLLN", "experts": 4},
    state="the mixers'",
    parity="transformers MixtralSparseMoeBlock and load_balancing_loss_func; one expert is the dense feed-forward; SP split equals unsplit",
    claim="Loss close to softmax attention's at the same active parameters, pure or hybrid; memory flat in the length without N layers.",
)
def linear_moe(
    vocab: int,
    dim: int = 256,
    layers: int = 4,
    mixer: str = "gla",
    hyper: dict[str, Any] | None = None,
    pattern: str = "L",
    heads: int = 4,
    experts: int = 8,
    top_k: int = 2,
    ffn: float = 1.0,
    tie: bool = True,
) -> Decoder:
    """A Decoder of RMSNorm, mixer, RMSNorm, mixture of experts. The paper's has 64 experts, of which a token takes 8.

    mixer, hyper: the linear layers' slug and hyper-parameters, any of the catalog. pattern: L is such a layer, N one of softmax attention
    with `heads`; repeated to `layers` of them: "L" is the pure model, "LLLN" the hybrid. ffn: the width of one expert over dim.
    Train it with `moe.balanced(loss)`; a sequence may be split among machines as `ops.sequence` shows.
    """
    positive(layers=layers, experts=experts, top_k=top_k)
    if not pattern or set(pattern) - set("LN"):
        raise UsageError(f"pattern is {pattern!r}; it must be of the letters L (linear) and N (softmax attention), such as 'LLLN'.")
    kinds = {"L": {"mixer": mixer, **(hyper or {})}, "N": {"mixer": "attention", "heads": heads}}
    specs = [kinds[pattern[index % len(pattern)]] for index in range(layers)]
    return Decoder(ModelConfig(vocab=vocab, dim=dim, layers=specs, ffn=ffn, tie=tie, experts=experts, top_k=top_k))


linear_moe.role = "model"  # rm.model finds it too
