import math

import pytest
import torch

import remanence as rm
from remanence.train import adamw, decay_groups, learning_rate


def test_groups():
    model = rm.Decoder(rm.ModelConfig(vocab=11, dim=8, layers=[{"mixer": "gated-deltanet", "heads": 2}]))
    decay, rest = decay_groups(model, 0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert "blocks.0.mixer.to_qkv.weight" in decay["names"] and all(p.ndim >= 2 for p in decay["params"])
    for name in ("embedding.weight", "norm.weight", "blocks.0.mixer.A_log", "blocks.0.mixer.dt_bias"):
        assert name in rest["names"]
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))  # the tied head counts once
    assert "embedding.weight" in decay_groups(model, 0.1, decay_embeddings=True)[0]["names"]


def test_marked_and_frozen_parameters():
    model = torch.nn.Linear(3, 3)
    model.weight.no_weight_decay = True
    model.bias.requires_grad_(False)
    (group,) = decay_groups(model, 0.1)
    assert group["names"] == ["weight"] and group["weight_decay"] == 0


def test_decay_touches_only_its_group():
    model = torch.nn.Linear(3, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, lr=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(model.weight, before["weight"] * 0.95) and torch.equal(model.bias, before["bias"])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_schedules_warm_up_and_end_at_the_floor(name):
    rates = [learning_rate(name, step, 100, 2.0, warmup=10, floor=0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2.0) and rates[-1] == pytest.approx(0.2)
    assert all(a >= b - 1e-12 for a, b in zip(rates[10:], rates[11:]))


def test_schedule_values():
    assert learning_rate("cosine", 50, 101, 1.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert learning_rate("linear", 50, 101, 1.0) == pytest.approx(0.5)
    assert [learning_rate("wsd", step, 100, 1.0, warmup=5) for step in (5, 79, 80)] == [1.0, 1.0, 1.0]
    assert learning_rate("constant", 99, 100, 3.0, floor=0.5) == 3.0
    assert learning_rate("cosine", 0, 1, 1.0) == 1.0
    with pytest.raises(rm.errors.UnknownName, match="cosine"):
        learning_rate("cosin", 0, 1, 1.0)
