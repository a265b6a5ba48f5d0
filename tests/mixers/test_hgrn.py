"""HGRN and HGRN2: their recurrences one token at a time, their lower bounds, and models whose layers share them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import remanence as rm
from helpers import assert_close, cuts, pieces
from parity import assert_parity
from remanence import Decoder, ModelConfig, Span
from remanence.errors import UsageError
from remanence.mixers.hgrn import LowerBound, tie_lower_bounds
from remanence.ops.scan import scan


def layer(slug: str = "hgrn", **hyper) -> rm.Mixer:
    torch.manual_seed(0)
    mixer = rm.mixer(slug, dim=32, **{"layer": 3, "layers": 4} | hyper)
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return mixer


def bound(mixer: nn.Module, index: int) -> Tensor:
    """The bound of layer `index`, the lowest being 0: cumulative sums of a softmax over layers, minus the first (as fla computes it)."""
    if mixer.bound.Gamma is None:
        return torch.zeros(32)
    weights = mixer.bound.Gamma.softmax(0)
    return weights.cumsum(0)[index] - weights[0]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@pytest.mark.parametrize("index", [0, 1, 3])
def test_parity_with_the_published_real_form(index: int) -> None:
    mixer, x = layer(layer=index + 1), torch.randn(2, 90, 32)
    gamma, silu = bound(mixer, index), nn.functional.silu
    h, outputs = torch.zeros(2, 32), []
    for t in range(90):
        f = gamma + (1 - gamma) * (x[:, t] @ mixer.to_f.weight.T).sigmoid()
        h = f * h + (1 - f) * silu(x[:, t] @ mixer.to_i.weight.T)
        outputs.append(rms_norm(h, mixer.norm.weight) * silu(x[:, t] @ mixer.to_gate.weight.T))
    y, state = mixer(x)
    assert_parity("hgrn", "fla HGRN layer and naive_recurrent_hgrn (re-derived)", y, torch.stack(outputs, 1) @ mixer.out.weight.T)
    assert_close("state", state.hidden, h, 1e-5)


def test_parity_of_the_complex_form_with_its_equation() -> None:
    mixer, x = layer(complex=True), torch.randn(2, 90, 32)
    gamma, silu = bound(mixer, 2), nn.functional.silu
    h, outputs = torch.zeros(2, 32, dtype=torch.complex64), []
    for t in range(90):
        f = gamma + (1 - gamma) * (x[:, t] @ mixer.to_f.weight.T).sigmoid()
        h = f * torch.polar(torch.ones(32), mixer.theta) * h + (1 - f) * torch.complex(*silu(mixer.to_i(x[:, t])).chunk(2, -1))
        outputs.append(rms_norm(torch.cat([h.real, h.imag], -1), mixer.norm.weight) * silu(mixer.to_gate(x[:, t])))
    y, state = mixer(x)
    assert_parity("hgrn", "the paper's complex recurrence as a loop", y, mixer.out(torch.stack(outputs, 1)))
    assert_close("state", state.hidden, torch.view_as_real(h), 1e-5)


@given(where=cuts(40), resets=st.lists(st.integers(0, 39), max_size=3))
def test_complex_form_in_any_cut(where: list[int], resets: list[int]) -> None:
    mixer, x, reset = layer(complex=True), torch.randn(2, 40, 32), torch.zeros(2, 40, dtype=torch.bool)
    reset[1, resets] = True
    whole, end = mixer(x, span=Span(reset=reset))
    state, outputs = None, []
    for part, marks in zip(pieces(x, where), pieces(reset, where)):
        y, state = mixer(part, state, Span(reset=marks))
        outputs.append(y)
    assert_close("y", torch.cat(outputs, 1), whole, 1e-5)
    assert_close("state", state.hidden, end.hidden, 1e-5)


def test_complex_form_takes_part_in_training_and_saving(tmp_path: Path) -> None:
    mixer = layer(complex=True)
    y, state = mixer(torch.randn(1, 20, 32))
    y.sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in mixer.parameters())
    state.save(tmp_path / "state.safetensors")
    assert rm.State.load(tmp_path / "state.safetensors").digest() == state.detach().digest()
    low = layer(complex=True).bfloat16()
    got, _ = low(torch.randn(1, 20, 32).bfloat16())
    assert got.dtype == torch.bfloat16


def test_bounds_are_zero_at_the_bottom_and_grow_with_depth() -> None:
    f = torch.full((1, 1, 8), -1e4, dtype=torch.float64)  # the gate as shut as can be: what is left is the bound
    torch.manual_seed(0)
    Gamma = torch.randn(5, 8, dtype=torch.float64)
    found = []
    for layer in range(1, 6):
        bound = LowerBound(8, layer, 5)
        if bound.Gamma is not None:
            bound.Gamma = nn.Parameter(Gamma)
        log_f, write = bound(f)
        found.append(log_f.exp()[0, 0])
        assert_close("1 - f", write[0, 0], 1 - found[-1], 1e-12)
    assert not found[0].any() and all((low < high).all() for low, high in zip(found, found[1:])) and (found[-1] < 1).all()


def test_gates_keep_their_digits_at_both_ends() -> None:
    bound, f = LowerBound(1, 2, 2), torch.tensor([-80.0, -30.0, 0.0, 30.0, 80.0])[None, :, None]
    with torch.no_grad():
        bound.Gamma.copy_(torch.tensor([[10.0], [0.0]]))  # a bound of 5e-5
    exact = bound(f.double())
    for got, want in zip(bound(f), exact):
        assert ((got - want).abs() <= 1e-6 * want.abs()).all(), f"{got.flatten().tolist()} against {want.flatten().tolist()}"


def model(layers: str) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(vocab=11, dim=16, layers=layers, ffn=1))
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if name.endswith("Gamma"):
                weight.add_(torch.randn_like(weight))
    return decoder


@pytest.mark.parametrize("layers", ["4 x hgrn", "4 x hgrn2", "2 x hgrn, 2 x hgrn2"])
def test_tied_bounds_are_one_parameter_and_survive_saving(layers: str, tmp_path: Path) -> None:
    decoder, ids = model(layers), torch.randint(11, (2, 30))
    before = decoder(ids).logits
    shared = tie_lower_bounds(decoder)
    names = [name for name, _ in decoder.named_parameters() if name.endswith("Gamma")]
    assert names == ["blocks.1.mixer.bound.Gamma"] and decoder.blocks[3].mixer.bound.Gamma is shared
    after = decoder(ids).logits
    assert not torch.allclose(before, after)  # each had its own values
    after.sin().sum().backward()
    assert shared.grad is not None and (shared.grad.abs().sum(1) > 0).all()
    decoder.save(tmp_path)
    loaded = rm.load(tmp_path)
    assert torch.equal(loaded(ids).logits, decoder.eval()(ids).logits)
    again = tie_lower_bounds(loaded)
    assert torch.equal(again, shared) and torch.equal(loaded(ids).logits, decoder(ids).logits)


def test_bounds_that_cannot_be_tied() -> None:
    with pytest.raises(UsageError, match="lower bounds"):
        tie_lower_bounds(model("attention"))
    with pytest.raises(UsageError, match="layer=3 of layers=2"):
        rm.mixer("hgrn", dim=8, layer=3, layers=2)


def recurrent_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """[B, T, H, K or V], one token at a time."""
    memory, outputs = torch.zeros(*q[:, 0].shape, v.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[1]):
        memory = memory * g[:, t, ..., None] + k[:, t, ..., None] * v[:, t, :, None]
        outputs.append((memory * q[:, t, ..., None]).sum(-2))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("key_dim", [8, 32])
def test_parity_of_hgrn2_with_the_published_recurrence(key_dim: int) -> None:
    mixer, x = layer("hgrn2", key_dim=key_dim), torch.randn(2, 90, 32)
    q, f, v = mixer.to_qfv(x).chunk(3, -1)
    gamma = bound(mixer, 2)
    f = gamma + (1 - gamma) * f.sigmoid()
    o = recurrent_gla(*(part.unflatten(-1, (-1, key_dim)) for part in (q * q.sigmoid(), 1 - f, v, f))).flatten(2)
    want = rms_norm(o, mixer.norm.weight) @ mixer.out.weight.T
    assert_parity("hgrn2", "fla HGRN2 layer and naive_recurrent_gla (re-derived)", mixer(x)[0], want)


def test_hgrn2_with_one_key_per_channel_is_hgrn() -> None:
    mixer, x = layer("hgrn2", key_dim=1).double(), torch.randn(2, 90, 32, dtype=torch.float64)
    _, f, v = mixer.to_qfv(x).chunk(3, -1)
    log_f, write = mixer.bound(f)
    h, _ = scan(log_f, write * v)
    assert_close("state", mixer(x)[1].memory[..., 0, 0], h[:, -1], 1e-10)


def test_wrong_use_of_hgrn2() -> None:
    with pytest.raises(UsageError, match="key_dim=5 does not divide dim=32"):
        rm.mixer("hgrn2", dim=32, key_dim=5)
