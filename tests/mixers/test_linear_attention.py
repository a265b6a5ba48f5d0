"""Linear attention against its quadratic form: the T x T matrix of phi(q) . phi(k), its rows divided by their sums."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import remanence as rm
from helpers import assert_close


@pytest.mark.parametrize("feature", ["elu", "relu"])
def test_quadratic_form(feature: str) -> None:
    mixer = rm.mixer("linear-attention", dim=16, heads=2, feature=feature).double()
    x = torch.randn(2, 90, 16, dtype=torch.float64)
    q, k, v = mixer.to_qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
    phi = (lambda u: F.elu(u) + 1) if feature == "elu" else F.relu
    weight = torch.einsum("bihd,bjhd->bhij", phi(q), phi(k)).tril()
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)
    want = mixer.out(torch.einsum("bhij,bjhd->bihd", weight, v).flatten(2))
    y, state = mixer(x)
    assert_close("y", y, want, 1e-10)
    assert_close("normalizer", state.normalizer, phi(k).sum(1), 1e-10)


def test_wrong_use() -> None:
    with pytest.raises(rm.errors.UsageError, match="'elu' or 'relu'"):
        rm.mixer("linear-attention", dim=16, feature="exp")
    with pytest.raises(rm.errors.UsageError, match="heads=3"):
        rm.mixer("linear-attention", dim=16, heads=3)
    with pytest.raises(rm.errors.UsageError, match="head_dim=64"):
        rm.mixer("mamba2", dim=16)
    with pytest.raises(rm.errors.UsageError, match="groups=3"):
        rm.mixer("mamba2", dim=16, head_dim=8, groups=3)
