"""RAT against its equations with a mask written by hand, and at both ends: chunks of one token and of all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import remanence as rm
from helpers import assert_close, cuts, pieces
from parity import assert_parity
from remanence import Span
from remanence.errors import UsageError

DIM, HEADS, GROUPS = 32, 4, 2
D = DIM // HEADS


def rotated(x: Tensor, chunk: Tensor) -> Tensor:
    """x [B, T, H, D], halves paired, by angles chunk x 10000^(-2i / D)."""
    angle = chunk[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    y = torch.complex(*x.chunk(2, -1)) * turn
    return torch.cat([y.real, y.imag], -1)


def equations(mixer: rm.Mixer, x: Tensor, chunk: int) -> Tensor:
    """Token by token inside a chunk, and a softmax over [last tokens of the chunks before, own] by a T x (T / L + 1) mask."""
    length = x.shape[1]
    z, u, g, q, k = mixer.to_zxgqk(x).split([DIM, DIM, DIM, GROUPS * D, GROUPS * D], -1)
    g = (g + mixer.gate_bias).sigmoid()
    k = torch.cat([k] * (HEADS // GROUPS), -1)
    averages, held = [], None
    for t in range(length):
        held = (1 - g[:, t, None]) * torch.stack([u, k], 2)[:, t] + (0 if t % chunk == 0 else g[:, t, None] * held)
        averages.append(held)
    u, c = (part.unflatten(-1, (HEADS, D)) for part in torch.stack(averages, 1).unbind(2))
    index = torch.arange(length) // chunk
    q = rotated(torch.cat([q.unflatten(-1, (GROUPS, D))] * (HEADS // GROUPS), 2), index)
    c = rotated(c, index)
    ends = torch.arange(length)[chunk - 1 :: chunk]
    score = torch.einsum("bthd,bnhd->bhtn", q, c[:, ends]).masked_fill(index[:, None] <= index[ends], -torch.inf)
    own = torch.einsum("bthd,bthd->bht", q, c)[..., None]
    weight = (torch.cat([score, own], -1) * D**-0.5).softmax(-1)
    o = torch.einsum("bhtn,bnhd->bthd", weight[..., :-1], u[:, ends]) + weight[..., -1].transpose(1, 2)[..., None] * u
    return mixer.out(z.sigmoid() * o.flatten(2))


def make(chunk: int, **hyper) -> rm.Mixer:
    torch.manual_seed(0)
    return rm.mixer("rat", dim=DIM, heads=HEADS, groups=GROUPS, chunk=chunk, **hyper)


@pytest.mark.parametrize("chunk", [1, 4, 7, 16])
@pytest.mark.parametrize("length", [1, 16, 75])
def test_parity_equations(chunk, length):
    mixer = make(chunk)
    x, dy = torch.randn(2, length, DIM, requires_grad=True), torch.randn(2, length, DIM)
    got, want = mixer(x)[0], equations(mixer, x, chunk)
    assert_parity("rat", "the equations with a hand-written mask", got, want)
    leaves = [x, mixer.to_zxgqk.weight, mixer.gate_bias]
    for one, other in zip(*(torch.autograd.grad(y, leaves, dy) for y in (got, want))):
        assert_close("gradient", one, other, 1e-5, floor=1e-3)


def test_parity_chunks_of_one_token_are_attention():
    """Keys and values (1 - g) k and (1 - g) x, positions rotated, all tokens up to the query's."""
    mixer = make(1)
    x = torch.randn(2, 60, DIM)
    with torch.no_grad():
        z, u, g, q, k = mixer.to_zxgqk(x).split(mixer.sizes, -1)
        shut = 1 - (g + mixer.gate_bias).sigmoid()
        q, k = (torch.cat([part] * 2, -1) for part in (q, k))
        heads = [part.unflatten(-1, (HEADS, D)) for part in (q, shut * k, shut * u)]
        heads[:2] = [rotated(part, torch.arange(60)) for part in heads[:2]]
        o = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in heads), is_causal=True).transpose(1, 2).flatten(2)
        assert_parity("rat", "softmax attention (chunk = 1)", mixer(x)[0], mixer.out(z.sigmoid() * o))


def test_parity_one_chunk_is_the_recurrence():
    mixer = make(64)
    x = torch.randn(2, 60, DIM)
    with torch.no_grad():
        z, u, g, _, _ = mixer.to_zxgqk(x).split(mixer.sizes, -1)
        g, h, outputs = (g + mixer.gate_bias).sigmoid(), torch.zeros(2, DIM), []
        for t in range(60):
            h = g[:, t] * h + (1 - g[:, t]) * u[:, t]
            outputs.append(h)
        y, state = mixer(x)
        assert_parity("rat", "the gated recurrence (chunk >= T)", y, mixer.out(z.sigmoid() * torch.stack(outputs, 1)))
    assert state.keys.length == 0


@settings(max_examples=15, deadline=None)
@given(where=cuts(40), at=st.sets(st.integers(0, 39), max_size=4), chunk=st.sampled_from([1, 3, 8]))
def test_a_document_counts_its_chunks_from_its_own_start(where, at, chunk):
    mixer, x = make(chunk), torch.randn(1, 40, DIM)
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, sorted(at)] = True
    with torch.no_grad():
        outputs, state, edges = [], None, [0, *where, 40]
        for a, b in zip(edges, edges[1:]):
            y, state = mixer(x[:, a:b], state, Span(reset=reset[:, a:b]))
            outputs.append(y)
        documents = [part for part in pieces(x, sorted(at - {0}))]
        assert_close("y", torch.cat(outputs, 1), torch.cat([mixer(part)[0] for part in documents], 1), 1e-5)
    assert state.keys.length == documents[-1].shape[1] // chunk, "documents that are over are let go"


def test_the_state_grows_by_one_entry_a_chunk():
    mixer, state = make(8), None
    with torch.no_grad():
        for t in range(33):
            _, state = mixer(torch.randn(2, 1, DIM), state)
            assert state.keys.length == (t + 1) // 8


def test_rows_of_different_length_fill_up_with_dead_entries():
    mixer, x = make(4), torch.randn(2, 21, DIM)
    with torch.no_grad():
        _, state = mixer(x[:, :13], None, Span.from_lengths([13, 2], 13))
        assert state.chunks.tensor.tolist() == [[0, 1, 2], [-1, -1, -1]]
        y, _ = mixer(x[:, 13:], state)
        assert_close("short row", y[1:], mixer(torch.cat([x[1:, :2], x[1:, 13:]], 1))[0][:, 2:], 1e-5)


def test_initial_gates_keep_for_up_to_a_chunk():
    """sigmoid(b) = n / (1 + n) with n in 1 .. L - 1: a memory of up to L tokens."""
    bias = make(16).gate_bias.detach()
    assert bias.min() >= 0 and bias.max() <= torch.tensor(15.0).log() and not make(1).gate_bias.any()


@pytest.mark.parametrize(("hyper", "message"), [
    ({"heads": 5}, "heads=5 does not divide dim=32"),
    ({"groups": 3}, "groups=3 does not divide heads=4"),
    ({"chunk": 0}, "chunk is 0"),
])  # fmt: skip
def test_bad_hyper_parameters(hyper, message):
    with pytest.raises(UsageError, match=message):
        rm.mixer("rat", dim=DIM, **hyper)
