"""B'MOJO: its limits are window and full attention; a loop over tokens with a priority queue is its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_states_close, pieces
from parity import assert_parity
from remanence.mixers import bmojo
from remanence.mixers.attention import rotate


def pair(attention_window: int | None, **hyper: int | None) -> tuple[rm.Mixer, rm.Mixer]:
    """A B'MOJO and an attention of the same weights."""
    torch.manual_seed(0)
    mixer = rm.mixer("bmojo", dim=32, summaries=None, fading="mingru", **hyper)
    attention = rm.mixer("attention", dim=32, window=attention_window)
    attention.load_state_dict({name: tensor for name, tensor in mixer.state_dict().items() if name in attention.state_dict()})
    return mixer, attention


def test_parity_limits() -> None:
    x = torch.randn(2, 100, 32)
    mixer, attention = pair(8, window=8, eidetic=None)
    assert_parity("bmojo", "window attention (no eidetic tokens, no summaries)", mixer(x)[0], attention(x)[0])
    mixer, attention = pair(None, window=8, eidetic=100)
    assert_parity("bmojo", "full attention (every token eidetic)", mixer(x)[0], attention(x)[0])


def by_hand(mixer: rm.Mixer, x: Tensor) -> Tensor:
    """One document [T, dim], token by token, with lists."""
    W, M, S = mixer.window, mixer.eidetic, mixer.summaries
    f = mixer.fading(x[None])[0][0]
    zero = torch.zeros_like(f[0])
    surprise = [float((x[t] - mixer.predict(f[t - 1] if t else zero)).norm()) for t in range(len(x))]
    at = torch.arange(len(x))

    def project(rows: Tensor, where: Tensor) -> list[Tensor]:
        q, k, v = mixer.to_qkv(rows[None]).unflatten(-1, (3, mixer.heads, -1)).unbind(2)
        return [rotate(q, where[None], mixer.theta, q.shape[-1])[0], rotate(k, where[None], mixer.theta, k.shape[-1])[0], v[0]]

    q, k, v = project(x, at)
    _, k_f, v_f = project(f, at)
    outputs = []
    for t in range(len(x)):
        chunk = t // W
        queue = sorted(range(chunk * W), key=lambda s: -surprise[s])[:M]
        tokens = [s for s in queue if s <= t - W] + list(range(max(0, t - W + 1), t + 1))
        ends = [c * W - 1 for c in range(max(1, chunk - S + 1), chunk + 1)]
        keys, values = torch.cat([k[tokens], k_f[ends]]), torch.cat([v[tokens], v_f[ends]])
        weight = torch.einsum("hd,nhd->hn", q[t], keys) / q.shape[-1] ** 0.5
        outputs.append(torch.einsum("hn,nhd->hd", weight.softmax(-1), values).flatten())
    return mixer.out(torch.stack(outputs))


@pytest.mark.parametrize(("window", "eidetic", "summaries"), [(8, 5, 2), (1, 3, 1), (5, None, 3), (7, 2, None)])
def test_the_definition(window: int, eidetic: int | None, summaries: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bmojo, "PIECE", 23)  # more than one piece, cut off the chunks' ends
    torch.manual_seed(1)
    mixer = rm.mixer("bmojo", dim=16, heads=2, window=window, eidetic=eidetic, summaries=summaries, fading="mingru").double()
    x = torch.randn(2, 60, 16, dtype=torch.float64) * (1 + torch.rand(2, 60, 1, dtype=torch.float64))
    with torch.no_grad():
        want = torch.stack([by_hand(mixer, row) for row in x])
        whole, end = mixer(x)
        assert_parity("bmojo", "the definition in a loop, with a sorted list for a queue", whole, want, 1e-10)
        state, outputs = None, []
        for part in pieces(x, [3, 4, 21, 40]):
            y, state = mixer(part, state)
            outputs.append(y)
    assert_close("pieces", torch.cat(outputs, 1), want, 1e-10)
    assert_states_close("pieces", state, end, 1e-10)


def test_what_is_kept_is_the_most_surprising() -> None:
    mixer = rm.mixer("bmojo", dim=16, heads=2, window=4, eidetic=3, fading="mingru")
    with torch.no_grad():
        mixer.predict.weight.zero_()  # then surprise is the norm of the token
    x = torch.randn(1, 40, 16)
    x[0, [5, 11, 30]] *= 20
    assert mixer(x)[1].eidetic[2].tolist() == [[5, 11, 30]]
    assert mixer(x[:, :32])[1].eidetic[2].tolist()[0][-1] == 30  # its chunk, 28 to 31, is whole
    assert 30 not in mixer(x[:, :31])[1].eidetic[2].tolist()[0]


def test_the_predictor_learns_from_innovation_alone() -> None:
    mixer = rm.mixer("bmojo", dim=16, heads=2, window=4, fading="mingru")
    x = torch.randn(2, 20, 16)
    mixer(x)[0].sum().backward()
    assert mixer.predict.weight.grad is None
    mixer.innovation(x, mixer.fading(x)[0]).square().mean().backward()
    assert mixer.predict.weight.grad.abs().max() > 0


def test_wrong_use() -> None:
    with pytest.raises(rm.errors.UsageError, match="heads=3 does not divide dim=32"):
        rm.mixer("bmojo", dim=32, heads=3)
    with pytest.raises(rm.errors.UsageError, match="window is 0"):
        rm.mixer("bmojo", dim=32, window=0)
    with pytest.raises(rm.errors.UnknownName, match="mamba3"):
        rm.mixer("bmojo", dim=32, fading="mamba3")
