"""The log under a stream: its columns are positions whatever padding and documents there were, and a bounded one stays bounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import remanence as rm
from helpers import spans
from remanence import Span
from remanence.banks.log import held, join, rounds, trim
from remanence.span import positions
from remanence.state import Growing


@settings(max_examples=25, deadline=None)
@given(span=spans(3, 20), segment=st.none() | st.integers(1, 7), calls=st.integers(1, 3), keep=st.none() | st.integers(1, 6))
def test_columns_are_positions(span: Span, segment: int | None, calls: int, keep: int | None) -> None:
    """Tokens are logged as numbers; after every call column j of a row is the token at position first + j of its document."""
    span, order = span.right_padded()
    ids = torch.arange(60).reshape(3, 20, 1)
    ids = ids if order is None else ids.gather(1, order[..., None])
    seen, log = torch.zeros(3, dtype=torch.long), Growing(torch.zeros(3, 0, 1, dtype=torch.long))
    documents: list[list[int]] = [[], [], []]
    for call in range(calls):
        now = span if call % 2 == 0 else None
        at, first, x = positions(seen, 20, now), held(seen, keep), ids + 100 * call
        taken, outputs = [], []
        for r in rounds(at, now, segment):
            first = torch.where(torch.as_tensor(r.fresh), 0, first)
            log = r.extend(log, r.take(x), first)
            assert torch.equal(
                r.take(at)[:, 0][torch.as_tensor(r.size) + 0 * r.begin > 0], r.begin[torch.as_tensor(r.size) + 0 * r.begin > 0]
            )
            taken.append(r)
            outputs.append(r.take(x))
        if outputs:
            whole = join(outputs, taken, 20)
            real = torch.ones(3, 20, dtype=torch.bool) if now is None or now.valid is None else now.valid
            assert torch.equal(whole[real], x[real]) and not whole[~real].any()
        for row in range(3):
            for t in range(20):
                if now is None or now.valid is None or now.valid[row, t]:
                    if now is not None and now.reset is not None and now.reset[row, t]:
                        documents[row] = []
                    documents[row].append(int(x[row, t]))
        seen = at[:, -1] + 1
        log, first = trim(log, held(seen, keep) - first, seen - held(seen, keep)), held(seen, keep)
        for row, document in enumerate(documents):
            assert log.tensor[row, : len(document) - int(first[row]), 0].tolist() == document[int(first[row]) :]
            assert keep is None or len(document) - int(first[row]) >= min(keep, len(document))


@pytest.mark.parametrize(
    ("slug", "hyper"),
    [
        ("memorizing-transformer", {"window": 16, "memory": 100, "top": 4}),
        ("landmark-attention", {"block": 7, "top": 2, "memory": 6}),
        ("camelot", {"segment": 32, "modes": 8}),
    ],
)
def test_a_long_stream_stays_bounded(slug: str, hyper: dict) -> None:
    mixer = rm.mixer(slug, dim=4, heads=1, **hyper)
    state, sizes = None, []
    with torch.no_grad():
        for _ in range(10):
            _, state = mixer(torch.randn(1, 2000, 4), state)
            sizes.append(state.nbytes)
    assert state is not None and state.tokens == 20_000
    bound = {"memorizing-transformer": 2 * 116 * 8, "landmark-attention": 2 * 56 * 8, "camelot": (16 + 64) * 4 + 16 * 8}[slug]
    assert max(sizes) <= bound * 4 + 64


def test_decoding_does_not_copy_the_log() -> None:
    """Token by token without gradients the store is the same memory, and an older state keeps its content."""
    mixer: Tensor = rm.mixer("extended-mind", dim=8, heads=2, window=4, top=2)  # type: ignore[assignment]
    with torch.no_grad():
        _, state = mixer(torch.randn(1, 20, 8))  # type: ignore[operator]
        _, state = mixer(torch.randn(1, 1, 8), state)  # type: ignore[operator]
        before = state.log[0].tensor.clone()
        _, later = mixer(torch.randn(1, 1, 8), state)  # type: ignore[operator]
    assert later.log[0].tensor.data_ptr() == state.log[0].tensor.data_ptr() and torch.equal(state.log[0].tensor, before)
