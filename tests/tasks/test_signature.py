"""Signature regression: iterated integrals three ways, and what guessing costs."""

from hashlib import sha256

import numpy as np
import pytest

import remanence as rm
from remanence.errors import UsageError
from remanence.tasks.signature import batch, signature

TASK = rm.task("signature")


@pytest.mark.parametrize(("level", "expected"), [(2, "8d9f956958f0c7b3"), (3, "d7510ec3635b21a8")])
def test_the_paths_of_a_seed_never_change(level, expected):
    examples = TASK.sample(seed=5, n=16, level=level)
    whole = [np.round(np.append(e.path, e.target) * 1e9).astype("<i8").tobytes() for e in examples]
    assert sha256(b"".join(whole)).hexdigest()[:16] == expected


@pytest.mark.parametrize("level", [2, 3])
def test_the_oracle_is_right(level):
    for e in TASK.sample(seed=2, n=50, level=level):
        assert abs(TASK.oracle(e) - e.target) < 1e-9 and TASK.score(e, TASK.oracle(e)) and not TASK.score(e, e.target + 0.02)


def test_iterated_sums_in_full():
    """Level 2 and 3 as the sums over all pairs and triples of increments, with 1/2 and 1/6 where indices coincide."""
    rng = np.random.default_rng(0)
    two, three = np.diff(a := rng.standard_normal((9, 2)), axis=0), np.diff(b := rng.standard_normal((9, 3)), axis=0)
    weight = {3: 1, 2: 1 / 2, 1: 1 / 6}  # by the number of different indices
    pairs = sum(two[i, 0] * two[j, 1] * (1 if i < j else 1 / 2) for i in range(8) for j in range(i, 8))
    triples = sum(
        three[i, 0] * three[j, 1] * three[k, 2] * weight[len({i, j, k})] for i in range(8) for j in range(i, 8) for k in range(j, 8)
    )
    assert np.allclose([signature(a), signature(b)], [pairs, triples], rtol=1e-12)


def test_it_is_the_integral_along_the_path():
    """Refining a piecewise linear path changes nothing; a closed unit square has the signed area 1 in S(0,1) - S(1,0)."""
    path = np.random.default_rng(1).standard_normal((6, 3))
    fine = np.concatenate([np.linspace(p, q, 50, endpoint=False) for p, q in zip(path, path[1:])] + [path[-1:]])
    assert np.isclose(signature(path), signature(fine), rtol=1e-10)
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]], float)
    assert np.isclose(signature(square) - signature(square[:, ::-1]), 2)


@pytest.mark.parametrize("level", [2, 3])
def test_what_always_answering_zero_costs(level):
    n, length = 20_000, 30
    rng = np.random.default_rng(3)
    path = np.cumsum(np.round(rng.standard_normal((n, length, level))), 1)
    squares = signature(path) ** 2
    assert abs(squares.mean() - TASK.guess_rmse(length, level) ** 2) < 4.5 * squares.std() / n**0.5


@pytest.mark.parametrize("level", [2, 3])
def test_scale(level):
    path, target = batch(np.random.default_rng(0), 500, level)
    assert np.abs(path).max() == 1 and np.isclose(np.abs(target).max(), 1) and path.shape == (500, 100, level)


@pytest.mark.parametrize(("options", "says"), [({"level": 4}, "2 .area. or 3"), ({"length": 2}, "at least 3 points")])
def test_bad_use_says_so_in_one_sentence(options, says):
    with pytest.raises(UsageError, match=says):
        TASK.sample(**options)
