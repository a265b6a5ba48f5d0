"""Set disjointness: the layout, exactly one shared token, both orders, the oracle and chance."""

from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import remanence as rm
from remanence.errors import UsageError
from remanence.tasks.base import IGNORE
from remanence.tasks.set_disjointness import batch

TASK = rm.task("set-disjointness")


def test_the_sequences_of_a_seed_never_change():
    examples = TASK.sample(seed=3, n=8, first=8, second=32, vocab_size=128)
    data = b"".join(np.ascontiguousarray(a, "<i8").tobytes() for e in examples for a in (e.ids, e.targets))
    assert sha256(data).hexdigest()[:16] == "87ffe8ddff2b3677"


@settings(max_examples=40, deadline=None)
@given(first=st.integers(1, 20), second=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_layout(first, second, seed):
    for e in TASK.sample(seed=seed, n=2, first=first, second=second, vocab_size=50):
        assert e.ids.shape == e.targets.shape == (first + second + 3,) and e.ids.dtype == e.targets.dtype == np.int64
        one, two = e.ids[1 : first + 1].tolist(), e.ids[first + 2 : -1].tolist()
        assert (e.ids[0], e.ids[first + 1], e.ids[-1]) == (1, 2, 3)
        assert len(set(one)) == first and len(set(two)) == second and min(one + two) >= 4 and max(one + two) < 50
        assert set(one) & set(two) == {int(e.targets[-1])} and (e.targets[:-1] == IGNORE).all()
        assert TASK.score(e, TASK.oracle(e)) and TASK.score(e, e.targets[-1]) and not TASK.score(e, e.targets[-1] + 1)


def test_length_leaves_the_rest_to_the_second_list():
    (e,) = TASK.sample(n=1, length=200, first=16)
    assert e.ids.shape == (200,) and e.ids[17] == 2


def test_the_answer_is_uniform_in_both_lists():
    ids, targets = batch(np.random.default_rng(0), 2000, 4, 8, vocab_size=64)
    places = (ids == targets[:, -1:]).nonzero()[1].reshape(-1, 2)
    for column, start, size in ((0, 1, 4), (1, 6, 8)):
        counts = np.bincount(places[:, column] - start, minlength=size)
        assert counts.size == size and abs(counts / 2000 - 1 / size).max() < 4.5 * (1 / size / 2000) ** 0.5


def test_a_guess_scores_chance():
    assert TASK.chance == 1 / 2044
    rng = np.random.default_rng(1)
    hits = sum(TASK.score(e, rng.choice(e.ids[1:5])) for e in TASK.sample(n=2000, first=4))
    assert abs(hits / 2000 - 1 / 4) < 0.045  # any of the first list: one in four


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 7}, "length is 7; the first list and three marks take 7"),
        ({"length": 40, "second": 3}, "both given"),
        ({"first": 0}, "first is 0"),
        ({"second": 30, "vocab_size": 50}, "at most 25 and 21"),
        ({"size": 3}, "option of set-disjointness"),
    ],
)
def test_bad_use_says_so_in_one_sentence(options, says):
    with pytest.raises(UsageError) as error:
        TASK.sample(**options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_output_of_the_wrong_shape_is_refused():
    (e,) = TASK.sample(n=1)
    with pytest.raises(UsageError, match="output has shape"):
        TASK.score(e, np.zeros(3))
