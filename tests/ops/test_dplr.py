"""Diagonal plus low rank: chunk and step against the equation in float64, in values and in every gradient, and its special cases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import assert_close, assert_gradients_close
from remanence.errors import ShapeError, UsageError
from remanence.ops.delta import delta
from remanence.ops.dplr import chunk, dplr, naive, step
from remanence.ops.outer import outer
from remanence.span import Span

EXACT = 1e-10
NAMES = ("q", "k", "v", "a", "b", "log_decay", "initial")


def inputs(seed: int, batch: int, length: int, heads: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, a, b, g [B, T, H, 6], v [B, T, H, 4], initial; b of norm 1, a = -(0 .. 2) b, log decays from none to e^-20 a token and key."""
    torch.manual_seed(seed)
    q, k, v, b = (torch.randn(batch, length, heads, width, dtype=torch.float64) for width in (6, 6, 4, 6))
    b = F.normalize(b, dim=-1)
    a = -2 * torch.rand(batch, length, heads, 6) * b
    g = -torch.rand(batch, length, heads, 6) * torch.tensor([0.0, 0.01, 0.1, 1.0, 5.0, 20.0])[torch.randperm(6)]
    return [x.to(dtype) for x in (q, k, v, a, b, g, torch.randn(batch, heads, 6, 4))]


