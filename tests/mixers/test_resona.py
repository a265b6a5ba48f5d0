"""Resona: a closed gate is the recurrence, all passages retrieved is cross-attention, and retrieval picks the right ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence import Span


def test_parity_a_closed_gate_is_the_recurrence() -> None:
    mixer, base = rm.mixer("resona", dim=32, passage=8), rm.mixer("gated-deltanet", dim=32)
    base.load_state_dict(mixer.base.state_dict())
    x = torch.randn(2, 60, 32)
    want, _ = base(x)
    assert 0 < (mixer(x)[0] - want).square().mean().sqrt() < 0.05 * want.square().mean().sqrt()  # nearly closed at the start
    with torch.no_grad():
        mixer.gate.bias.fill_(-torch.inf)
    assert_parity("resona", "the recurrence (gate 0)", mixer(x)[0], want)


def by_hand(mixer: rm.Mixer, x: torch.Tensor) -> torch.Tensor:
    """One document [T, dim], token by token: what the branch adds."""
    P, T = mixer.passage, len(x)
    k, v = mixer.to_kv(x).unflatten(-1, (2, mixer.heads, -1)).unbind(1)
    q = mixer.to_q(x).unflatten(-1, (mixer.heads, -1))
    rows = []
    for t in range(T):
        fit = [float(F.cosine_similarity(x[t], x[p * P : p * P + P].mean(0), dim=0)) for p in range(t // P)]
        best = sorted(range(len(fit)), key=lambda p: -fit[p])[: mixer.top]
        tokens = [s for p in best for s in range(p * P, p * P + P)]
        if not tokens:
            rows.append(torch.zeros_like(q[0]))
            continue
        weight = torch.einsum("hd,nhd->hn", q[t], k[tokens]) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("hn,nhd->hd", weight.softmax(-1), v[tokens]))
    return mixer.gate(x).sigmoid() * mixer.out(torch.stack(rows).flatten(1))


@pytest.mark.parametrize(("top", "source"), [(2, "the definition in a loop"), (100, "cross-attention to every whole passage, in a loop")])
def test_parity_definition(top: int, source: str) -> None:
    torch.manual_seed(0)
    mixer = rm.mixer("resona", dim=16, passage=5, top=top, base="mingru").double()
    x = torch.randn(2, 43, 16, dtype=torch.float64)
    with torch.no_grad():
        branch = torch.stack([by_hand(mixer, row) for row in x])
        base, _ = mixer.base(x)
        y, _ = mixer(x)
        assert_parity("resona", source, y - base, branch, 1e-9)
        state, outputs = None, []
        for t in range(43):  # one at a time, a token fetches its passages instead of masking the others
            y, state = mixer(x[:, t : t + 1], state)
            outputs.append(y)
    assert_close("token by token", torch.cat(outputs, 1) - base, branch, 1e-9)
    assert state.passage.tensor.tolist() == [list(range(8))] * 2


def test_a_token_retrieves_the_passage_it_resembles() -> None:
    mixer = rm.mixer("resona", dim=16, passage=4, top=1, base="mingru")
    x = torch.randn(1, 41, 16)
    x[0, 40] = x[0, 12:16].mean(0)
    other = x.clone()
    other[0, 20:24] += 0.01 * torch.randn(4, 16)  # a passage that is not retrieved
    with torch.no_grad():
        mixer.gate.bias.fill_(0.0)
        branch, changed = (mixer(z)[0][0, 40] - mixer.base(z)[0][0, 40] for z in (x, other))
    assert_close("untouched", changed, branch, 1e-5)


def test_rows_of_different_length_keep_only_their_own_passages() -> None:
    mixer = rm.mixer("resona", dim=16, passage=4, base="mingru")
    _, state = mixer(torch.randn(2, 30, 16), None, Span.from_lengths([30, 9], 30))
    assert state.passage.tensor.tolist() == [list(range(7)), [-1] * 5 + [0, 1]]
    reset = torch.zeros(2, 10, dtype=torch.bool)
    reset[:, 3] = True
    _, state = mixer(torch.randn(2, 10, 16), state, Span(reset=reset))
    assert state.passage.tensor.tolist() == [[0]] * 2


def test_wrong_use() -> None:
    with pytest.raises(rm.errors.UsageError, match="heads=3"):
        rm.mixer("resona", dim=32, heads=3)
    with pytest.raises(rm.errors.UnknownName, match="gated-delta"):
        rm.mixer("resona", dim=32, base="gated-delta")
