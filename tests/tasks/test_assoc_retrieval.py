"""Associative retrieval: the layout, the rules for keys, the oracle and chance."""

from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import remanence as rm
from remanence.errors import UsageError
from remanence.tasks.assoc_retrieval import EOS, GEN, SEP, VOCAB_SIZE, batch, segment
from remanence.tasks.base import IGNORE

TASK = rm.task("assoc-retrieval")


def digest(*arrays) -> str:
    return sha256(b"".join(np.ascontiguousarray(a, dtype="<i8").tobytes() for a in arrays)).hexdigest()[:16]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "d41949c240f5638d"),
        ({"pairs": 40, "key_size": 2, "value_size": 3}, "44816a4938efafbb"),
        ({"pairs": 30, "rewrite": True}, "01f8adef26629d82"),
    ],
)
def test_the_sequences_of_a_seed_never_change(options, expected):
    examples = TASK.sample(seed=5, n=16, **options)
    assert digest(*(e.ids for e in examples), *(e.targets for e in examples)) == expected


def split(ids, pairs, key_size, value_size):
    """keys [n, pairs + 1, key_size] and values, after asserting every token between them."""
    width = segment(key_size, value_size)
    assert ids.shape[1] == (pairs + 1) * width and ids.dtype == np.int64
    ids = ids.reshape(len(ids), pairs + 1, width)
    assert (ids[:, :-1, key_size] == SEP).all() and (ids[:, -1, key_size] == GEN).all() and (ids[:, :, -1] == EOS).all()
    keys, values = ids[:, :, :key_size], ids[:, :, key_size + 1 : -1]
    assert keys.min() >= 0 and keys.max() < 16 and values.min() >= 0 and values.max() < 16
    return keys, values


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.integers(1, 40), key_size=st.integers(1, 3), value_size=st.integers(1, 3), rewrite=st.booleans(), seed=st.integers(0, 2**32)
)
def test_layout_and_rules(pairs, key_size, value_size, rewrite, seed):
    if not rewrite:
        pairs = min(pairs, 16**key_size)
    ids, targets = batch(np.random.default_rng(seed), 8, pairs, key_size, value_size, rewrite)
    keys, values = split(ids, pairs, key_size, value_size)
    scored = targets != IGNORE
    assert (scored.sum(1) == value_size + 1).all()
    assert (targets[:, :-1][scored[:, :-1]] == ids[:, 1:][scored[:, :-1]]).all() and not scored[:, -1].any()
    assert (ids[np.arange(8), scored.argmax(1)] == GEN).all()
    for row in range(8):
        told = [tuple(key) for key in keys[row, :-1].tolist()]
        if not rewrite:
            assert len(set(told)) == pairs
        asked = tuple(keys[row, -1].tolist())
        last = max(i for i, key in enumerate(told) if key == asked)
        assert values[row, -1].tolist() == values[row, last].tolist()


def test_every_key_occurs_when_there_are_as_many_pairs_as_keys():
    ids, _ = batch(np.random.default_rng(0), 4, 16)
    keys, _ = split(ids, 16, 1, 1)
    assert (np.sort(keys[:, :-1, 0], 1) == np.arange(16)).all()


def test_the_question_is_uniform_over_the_pairs():
    ids, _ = batch(np.random.default_rng(1), 4000, 10)
    keys, _ = split(ids, 10, 1, 1)
    counts = np.bincount((keys[:, :-1, 0] == keys[:, -1:, 0]).argmax(1), minlength=10)
    assert (abs(counts - 400) < 4.5 * (4000 * 0.1 * 0.9) ** 0.5).all()


def test_rewriting_asks_uniformly_among_distinct_keys():
    """A key that was told often is asked no more often: with 2 distinct keys in a row each is asked in half of the cases."""
    ids, _ = batch(np.random.default_rng(2), 60_000, 3, rewrite=True)
    keys, _ = split(ids, 3, 1, 1)
    told, asked = keys[:, :-1, 0], keys[:, -1, 0]
    twice = (np.sort(told, 1)[:, 1:] == np.sort(told, 1)[:, :-1]).sum(1) == 1
    often = ((told == asked[:, None]).sum(1) == 2)[twice]
    assert abs(often.mean() - 0.5) < 4.5 * 0.5 / len(often) ** 0.5


@pytest.mark.parametrize("rewrite", [False, True])
@pytest.mark.parametrize(("pairs", "key_size", "value_size"), [(1, 1, 1), (10, 1, 1), (200, 3, 1), (50, 2, 4)])
def test_the_oracle_is_always_right(pairs, key_size, value_size, rewrite):
    examples = TASK.sample(seed=3, n=200, pairs=pairs, key_size=key_size, value_size=value_size, rewrite=rewrite)
    assert all(TASK.score(e, TASK.oracle(e)) for e in examples)


def test_the_oracle_does_not_look_at_the_answer():
    for e in TASK.sample(n=50, value_size=2):
        answer = TASK.oracle(e)
        ask = e.ids.tolist().index(GEN)
        e.ids[ask + 1 :] = 7
        assert (TASK.oracle(e) == answer).all()


def test_score_takes_all_positions_or_the_scored_ones():
    e = TASK.sample(n=1, value_size=2)[0]
    right = e.targets[e.targets != IGNORE]
    assert right[-1] == EOS and TASK.score(e, right) and TASK.score(e, right.tolist())
    assert not TASK.score(e, [*right[:-1], 0])
    everywhere = np.where(e.targets == IGNORE, 3, e.targets)
    assert TASK.score(e, everywhere)
    with pytest.raises(UsageError, match="output has shape"):
        TASK.score(e, right[:-1])


@pytest.mark.parametrize("value_size", [1, 2])
def test_a_guess_scores_chance(value_size):
    n, rng = 6000, np.random.default_rng(4)
    chance = TASK.chance**value_size
    right = sum(TASK.score(e, [*rng.integers(16, size=value_size), EOS]) for e in TASK.sample(seed=9, n=n, value_size=value_size))
    assert abs(right - n * chance) < 4.5 * (n * chance * (1 - chance)) ** 0.5


@settings(max_examples=60, deadline=None)
@given(length=st.integers(12, 20_000), value_size=st.integers(1, 3))
def test_length_gives_as_many_pairs_as_fit(length, value_size):
    e = TASK.sample(n=1, length=length, value_size=value_size)[0]
    width = e.ids.tolist().index(EOS) + 1
    assert len(e.ids) <= length < len(e.ids) + width
    keys = e.ids.reshape(-1, width)[:-1, : width - value_size - 2]
    assert len({tuple(key) for key in keys.tolist()}) == len(keys)
    assert TASK.score(e, TASK.oracle(e))


def test_defaults():
    examples = TASK.sample()
    assert len(examples) == 8 and {len(e.ids) for e in examples} == {11 * segment()}
    assert max(e.ids.max() for e in examples) < VOCAB_SIZE == TASK.vocab_size


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pairs": 17}, "keys of size 1 are only 16"),
        ({"pairs": 0}, "pairs is 0"),
        ({"value_size": 0}, "value_size is 0"),
        ({"key_size": 16}, "at most 15"),
        ({"length": 7}, "one pair and the question take 8 tokens"),
        ({"length": 64, "pairs": 4}, "give one of them"),
        ({"length": -1}, "length is -1"),
        ({"length": 4000, "key_size": 1}, "keys of size 1 are only 16"),
        ({"piars": 3}, "did you mean pairs?"),
    ],
)
def test_bad_use_says_so_in_one_sentence(options, says):
    with pytest.raises(UsageError) as error:
        TASK.sample(**options)
    assert says in str(error.value) and "\n" not in str(error.value)