def values_and_gradients(rule: Callable, leaves: list[Tensor], alone: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values, and gradients of a loss that reads the outputs and the final state. alone: a = -k is left to the rule."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    q, k, v, a, *rest = leaves
    o, S = rule(q, k, v, None if alone else a, *rest)
    loss = o.sin().sum() + (S * S.detach().cos()).sum()
    named = {name: leaf for name, leaf in zip(NAMES, leaves) if not (alone and name == "a")}
    return {"o": o, "S": S}, dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


def assert_same(got: tuple[dict, dict], want: tuple[dict, dict], tol: float) -> None:
    for key in want[0]:
        assert_close(key, got[0][key], want[0][key], tol)
    assert_gradients_close("dplr", got[1], want[1], tol)


def by_steps(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor, g: Tensor, S: Tensor, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[1]):
        at = slice(t, t + 1)
        q_t, k_t, v_t, a_t, b_t, g_t, reset_t = (None if x is None else x[:, at] for x in (q, k, v, a, b, g, reset))
        o, S = step(q_t, k_t, v_t, a_t, b_t, g_t, S, reset_t)
        outputs.append(o)
    return torch.cat(outputs, 1), S


def resets(length: int, which: str) -> Tensor | None:
    """[2, T]: a reset at the first or the last token, at several, or none; the second row has its own."""
    reset = torch.zeros(2, length, dtype=torch.bool)
    at = {"none": [], "first": [0], "last": [length - 1], "several": [0, length // 3, length // 3 + 1, length // 2]}[which]
    reset[0, [t for t in at if t < length]] = True
    reset[1, length // 2] = which == "several"
    return reset if which != "none" else None


WHICH = st.sampled_from(["none", "first", "last", "several"])


@given(st.integers(0, 99), st.integers(1, 150), WHICH, st.booleans())
def test_chunks_agree(seed: int, length: int, which: str, alone: bool) -> None:
    leaves, reset = inputs(seed, 2, length), resets(length, which)
    leaves[1] = leaves[4] if alone else leaves[1]  # a key of norm 1 where it is also what is erased
    want = values_and_gradients(lambda *x: naive(*x, reset), leaves, alone)
    assert_same(values_and_gradients(lambda *x: chunk(*x, reset), leaves, alone), want, EXACT)


@given(st.integers(0, 99), st.integers(1, 20), WHICH, st.booleans())
def test_steps_agree(seed: int, length: int, which: str, alone: bool) -> None:
    leaves, reset = inputs(seed, 2, length), resets(length, which)
    leaves[1] = leaves[4] if alone else leaves[1]
    want = values_and_gradients(lambda *x: naive(*x, reset), leaves, alone)
    assert_same(values_and_gradients(lambda *x: by_steps(*x, reset), leaves, alone), want, EXACT)


@pytest.mark.parametrize("size", [1, 7, 16, 64])
@pytest.mark.parametrize("alone", [False, True])
def test_any_chunk_size(size: int, alone: bool) -> None:
    leaves, reset = inputs(0, 2, 130), resets(130, "several")
    leaves[1] = leaves[4] if alone else leaves[1]
    want = values_and_gradients(lambda *x: naive(*x, reset), leaves, alone)
    assert_same(values_and_gradients(lambda *x: chunk(*x, reset, size), leaves, alone), want, EXACT)


@pytest.mark.parametrize("alone", [False, True])
def test_float32(alone: bool) -> None:
    leaves = inputs(1, 2, 200)
    leaves[1] = leaves[4] if alone else leaves[1]
    got = values_and_gradients(chunk, [x.float() for x in leaves], alone)
    assert got[0]["o"].dtype == torch.float32
    assert_same(got, values_and_gradients(naive, leaves, alone), 1e-5)


def test_none_stands_for_minus_k() -> None:
    q, k, v, _, b, g, S = inputs(2, 2, 70)
    for backend in ("torch", "naive"):
        for got, want in zip(dplr(q, b, v, None, b, g, S, backend=backend), dplr(q, b, v, -b, b, g, S, backend=backend)):
            assert_close(f"a = -k, {backend}", got, want, 1e-12)


def test_fresh_start_is_a_zero_state() -> None:
    *leaves, S = inputs(2, 2, 70)
    for rule, cut in ((chunk, 70), (naive, 70), (step, 1)):
        part = [x[:, :cut] for x in leaves]
        for got, want in zip(rule(*part), rule(*part, torch.zeros_like(S))):
            assert_close("fresh start", got, want, 1e-12)


def test_one_decay_for_all_keys_is_the_gated_delta_rule() -> None:
    q, _, v, _, k, g, S = inputs(3, 2, 100)
    beta, g = torch.rand(2, 100, 3).double(), g[..., 0]
    full = g[..., None].expand_as(k)
    want = delta(q, k, v, g, beta, S)
    for got, expected in zip(dplr(q, k, v * beta[..., None], None, k * (beta * g.exp())[..., None], full, S), want):
        # k (b v - (b exp(g) k)^T S)^T = exp(g) (-b k k^T) S + b k v^T
        assert_close("delta", got, expected, EXACT)


def test_without_correction_it_is_the_outer_rule() -> None:
    q, k, v, _, b, g, S = inputs(4, 2, 100)
    g = g[..., 1]
    got = dplr(q, k, v, torch.zeros_like(k), b, g[..., None].expand_as(k), S)
    for one, other in zip(got, outer(q, k, v, g, S)):
        assert_close("outer", one, other, EXACT)


def test_strong_decay_neither_overflows_nor_leaks() -> None:
    """exp(-60) a token on every other key: over a chunk the sums of logs reach -4000, whose difference must precede the exponential."""
    q, _, v, _, k, g, S = (x.float() for x in inputs(5, 1, 128))
    g = torch.zeros_like(g)
    g[..., ::2] = -60.0
    leaves = [x.requires_grad_() for x in (q, k, v, -0.5 * k, k * g.exp(), g, S)]
    o, end = chunk(*leaves)
    want, last = naive(*(x.detach().double() for x in leaves))
    assert_close("o", o, want, 1e-5)
    assert_close("S", end, last, 1e-5)
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum() + end.sum(), leaves))


def test_permutations_are_tracked() -> None:
    """a = -2 b with b = (e_i - e_j) / sqrt 2 swaps two rows of the state and shrinks nothing: what no diagonal decay can do."""
    torch.manual_seed(6)
    swaps = [torch.randperm(5)[:2].tolist() for _ in range(100)]
    b = torch.zeros(1, 100, 1, 5, dtype=torch.float64)
    order = list(range(5))
    for t, (i, j) in enumerate(swaps):
        b[0, t, 0, i], b[0, t, 0, j] = 0.5**0.5, -(0.5**0.5)
        order[i], order[j] = order[j], order[i]
    zero = torch.zeros_like(b)
    _, S = dplr(zero, zero, zero, -2 * b, b, zero, torch.eye(5, dtype=torch.float64)[None, None])
    assert_close("permutation", S[0, 0], torch.eye(5, dtype=torch.float64)[order], 1e-12)


@given(st.integers(0, 99), st.integers(1, 90))
def test_padding_and_cuts_of_the_rule(seed: int, length: int) -> None:
    *leaves, S = inputs(seed, 2, length)
    real = 1 + seed % length
    o, end = dplr(*leaves, S, Span.from_lengths([length, real], length))
    alone, state = dplr(*(x[1:, :real] for x in leaves), S[1:])
    assert_close("padded row", o[1:, :real], alone, EXACT)
    assert_close("padded row's state", end[1:], state, EXACT)
    first, state = dplr(*(x[:, :real] for x in leaves), S)
    assert_close("first piece", first[:1], o[:1, :real], EXACT)
    if real < length:
        rest, state = dplr(*(x[:, real:] for x in leaves), state)
        assert_close("second piece", rest[:1], o[:1, real:], EXACT)
    assert_close("state", state[:1], end[:1], EXACT)


def test_dtypes() -> None:
    *leaves, S = (x.float() for x in inputs(7, 1, 40))
    o, end = dplr(*(x.bfloat16() for x in leaves))
    assert o.dtype == torch.bfloat16 and end.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the recurrence stays in float32
        inside = dplr(*leaves, S)
    for got, want in zip(inside, dplr(*leaves, S)):
        assert torch.equal(got, want)


def test_wrong_use() -> None:
    q, k, v, a, b, g, S = inputs(8, 1, 4)
    with pytest.raises(ShapeError, match="expected .B, T, H, K."):
        dplr(q, k, v, a, b, g[..., 0], S)
    with pytest.raises(ShapeError, match="expected .B, T, H, K."):
        dplr(q, k, v[:, :3], a, b, g, S)
    with pytest.raises(UsageError, match="backend"):
        dplr(q, k, v, a, b, g, S, backend="tritn")
