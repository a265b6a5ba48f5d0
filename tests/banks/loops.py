"""What the tests of the layers over banks share: a layer with weights that are not special, and attention of one query in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import remanence as rm


def layer(slug: str, dim: int = 12, dtype: torch.dtype = torch.float64, **hyper: Any) -> Any:
    """A mixer of the catalog, its parameters moved off their initial values."""
    torch.manual_seed(0)
    mixer = rm.mixer(slug, dim=dim, **hyper).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer.eval()


def inputs(batch: int, length: int, dim: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(mixer: Any, x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, H, D] each."""
    q, k, v = (x @ mixer.to_qkv.weight.T).chunk(3, -1)
    return tuple(part.unflatten(-1, (heads, -1)) for part in (q, k, v))  # type: ignore[return-value]


def turn(x: Tensor, place: int, theta: float = 10000.0) -> Tensor:
    """Rotary embedding of one vector [D] at a position, as complex numbers of the pairs (i, i + D / 2)."""
    half = x.shape[-1] // 2
    angle = place * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half, dtype=torch.float64), angle)
    return torch.cat([turned.real, turned.imag])


def softmax_read(logits: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """sum_j softmax_j(logits) values_j over lists of numbers and vectors."""
    return (torch.stack(list(logits)).softmax(0)[:, None] * torch.stack(list(values))).sum(0)
