"""Induction heads: one special token before the end, anywhere."""

import numpy as np

from remanence.tasks.base import IGNORE
from remanence.tasks.induction_heads import batch


def test_layout():
    ids, targets = batch(np.random.default_rng(0), 5000, 12, 6)
    special = ids == 5
    assert (special.sum(1) == 2).all() and special[:, -1].all() and not special[:, -2].any()
    place = special.argmax(1)
    assert (targets[:, -1] == ids[np.arange(5000), place + 1]).all() and (targets[:, :-1] == IGNORE).all()
    counts = np.bincount(place, minlength=10)
    assert len(counts) == 10 and (abs(counts - 500) < 4.5 * 500**0.5).all()
