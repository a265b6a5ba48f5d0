"""MQAR: the layout and the distributions of the zoology generator."""

import numpy as np
import pytest

from remanence.tasks.base import IGNORE
from remanence.tasks.mqar import batch


@pytest.mark.parametrize("passes", [1, 2])
def test_layout(passes):
    n, pairs, length, vocab = 50, 6, 64, 40
    ids, targets = batch(np.random.default_rng(0), n, pairs, length, vocab, passes, random_non_queries=False)
    context = 2 * pairs * passes
    keys, values = ids[:, : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2]
    assert keys.min() >= 1 and keys.max() < vocab // 2 <= values.min() and values.max() < vocab
    assert all(len(set(row)) == pairs for row in [*keys.tolist(), *values.tolist()])
    assert (ids[:, :context] == np.tile(ids[:, : 2 * pairs], passes)).all()
    scored = targets != IGNORE
    assert not scored[:, :context].any() and not scored[:, 1::2].any() and (scored.sum(1) == pairs).all()
    assert ((ids[:, context:] > 0) == scored[:, context:]).all()
    for row in range(n):
        told = dict(zip(keys[row].tolist(), values[row].tolist()))
        assert {(k, v) for k, v in zip(ids[row][scored[row]].tolist(), targets[row][scored[row]].tolist())} == set(told.items())


def test_the_rest_is_uniform_noise():
    clean, _ = batch(np.random.default_rng(3), 400, 4, 64, 32, random_non_queries=False)
    noisy, _ = batch(np.random.default_rng(3), 400, 4, 64, 32)
    assert (noisy[clean > 0] == clean[clean > 0]).all()
    counts = np.bincount(noisy[clean == 0], minlength=32)
    assert len(counts) == 32 and (abs(counts - counts.mean()) < 5 * counts.mean() ** 0.5).all()


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_the_gaps_follow_the_power_law(power):
    """The published code draws slots one after the other without replacement; the first pair's gap has the law p itself."""
    n, pairs, length = 8000, 3, 64
    ids, targets = batch(np.random.default_rng(1), n, pairs, length, 64, power=power)
    space = (length - 2 * pairs) // 2
    p = np.arange(1, space + 1) ** (power - 1)
    p /= p.sum()
    asked = (ids[:, 2 * pairs :: 2] == ids[:, :1]) & (targets[:, 2 * pairs :: 2] != IGNORE)
    first = np.bincount(asked.argmax(1), minlength=space) / n
    assert (abs(first - p) < 4.5 * (p * (1 - p) / n) ** 0.5).all()
    reference = np.random.RandomState(0)  # the second pair, against numpy's own draw without replacement
    drawn = np.array([reference.choice(space, pairs, replace=False, p=p)[1] for _ in range(n)])
    asked = (ids[:, 2 * pairs :: 2] == ids[:, 2:3]) & (targets[:, 2 * pairs :: 2] != IGNORE)
    assert abs((asked.argmax(1) < 4).mean() - (drawn < 4).mean()) < 4.5 * (0.5 / n) ** 0.5
