"""State tracking: the groups are groups, of the right size and kind, and a word's target is its product."""

import itertools

import numpy as np
import pytest

import remanence as rm
from remanence.tasks.state_tracking import GROUPS, batch, elements, table

ORDERS = {"parity": 2, "s3": 6, "s5": 120, "a5": 60, "z60": 60}


@pytest.mark.parametrize("group", GROUPS)
def test_the_table_is_a_group(group):
    t, size = table(group), ORDERS[group]
    assert t.shape == (size, size) and (t[0] == np.arange(size)).all() and (t[:, 0] == np.arange(size)).all()
    assert (np.sort(t, 0) == np.arange(size)[:, None]).all() and (np.sort(t, 1) == np.arange(size)).all()
    assert (t[t] == t[:, t]).all(), "not associative"  # t[t[a, b], c] == t[a, t[b, c]]
    assert (t == t.T).all() == (group in ("parity", "z60"))


def test_a5_is_simple_and_z60_is_cyclic():
    """The conjugacy classes of A5 have 1, 12, 12, 15, 20 elements, so that no union with the identity divides 60 but the whole."""
    t = table("a5")
    inverse = t.argmin(1)
    classes = {frozenset(t[t[g, a], inverse[g]] for g in range(60)) for a in range(60)}
    assert sorted(map(len, classes)) == [1, 12, 12, 15, 20]
    z = table("z60")
    assert len(set(itertools.accumulate([1] * 60, lambda a, b: z[a, b]))) == 60


def test_parity_is_parity():
    ids, targets = batch(np.random.default_rng(0), 20, 50)
    assert (targets == ids.cumsum(1) % 2).all()


def test_the_product_is_taken_from_the_left():
    word = rm.task("state-tracking").sample(n=1, length=2, group="s3")[0]
    a, b = (elements("s3")[i] for i in word.ids)
    assert elements("s3")[word.targets[1]] == tuple(a[i] for i in b) and word.targets[0] == word.ids[0]
