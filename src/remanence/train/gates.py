"""Write gates that can be exactly shut: seeing them from outside, and the cost that shuts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import UsageError


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, the pre-activations [B, T, H] of every hard write gate are appended to the list it yields, layer by layer.

    A hard gate is the `to_beta` of a mixer with write='hard': its value is the pre-activation clipped to [0, 1]. Raises UsageError if the
    model has none.
    """
    gates: list[Tensor] = []
    mixers = [module for module in model.modules() if getattr(module, "write", None) == "hard"]
    if not mixers:
        raise UsageError("the model has no hard write gate; give its gated-deltanet layers write='hard'.")
    hooks = [mixer.to_beta.register_forward_hook(lambda _module, _inputs, z: gates.append(z)) for mixer in mixers]  # type: ignore[union-attr]
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


def opening_cost(gates: list[Tensor], margin: float = 1.0) -> Tensor:
    """mean relu(z + margin): pushes every gate that nothing else holds open below -margin, so that it stays shut on text never seen."""
    return torch.stack([(z + margin).relu().mean() for z in gates]).mean()
