"""The delta rule: chunk and step against the equation in float64, in values and in every gradient, and what it does in the limits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import assert_close, assert_gradients_close
from remanence.ops.delta import chunk, delta, naive, step
from remanence.ops.delta.chunk import inverse
from remanence.span import Span

EXACT = 1e-10
NAMES = ("q", "k", "v", "log_decay", "beta", "initial")


def inputs(seed: int, batch: int, length: int, heads: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k [B, T, H, 6] with unit keys, v [B, T, H, 4], log decays from none to e^-3 a token, b in (0, 2), initial."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(batch, length, heads, width, dtype=torch.float64) for width in (6, 6, 4))
    log_decay = -torch.rand(batch, length, heads) * torch.tensor([0.0, 0.1, 3.0])[torch.arange(heads) % 3]
    beta, initial = 2 * torch.rand(batch, length, heads), torch.randn(batch, heads, 6, 4)
    return [x.to(dtype) for x in (q, F.normalize(k, dim=-1), v, log_decay, beta, initial)]


def values_and_gradients(rule: Callable, leaves: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values, and gradients of a loss that reads the outputs and the final state."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    o, S = rule(*leaves)
    gradients = torch.autograd.grad(o.sin().sum() + (S * S.detach().cos()).sum(), leaves)
    return {"o": o, "S": S}, dict(zip(NAMES, gradients))


def assert_same(got: tuple[dict, dict], want: tuple[dict, dict], tol: float) -> None:
    for key in want[0]:
        assert_close(key, got[0][key], want[0][key], tol)
    assert_gradients_close("delta", got[1], want[1], tol)


def by_steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, S: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[1]):
        o, S = step(*(x[:, t : t + 1] for x in (q, k, v, g, b)), S, None if reset is None else reset[:, t : t + 1])
        outputs.append(o)
    return torch.cat(outputs, 1), S


def resets(length: int, which: str) -> Tensor | None:
    """[2, T]: a reset at the first or the last token, at several, or none; the second row has its own."""
    reset = torch.zeros(2, length, dtype=torch.bool)
    at = {"none": [], "first": [0], "last": [length - 1], "several": [0, length // 3, length // 3 + 1, length // 2]}[which]
    reset[0, [a for a in at if a < length]] = True
    reset[1, length // 2] = which == "several"
    return reset if which != "none" else None


@given(st.integers(0, 99), st.integers(1, 200), st.sampled_from(["none", "first", "last", "several"]))
def test_chunks_agree(seed: int, length: int, which: str) -> None:
    leaves, reset = inputs(seed, 2, length), resets(length, which)
    want = values_and_gradients(lambda *x: naive(*x, reset), leaves)
    assert_same(values_and_gradients(lambda *x: chunk(*x, reset), leaves), want, EXACT)


@given(st.integers(0, 99), st.integers(1, 20), st.sampled_from(["none", "first", "last", "several"]))
def test_steps_agree(seed: int, length: int, which: str) -> None:
    leaves, reset = inputs(seed, 2, length), resets(length, which)
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
            assert_close("fresh start", got, want, 1e-12)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 33, 64])
def test_inverse(size: int) -> None:
    """Only the strictly lower triangle is read: the rest may hold anything, NaN included."""
    torch.manual_seed(size)
    A = torch.randn(3, 2, size, size, dtype=torch.float64).tril(-1) / size**0.5
    garbage = A.masked_fill(~torch.ones(size, size, dtype=torch.bool).tril(-1), torch.nan)
    assert_close("inverse", inverse(garbage), torch.linalg.inv(torch.eye(size, dtype=torch.float64) + A), 1e-12)


def test_orthonormal_keys_are_stored_exactly() -> None:
    """Without decay, b = 1 and orthonormal keys: a table. Every key reads back its value, whatever was written after it."""
    keys = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0][None, :, None]  # [1, T, 1, K]
    v = torch.randn(1, 64, 1, 5, dtype=torch.float64)
    _, S = delta(keys, keys, v, None, torch.ones(1, 64, 1, dtype=torch.float64))
    o, _ = delta(keys, keys, v, None, torch.zeros(1, 64, 1, dtype=torch.float64), S)
    assert_close("read back", o, v, 1e-12)


@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_the_same_key_overwrites(backend: str) -> None:
    """b = 1: the second write to a key leaves nothing of the first."""
    q, k, v, _, b, _ = inputs(3, 1, 80)
    k = k[:, :1].expand_as(k)
    _, S = delta(q, k, v, None, torch.ones_like(b), backend=backend)
    assert_close("S", S, k[:, -1, :, :, None] * v[:, -1, :, None, :], 1e-12)


@pytest.mark.parametrize("length", [1, 64, 200])
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_what_is_not_written_changes_nothing(length: int, backend: str) -> None:
    """b = 0 and no decay leave the state bit for bit the same."""
    q, k, v, _, b, S = (x.float() for x in inputs(4, 2, length))
    _, end = delta(q, k, v, None, torch.zeros_like(b), S, backend=backend)
    assert torch.equal(end, S)


@pytest.mark.parametrize("beta", [1.0, 1.9])
def test_equal_keys_stay_accurate(beta: float) -> None:
    """The worst case for a series of powers: every product of keys in a chunk is 1, so that terms up to C(63, 31) would cancel."""
    q, k, v, _, b, S = inputs(5, 1, 192)
    k = F.normalize(k[:, :1] + 1e-3 * torch.randn_like(k), dim=-1)
    leaves = [q, k, v, torch.zeros_like(b), torch.full_like(b, beta), S]
    want = values_and_gradients(naive, leaves)
    assert_same(values_and_gradients(chunk, leaves), want, EXACT)
    o, end = chunk(*(x.float() for x in leaves))
    exact, exact_end = naive(*(x.float().double() for x in leaves))
    assert_close("o in fp32", o, exact, 1e-5)
    assert_close("S in fp32", end, exact_end, 1e-5)


def test_strong_decay_neither_overflows_nor_leaks() -> None:
    """exp(-60) a token: over a chunk the sums of logs reach -4000, whose difference must be taken before the exponential."""
    q, k, v, g, b, S = (x.float() for x in inputs(6, 1, 128))
    leaves = [x.requires_grad_() for x in (q, k, v, torch.full_like(g, -60.0), b, S)]
    o, end = chunk(*leaves)
    assert_close("o", o, ((q * k).sum(-1) * b)[..., None] * v, 1e-5)
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum() + end.sum(), leaves))


@given(st.integers(0, 99), st.integers(1, 90))
def test_padding_and_cuts_of_the_rule(seed: int, length: int) -> None:
    *leaves, S = inputs(seed, 2, length)
    real = 1 + seed % length
    o, end = delta(*leaves, S, Span.from_lengths([length, real], length))
    alone, state = delta(*(x[1:, :real] for x in leaves), S[1:])
    assert_close("padded row", o[1:, :real], alone, EXACT)
    assert_close("padded row's state", end[1:], state, EXACT)
    first, state = delta(*(x[:, :real] for x in leaves), S)
    assert_close("first piece", first[:1], o[:1, :real], EXACT)
    if real < length:
        rest, state = delta(*(x[:, real:] for x in leaves), state)
        assert_close("second piece", rest[:1], o[:1, real:], EXACT)
    assert_close("state", state[:1], end[:1], EXACT)


def test_autocast_does_not_reach_the_recurrence() -> None:
    leaves = [x.float() for x in inputs(7, 1, 40)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = chunk(*leaves)
    for got, want in zip(inside, chunk(*leaves)):
        assert torch.equal(got, want)
