"""Griffin's recurrent block: against its equation, the public implementation, and itself cut anywhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import remanence as rm
from helpers import assert_close, assert_gradients_close, cuts, pieces
from remanence import Span
from remanence.mixers.griffin import MAX_SLOPE, BoundedSqrt, lambda_init

TOL = 1e-5


def reference(ours, dim: int, width: int, heads: int):
    """The public block with our weights; it keeps its state on the module, so every test makes its own."""
    hf = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma", reason="transformers is not installed")
    config = hf.RecurrentGemmaConfig(hidden_size=dim, lru_width=width, num_attention_heads=heads, num_key_value_heads=1, conv1d_width=4)
    block = hf.RecurrentGemmaRecurrentBlock(config, 0)
    i, r = ours.gate_weight.chunk(2, -1)
    bi, br = ours.gate_bias.chunk(2, -1)
    values = {
        "linear_x": ours.to_x, "linear_y": ours.to_y, "linear_out": ours.out,
        "conv_1d.weight": ours.conv.weight[:, None], "conv_1d.bias": ours.conv.bias, "rg_lru.recurrent_param": ours.Lambda,
        "rg_lru.input_gate_weight": i, "rg_lru.input_gate_bias": bi, "rg_lru.recurrent_gate_weight": r, "rg_lru.recurrent_gate_bias": br,
    }  # fmt: skip
    flat = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": part for key, part in value.named_parameters()} if isinstance(value, torch.nn.Module) else {name: value}
    block.load_state_dict({name: value.detach() for name, value in flat.items()})
    return block


def block_of(dim: int = 24, width: int = 24, heads: int = 3, **hyper):
    """Ours, with gates and biases large enough to matter."""
    ours = rm.mixer("griffin", dim=dim, width=width, heads=heads, **hyper)
    with torch.no_grad():
        ours.gate_weight.mul_(20)
        for bias in (ours.gate_bias, ours.to_x.bias, ours.to_y.bias, ours.out.bias):
            bias.normal_()
    return ours


@pytest.mark.parametrize("length", [1, 2, 77])
def test_equals_the_public_block(length):
    ours = block_of(width=30)
    theirs = reference(ours, 24, 30, 3)
    x, direction = torch.randn(2, length, 24, requires_grad=True), torch.randn(2, length, 24)
    want, _ = theirs(x, torch.arange(length).expand(2, -1), None, use_cache=False)
    got, _ = ours(x)
    assert_close("y", got, want, TOL)

    names = [name for name, _ in theirs.named_parameters()]
    ref = dict(zip(names, torch.autograd.grad((want * direction).sum(), list(theirs.parameters()), allow_unused=True)))
    grads = dict(zip(dict(ours.named_parameters()), torch.autograd.grad((got * direction).sum(), list(ours.parameters()))))
    i, r = grads["gate_weight"].chunk(2, -1)
    mine = {
        "linear_x.weight": grads["to_x.weight"], "linear_y.weight": grads["to_y.weight"], "linear_out.weight": grads["out.weight"],
        "conv_1d.weight": grads["conv.weight"][:, None], "rg_lru.recurrent_param": grads["Lambda"],
        "rg_lru.input_gate_weight": i, "rg_lru.recurrent_gate_weight": r,
    }  # fmt: skip
    zero = {name for name in mine if ref[name] is None}
    assert not zero or length == 1  # one token, factor 1 and nothing carried: the decay plays no part
    assert all(not mine[name].any() for name in zero)
    assert_gradients_close("griffin", {k: v for k, v in mine.items() if k not in zero}, {k: ref[k] for k in mine if k not in zero}, TOL)


def test_decodes_as_the_public_block():
    ours = block_of()
    theirs = reference(ours, 24, 24, 3)
    x = torch.randn(2, 20, 24)
    state = None
    for part in (slice(0, 12), *(slice(t, t + 1) for t in range(12, 20))):
        at = torch.arange(part.start, part.stop).expand(2, -1)
        want, _ = theirs(x[:, part], at, None, use_cache=True)
        got, state = ours(x[:, part], state)
        assert_close(f"token {part.stop}", got, want, TOL)
    assert_close("hidden", state.hidden, theirs.rg_lru.recurrent_states, TOL)


def test_documents_in_a_row_as_the_public_block():
    """Its convolution looks over document borders, so only the current tap is left on here; its recurrence does start anew."""
    ours = block_of()
    with torch.no_grad():
        ours.conv.weight[:, :-1] = 0
    theirs = reference(ours, 24, 24, 3)
    x, at = torch.randn(1, 30, 24), torch.cat([torch.arange(11), torch.arange(19)])[None]
    want, _ = theirs(x, at, None, use_cache=False)
    assert_close("y", ours(x, span=Span.from_cu_seqlens([0, 11, 30]))[0], want, TOL)


@pytest.mark.parametrize("init", ["released", "paper"])
def test_equals_the_loop(init):
    ours = block_of(init=init).double()
    x = torch.randn(2, 40, 24, dtype=torch.float64)
    y, state = ours(x)
    u = F.conv1d(F.pad(ours.to_x(x).mT, (3, 0)), ours.conv.weight[:, None], ours.conv.bias, groups=24).mT
    h, outputs = torch.zeros(2, 24, dtype=torch.float64), []
    for t in range(40):
        gates = [u[:, t, 8 * n : 8 * n + 8] @ ours.gate_weight[n] + ours.gate_bias[n] for n in range(3)]
        i, r = (torch.cat([gate.chunk(2, -1)[k] for gate in gates], -1).sigmoid() for k in (0, 1))
        a = torch.sigmoid(-ours.Lambda) ** (8 * r)
        h = a * h + (1.0 if t == 0 else (1 - a**2).sqrt()) * i * u[:, t]
        outputs.append(h)
    want = ours.out(F.gelu(ours.to_y(x), approximate="tanh") * torch.stack(outputs, 1))
    assert_close("y", y, want, 1e-10)
    assert_close("hidden", state.hidden, h, 1e-10)


@given(where=cuts(80), resets=st.lists(st.integers(0, 79), max_size=3))
def test_any_cut(where, resets):
    mixer = block_of()
    x, reset = torch.randn(2, 80, 24), torch.zeros(2, 80, dtype=torch.bool)
    reset[1, resets] = True
    whole, end = mixer(x, span=Span(reset=reset))
    state, outputs = None, []
    for part, marks in zip(pieces(x, where), pieces(reset, where)):
        y, state = mixer(part, state, Span(reset=marks))
        outputs.append(y)
    assert_close("y", torch.cat(outputs, 1), whole, TOL)
    for name, tensor in state.named_tensors():
        assert_close(name, tensor, dict(end.named_tensors())[name], TOL)


def test_initial_values_of_lambda():
    keep = (-F.softplus(lambda_init(4000, "released").double())).exp()
    assert 0.9 - 1e-5 < keep.min() < 0.905 and 0.995 < keep.max() < 0.999 + 1e-5
    assert abs(keep.square().mean() - (0.9**2 + 0.999**2) / 2) < 0.005
    keep = (-8 * F.softplus(lambda_init(4000, "paper").double())).exp()
    assert 0.9 - 1e-5 < keep.min() < 0.905 and 0.995 < keep.max() < 0.999 + 1e-5
    assert abs(keep.mean() - (0.9 + 0.999) / 2) < 0.005


def test_the_slope_of_the_root_is_bounded():
    x = torch.tensor([0.0, 1e-12, 0.25], dtype=torch.float64, requires_grad=True)
    root = BoundedSqrt.apply(x)
    (slope,) = torch.autograd.grad(root.sum(), x)
    assert torch.equal(root, x.sqrt()) and slope.tolist() == pytest.approx([MAX_SLOPE, MAX_SLOPE, 1.0])
    mixer = rm.mixer("griffin", dim=8)
    with torch.no_grad():
        mixer.Lambda.fill_(-60.0)  # a is 1 to the last bit
    mixer(torch.randn(2, 30, 8))[0].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in mixer.parameters())


def test_hyper_parameters():
    assert rm.mixer("griffin", dim=8).Lambda.no_weight_decay
    with pytest.raises(rm.errors.UsageError, match="heads=4 does not divide width=10"):
        rm.mixer("griffin", dim=8, width=10)
    with pytest.raises(rm.errors.UsageError, match="init is 'other'"):
        rm.mixer("griffin", dim=8, init="other")
