import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remanence.errors import UsageError
from remanence.train import Curriculum


def test_advance_needs_a_full_window_of_this_stage():
    c = Curriculum([1, 2, 5], advance=0.9, window=3)
    moved = [c.observe(a) for a in (1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)]
    assert moved == [False] * 5 + [True, False, False, True] and c.top == 5
    assert [c.observe(1.0) for _ in range(5)] == [False] * 5  # there is nothing after the last


def test_limit_and_retreat():
    c = Curriculum([1, 2, 3], advance=0.9, window=2, limit=4, retreat=0.3)
    assert [c.observe(0.5) for _ in range(4)] == [False, False, False, True] and c.top == 2
    assert [c.observe(0.1) for _ in range(2)] == [False, True] and c.top == 1
    assert [c.observe(0.1) for _ in range(3)] == [False] * 3  # nothing before the first


def test_vary_is_pure_and_covers_all_sizes():
    c = Curriculum([4], vary=True)
    sizes = [c.size(0, i) for i in range(200)]
    assert set(sizes) == {1, 2, 3, 4} and sizes == [c.size(0, i) for i in range(200)] and sizes != [c.size(1, i) for i in range(200)]
    assert {Curriculum([4]).size(0, i) for i in range(9)} == {4}


@given(st.lists(st.floats(0, 1), max_size=60), st.integers(0, 60))
def test_state_resumes_exactly(accuracies, at):
    make = lambda: Curriculum([1, 2, 3, 5], advance=0.6, window=3, limit=9, retreat=0.2)  # noqa: E731
    whole, first, second = make(), make(), make()
    for a in accuracies:
        whole.observe(a)
    for a in accuracies[:at]:
        first.observe(a)
    second.restore(json.loads(json.dumps(first.state())))
    for a in accuracies[at:]:
        second.observe(a)
    assert second.state() == whole.state() and second.top == whole.top


def test_refusals():
    for wrong in ({"stages": []}, {"stages": [0]}, {"window": 0}, {"limit": 0}, {"retreat": 0.96}):
        with pytest.raises(UsageError):
            Curriculum(**({"stages": [1]} | wrong))
    with pytest.raises(UsageError, match="stage 3"):
        Curriculum([1, 2]).restore({"stage": 3, "steps": 0, "recent": []})
