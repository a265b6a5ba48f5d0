"""Span: its constructors, its errors, and positions, documents and last inputs against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from helpers import masks, spans
from remanence import Span
from remanence.errors import ShapeError, UsageError
from remanence.span import documents, last_inputs, positions

B, T = 2, 9
yes = torch.ones(B, T, dtype=torch.bool)


def masks_of(span: Span | None) -> tuple[Tensor, Tensor]:
    """(valid, reset), written out."""
    valid = yes if span is None or span.valid is None else span.valid
    reset = ~yes if span is None or span.reset is None else span.reset
    return valid, reset


def test_from_lengths() -> None:
    right, left = (Span.from_lengths([0, 2, 3], 3, side).valid for side in ("right", "left"))
    assert right.int().tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert left.int().tolist() == [[0, 0, 0], [0, 1, 1], [1, 1, 1]]
    assert Span.from_lengths(torch.tensor([1]), 1).lengths().tolist() == [1] and Span().lengths() is None
    for lengths in ([4], [-1]):
        with pytest.raises(UsageError, match=r"each must be in 0\.\.3"):
            Span.from_lengths(lengths, 3)
    with pytest.raises(UsageError, match="'left' or 'right'"):
        Span.from_lengths([1], 3, "top")


def test_from_cu_seqlens() -> None:
    span = Span.from_cu_seqlens([0, 1, 4, 6])
    assert span.valid is None and span.reset.int().tolist() == [[1, 1, 0, 0, 1, 0]]
    for wrong in ([], [0], [1, 4], [0, 3, 3], [0, 4, 2], [[0, 1]]):
        with pytest.raises(UsageError, match="must start at 0 and increase"):
            Span.from_cu_seqlens(wrong)


def test_masks_are_checked() -> None:
    for wrong in (torch.ones(2, 3), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(ShapeError, match=r"span.valid is .*; it must be bool \[B, T\]"):
            Span(valid=wrong)
        with pytest.raises(ShapeError, match="span.reset is"):
            Span(reset=wrong)
    with pytest.raises(ShapeError, match="must agree"):
        Span(yes, yes[:, :-1])
    with pytest.raises(ShapeError, match=r"span.reset has shape \[2, 9\]; the input has \[B, T\] = \[2, 8\]"):
        Span(reset=yes).check(2, 8)
    Span(yes, yes).check(B, T)


def test_a_reset_at_a_padded_position_is_none() -> None:
    assert not Span(~yes, yes).reset.any()


@given(spans(B, T), st.integers(0, T), st.integers(0, T))
def test_slices(span: Span, a: int, b: int) -> None:
    part = span[a:b]
    for whole, cut in ((span.valid, part.valid), (span.reset, part.reset)):
        assert (whole is None) == (cut is None) and (whole is None or torch.equal(whole[:, a:b], cut))


@given(spans(B, T))
def test_right_padded_keeps_the_tokens_in_order(span: Span) -> None:
    moved, order = span.right_padded()
    valid, reset = masks_of(span)
    now_valid, now_reset = masks_of(moved)
    x = torch.arange(B * T).reshape(B, T)
    y = x if order is None else x.gather(1, order)
    assert (now_valid.int().diff(dim=1) <= 0).all()
    for row in range(B):
        assert torch.equal(y[row, now_valid[row]], x[row, valid[row]])
        assert torch.equal(now_reset[row, now_valid[row]], reset[row, valid[row]])
    if order is not None:
        assert torch.equal(torch.zeros_like(y).scatter(1, order, y), x)


@given(st.none() | spans(B, T), st.lists(st.integers(0, 50), min_size=B, max_size=B))
@example(Span(~yes), [0, 3])
def test_positions_and_documents(span: Span | None, seen: list[int]) -> None:
    valid, reset = masks_of(span)
    want, docs = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.long)
    for row in range(B):
        at, doc = seen[row] - 1, 0
        for t in range(T):
            if reset[row, t]:
                at, doc = -1, doc + 1
            at += int(valid[row, t])
            want[row, t], docs[row, t] = at, doc
    assert torch.equal(positions(torch.tensor(seen), T, span), want)
    got = documents(span)
    assert torch.equal(got, docs) if got is not None else not docs.any()


@given(st.integers(1, 5), st.none() | spans(B, T), masks(B, T))
@example(4, Span(~yes, yes), yes)
@example(1, Span(yes, yes), yes)
def test_last_inputs(width: int, span: Span | None, noise: Tensor) -> None:
    span = None if span is None else span.right_padded()[0]
    valid, reset = masks_of(span)
    x = torch.arange(1.0, B * T * 2 + 1).reshape(B, T, 2) + noise[..., None] * 0.5
    before = -torch.arange(1.0, B * (width - 1) * 2 + 1).reshape(B, width - 1, 2)
    want = []
    for row in range(B):
        held = list(before[row])
        for t in range(T):
            if valid[row, t]:
                held = [torch.zeros(2)] * (width - 1) if reset[row, t] else held
                held = [*held, x[row, t]][1:]
        want.append(torch.stack(held) if held else torch.zeros(0, 2))
    assert torch.equal(last_inputs(before, x, span), torch.stack(want))
