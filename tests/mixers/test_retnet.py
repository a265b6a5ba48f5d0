"""Retention against the published sum over all pairs, before and after the norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.errors import UsageError
from remanence.mixers.attention import rotate


def layer(**hyper) -> rm.Mixer:
    torch.manual_seed(0)
    return rm.mixer("retnet", dim=32, **hyper)


def parallel(mixer: nn.Module, x: Tensor) -> Tensor:
    """o before the norm: fla's naive_retention in our words, its rotation as one of complex numbers by the distance t - s."""
    B, T, _ = x.shape
    H, K = mixer.heads, mixer.key_dim
    q, k, v = mixer.to_qkv(x).split(mixer.sizes, -1)
    q, k = (torch.complex(*part.reshape(B, T, H, 2, K // 2).unbind(3)) for part in (q, k))  # dimension i is paired with i + K / 2
    at = torch.arange(T, dtype=x.dtype)
    distance = (at[:, None] - at[None, :]).clamp(min=0)
    turn = torch.exp(1j * distance[..., None] * 10000.0 ** (-2 * torch.arange(K // 2, dtype=x.dtype) / K))
    scores = torch.einsum("bthc,bshc,tsc->bhts", q, k.conj(), turn).real * K**-0.5
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=x.dtype))
    scores = scores * gamma[:, None, None] ** distance * (at[:, None] >= at[None, :])
    return torch.einsum("bhts,bshv->bthv", scores, v.reshape(B, T, H, -1))


@pytest.mark.parametrize("hyper", [{}, {"heads": 2, "expand_v": 1.0}])
def test_parity_with_the_published_sum(hyper: dict) -> None:
    mixer, x = layer(**hyper).double(), torch.randn(2, 130, 32, dtype=torch.float64)
    want = parallel(mixer, x)
    assert_parity("retnet", "fla naive_retention (re-derived), before the norm", mixer.retain(x, None, None)[0], want, 1e-10)
    single = layer(**hyper)
    assert_parity("retnet", "fla naive_retention (re-derived), fp32", single.retain(x.float(), None, None)[0], want.float())
    gate = mixer.to_gate(x)
    o = (want / (want.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2)
    assert_close("y", mixer(x)[0], (o * gate * gate.sigmoid()) @ mixer.out.weight.T, 1e-10)


def test_recurrent_chunked_and_parallel_forms_agree() -> None:
    x = torch.randn(2, 100, 32, dtype=torch.float64)
    want = parallel(layer().double(), x)
    naive, chunked = (layer(backend=backend).double() for backend in ("naive", "auto"))
    outputs, state = [], None
    for t in range(100):
        o, state = chunked.retain(x[:, t : t + 1], state, None)
        outputs.append(o)
    for got in (naive.retain(x, None, None)[0], chunked.retain(x, None, None)[0], torch.cat(outputs, 1)):
        assert_close("o", got, want, 1e-10)


def test_without_forgetting_it_is_linear_attention_on_rotated_keys() -> None:
    mixer, x = layer().double(), torch.randn(1, 90, 32, dtype=torch.float64)
    mixer.log_gamma = [0.0] * 4
    q, k, v = (part.unflatten(-1, (4, -1)) for part in mixer.to_qkv(x).split(mixer.sizes, -1))
    at = torch.arange(90)[None]
    q, k = (rotate(part, at, 10000.0, 8) for part in (q, k))
    want = torch.einsum("bhts,bshv->bthv", torch.einsum("bthk,bshk->bhts", q, k).tril() * 8**-0.5, v)
    assert_close("o", mixer.retain(x, None, None)[0], want, 1e-10)


def test_wrong_use() -> None:
    with pytest.raises(UsageError, match="heads=5 does not divide dim=32"):
        rm.mixer("retnet", dim=32, heads=5)
    with pytest.raises(UsageError, match="must be even"):
        rm.mixer("retnet", dim=12, heads=4)
