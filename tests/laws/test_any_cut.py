"""Law 1: a sequence fed in any pieces gives what it gives fed whole, outputs and final state."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import assert_close, assert_states_close, cuts, pieces

from .systems import LENGTH, System, law


@law("any-cut")
@settings(max_examples=6)
@given(where=cuts(LENGTH), grad=st.booleans())
@example(where=[64], grad=False)  # at the end of a chunk, and one token either side of it
@example(where=[63, 64, 65, 128], grad=True)
@example(where=[1, LENGTH - 1], grad=False)
@example(where=list(range(1, LENGTH)), grad=False)  # token by token
def test_any_cut(system: System, where: list[int], grad: bool) -> None:
    module, x = system.module(), system.inputs(2, LENGTH)
    with torch.set_grad_enabled(grad):
        want, end = system.run(module, x)
        got, state = system.run_pieces(module, pieces(x, where))
    assert_close(f"{system.name} outputs", got, want, 1e-5)
    assert_states_close(system.name, state, end, 1e-5)


@law("any-cut")
@settings(max_examples=4)
@given(where=cuts(70), before=st.integers(1, 70))
@example(where=[1], before=3)
def test_any_cut_from_a_state(system: System, where: list[int], before: int) -> None:
    """The pieces may start anywhere in a stream, in mid-chunk and in mid-segment too."""
    module, x = system.module(), system.inputs(2, 70, seed=1)
    with torch.no_grad():
        _, state = system.run(module, system.inputs(2, before, seed=2))
        want, end = system.run(module, x, state)
        got, last = system.run_pieces(module, pieces(x, where), state)
    assert_close(f"{system.name} outputs", got, want, 1e-5)
    assert_states_close(system.name, last, end, 1e-5)
