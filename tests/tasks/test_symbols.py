"""The tasks on symbols alike: seeded bytes, the oracle, chance, the score, and what they say to bad use."""

from hashlib import sha256

import numpy as np
import pytest

import remanence as rm
from remanence.errors import UsageError
from remanence.tasks.base import IGNORE

CASES = [
    ("mqar", {}, "f731c1245a673715"),
    ("mqar", {"length": 64, "pairs": 4, "vocab": 64, "passes": 2, "power": 1.0, "random_non_queries": False}, "8b1d4b28f0f85f98"),
    ("selective-copying", {}, "e5c630a12240e7c8"),
    ("selective-copying", {"variant": "copying", "length": 40, "data": 7, "vocab": 9}, "450b7308edb48ba3"),
    ("induction-heads", {}, "76a76ece2bd2dcb4"),
    ("induction-heads", {"length": 3, "vocab": 3}, "cdd56f994a2e7c40"),
    ("state-tracking", {}, "0d7ed112d0405194"),
    ("state-tracking", {"group": "s3"}, "d722000f424c7fec"),
    ("state-tracking", {"group": "s5"}, "90b252cb5fde4235"),
    ("state-tracking", {"group": "a5"}, "a9845c3f866ee383"),
    ("state-tracking", {"group": "z60"}, "48e69b51435ad008"),
    ("memory-horizon", {}, "73aa7b8cac472597"),
    ("memory-horizon", {"function": "max", "horizon": 5, "vocab": 6}, "884a1b6f302843b7"),
    ("memory-horizon", {"function": "sum", "horizon": 8.5}, "bc7593fc9989a58d"),
]
NAMES = [f"{slug} {options}" for slug, options, _ in CASES]


@pytest.mark.parametrize(("slug", "options", "expected"), CASES, ids=NAMES)
def test_the_sequences_of_a_seed_never_change(slug, options, expected):
    examples = rm.task(slug).sample(seed=5, n=16, **options)
    arrays = [array for e in examples for array in (e.ids, e.targets)]
    assert sha256(b"".join(np.ascontiguousarray(a, dtype="<i8").tobytes() for a in arrays)).hexdigest()[:16] == expected


@pytest.mark.parametrize(("slug", "options", "expected"), CASES, ids=NAMES)
def test_the_oracle_is_always_right(slug, options, expected):
    task = rm.task(slug)
    for e in task.sample(seed=3, n=100, **options):
        answer = task.oracle(e)
        assert answer.shape == e.ids.shape and task.score(e, answer) and task.accuracy(e, answer) == 1
        assert (e.targets != IGNORE).any() and e.ids.min() >= 0


@pytest.mark.parametrize(
    ("slug", "options", "low", "high"),
    [
        ("mqar", {"vocab": 32}, 16, 32),
        ("selective-copying", {}, 1, 15),
        ("induction-heads", {}, 0, 15),
        ("state-tracking", {}, 0, 2),
        ("state-tracking", {"group": "s5"}, 0, 120),
        ("memory-horizon", {}, 0, 15),
        ("memory-horizon", {"function": "sum"}, 0, 15),
    ],
)
def test_a_guess_scores_chance(slug, options, low, high):
    task, rng = rm.task(slug), np.random.default_rng(4)
    chance = task.chance if slug not in ("mqar", "state-tracking") else 1 / (high - low)
    n = 3000 if slug == "induction-heads" else 200
    examples = task.sample(seed=9, n=n, **options)
    scored = sum((e.targets != IGNORE).sum() for e in examples)
    right = sum(task.accuracy(e, rng.integers(low, high, size=e.ids.shape)) * (e.targets != IGNORE).sum() for e in examples)
    assert abs(right - scored * chance) < 4.5 * (scored * chance * (1 - chance)) ** 0.5
    assert task.chance == 1 / (len(task.labels) or {"mqar": 4096, "state-tracking": 2}[slug])


def test_score_takes_all_positions_or_the_scored_ones():
    task = rm.task("selective-copying")
    e = task.sample(n=1)[0]
    right = e.targets[e.targets != IGNORE]
    assert task.score(e, right) and task.score(e, right.tolist()) and task.score(e, np.where(e.targets == IGNORE, 3, e.targets))
    wrong = [*right[:-1], 0]
    assert not task.score(e, wrong) and task.accuracy(e, wrong) == 15 / 16
    with pytest.raises(UsageError, match="output has shape"):
        task.score(e, right[:-1])


@pytest.mark.parametrize(
    ("slug", "options", "says"),
    [
        ("mqar", {"pairs": 40}, "need an even length >= 160"),
        ("mqar", {"length": 127}, "need an even length"),
        ("mqar", {"vocab": 16}, "has 7 keys"),
        ("mqar", {"pairs": 0}, "pairs is 0"),
        ("selective-copying", {"length": 15}, "holds at most 15"),
        ("selective-copying", {"vocab": 3}, "at least 4"),
        ("selective-copying", {"variant": "plain"}, "'selective' or 'copying'"),
        ("induction-heads", {"length": 2}, "at least 3"),
        ("state-tracking", {"group": "s6"}, "did you mean"),
        ("state-tracking", {"length": 0}, "length is 0"),
        ("memory-horizon", {"function": "qqq"}, "known: first, max, sum"),
        ("memory-horizon", {"horizon": 1}, "horizon above 1"),
        ("memory-horizon", {"lenght": 3}, "did you mean length?"),
    ],
)
def test_bad_use_says_so_in_one_sentence(slug, options, says):
    with pytest.raises(UsageError) as error:
        rm.task(slug).sample(**options)
    assert says in str(error.value) and "\n" not in str(error.value)
