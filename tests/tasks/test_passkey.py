"""Passkey retrieval: the five lines, exact lengths, the oracle and the scorer."""

import random
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import remanence as rm
from remanence.errors import UsageError
from remanence.tasks.passkey import FILLER, QUESTION, TASK
from remanence.tokenizers import BPETokenizer, ByteTokenizer

PASSKEY = rm.task("passkey")
TOKENIZERS = {"bytes": ByteTokenizer(), "bpe": BPETokenizer.train([FILLER * 20], vocab_size=400)}


def test_the_examples_of_a_seed_never_change():
    examples = PASSKEY.sample(seed=2, n=8, length=1000)
    assert sha256(b"".join(e.ids.astype("<i8").tobytes() for e in examples)).hexdigest()[:16] == "a1c453f800465d24"
    assert [e.answer for e in PASSKEY.sample(seed=2, n=3, length=5000)] == [e.answer for e in examples[:3]]


@settings(max_examples=60, deadline=None)
@given(length=st.integers(300, 40_000), seed=st.integers(0, 2**40), name=st.sampled_from(["bytes", "bpe"]))
def test_every_context_has_exactly_its_length(length, seed, name):
    tokenizer = TOKENIZERS[name]
    for e in PASSKEY.sample(seed=seed, n=2, length=length, tokenizer=tokenizer):
        assert e.ids.shape == (length,) and e.ids.dtype == np.int64
        (fact,) = e.facts
        told = tokenizer.encode(fact.text + "\n")
        assert e.ids[fact.position : fact.position + len(told)].tolist() == told
        assert PASSKEY.oracle(e, tokenizer) == e.answer and PASSKEY.score(e, PASSKEY.oracle(e, tokenizer))


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_the_five_lines(name):
    tokenizer = TOKENIZERS[name]
    for e in PASSKEY.sample(n=50, length=900, tokenizer=tokenizer):
        task, before, told, after, question = PASSKEY.prompt(e, tokenizer).split("\n")
        assert task == TASK and question == QUESTION == e.question
        assert told == f"The pass key is {e.answer}. Remember it. {e.answer} is the pass key."
        assert before in FILLER * 99 and (FILLER * 99).startswith(before) and (FILLER * 99).startswith(after)
        assert 1 <= int(e.answer) <= 50_000


def test_length_zero_leaves_the_filler_out():
    e = PASSKEY.sample(n=1, length=0)[0]
    assert e.text() == f"{TASK}\n\n{e.facts[0].text}\n"


def test_the_place_is_uniform():
    places = np.array([e.facts[0].position for e in PASSKEY.sample(n=400, length=20_000)]) / 20_000
    assert abs(places.mean() - 0.5) < 4.5 * (1 / 12 / 400) ** 0.5
    assert places.min() < 0.05 and places.max() > 0.95


@pytest.mark.parametrize(
    ("output", "right"),
    [
        (" 4217. Remember", True),
        ("it is 04217", True),
        ("4217 or 17", True),
        ("17 or 4217", False),
        ("42 17", False),
        ("none", False),
        ("", False),
    ],
)
def test_the_score_is_the_first_integer(output, right):
    e = PASSKEY.sample(n=1, length=500)[0]
    object.__setattr__(e, "answer", "4217")
    assert PASSKEY.score(e, output) is right


def test_a_guess_scores_chance():
    rng = random.Random(1)
    right = sum(PASSKEY.score(e, str(rng.randint(1, 50_000))) for e in PASSKEY.sample(n=1000, length=0))
    assert PASSKEY.chance == 1 / 50_000
    assert right <= 2  # expected 0.02: three or more happen once in a million runs


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 100}, "length is 100; the task and the pass key alone take"),
        ({"length": -5}, "length is -5"),
        ({"size": 3}, "option of passkey"),
    ],
)
def test_bad_use_says_so_in_one_sentence(options, says):
    with pytest.raises(UsageError) as error:
        PASSKEY.sample(**options)
    assert says in str(error.value) and "\n" not in str(error.value)
