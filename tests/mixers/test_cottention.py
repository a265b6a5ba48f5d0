"""Cottention against its quadratic form with the released code's normalisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.mixers.attention import rotate


@pytest.mark.parametrize("rope", [1.0, 0.5, 0.0])
def test_parity_quadratic_form(rope: float) -> None:
    torch.manual_seed(0)
    mixer = rm.mixer("cottention", dim=32, heads=4, rope=rope)
    with torch.no_grad():
        mixer.norm_power.copy_(torch.tensor([0.5, -2.0, 0.0, 3.0]))
    x = torch.randn(2, 100, 32)
    q, k, v = mixer.to_qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
    at = torch.arange(100).expand(2, -1)
    if rope:
        q, k = (rotate(part, at, 10000.0, int(8 * rope)) for part in (q, k))
    similarity = torch.einsum("bihd,bjhd->bhij", F.normalize(q, dim=-1), F.normalize(k, dim=-1)).tril()
    v = v / (torch.arange(1, 101)[:, None] ** mixer.norm_power.sigmoid())[None, ..., None]
    want = mixer.out(torch.einsum("bhij,bjhd->bihd", similarity, v).flatten(2))
    assert_parity("cottention", "GPTCosAttention's quadratic branch, re-derived", mixer(x)[0], want)


def test_the_sum_depends_on_distance_alone_but_for_the_count() -> None:
    """With m at minus infinity no value is divided, and rotary similarities see differences of positions only."""
    mixer = rm.mixer("cottention", dim=16, heads=2).double()
    with torch.no_grad():
        mixer.norm_power.fill_(-100.0)
    x = torch.randn(1, 30, 16, dtype=torch.float64)
    _, state = mixer(torch.randn(1, 50, 16, dtype=torch.float64))
    late, _ = mixer(x, state.replace(memory=torch.zeros_like(state.memory)))
    assert_close("late", late, mixer(x)[0], 1e-10)


def test_wrong_use() -> None:
    with pytest.raises(rm.errors.UsageError, match="heads=3"):
        rm.mixer("cottention", dim=32, heads=3)
