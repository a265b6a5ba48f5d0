"""Attention: the fused and the blocked form against the equation, with windows, sinks, documents and padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import assert_close, assert_gradients_close
from remanence.ops.softmax import DEAD, attend, local, naive, visible

EXACT = 1e-12
SCALE = 0.4


def inputs(seed: int, queries: int, keys: int, heads: int = 4, groups: int = 2, dim: int = 6) -> list[Tensor]:
    """q [2, Tq, H, D], k, v [2, Tk, G, D]."""
    torch.manual_seed(seed)
    shapes = [(2, queries, heads, dim), (2, keys, groups, dim), (2, keys, groups, dim)]
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def values_and_gradients(rule, leaves: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = [x.clone().requires_grad_() for x in leaves]
    o = rule(*leaves)
    return o, dict(zip("qkv", torch.autograd.grad(o.sin().sum(), leaves)))


def assert_same(rule, reference, leaves: list[Tensor]) -> None:
    want, gradients = values_and_gradients(reference, leaves)
    got, found = values_and_gradients(rule, leaves)
    assert_close("o", got, want, EXACT)
    assert_gradients_close("attention", found, gradients, EXACT)


def at(length: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + length).expand(2, -1)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_causal(groups: int) -> None:
    leaves = inputs(0, 17, 17, groups=groups)
    mask = visible(at(17), at(17), None, None, None, 0)
    assert torch.equal(mask, torch.ones(2, 17, 17, dtype=torch.bool).tril())
    assert_same(lambda q, k, v: attend(q, k, v, None, SCALE), lambda q, k, v: naive(q, k, v, mask, SCALE), leaves)


@given(st.integers(0, 99), st.integers(1, 20), st.integers(0, 20), st.none() | st.integers(1, 9), st.integers(0, 3))
def test_attend_with_a_mask(seed: int, length: int, past: int, window: int | None, sinks: int) -> None:
    leaves = inputs(seed, length, past + length)
    mask = visible(at(length, past), at(past + length), None, None, window, sinks if window else 0)
    assert_same(lambda q, k, v: attend(q, k, v, mask, SCALE), lambda q, k, v: naive(q, k, v, mask, SCALE), leaves)


def test_what_is_visible() -> None:
    """One query at position 5 of document 1, window 3, 1 sink."""
    q_pos, q_doc = torch.tensor([[5]]), torch.tensor([[1]])
    k_pos = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6, DEAD, 4]])
    k_doc = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 0]])
    #                     ^ other document, sink, outside, outside, window x 3, future, dead, other document
    mask = visible(q_pos, k_pos, q_doc, k_doc, 3, 1)
    assert mask.tolist() == [[[False, True, False, False, True, True, True, False, False, False]]]


def test_nothing_visible_reads_zero() -> None:
    q, k, v = inputs(1, 3, 4)
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[0, 1, 2] = True
    o = naive(q, k, v, mask, SCALE)
    assert_close("the one", o[0, 1], v[0, 2].repeat_interleave(2, 0), EXACT)
    assert torch.equal(o[1], torch.zeros_like(o[1]))


@given(st.integers(0, 99), st.integers(1, 80), st.integers(2, 40), st.booleans(), st.booleans())
def test_local_is_windowed_attention(seed: int, length: int, window: int, packed: bool, padded: bool) -> None:
    """window - 1 cached keys, some dead, then one key per query; documents and right padding as a mixer passes them."""
    past = window - 1
    leaves = inputs(seed, length, past + length)
    alive = torch.randint(0, past + 1, (2, 1))
    q_pos = at(length) + alive
    k_pos = torch.where(at(past) < past - alive, DEAD, at(past) - past + alive)
    docs = (None, None)
    if packed:
        doc = (torch.rand(2, length) < 0.1).cumsum(1)
        docs = doc, torch.cat([torch.zeros(2, past, dtype=torch.long), doc], 1)
    real = torch.tensor([length, 1 + seed % length])[:, None] if padded else torch.full((2, 1), length)
    valid = at(length) < real
    k_pos = torch.cat([k_pos, torch.where(valid, q_pos, DEAD)], 1)
    mask = visible(q_pos, k_pos, *docs, window, 0)
    kept = valid[..., None, None]
    assert_same(
        lambda q, k, v: local(q, k, v, q_pos, k_pos, *docs, window, SCALE) * kept,
        lambda q, k, v: naive(q, k, v, mask, SCALE) * kept,
        leaves,
    )
