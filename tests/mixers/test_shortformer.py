"""Shortformer's position-infused attention against the equation in a loop, and its training lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence.errors import UsageError
from remanence.mixers.relative_attention import sinusoids
from remanence.mixers.shortformer import Shortformer, staged_lengths

DIM, H, S = 16, 2, 5


def build(segment: int = S) -> Shortformer:
    return rm.mixer("shortformer", dim=DIM, heads=H, segment=segment).double()  # type: ignore[return-value]


def attention(mixer: Shortformer, x: Tensor, queries: int) -> Tensor:
    """Ordinary causal attention of the last `queries` of x [B, N, dim] to all, with positions 0 .. N - 1 in queries and keys."""
    w_q, w_k = mixer.to_qk.weight.chunk(2)
    placed = x + sinusoids(x.shape[1], DIM, x.device, x.dtype)
    q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in (placed[:, -queries:] @ w_q.T, placed @ w_k.T, mixer.to_v(x)))
    score = (q @ k.mT) * (DIM // H) ** -0.5
    future = torch.ones(score.shape[-2:]).triu(1 + x.shape[1] - queries).bool()
    return mixer.out((score.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2))


def loop(mixer: Shortformer, x: Tensor) -> Tensor:
    parts, cache, outputs = x.split(mixer.segment, 1), x[:, :0], []
    for part in parts:
        outputs.append(attention(mixer, torch.cat([cache, part], 1), part.shape[1]))
        cache = part  # layer inputs, without positions
    return torch.cat(outputs, 1)


def test_parity_with_the_cached_subsequence() -> None:
    mixer, x = build(), torch.randn(2, 4 * S + 3, DIM, dtype=torch.float64)
    got, want = mixer(x)[0], loop(mixer, x)
    assert_parity("shortformer", "position-infused attention over [cache, segment], the equation", got, want, 1e-10)
    grads = []
    for y in (got, want):
        found = torch.autograd.grad(y.square().sum(), list(mixer.parameters()))
        grads.append(dict(zip(dict(mixer.named_parameters()), found)))
    assert_gradients_close("shortformer", *grads, tol=1e-9)


def test_an_empty_cache_is_ordinary_attention_with_positions() -> None:
    mixer, x = build(40), torch.randn(2, 37, DIM, dtype=torch.float64)
    assert_close("one segment", mixer(x)[0], attention(mixer, x, 37), 1e-10)


def test_values_hold_no_position() -> None:
    """Were all inputs the same, no mixture of values could tell one place from another."""
    x = torch.randn(1, 1, DIM, dtype=torch.float64).expand(2, 3 * S, -1)
    y, _ = build()(x)
    assert_close("all places", y, y[:, :1].expand_as(y), 1e-12)


def test_staged_lengths() -> None:
    assert staged_lengths(6) == [128] * 3 + [512] * 3
    assert staged_lengths(8, (32, 64, 128), 0.25) == [32] * 2 + [64] * 3 + [128] * 3
    assert staged_lengths(3, (64,)) == [64] * 3 and staged_lengths(4, (8, 16), 1.0) == [8] * 4
    with pytest.raises(UsageError, match="grow"):
        staged_lengths(4, (16, 8))
    with pytest.raises(UsageError, match="fraction"):
        staged_lengths(4, (8, 16), 1.5)
