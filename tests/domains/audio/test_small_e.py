"""Small-E's cross-attention: the two attentions in a loop, the look-up limit, cuts and padding, and the copy task."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import remanence as rm
from helpers import assert_close, assert_states_close, cuts, pieces
from parity import assert_parity
from remanence import Span
from remanence.domains.audio.small_e import SmallE, monotone_copy, sinusoids, skips_and_repeats
from remanence.mixers.attention import rotate

torch.manual_seed(0)
HYPER = {"dim": 32, "text_dim": 24, "inner": 16, "position_dim": 16}
BLOCK, PLAIN = SmallE(**HYPER).double().eval(), SmallE(**HYPER, position=None).double().eval()
X, TEXT = torch.randn(2, 40, 32, dtype=torch.float64), torch.randn(2, 9, 24, dtype=torch.float64)


def test_parity_both_attentions_by_hand() -> None:
    q, (k, v) = PLAIN.q_norm(PLAIN.to_q(X)), PLAIN.to_kv(TEXT).chunk(2, -1)
    k, v = PLAIN.k_norm(k), PLAIN.v_norm(v)
    q, k = (rotate(part[:, :, None], torch.arange(part.shape[1]).expand(2, -1), 1e4, 8)[:, :, 0] for part in (q, k))
    n = torch.arange(9, dtype=torch.float64)
    P = torch.cat([f(n[:, None] * 1e4 ** -(torch.arange(8, dtype=torch.float64) / 8)) for f in (torch.sin, torch.cos)], 1)
    rows = []
    for t in range(40):
        where = torch.stack([(k[b] @ q[b, t] / 4).softmax(0) @ P for b in range(2)])
        rows.append(torch.stack([(P @ where[b] / 4).softmax(0) @ v[b] for b in range(2)]))
    got, _ = PLAIN(X, PLAIN.read_text(TEXT))
    assert_parity("small-e", "lina-speech's BlindCrossAttention with pos_net = identity, re-derived", got, torch.stack(rows, 1), 1e-10)


def test_parity_a_sharp_first_attention_looks_up_its_position() -> None:
    """Keys far apart make the first attention one-hot; a large position then makes the second one-hot at the same place."""
    state = PLAIN.read_text(TEXT)
    q = PLAIN._rotate(PLAIN.q_norm(PLAIN.to_q(X)), torch.arange(40).expand(2, -1))
    best = (q @ state.keys.mT).argmax(-1)
    P = sinusoids(9, 16, TEXT)
    sharp = PLAIN._weights(q * 1e6, state.keys, state.real) @ P
    assert_parity("small-e", "the plain positional look-up", sharp, P[best], 1e-8)
    values = PLAIN._weights(sharp * 1e4, P, state.real) @ state.values
    assert_parity("small-e", "the plain look-up of values", values, state.values.gather(1, best[..., None].expand(-1, -1, 16)), 1e-8)


@settings(max_examples=10, deadline=None)
@given(where=cuts(40))
def test_any_cut(where: list[int]) -> None:
    with torch.no_grad():
        state = BLOCK.read_text(TEXT)
        want, end = BLOCK(X, state)
        outputs = []
        for part in pieces(X, where):
            y, state = BLOCK(part, state)
            outputs.append(y)
    assert_close("y", torch.cat(outputs, 1), want, 1e-9)
    assert_states_close("state", state, end, 1e-9)


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=2), steps=st.lists(st.integers(1, 40), min_size=2, max_size=2))
def test_padding_of_text_and_steps(lengths: list[int], steps: list[int]) -> None:
    text, x = TEXT.clone(), X.clone()
    for row in range(2):
        text[row, lengths[row] :], x[row, steps[row] :] = torch.nan, 100.0
    with torch.no_grad():
        y, end = BLOCK(x, BLOCK.read_text(text, torch.tensor(lengths)), Span.from_lengths(steps, 40))
        for row in range(2):
            want, _ = BLOCK(X[row : row + 1, : steps[row]], BLOCK.read_text(TEXT[row : row + 1, : lengths[row]]))
            assert_close(f"row {row}", y[row, : steps[row]], want[0], 1e-9)
    assert end.seen.tolist() == steps and not y[0, steps[0] :].any()


def test_it_trains_and_is_in_the_catalog() -> None:
    block = rm.find("small-e", ("audio",)).builder(**HYPER)
    y, _ = block(X.float(), block.read_text(TEXT.float()))
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.to_q.parameters())


def test_monotone_copy() -> None:
    text, speech = monotone_copy(np.random.default_rng(0), 20, length=12, vocab=8)
    assert text.shape == (20, 12) and text.min() >= 1 and text.max() < 8
    for t, s in zip(text, speech, strict=True):
        runs = np.split(s[s > 0], np.flatnonzero(np.diff(s[s > 0])) + 1)
        assert [run[0] for run in runs] == t.tolist() and {2, 3, 4, 5, 6} >= set(map(len, runs))
        assert skips_and_repeats(t, s) == (0, 0)
    assert skips_and_repeats(np.array([3, 1, 2, 5]), np.array([3, 3, 2, 2, 5, 0])) == (1, 0)
    assert skips_and_repeats(np.array([3, 1, 2]), np.array([3, 1, 3, 1, 2])) == (0, 2)
    assert skips_and_repeats(np.array([3, 1, 2]), np.array([0, 0])) == (3, 0)


def test_wrong_use() -> None:
    with pytest.raises(rm.errors.ShapeError, match="text has shape"):
        BLOCK.read_text(TEXT[0])
    with pytest.raises(rm.errors.UsageError, match="a text is empty"):
        BLOCK.read_text(TEXT, torch.tensor([3, 0]))
    with pytest.raises(rm.errors.UsageError, match="cannot start in the middle"):
        BLOCK(X, BLOCK.read_text(TEXT), Span(reset=torch.zeros(2, 40, dtype=torch.bool)))
    with pytest.raises(rm.errors.UsageError, match="inner=18"):
        SmallE(32, 24, 18)
    with pytest.raises(rm.errors.UsageError, match="vocab is 2"):
        monotone_copy(np.random.default_rng(0), 1, vocab=2)
