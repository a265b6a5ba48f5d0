"""The short convolution: chunk against the equation and against torch's conv1d, resets, and its state."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import assert_close, assert_gradients_close, spans
from remanence.ops.conv import chunk, conv, naive
from remanence.span import Span

EXACT = 1e-12
DIM = 5


def inputs(seed: int, length: int, width: int) -> list[Tensor]:
    """x [2, T, 5], weight [5, W], bias [5], before [2, W - 1, 5]."""
    torch.manual_seed(seed)
    shapes = [(2, length, DIM), (DIM, width), (DIM,), (2, width - 1, DIM)]
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def values_and_gradients(rule, leaves: list[Tensor], *rest) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = [x.clone().requires_grad_() for x in leaves]
    y = rule(*leaves, *rest)
    return y, dict(zip(("x", "weight", "bias", "before"), torch.autograd.grad(y.sin().sum(), leaves)))


@given(st.data(), st.integers(0, 99), st.integers(1, 40), st.integers(2, 5))
def test_chunk_is_the_equation(data: st.DataObject, seed: int, length: int, width: int) -> None:
    leaves = inputs(seed, length, width)
    reset = data.draw(spans(2, length)).reset
    want, gradients = values_and_gradients(naive, leaves, reset)
    got, found = values_and_gradients(chunk, leaves, reset)
    assert_close("y", got, want, EXACT)
    assert_gradients_close("conv", found, gradients, EXACT)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fresh_start_is_torch_conv1d(width: int, bias: bool) -> None:
    x, weight, b, _ = inputs(0, 23, width)
    b = b if bias else None
    want = F.conv1d(F.pad(x.mT, (width - 1, 0)), weight[:, None], b, groups=DIM).mT
    got, state = conv(x, weight, b)
    assert_close("y", got, want, EXACT)
    assert torch.equal(state, x[:, x.shape[1] - width + 1 :])


@given(st.integers(0, 99), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
def test_the_state_continues(seed: int, first: int, second: int, width: int) -> None:
    x, weight, bias, before = inputs(seed, first + second, width)
    want, end = conv(x, weight, bias, before)
    a, state = conv(x[:, :first], weight, bias, before)
    b, state = conv(x[:, first:], weight, bias, state)
    assert_close("y", torch.cat([a, b], 1), want, EXACT)
    assert torch.equal(state, end)


@given(st.data(), st.integers(0, 99), st.integers(1, 20))
def test_a_reset_starts_afresh(data: st.DataObject, seed: int, length: int) -> None:
    x, weight, bias, before = (part[:1] if part.ndim == 3 else part for part in inputs(seed, length, 4))
    at = data.draw(st.integers(0, length - 1))
    reset = (torch.arange(length) == at)[None]
    y, end = conv(x, weight, bias, before, Span(reset=reset))
    fresh, state = conv(x[:, at:], weight, bias)
    assert_close("from the reset on", y[:, at:], fresh, EXACT)
    assert torch.equal(end, state)
    if at:
        assert_close("up to the reset", y[:, :at], conv(x[:, :at], weight, bias, before)[0], EXACT)


@given(st.integers(0, 99), st.integers(2, 20), st.integers(0, 20))
def test_padding_leaves_the_state_alone(seed: int, length: int, real: int) -> None:
    x, weight, bias, before = inputs(seed, length, 4)
    real = min(real, length)
    y, end = conv(x, weight, bias, before, Span.from_lengths([length, real], length))
    if real:
        alone, state = conv(x[1:, :real], weight, bias, before[1:])
        assert_close("padded row", y[1:, :real], alone, EXACT)
        assert torch.equal(end[1:], state)
    else:
        assert torch.equal(end[1:], before[1:])
