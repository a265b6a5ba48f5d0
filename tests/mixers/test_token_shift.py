"""Token shift: the token before, whatever the cut, the documents and the padding."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import cuts, pieces
from remanence.mixers.token_shift import token_shift
from remanence.span import Span


@given(st.integers(0, 99), cuts(12))
def test_any_cut(seed: int, places: list[int]) -> None:
    torch.manual_seed(seed)
    x, reset = torch.randn(2, 12, 3), torch.rand(2, 12) < 0.2
    want, end = token_shift(x, None, Span(reset=reset))
    for b in range(2):
        for t in range(12):
            assert torch.equal(want[b, t], torch.zeros(3) if t == 0 or reset[b, t] else x[b, t - 1])
    before, got = None, []
    for part, mask in zip(pieces(x, places), pieces(reset, places)):
        shifted, before = token_shift(part, before, Span(reset=mask))
        got.append(shifted)
    assert torch.equal(torch.cat(got, 1), want) and before is not None and torch.equal(before, end) and torch.equal(end, x[:, -1:])


def test_padding_keeps_the_last_real_token() -> None:
    x = torch.randn(3, 4, 2)
    _, before = token_shift(x, torch.full((3, 1, 2), 7.0), Span.from_lengths([4, 2, 0], 4))
    assert torch.equal(before, torch.stack([x[0, 3:], x[1, 1:2], torch.full((1, 2), 7.0)]))
