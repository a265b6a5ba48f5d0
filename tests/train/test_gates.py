"""Hard write gates: what is recorded, what it costs, and that a shut gate leaves the memory bit for bit as it was."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from remanence.errors import UsageError
from remanence.train.gates import opening_cost, recorded


def hard(dim: int = 16) -> rm.Mixer:
    torch.manual_seed(0)
    return rm.mixer("gated-deltanet", dim=dim, heads=2, write="hard", forget=False)


def test_recorded_sees_every_call_and_stops_with_the_block():
    mixer, x = hard(), torch.randn(2, 5, 16)
    with recorded(mixer) as gates:
        _, state = mixer(x)
        mixer(x[:, :3], state)
    mixer(x)
    assert [tuple(z.shape) for z in gates] == [(2, 5, 2), (2, 3, 2)]
    assert torch.equal(gates[0], mixer.to_beta(x))


def test_cost_is_the_mean_excess_over_the_margin():
    z = torch.tensor([[[-3.0], [-1.0], [-0.5], [1.0]]], requires_grad=True)
    cost = opening_cost([z], margin=1.0)
    assert cost.item() == pytest.approx((0.5 + 2.0) / 4)
    cost.backward()
    assert torch.equal(z.grad, torch.tensor([[[0.0], [0.0], [0.25], [0.25]]]))


def test_shut_gates_keep_the_memory_to_the_bit():
    mixer = hard()
    _, state = mixer(torch.randn(1, 20, 16))
    with torch.no_grad():
        mixer.to_beta.bias.fill_(-100.0)
        _, after = mixer(torch.randn(1, 300, 16), state)
        for x in torch.randn(5, 1, 1, 16):
            _, after = mixer(x, after)
    assert torch.equal(state.memory, after.memory) and bool(state.memory.abs().sum() > 0)


def test_a_model_without_hard_gates_is_refused():
    with pytest.raises(UsageError, match="no hard write gate"), recorded(rm.mixer("gated-deltanet", dim=16)):
        pass
