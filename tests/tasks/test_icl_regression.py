"""In-context regression: least squares is exact, and one gradient step costs what the formula says."""

from hashlib import sha256

import numpy as np
import pytest

import remanence as rm
from remanence.tasks.icl_regression import batch, best_rate, one_step, one_step_loss

TASK = rm.task("icl-regression")


def test_the_examples_of_a_seed_never_change():
    tokens, targets = batch(np.random.default_rng(5), 16)
    whole = np.round(np.concatenate([tokens.ravel(), targets.ravel()]) * 1e9).astype("<i8")
    assert sha256(whole.tobytes()).hexdigest()[:16] == "c19f599b7761b314"


@pytest.mark.parametrize("options", [{}, {"pairs": 5, "dim": 5, "outputs": 1}])
def test_the_oracle_is_exact(options):
    for e in TASK.sample(seed=1, n=50, **options):
        assert TASK.score(e, TASK.oracle(e)) and not TASK.score(e, e.target + 0.02)


def test_layout():
    tokens, targets = batch(np.random.default_rng(0), 7, 4, 3, 2)
    assert tokens.shape == (7, 5, 5) and targets.shape == (7, 2) and (tokens[:, -1, 3:] == 0).all()
    x, y = tokens[:, :-1, :3], tokens[:, :-1, 3:]
    weights = np.stack([np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(x, y)])
    assert np.allclose(np.einsum("nd,nde->ne", tokens[:, -1, :3], weights), targets)


@pytest.mark.parametrize(("pairs", "dim"), [(12, 3), (4, 6)])
def test_the_loss_of_one_step(pairs, dim):
    n = 40_000
    tokens, targets = batch(np.random.default_rng(2), n, pairs, dim, 2)
    x, y, query = tokens[:, :-1, :dim], tokens[:, :-1, dim:], tokens[:, -1, :dim]
    for rate in (0.0, 0.3, best_rate(pairs, dim), 1.0):
        errors = ((one_step(x, y, query, rate) - targets) ** 2).mean(1)
        assert abs(errors.mean() - one_step_loss(pairs, dim, rate)) < 4.5 * errors.std() / n**0.5
        assert one_step_loss(pairs, dim) <= one_step_loss(pairs, dim, rate)
    assert one_step_loss(pairs, dim, 0.0) == dim
