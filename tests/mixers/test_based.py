"""Based against quadratic Taylor attention, its feature map against the full one, BaseConv against a loop, and the model's layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.mixers.based import taylor


def full_map(x: Tensor) -> Tensor:
    """The paper's 1 + d + d^2 features: 1, x / d^(1/4), x (x) x / sqrt(2 d)."""
    d = x.shape[-1]
    square = torch.einsum("...i,...j->...ij", x, x).flatten(-2) / (2 * d) ** 0.5
    return torch.cat([torch.ones_like(x[..., :1]), x / d**0.25, square], -1)


def project(mixer: rm.Mixer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = mixer.to_qkv(x).split(mixer.sizes, -1)
    return tuple(part.unflatten(-1, (mixer.heads, -1)) for part in (q, k, v))


@pytest.mark.parametrize(("d", "size"), [(1, 3), (4, 15), (16, 153)])
def test_parity_compact_map_has_the_full_maps_inner_products(d: int, size: int) -> None:
    q, k = torch.randn(2, 50, d, dtype=torch.float64, requires_grad=True).unbind(0)
    assert taylor(q).shape == (50, size) and full_map(q).shape == (50, 1 + d + d * d)
    want = full_map(q) @ full_map(k).T
    assert_parity("based", "the full Taylor map (zoology's TaylorExp), re-derived", taylor(q) @ taylor(k).T, want, 1e-13)
    s = q @ k.T / d**0.5
    assert_close("1 + s + s^2 / 2", taylor(q) @ taylor(k).T, 1 + s + s.square() / 2, 1e-13)
    assert torch.autograd.gradcheck(taylor, (q[:3],))


def test_parity_quadratic_form() -> None:
    mixer = rm.mixer("based", dim=48, heads=3)
    x = torch.randn(2, 130, 48)
    q, k, v = project(mixer, x)
    s = torch.einsum("bihd,bjhd->bhij", q, k) / 16**0.5
    weight = (1 + s + s.square() / 2).tril()
    weight = weight / (weight.sum(-1, keepdim=True) + 1e-12)
    want = mixer.out(torch.einsum("bhij,bjhd->bihd", weight, v).flatten(2))
    y, state = mixer(x)
    assert_parity("based", "fla naive_parallel_based, re-derived", y, want)
    assert state.memory.shape == (2, 3, 153, 17)
    assert_close("normaliser", state.memory[..., -1], taylor(k).sum(1), 1e-5)


def test_base_conv_is_a_gated_sum_of_shifted_inputs() -> None:
    mixer = rm.mixer("base-conv", dim=8).double()
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    u, v = mixer.to_uv(x).chunk(2, -1)
    rows = [sum(mixer.conv.weight[:, 2 - j] * u[:, t - j] for j in range(min(3, t + 1))) for t in range(20)]
    want = mixer.out(F.silu(torch.stack(rows, 1)) * v)
    y, state = mixer(x)
    assert_close("y", y, want, 1e-12)
    assert torch.equal(state.conv, u[:, -2:])


def test_wrong_use() -> None:
    with pytest.raises(rm.errors.UsageError, match="heads=3"):
        rm.mixer("based", dim=32, heads=3)
    with pytest.raises(rm.errors.UsageError, match="feature_dim is 0"):
        rm.mixer("based", dim=32, feature_dim=0)
    with pytest.raises(rm.errors.ShapeError, match="empty sequence"):
        rm.mixer("based", dim=32)(torch.zeros(1, 0, 32))
