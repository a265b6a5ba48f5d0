"""Memory horizon: resets, their rate, and that nothing before one counts."""

import numpy as np
import pytest

from remanence.tasks.base import IGNORE
from remanence.tasks.memory_horizon import FUNCTIONS, batch


@pytest.mark.parametrize("function", FUNCTIONS)
def test_layout(function):
    ids, targets = batch(np.random.default_rng(0), 100, 200, 8, 10, function)
    reset = ids == 7
    assert reset[:, 0].all() and ((targets == IGNORE) == reset).all() and targets.max() < 7
    assert abs(reset[:, 1:].mean() - 0.1) < 4.5 * (0.09 / 19900) ** 0.5
    after = reset[:, :-1] & ~reset[:, 1:]
    assert (targets[:, 1:][after] == ids[:, 1:][after]).all()
