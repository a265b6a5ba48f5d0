"""Linear CDE: signatures exactly, the diagonal case, resets that restart from the learned start, and its two forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence import Span
from remanence.errors import UsageError
from remanence.mixers.linear_cde import LinearCDE, sequential, two_levels
from remanence.tasks.signature import signature


def signature_cde(dim: int) -> LinearCDE:
    """The linear CDE that is the signature up to words of `dim` letters: A_i moves every word w to w i, which keeps dS^(w i) = S^w dx^i."""
    words = [()]
    for word in words:
        words += [(*word, letter) for letter in range(dim)] if len(word) < dim else []
    cde = LinearCDE(dim, state_size=len(words), channels=dim, step=1.0).double()
    with torch.no_grad():
        for parameter in cde.parameters():
            parameter.zero_()
        cde.to_path.weight.copy_(torch.eye(dim))
        for word in words:
            for letter in range(dim):
                if len(word) < dim:
                    cde.A[letter, words.index((*word, letter)), words.index(word)] = 1
        cde.start[0] = 1
        cde.out.weight[0, words.index(tuple(range(dim)))] = 1
    return cde


@pytest.mark.parametrize("dim", [2, 3])
def test_parity_with_signatures(dim):
    path = np.cumsum(np.random.default_rng(0).standard_normal((5, 30, dim)), 1)
    with torch.no_grad():
        got = signature_cde(dim)(torch.from_numpy(np.diff(path, axis=1)))[0][:, -1, 0]
    assert_parity("linear-cde", f"level-{dim} signatures by iterated sums", got, torch.from_numpy(signature(path)), 1e-12)


def test_only_dense_matrices_know_the_order():
    """Area is antisymmetric in time: with B = 0 a diagonal CDE cannot tell the increments' order, a dense one can."""
    x = torch.randn(4, 25, 8, dtype=torch.float64)
    for structure, same in (("diagonal", True), ("dense", False)):
        cde = LinearCDE(8, structure=structure).double()
        torch.nn.init.zeros_(cde.to_input.weight)
        with torch.no_grad():
            ahead, back = cde(x)[0][:, -1], cde(x.flip(1))[0][:, -1]
        assert torch.allclose(ahead, back, rtol=1e-9) == same


def test_diagonal_is_dense_with_diagonal_matrices():
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    span = Span(reset=torch.rand(2, 20) < 0.2)
    thin, dense = LinearCDE(8, state_size=5, structure="diagonal").double(), LinearCDE(8, state_size=5).double()
    weights = thin.state_dict()
    dense.load_state_dict(weights | {"A": weights["A"].diag_embed()})
    for where in (None, span):
        assert_close("diagonal", thin(x, span=where)[0], dense(x, span=where)[0], 1e-12)


def test_euler_is_the_first_order_of_the_flow():
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    errors = []
    for step in (0.1, 0.01):
        torch.manual_seed(0)
        exact = LinearCDE(8, step=step).double()
        euler = LinearCDE(8, step=step, flow="euler").double()
        euler.load_state_dict(exact.state_dict())
        with torch.no_grad():
            errors.append(float((exact(x)[0] - euler(x)[0]).norm()))
    assert errors[1] < errors[0] / 50


@pytest.mark.parametrize("length", [1, 2, 3, 9, 40, 49])
def test_the_two_forms_agree_with_all_gradients(length):
    torch.manual_seed(length)
    inputs = [torch.randn(2, length, 4, 4, dtype=torch.float64) * 0.5, torch.randn(2, length, 4, dtype=torch.float64)]
    inputs.append(torch.randn(2, 4, dtype=torch.float64))
    seed = torch.randn(2, length, 4, dtype=torch.float64)

    def run(rule) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        z, last = rule(*leaves)
        ((z * seed).sum() + last.square().sum()).backward()
        return [z, last, *(x.grad for x in leaves)]

    for name, got, want in zip(("z", "last", "m", "u", "initial"), run(two_levels), run(sequential)):
        assert_close(name, got, want, 1e-12)


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_a_reset_restarts_from_the_learned_start(structure):
    cde, x = LinearCDE(8, structure=structure).double(), torch.randn(1, 12, 8, dtype=torch.float64)
    for at in (0, 5, 11):
        reset = torch.zeros(1, 12, dtype=torch.bool)
        reset[0, at] = True
        _, before = cde(torch.randn(1, 3, 8, dtype=torch.float64))
        assert_close(f"reset at {at}", cde(x, before, Span(reset=reset))[0][:, at:], cde(x[:, at:])[0], 1e-12)


@pytest.mark.parametrize(
    ("hyper", "says"),
    [
        ({"structure": "banded"}, "'dense' or 'diagonal'"),
        ({"structure": "diagonal", "flow": "euler"}, "for dense matrices"),
        ({"step": 0}, "step is 0"),
        ({"state_size": 0}, "state_size is 0"),
    ],
)
def test_bad_use(hyper, says):
    with pytest.raises(UsageError, match=says):
        rm.mixer("linear-cde", dim=8, **hyper)
