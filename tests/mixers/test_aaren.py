"""Aaren is causal softmax attention in which every token asks the same, learned, question."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence import Span
from remanence.errors import UsageError

DIM, HEADS = 32, 4


def attention(mixer: rm.Mixer, x: torch.Tensor) -> torch.Tensor:
    """Softmax attention with the query broadcast to all rows and a causal mask."""
    q = mixer.to_q(mixer.token).expand_as(x)
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, mixer.to_k(x), mixer.to_v(x)))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixer.out(o.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("length", [1, 5, 200])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_parity_attention_with_one_query(length, dtype, tol):
    torch.manual_seed(0)
    mixer = rm.mixer("aaren", dim=DIM, heads=HEADS).to(dtype)
    x, dy = torch.randn(2, length, DIM, dtype=dtype, requires_grad=True), torch.randn(2, length, DIM, dtype=dtype)
    got, want = mixer(x)[0], attention(mixer, x)
    if dtype == torch.float32:
        assert_parity("aaren", "torch scaled_dot_product_attention with one query", got, want, tol)
    assert_close("y", got, want, tol)
    leaves = [x, mixer.token, mixer.to_q.weight, mixer.to_k.weight, mixer.to_v.weight]
    for one, other in zip(*(torch.autograd.grad(y, leaves, dy) for y in (got, want))):
        assert_close("gradient", one, other, 10 * tol, floor=1e-3)


def test_scores_of_any_size():
    """Keys a thousand times too large: the average is that of one token, and nothing overflows."""
    torch.manual_seed(1)
    mixer = rm.mixer("aaren", dim=DIM, heads=HEADS)
    x = torch.randn(1, 50, DIM)
    with torch.no_grad():
        mixer.to_k.weight.mul_(1e3)
        assert_close("y", mixer(x)[0], attention(mixer, x), 1e-4)  # scores near 1e3 are multiples of 6e-5
        y, state = mixer(x[:, :20])
        assert state.weighted.isfinite().all() and y.isfinite().all()


def test_nothing_but_padding_is_nothing():
    mixer = rm.mixer("aaren", dim=DIM)
    x = torch.full((2, 3, DIM), torch.nan)
    y, state = mixer(x, None, Span(torch.zeros(2, 3, dtype=torch.bool)))
    assert not y.any() and not state.total.any() and state.tokens == 0


def test_bad_heads():
    with pytest.raises(UsageError, match="heads=5 does not divide dim=32"):
        rm.mixer("aaren", dim=DIM, heads=5)
