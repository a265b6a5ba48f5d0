"""Law 3: padding and packing are invisible, and a batch is its rows.

What a state means is what it makes of the tokens to come, so states are compared by that: a cache may hold dead entries that differ.
"""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import assert_close, assert_states_close, cuts, masks, pieces, spans
from remanence import Span, State

from .systems import System, law

ROWS, T = 3, 40


def apart(system: System, module: nn.Module, x: Tensor, span: Span, state: State | None) -> list[tuple[list[Tensor], State | None]]:
    """For every row, the outputs of its documents, each run alone without padding, and the last one's state."""
    results = []
    valid = torch.ones(x.shape[:2], dtype=torch.bool) if span.valid is None else span.valid
    reset = torch.zeros_like(valid) if span.reset is None else span.reset
    for row in range(len(x)):
        real = x[row : row + 1, valid[row]]
        starts = reset[row, valid[row]].nonzero()[:, 0].tolist()
        held, outputs = None if state is None else state.rows([row]), []
        for start, document in zip([0, *starts], pieces(real, starts)):
            held = None if start in starts else held
            if document.shape[1]:
                y, held = system.run(module, document, held)
                outputs.append(y[0])
        results.append((outputs, held))
    return results


def check(system: System, x: Tensor, span: Span, carried: bool, where: list[int] | None = None) -> None:
    """x under `span`, in pieces if told, gives at every real token what the documents give apart, and so do the tokens that follow."""
    module, probe = system.module(), system.inputs(len(x), T, seed=9)
    with torch.no_grad():
        state = system.run(module, system.inputs(len(x), 11, seed=8))[1] if carried else None
        wanted = apart(system, module, x, span, state)
        outputs, after, edges = [], state, [0, *(where or []), x.shape[1]]
        for a, b in zip(edges, edges[1:]):
            y, after = system.run(module, x[:, a:b], after, span[a:b])
            outputs.append(y)
        y = torch.cat(outputs, 1)
        future, _ = system.run(module, probe, after)
        for row, (documents, held) in enumerate(wanted):
            real = slice(None) if span.valid is None else span.valid[row]
            if documents:
                assert_close(f"{system.name} row {row}", y[row, real], torch.cat(documents), 1e-5)
            want, _ = system.run(module, probe[row : row + 1], held)
            assert_close(f"{system.name} row {row}, what follows", future[row], want[0], 1e-5)
            assert after.rows([row]).tokens == (held.tokens if held else 0)
    if span.valid is not None and not system.tokens:
        assert not y[~span.valid].any(), "the output at a padded position is zero"


def padded(system: System, valid: Tensor, garbage: float) -> Tensor:
    """Inputs whose padded positions hold `garbage`: for ids, other ids."""
    x, noise = system.inputs(*valid.shape), system.inputs(*valid.shape, seed=5)
    return torch.where(valid, x, noise) if system.tokens else torch.where(valid[..., None], x, garbage * noise)


@law("padding")
@settings(max_examples=4)
@given(sizes=st.lists(st.integers(0, T), min_size=ROWS, max_size=ROWS), side=st.sampled_from(["left", "right"]), carried=st.booleans())
@example(sizes=[T, 0, 17], side="left", carried=True)
@example(sizes=[1, 0, T - 1], side="right", carried=False)
def test_padding_is_invisible(system: System, sizes: list[int], side: str, carried: bool) -> None:
    span = Span.from_lengths(sizes, T, side)
    for garbage in (100.0, torch.nan):
        check(system, padded(system, span.valid, garbage), span, carried)


@law("padding")
@settings(max_examples=3)
@given(valid=masks(ROWS, T), carried=st.booleans())
def test_padding_inside_is_invisible(system: System, valid: Tensor, carried: bool) -> None:
    check(system, padded(system, valid, torch.nan), Span(valid), carried)


@law("padding")
def test_a_row_of_padding_changes_nothing(system: System) -> None:
    """Step after step of nothing but padding, from a carried state and from none."""
    valid = torch.tensor([[True], [False], [False]]).expand(ROWS, 6)
    check(system, padded(system, valid, torch.nan), Span(valid), True, list(range(1, 6)))
    check(system, padded(system, valid, torch.nan), Span(valid), False, [1, 3])


def resets(at: list[set[int]]) -> Span:
    mask = torch.zeros(len(at), T, dtype=torch.bool)
    for row, starts in enumerate(at):
        mask[row, sorted(starts)] = True
    return Span(reset=mask)


@law("packing")
@settings(max_examples=4)
@given(at=st.lists(st.sets(st.integers(0, T - 1), max_size=6), min_size=2, max_size=2), carried=st.booleans())
@example(at=[{0, T - 1}, set()], carried=True)  # a reset at the first and at the last token
@example(at=[{5, 6, 7}, {T - 2, T - 1}], carried=True)  # documents of one token
@example(at=[set(range(T)), {1}], carried=False)
@example(at=[{12}, {12}], carried=True)  # every row at once
def test_packed_documents_are_what_they_are_apart(system: System, at: list[set[int]], carried: bool) -> None:
    check(system, system.inputs(2, T), resets(at), carried)


@law("packing")
def test_cu_seqlens(system: System) -> None:
    check(system, system.inputs(1, T), Span.from_cu_seqlens([0, 1, 2, 13, T]), carried=True)


@law("packing")
@settings(max_examples=5)
@given(span=spans(2, T), carried=st.booleans(), where=cuts(T, most=6))
def test_packed_padded_and_cut(system: System, span: Span, carried: bool, where: list[int]) -> None:
    """All at once: documents, padding anywhere, and a stream cut into pieces."""
    valid = torch.ones(2, T, dtype=torch.bool) if span.valid is None else span.valid
    check(system, padded(system, valid, torch.nan), span, carried, where)


@law("batch")
def test_a_batch_is_its_rows(system: System) -> None:
    module, x, more = system.module(), system.inputs(ROWS, 70), system.inputs(ROWS, 7, seed=1)
    with torch.no_grad():
        y, state = system.run(module, x)
        then, last = system.run(module, more, state)
        for row in range(ROWS):
            one, alone = system.run(module, x[row : row + 1])
            assert_close(f"{system.name} row {row}", y[row : row + 1], one, 1e-5)
            assert_states_close(f"{system.name} row {row}", state.rows([row]), alone, 1e-5)
            two, alone = system.run(module, more[row : row + 1], alone)
            assert_close(f"{system.name} row {row}, continued", then[row : row + 1], two, 1e-5)
            assert_states_close(f"{system.name} row {row}, continued", last.rows([row]), alone, 1e-5)
