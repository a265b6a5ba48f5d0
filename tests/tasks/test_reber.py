"""Embedded Reber strings: the grammar, the one long dependency, the corruptions and the oracle."""

from __future__ import annotations

import random
from collections import Counter
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remanence.errors import UsageError
from remanence.tasks.base import IGNORE
from remanence.tasks.reber import ACCEPT, REJECT, SHORTEST, EmbeddedReber, accepts, accepts_reber, corrupted, decode, embedded

TASK = EmbeddedReber()


@pytest.mark.parametrize("text", ["BTXSE", "BPVVE", "BTSSXXTVPSE", "BPTTVPXVVE"])
def test_strings_of_the_grammar(text: str) -> None:
    assert accepts_reber(text) and accepts(f"BT{text}TE") and accepts(f"BP{text}PE")
    assert not accepts(f"BT{text}PE") and not accepts(text)


@pytest.mark.parametrize("text", ["", "B", "BTXS", "BTXSEE", "BTXPE", "TXSE", "BPVPVE"])
def test_strings_outside_the_grammar(text: str) -> None:
    assert not accepts_reber(text)


@given(seed=st.integers(0, 10**6), least=st.integers(0, 60))
def test_what_is_drawn_is_accepted_until_it_is_corrupted(seed: int, least: int) -> None:
    rng = random.Random(seed)
    text = embedded(rng, least)
    assert accepts(text) and len(text) >= max(least, SHORTEST)
    wrong = corrupted(rng, text)
    assert not accepts(wrong) and sum(a != b for a, b in zip(text, wrong, strict=True)) == 1


@pytest.mark.parametrize("acceptance", [False, True])
@pytest.mark.parametrize("length", [None, 0, 9, 40])
def test_examples(length: int | None, acceptance: bool) -> None:
    for example in TASK.sample(seed=1, n=40, length=length, acceptance=acceptance):
        scored = np.flatnonzero(example.targets != IGNORE)
        assert example.ids.dtype == example.targets.dtype == np.int64 and len(scored) == 1
        assert example.targets[scored[0]] == example.ids[scored[0] + 1]
        if acceptance:
            assert example.ids[-1] in (ACCEPT, REJECT) and (example.ids[-1] == ACCEPT) == accepts(decode(example.ids[:-1]))
        else:
            assert accepts(decode(example.ids)) and decode(example.ids)[scored[0] + 1] in "TP"
        assert len(example.ids) - acceptance >= (length or SHORTEST)
        answer = TASK.oracle(example)
        assert TASK.score(example, answer) and not TASK.score(example, answer + 1)


def test_choices_are_even_and_the_seed_decides() -> None:
    examples = TASK.sample(seed=2, n=2000)
    share = Counter(decode(example.ids)[1] for example in examples)["T"] / 2000
    assert abs(share - 0.5) < 0.05 and TASK.chance == 0.5
    valid = np.mean([example.ids[-1] == ACCEPT for example in TASK.sample(seed=2, n=2000, acceptance=True)])
    assert abs(valid - 0.5) < 0.05
    again = TASK.sample(seed=2, n=3)
    assert all((a.ids == b.ids).all() for a, b in zip(again, examples))
    content = b"".join(np.ascontiguousarray(example.ids, dtype="<i8").tobytes() for example in examples)
    assert sha256(content).hexdigest()[:16] == "d50b9fad4f42e3ee"


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UsageError, match="option of embedded-reber 'lenght' is not known; did you mean length"):
        TASK.sample(lenght=3)
    with pytest.raises(UsageError, match="n is 0"):
        TASK.sample(n=0)
