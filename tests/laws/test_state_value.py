"""Law 2: a state is a value. A call never changes the one it was given, so keeping one is a fork and going back to one is a rewind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import assert_close, assert_states_close
from remanence import State

from .systems import System, law

lengths = st.integers(1, 40)


def same_bits(a: tuple[Tensor, State], b: tuple[Tensor, State]) -> None:
    assert torch.equal(a[0], b[0]) and a[1].digest() == b[1].digest() and a[1].header == b[1].header


@law("state-value")
@settings(max_examples=4)
@given(before=lengths, more=lengths, grad=st.booleans())
@example(before=20, more=1, grad=False)
def test_a_call_leaves_the_state_given_as_it_was(system: System, before: int, more: int, grad: bool) -> None:
    module = system.module()
    with torch.set_grad_enabled(grad):
        _, state = system.run(module, system.inputs(2, before))
        digest, header = state.digest(), state.header
        _, new = system.run(module, system.inputs(2, more, seed=1), state)
    assert state.digest() == digest and state.header == header
    assert new.header == header and new.digest() != digest


@law("state-value")
@settings(max_examples=4)
@given(before=lengths, first=lengths, second=lengths, first_goes_first=st.booleans())
@example(before=20, first=1, second=1, first_goes_first=True)
def test_forks_do_not_see_each_other(system: System, before: int, first: int, second: int, first_goes_first: bool) -> None:
    """Two continuations of one state, call by call in turns, give what each gives alone from a deep copy."""
    module = system.module()
    with torch.no_grad():
        _, state = system.run(module, system.inputs(2, before))
        streams = [[system.inputs(2, n, seed=10 * n + i) for i in range(3)] for n in (first, second)]
        want = [[system.run(module, stream[0], state.clone())] for stream in streams]
        for stream, results in zip(streams, want):
            for x in stream[1:]:
                results.append(system.run(module, x, results[-1][1].clone()))
        latest = [state, state]
        for i in range(3):
            for fork in (0, 1) if first_goes_first else (1, 0):
                y, latest[fork] = system.run(module, streams[fork][i], latest[fork])
                assert_close(f"{system.name} fork {fork} call {i}", y, want[fork][i][0], 1e-6)
        for fork in (0, 1):
            assert_states_close(f"{system.name} fork {fork}", latest[fork], want[fork][-1][1], 1e-6)


@law("state-value")
@settings(max_examples=4)
@given(before=lengths, more=lengths)
@example(before=20, more=1)
def test_rewind_gives_the_same_bits(system: System, before: int, more: int) -> None:
    module, x = system.module(), system.inputs(2, more, seed=1)
    with torch.no_grad():
        _, old = system.run(module, system.inputs(2, before))
        once = system.run(module, x, old)
        system.run(module, x, once[1])
        again = system.run(module, x, old)
    same_bits(again, once)


@law("state-value")
@settings(max_examples=4)
@given(before=lengths)
@example(before=1)
def test_save_and_load_give_the_same_bits(system: System, before: int) -> None:
    module, x = system.module(), system.inputs(2, 5, seed=1)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        _, state = system.run(module, system.inputs(2, before))
        state.save(Path(folder) / "state")
        loaded = State.load(Path(folder) / "state")
        assert type(loaded) is type(state) and loaded.header == state.header and loaded.tokens == state.tokens == before
        for (name, got), (wanted, want) in zip(loaded.named_tensors(), state.named_tensors(), strict=True):
            assert name == wanted and got.dtype == want.dtype and torch.equal(got, want)
        same_bits(system.run(module, x, loaded), system.run(module, x, state))


@law("state-value")
def test_rows_of_a_state_are_the_states_of_the_rows(system: System) -> None:
    module, x, more = system.module(), system.inputs(3, 30), system.inputs(3, 9, seed=1)
    with torch.no_grad():
        _, state = system.run(module, x)
        picked = state.rows([2, 0, 2])
        y, _ = system.run(module, more, picked)
        _, alone = system.run(module, x[[2, 0, 2]])
        want, _ = system.run(module, more, alone)
    assert_states_close(system.name, picked, alone, 1e-5)
    assert_close(f"{system.name} outputs", y, want, 1e-5)
