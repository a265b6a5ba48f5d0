"""Decayed scores inside a chunk: against the direct formula in float64, in values and in every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import assert_close, assert_gradients_close
from remanence.errors import ShapeError
from remanence.ops.pairs import pairs

NAMES = ("q", "k", "gq", "gk")


def direct(q: Tensor, k: Tensor, gq: Tensor, gk: Tensor, strict: bool = False) -> Tensor:
    """The formula, every pair and channel on its own."""
    rows = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril(-1 if strict else 0)
    decay = (gq[..., :, None, :] - gk[..., None, :, :]).masked_fill(~rows[..., None], -torch.inf).exp()
    return (q[..., :, None, :] * k[..., None, :, :] * decay).sum(-1)


def inputs(seed: int, size: int, strict: bool, strength: float = 1.0) -> list[Tensor]:
    """[2, 3, C, 5]; sums of log decays, from none to 10 `strength` a token by channel. Strict: rows read before their own decay."""
    torch.manual_seed(seed)
    q, k = torch.randn(2, 2, 3, size, 5, dtype=torch.float64)
    g = -torch.rand(2, 3, size, 5, dtype=torch.float64) * torch.tensor([0.0, 0.01, 0.3, 3.0, 10.0]) * strength
    gk = g.cumsum(-2)
    return [q, k, gk - g if strict else gk, gk]


def values_and_gradients(rule, leaves: list[Tensor], strict: bool) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    A = rule(*leaves, strict)
    return A, dict(zip(NAMES, torch.autograd.grad(A.sin().sum(), leaves)))


@given(st.integers(0, 99), st.integers(1, 140), st.booleans())
def test_agrees(seed: int, size: int, strict: bool) -> None:
    leaves = inputs(seed, size, strict)
    got, want = (values_and_gradients(rule, leaves, strict) for rule in (pairs, direct))
    if strict and size == 1:
        assert not got[0].any() and not any(x.any() for x in got[1].values())
        return
    assert_close("A", got[0], want[0], 1e-12)
    assert_gradients_close("pairs", got[1], want[1], 1e-10)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("size", [64, 50, 16, 7])
def test_decays_of_any_strength(size: int, strict: bool) -> None:
    """Up to e^-1000 a token in fp32: the sums of logs reach -60000, where exp of minus one of them is infinite."""
    leaves = inputs(1, size, strict, strength=100.0)
    assert leaves[3].neg().float().exp().isinf().any()
    got, want = values_and_gradients(pairs, [x.float() for x in leaves], strict), values_and_gradients(direct, leaves, strict)
    # sums of up to 60000 have a unit in the last place of 4e-3, so exponents come out no better; the formula in fp32 sets the measure
    plain = values_and_gradients(direct, [x.float() for x in leaves], strict)
    assert all(x.isfinite().all() for x in (got[0], *got[1].values()))
    assert_close("A", got[0], want[0], 1e-4)
    assert_close("A against the formula in fp32", got[0], plain[0], 1e-5)
    assert_gradients_close("pairs in fp32", got[1], plain[1], 1e-5)


def test_float32_at_usual_decays() -> None:
    leaves = inputs(2, 64, False, strength=0.1)
    got, want = values_and_gradients(pairs, [x.float() for x in leaves], False), values_and_gradients(direct, leaves, False)
    assert_close("A", got[0], want[0], 1e-5)
    assert_gradients_close("pairs", got[1], want[1], 1e-5)


def test_nothing_above_the_diagonal_and_nan_stays_in_its_row_and_column() -> None:
    q, k, gq, gk = inputs(3, 40, False)
    assert not pairs(q, k, gq, gk).triu(1).any() and not pairs(q, k, gq, gk, True).triu().any()
    broken = q.clone()
    broken[..., 20, 0] = torch.nan
    A = pairs(broken, k, gq, gk)
    assert A[..., 20, :21].isnan().all() and A.isnan().sum() == 6 * 21


def test_autocast_does_not_lower_it() -> None:
    q, k, gq, gk = (x.float() for x in inputs(4, 32, False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = pairs(q, k, gq, gk)
    assert torch.equal(got, pairs(q, k, gq, gk))


def test_wrong_shapes() -> None:
    q, k, gq, gk = inputs(5, 8, False)
    with pytest.raises(ShapeError, match="four times"):
        pairs(q, k, gq, gk[..., :4])
