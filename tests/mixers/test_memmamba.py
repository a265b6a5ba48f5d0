"""MemMamba: an empty pool is Mamba; the pool is what a loop over tokens makes of the same notes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import remanence as rm
from helpers import assert_close
from parity import assert_parity

DIM = 32
HYPER = {"slots": 3, "note_dim": 4, "period": 5, "state_size": 4}


def instance(**hyper: int) -> rm.Mixer:
    torch.manual_seed(0)
    mixer = rm.mixer("memmamba", dim=DIM, **(HYPER | hyper)).double()
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return mixer


def mamba_in(mixer: rm.Mixer) -> rm.Mixer:
    """The Mamba with the same weights."""
    mamba = rm.mixer("mamba", dim=DIM, state_size=HYPER["state_size"]).double()
    mamba.load_state_dict({name: mixer.state_dict()[name] for name in mamba.state_dict()})
    return mamba


def test_parity_empty_pool_is_mamba() -> None:
    """No chunk of the document is complete yet; and a fresh instance whatever its pool holds."""
    mixer, x = instance(period=64), torch.randn(2, 64, DIM).double()
    assert_parity("memmamba", "mamba, while the pool is empty", mixer(x)[0], mamba_in(mixer)(x)[0], 1e-12)
    fresh, x = rm.mixer("memmamba", dim=DIM, **HYPER).double(), torch.randn(2, 50, DIM).double()
    assert torch.equal(fresh(x)[0], mamba_in(fresh)(x)[0])


def by_token(mixer: rm.Mixer, x: Tensor) -> Tensor:
    """One document [T, dim] from the docstring's equations, with a list of notes."""
    o = mamba_in(mixer)(x[None])[0][0]
    scores = torch.sigmoid(mixer.score(F.silu(mixer.to_score(x))))[:, 0]
    outputs = []
    for t in range(len(x)):
        done = t // HYPER["period"] * HYPER["period"]
        best = sorted(range(done), key=lambda j: -scores[j].item())[: HYPER["slots"]]
        query, weights, read = mixer.to_query(x[t]), torch.ones(()).double(), torch.zeros(HYPER["note_dim"]).double()
        for j in best:
            note = mixer.to_note(x[j])
            weight = scores[j] * torch.exp(query @ note / HYPER["note_dim"] ** 0.5)
            weights, read = weights + weight, read + weight * note
        outputs.append(o[t] + torch.sigmoid(mixer.forgotten(o[t])) * mixer.recalled(read / weights))
    return torch.stack(outputs)


def test_parity_with_a_list_of_notes() -> None:
    mixer, x = instance(), torch.randn(2, 43, DIM).double()
    with torch.no_grad():
        y, state = mixer(x)
        assert_parity("memmamba", "the equations, with a list of notes", y, torch.stack([by_token(mixer, row) for row in x]), 1e-10)
        first, held = mixer(x[:, :17])
        assert_close("in pieces", torch.cat([first, mixer(x[:, 17:], held)[0]], 1), y, 1e-10)
    assert (state.priority[:, :-1] >= state.priority[:, 1:]).all() and (state.priority > 0).all()
    assert (state.importance[:, :3] > 0).all() and not state.importance[:, 3:].any()  # 43 = 8 chunks and 3 tokens


def test_a_note_outlives_the_state() -> None:
    """A token that mattered 400 tokens ago still moves the output, and only through the pool."""
    mixer, x = instance(), torch.randn(1, 400, DIM).double()
    with torch.no_grad():
        mixer.to_dt.bias.fill_(20.0)  # Mamba forgets at once
        best = int(torch.sigmoid(mixer.score(F.silu(mixer.to_score(x[0])))).argmax())
        other = x.clone()
        other[0, best] *= 1.01
        gap = [(layer(other)[0] - layer(x)[0])[0, best + 100 :].abs().max() for layer in (mixer, mamba_in(mixer))]
    assert gap[0] > 1e-6 > gap[1] and best < 250


def test_every_part_is_trained() -> None:
    mixer = instance()
    mixer(torch.randn(1, 40, DIM).double())[0].square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in mixer.parameters())


def test_bad_hyper_parameters() -> None:
    with pytest.raises(rm.errors.UsageError, match="slots is 0"):
        rm.mixer("memmamba", dim=DIM, slots=0)
