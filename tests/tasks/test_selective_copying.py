"""Selective copying: where the data stand, and the plain variant with its fixed spacing."""

import numpy as np

import remanence as rm
from remanence.tasks.base import IGNORE
from remanence.tasks.selective_copying import batch


def test_layout():
    for selective in (True, False):
        ids, targets = batch(np.random.default_rng(0), 300, 40, 8, 10, selective)
        assert ids.shape == (300, 48) and (ids[:, 40:] == 9).all() and (targets[:, :40] == IGNORE).all()
        body = ids[:, :40]
        assert ((body > 0).sum(1) == 8).all() and body.max() == 8
        assert (body[body > 0].reshape(300, 8) == targets[:, 40:]).all()
        if selective:  # every place is as likely
            counts = (body > 0).sum(0)
            assert (abs(counts - 60) < 4.5 * 60**0.5).all()
        else:
            assert (body[:, :8] > 0).all()


def test_published():
    assert {figure.value for figure in rm.task("selective-copying").published} >= {18.3, 57.0, 97.0, 99.5, 37.0}
