"""RWKV-4 against transformers' layers and kernel, with copied weights, and its initial values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.errors import UsageError
from remanence.ops.expsum import expsum

DIM = 32


def theirs(kind: str) -> nn.Module:
    rwkv = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    layer = getattr(rwkv, kind)(rwkv.RwkvConfig(hidden_size=DIM, attention_hidden_size=DIM, intermediate_size=4 * DIM))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.rand_like(weight) if weight.shape[0] == 1 else 0.5 * torch.randn_like(weight))
    return layer


def copied(slug: str, layer: nn.Module) -> rm.Mixer:
    ours = rm.mixer(slug, dim=DIM)
    out = layer.output if slug == "rwkv4" else layer.value
    pairs = {"mu_k": layer.time_mix_key, "mu_r": layer.time_mix_receptance, "to_k.weight": layer.key.weight}
    pairs |= {"to_r.weight": layer.receptance.weight, "out.weight": out.weight}
    if slug == "rwkv4":
        pairs |= {"mu_v": layer.time_mix_value, "to_v.weight": layer.value.weight}
        pairs |= {"time_decay": layer.time_decay, "time_first": layer.time_first}
    ours.load_state_dict({name: weight.flatten() if weight.ndim == 3 else weight for name, weight in pairs.items()})
    return ours


@pytest.mark.parametrize("length", [1, 2, 150])
@pytest.mark.parametrize(("slug", "kind"), [("rwkv4", "RwkvSelfAttention"), ("rwkv4-channel", "RwkvFeedForward")])
def test_parity_transformers_layer(slug, kind, length):
    layer = theirs(kind)
    ours = copied(slug, layer)
    torch.manual_seed(1)
    x, dy = torch.randn(2, length, DIM), torch.randn(2, length, DIM)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    got, want = ours(xs[0])[0], layer(xs[1])
    want = want[0] if isinstance(want, tuple) else want
    assert_parity(slug, f"transformers {kind}", got, want)
    if slug == "rwkv4-channel":  # the other's loop writes into its output and cannot be differentiated
        grads = [torch.autograd.grad(y, leaf, dy)[0] for y, leaf in zip((got, want), xs)]
        assert_parity(slug, f"transformers {kind}, gradient of the input", *grads)


def test_parity_transformers_kernel_and_its_state():
    """wkv from a state on, and the state left behind: theirs is (num, den, max)."""
    rwkv = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    torch.manual_seed(2)
    decay, k, v = torch.randn(DIM), 3 * torch.randn(2, 90, DIM), torch.randn(2, 90, DIM)
    _, held = rwkv.rwkv_linear_attention_cpu(decay, decay, k[:, :40], v[:, :40], return_state=True)
    _, (num, den, top) = rwkv.rwkv_linear_attention_cpu(decay, decay, k[:, 40:], v[:, 40:], state=held)
    _, start = expsum(k[:, :40], v[:, :40, :, None], -decay.exp())
    _, (m, total, weighted) = expsum(k[:, 40:], v[:, 40:, :, None], -decay.exp(), start)
    for name, got, want in (("max", m, top), ("den", total, den), ("num", weighted[..., 0], num)):
        assert_parity("rwkv4", f"transformers rwkv_linear_attention_cpu, {name}", got, want)


def equation(mixer: rm.Mixer, x: torch.Tensor) -> torch.Tensor:
    """wkv as the two sums of the paper, all pairs of tokens at once, in float64."""
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    k, v, r = (linear(mu * x + (1 - mu) * before) for linear, mu in (
        (mixer.to_k, mixer.mu_k), (mixer.to_v, mixer.mu_v), (mixer.to_r, mixer.mu_r)))  # fmt: skip
    at = torch.arange(x.shape[1])
    ago = (at[:, None] - at - 1)[None, :, :, None]  # t - 1 - i
    weight = (-ago.clamp(min=0) * mixer.time_decay.exp() + k[:, None]).exp() * (ago >= 0)
    own = (mixer.time_first + k).exp()
    wkv = ((weight * v[:, None]).sum(2) + own * v) / (weight.sum(2) + own)
    return mixer.out(r.sigmoid() * wkv)


def test_parity_equation_with_gradients():
    torch.manual_seed(3)
    mixer = rm.mixer("rwkv4", dim=DIM, layer=2, layers=3).double()
    x = torch.randn(2, 40, DIM, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    got, want = mixer(x)[0], equation(mixer, x)
    assert_parity("rwkv4", "the paper's sums, float64", got, want, 1e-10)
    leaves = [x, *mixer.parameters()]
    for one, other in zip(*(torch.autograd.grad(y, leaves, dy) for y in (got, want))):
        assert_close("gradient", one, other, 1e-9)


def test_initial_values():
    """The paper's formulas at the bottom and at the top of a stack of 3."""
    h = torch.arange(DIM)
    low, high = (rm.mixer("rwkv4", dim=DIM, layer=layer, layers=3) for layer in (1, 3))
    assert_close("decay", low.time_decay, -5 + 8 * (h / (DIM - 1)) ** 0.7, 1e-6)
    assert_close("decay", high.time_decay, -5 + 8 * (h / (DIM - 1)) ** 2.0, 1e-6)
    assert_close("bonus", low.time_first[:3], torch.tensor(0.3).log() + torch.tensor([0.0, 0.5, -0.5]), 1e-6)
    assert_close("mu_k", low.mu_k, h / DIM, 1e-6)
    assert_close("mu_k", high.mu_k, (h / DIM) ** (1 / 3), 1e-6)
    assert_close("mu_v", high.mu_v, high.mu_k + 0.3, 1e-6)
    assert_close("mu_r", low.mu_r, (h / DIM) ** 0.5, 1e-6)
    trainer = rm.mixer("rwkv4", dim=DIM, init="trainer")
    assert not trainer.to_k.weight.any() and not trainer.to_r.weight.any() and not trainer.out.weight.any() and trainer.to_v.weight.any()


def test_a_stack_of_blocks():
    """Time mixing and channel mixing as layers of a Decoder, which tells each where it stands."""
    layers = [{"mixer": "rwkv4", "ffn": 0}, {"mixer": "rwkv4-channel", "ffn": 0}]
    model = rm.model(rm.ModelConfig(vocab=11, dim=DIM, layers=layers, repeat=2))
    ids = torch.randint(11, (2, 20))
    want = model(ids)
    first = model(ids[:, :7])
    assert_close("logits", model(ids[:, 7:], first.state).logits, want.logits[:, 7:], 1e-5)
    assert model.blocks[0].mixer.config["layers"] == 4 and model.blocks[2].mixer.config["layer"] == 3


def test_keys_of_any_size_are_finite():
    mixer = rm.mixer("rwkv4", dim=DIM)
    with torch.no_grad():
        mixer.to_k.weight.mul_(1e4)
    x = torch.randn(2, 40, DIM, requires_grad=True)
    y, state = mixer(x)
    for tensor in (y, state.total, state.weighted, *torch.autograd.grad(y.sum(), [x, *mixer.parameters()])):
        assert tensor.isfinite().all()


@pytest.mark.parametrize(("hyper", "message"), [
    ({"layer": 3, "layers": 2}, r"layer is 3; it must be in 1\.\.2"),
    ({"init": "zero"}, "init is 'zero'"),
])  # fmt: skip
@pytest.mark.parametrize("slug", ["rwkv4", "rwkv4-channel"])
def test_bad_hyper_parameters(slug, hyper, message):
    with pytest.raises(UsageError, match=message):
        rm.mixer(slug, dim=DIM, **hyper)
