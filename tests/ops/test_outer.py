"""The gated outer-product state: chunk and step against the equation in float64, in values and in every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import assert_close, assert_gradients_close
from remanence.errors import BackendError, ShapeError, UsageError
from remanence.ops.outer import chunk, naive, outer, step
from remanence.span import Span

EXACT = 1e-10
NAMES = ("q", "k", "v", "log_decay", "initial")


def inputs(seed: int, batch: int, length: int, heads: int = 4, groups: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k [B, T, G, 5], v [B, T, H, 3], log decays from none to e^-3 a token, initial."""
    torch.manual_seed(seed)
    q, k, v = torch.randn(batch, length, groups, 5), torch.randn(batch, length, groups, 5), torch.randn(batch, length, heads, 3)
    log_decay = -torch.rand(batch, length, heads) * torch.tensor([0.0, 0.01, 0.3, 3.0])[torch.arange(heads) % 4]
    return [x.to(dtype) for x in (q, k, v, log_decay, torch.randn(batch, heads, 5, 3))]


def values_and_gradients(rule: Callable, leaves: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values, and gradients of a loss that reads the outputs and the final state."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    o, S = rule(*leaves)
    gradients = torch.autograd.grad(o.sin().sum() + (S * S.detach().cos()).sum(), leaves)
    return {"o": o, "S": S}, dict(zip(NAMES, gradients))


def assert_same(got: tuple[dict, dict], want: tuple[dict, dict], tol: float) -> None:
    for key in want[0]:
        assert_close(key, got[0][key], want[0][key], tol)
    assert_gradients_close("outer", got[1], want[1], tol)


def by_steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[1]):
        o, S = step(*(x[:, t : t + 1] for x in (q, k, v, g)), S, None if reset is None else reset[:, t : t + 1])
        outputs.append(o)
    return torch.cat(outputs, 1), S


def resets(length: int, which: str) -> Tensor | None:
    """[2, T]: a reset at the first or the last token, at several, or none; the second row has its own."""
    reset = torch.zeros(2, length, dtype=torch.bool)
    at = {"none": [], "first": [0], "last": [length - 1], "several": [0, length // 3, length // 3 + 1, length // 2]}[which]
    reset[0, [a for a in at if a < length]] = True
    reset[1, length // 2] = which == "several"
    return reset if which != "none" else None


@given(st.integers(0, 99), st.integers(1, 200), st.sampled_from(["none", "first", "last", "several"]), st.sampled_from([1, 2, 4]))
def test_chunks_agree(seed: int, length: int, which: str, groups: int) -> None:
    leaves, reset = inputs(seed, 2, length, groups=groups), resets(length, which)
    want = values_and_gradients(lambda *x: naive(*x, reset), leaves)
    assert_same(values_and_gradients(lambda *x: chunk(*x, reset), leaves), want, EXACT)


@given(st.integers(0, 99), st.integers(1, 20), st.sampled_from(["none", "first", "last", "several"]), st.sampled_from([1, 2, 4]))
def test_steps_agree(seed: int, length: int, which: str, groups: int) -> None:
    leaves, reset = inputs(seed, 2, length, groups=groups), resets(length, which)
    want = values_and_gradients(lambda *x: naive(*x, reset), leaves)
    assert_same(values_and_gradients(lambda *x: by_steps(*x, reset), leaves), want, EXACT)


@pytest.mark.parametrize("size", [1, 16, 33, 128])
def test_any_chunk_size(size: int) -> None:
    leaves, reset = inputs(0, 2, 130), resets(130, "several")
    want = values_and_gradients(lambda *x: naive(*x, reset), leaves)
    assert_same(values_and_gradients(lambda *x: chunk(*x, reset, size), leaves), want, EXACT)


def test_float32() -> None:
    leaves = inputs(1, 2, 200)
    got = values_and_gradients(chunk, [x.float() for x in leaves])
    assert got[0]["o"].dtype == torch.float32
    assert_same(got, values_and_gradients(naive, leaves), 1e-5)


def test_fresh_start_is_a_zero_state() -> None:
    *leaves, S = inputs(2, 2, 70)
    for rule, cut in ((chunk, 70), (naive, 70), (step, 1)):
        part = [x[:, :cut] for x in leaves]
        for got, want in zip(rule(*part), rule(*part, torch.zeros_like(S))):
            assert torch.equal(got, want)


def test_without_decay_the_state_is_a_sum() -> None:
    q, k, v, _, _ = inputs(3, 1, 90, groups=4)
    o, S = outer(q, k, v)
    assert_close("S", S, torch.einsum("bthk,bthv->bhkv", k, v), 1e-12)
    attention = torch.einsum("bthk,bshk->bhts", q, k).tril()
    assert_close("o", o, torch.einsum("bhts,bshv->bthv", attention, v), 1e-12)


def test_strong_decay_neither_overflows_nor_leaks() -> None:
    """exp(-60) a token: over a chunk the sums of logs reach -4000, whose difference must be taken before the exponential."""
    q, k, v, g, S = (x.float() for x in inputs(4, 1, 128, groups=4))
    leaves = [x.requires_grad_() for x in (q, k, v, torch.full_like(g, -60.0), S)]
    o, end = chunk(*leaves)
    assert_close("o", o, (q * k).sum(-1, keepdim=True) * v, 1e-5)
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum() + end.sum(), leaves))


@given(st.integers(0, 99), st.integers(1, 90))
def test_padding_and_cuts_of_the_rule(seed: int, length: int) -> None:
    q, k, v, g, S = inputs(seed, 2, length)
    real = 1 + seed % length
    span = Span.from_lengths([length, real], length)
    o, end = outer(q, k, v, g, S, span)
    alone, state = outer(*(x[1:, :real] for x in (q, k, v, g)), S[1:])
    assert_close("padded row", o[1:, :real], alone, EXACT)
    assert_close("padded row's state", end[1:], state, EXACT)
    first, state = outer(*(x[:, :real] for x in (q, k, v, g)), S)
    assert_close("first piece", first[:1], o[:1, :real], EXACT)
    if real < length:
        rest, state = outer(*(x[:, real:] for x in (q, k, v, g)), state)
        assert_close("second piece", rest[:1], o[:1, real:], EXACT)
    assert_close("state", state[:1], end[:1], EXACT)


def test_dtypes() -> None:
    q, k, v, g, S = inputs(5, 1, 20)
    o, end = outer(q.bfloat16(), k.bfloat16(), v.bfloat16(), g.bfloat16(), None)
    assert o.dtype == torch.bfloat16 and end.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the recurrence stays in float32
        inside = outer(q.float(), k.float(), v.float(), g.float(), S.float())
    for got, want in zip(inside, outer(q.float(), k.float(), v.float(), g.float(), S.float())):
        assert torch.equal(got, want)


def test_wrong_use() -> None:
    q, k, v, g, _ = inputs(6, 1, 4)
    with pytest.raises(ShapeError, match="G dividing H"):
        outer(q, k, v[:, :, :3], g[:, :, :3])
    with pytest.raises(ShapeError, match="log_decay"):
        outer(q, k, v, g[..., None])
    with pytest.raises(UsageError, match="backend"):
        outer(q, k, v, g, backend="tritn")
    with pytest.raises(BackendError, match="triton"):
        outer(q, k, v, g, backend="triton")
