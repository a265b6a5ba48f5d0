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
from remanence.ops.outer import chunk, keys, naive, outer, read_before, step
from remanence.span import Span

EXACT = 1e-10
NAMES = ("q", "k", "v", "log_decay", "initial", "bonus")


def inputs(seed: int, batch: int, length: int, heads: int = 4, groups: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k [B, T, G, 5], v [B, T, H, 3], log decays from none to e^-3 a token, initial."""
    torch.manual_seed(seed)
    q, k, v = torch.randn(batch, length, groups, 5), torch.randn(batch, length, groups, 5), torch.randn(batch, length, heads, 3)
    log_decay = -torch.rand(batch, length, heads) * torch.tensor([0.0, 0.01, 0.3, 3.0])[torch.arange(heads) % 4]
    return [x.to(dtype) for x in (q, k, v, log_decay, torch.randn(batch, heads, 5, 3))]


def key_inputs(seed: int, batch: int, length: int, heads: int = 2, bonus: bool = False, by_key: bool = True) -> list[Tensor]:
    """As `inputs` with G = H; per channel, decays from none to e^-40 a token; then the bonus if told."""
    q, k, v, g, S = inputs(seed, batch, length, heads, heads)
    if by_key:
        g = -torch.rand(batch, length, heads, 5, dtype=g.dtype) * torch.tensor([0.0, 0.01, 0.3, 3.0, 40.0])
    return [q, k, v, g, S, *([torch.randn(heads, 5, dtype=g.dtype)] if bonus else [])]


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


def by_steps(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor, reset: Tensor | None = None, bonus: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[1]):
        now = slice(t, t + 1)
        o, S = step(q[:, now], k[:, now], v[:, now], g[:, now], S, None if reset is None else reset[:, now], bonus)
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


@given(st.integers(0, 99), st.integers(1, 150), st.sampled_from(["none", "first", "last", "several"]))
def test_chunks_with_a_decay_per_key_agree(seed: int, length: int, which: str) -> None:
    leaves, reset = key_inputs(seed, 2, length), resets(length, which)
    want = values_and_gradients(lambda *x: naive(*x, reset), leaves)
    assert_same(values_and_gradients(lambda *x: keys.chunk(*x, reset), leaves), want, EXACT)


@pytest.mark.parametrize("size", [1, 16, 33, 128])
def test_any_chunk_size_with_a_decay_per_key(size: int) -> None:
    leaves, reset = key_inputs(0, 2, 130), resets(130, "several")
    want = values_and_gradients(lambda *x: naive(*x, reset), leaves)
    assert_same(values_and_gradients(lambda *x: keys.chunk(*x, reset, size), leaves), want, EXACT)


@given(st.integers(0, 99), st.integers(1, 20), st.sampled_from(["none", "first", "last", "several"]), st.booleans(), st.booleans())
def test_steps_with_a_decay_per_key_or_a_bonus_agree(seed: int, length: int, which: str, by_key: bool, bonus: bool) -> None:
    leaves, reset = key_inputs(seed, 2, length, bonus=bonus, by_key=by_key), resets(length, which)
    want = values_and_gradients(lambda *x: naive(*x[:5], reset, *x[5:]), leaves)
    assert_same(values_and_gradients(lambda *x: by_steps(*x[:5], reset, *x[5:]), leaves), want, EXACT)


@given(st.integers(0, 99), st.integers(2, 150), st.sampled_from(["none", "first", "last", "several"]), st.booleans())
def test_chunks_that_read_before_they_write_agree(seed: int, length: int, which: str, by_key: bool) -> None:
    leaves, reset = key_inputs(seed, 2, length, bonus=True, by_key=by_key), resets(length, which)
    want = values_and_gradients(lambda *x: naive(*x[:5], reset, x[5]), leaves)
    rule = keys.chunk if by_key else chunk
    assert_same(values_and_gradients(lambda q, k, v, g, S, u: read_before(rule, q, k, v, g, u, S, reset), leaves), want, EXACT)


def test_bonus_in_the_naive_form_is_the_published_sum() -> None:
    """o_t = sum_{s < t} (q_t . (prod_{s < r < t} a_r * k_s)) v_s + (q_t . (u * k_t)) v_t: the decays strictly between (2404.05892)."""
    q, k, v, g, _, u = key_inputs(8, 1, 12, bonus=True)
    total = g.cumsum(1)
    want = (q * u * k).sum(-1, keepdim=True) * v
    for t in range(12):
        for s in range(t):
            between = (total[:, t] - g[:, t] - total[:, s]).exp()
            want[:, t] += (q[:, t] * between * k[:, s]).sum(-1, keepdim=True) * v[:, s]
    assert_close("o", naive(q, k, v, g, bonus=u)[0], want, 1e-12)


@pytest.mark.parametrize("bonus", [False, True])
def test_equal_decays_of_all_keys_are_the_scalar_rule(bonus: bool) -> None:
    q, k, v, g, S, *u = key_inputs(9, 2, 100, bonus=bonus, by_key=False)
    got, want = (outer(q, k, v, x, S, bonus=u[0] if u else None) for x in (g[..., None].expand(q.shape), g))
    assert_close("o", got[0], want[0], 1e-12)
    assert_close("S", got[1], want[1], 1e-12)


@given(st.integers(0, 99), st.integers(2, 90), st.booleans())
def test_padding_and_cuts_of_the_rule_with_a_bonus(seed: int, length: int, by_key: bool) -> None:
    q, k, v, g, S, u = key_inputs(seed, 2, length, bonus=True, by_key=by_key)
    real = 1 + seed % (length - 1)
    o, end = outer(q, k, v, g, S, Span.from_lengths([length, real], length), bonus=u)
    first, state = outer(*(x[:, :real] for x in (q, k, v, g)), S, bonus=u)
    assert_close("first piece", first, o[:, :real], EXACT)
    assert_close("padded row's state", end[1:], state[1:], EXACT)
    rest, state = outer(*(x[:, real:] for x in (q, k, v, g)), state, bonus=u)
    assert_close("second piece", rest[:1], o[:1, real:], EXACT)
    assert_close("state", state[:1], end[:1], EXACT)


def test_strong_decay_per_key_neither_overflows_nor_leaks() -> None:
    q, k, v, g, S = (x.float() for x in key_inputs(10, 1, 128))
    leaves = [x.requires_grad_() for x in (q, k, v, torch.full_like(g, -60.0), S)]
    o, end = keys.chunk(*leaves)
    assert_close("o", o, (q * k).sum(-1, keepdim=True) * v, 1e-5)
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum() + end.sum(), leaves))


def test_a_key_that_is_wiped_out_by_one_token() -> None:
    """A log decay of -inf, or of -1e30, whose running sums would swallow every decay after it."""
    for wipe in (-torch.inf, -1e30):
        q, k, v, g, S = key_inputs(12, 2, 100)
        g = g.clamp(min=-3)
        g[:, 40:45, :, 1], g[0, 90, :, 2] = wipe, wipe
        want = values_and_gradients(naive, [q, k, v, g, S])
        assert_same(values_and_gradients(keys.chunk, [q, k, v, g, S]), want, EXACT)
        assert_same(values_and_gradients(keys.chunk, [x.float() for x in (q, k, v, g, S)]), want, 1e-4)


def test_float32_with_a_decay_per_key() -> None:
    leaves = key_inputs(11, 2, 200)
    got = values_and_gradients(keys.chunk, [x.float() for x in leaves])
    # the sums of logs reach -1300 inside a chunk, where a unit in the last place of fp32 is 1e-4
    assert_same(got, values_and_gradients(naive, leaves), 1e-4)


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
    with pytest.raises(ShapeError, match="G must be H"):
        outer(q, k, v, g[..., None].expand(-1, -1, -1, 5))
    with pytest.raises(ShapeError, match="bonus"):
        outer(q, k, v, g, bonus=torch.ones(4, 4))
    with pytest.raises(UsageError, match="backend"):
        outer(q, k, v, g, backend="tritn")
    with pytest.raises(BackendError, match="triton"):
        outer(q, k, v, g, backend="triton")
