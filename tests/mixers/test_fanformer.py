"""FANformer: without waves it is attention; its features against the definition."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from parity import assert_parity


@pytest.mark.parametrize("window", [None, 7])
def test_parity_without_waves_it_is_attention(window: int | None) -> None:
    mixer, attention = rm.mixer("fanformer", dim=32, period=0.0, window=window), rm.mixer("attention", dim=32, window=window)
    with torch.no_grad():
        mixer.to_features.weight.copy_(torch.eye(32))
        mixer.to_features.bias.zero_()
    attention.load_state_dict({name: tensor for name, tensor in mixer.state_dict().items() if "features" not in name})
    x = torch.randn(2, 50, 32)
    assert_parity("fanformer", "attention", mixer(x)[0], attention(x)[0])


def test_parity_features() -> None:
    mixer, attention = rm.mixer("fanformer", dim=32), rm.mixer("attention", dim=32)
    attention.load_state_dict({name: tensor for name, tensor in mixer.state_dict().items() if "features" not in name})
    weight, bias, x = mixer.to_features.weight, mixer.to_features.bias, torch.randn(2, 50, 32)
    assert weight.shape == (24, 32)  # a quarter of the features is shared by sine and cosine
    p, g = x @ weight[:8].T + bias[:8], x @ weight[8:].T + bias[8:]
    want, _ = attention(torch.cat([p.cos(), p.sin(), g], -1))
    assert_parity("fanformer", "YihongDong/FANformer's FAN before a fused q, k, v projection, re-derived", mixer(x)[0], want)


def test_wrong_use() -> None:
    with pytest.raises(rm.errors.UsageError, match="period is 0.6"):
        rm.mixer("fanformer", dim=32, period=0.6)
    with pytest.raises(rm.errors.UsageError, match="sinks=2"):
        rm.mixer("fanformer", dim=32, sinks=2)
