"""GateLoop: its recurrence as a loop, and what it is when its gates are constant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.ops.outer import outer


def layer(**hyper) -> rm.Mixer:
    torch.manual_seed(0)
    return rm.mixer("gateloop", dim=24, **hyper).double()


def constant(magnitude: Tensor, phase: Tensor) -> rm.Mixer:
    """Gates that do not look at the input: a = magnitude exp(i phase) in every channel."""
    mixer = layer()
    with torch.no_grad():
        mixer.to_a.weight.zero_()
        mixer.to_a.bias.copy_(torch.cat([torch.logit(magnitude), phase]))
    return mixer


def qkv(mixer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return mixer.to_qkv(x).chunk(3, -1)


def inputs() -> Tensor:
    return torch.randn(2, 90, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_parity_with_the_equation() -> None:
    mixer, x = layer(), inputs()
    h, outputs = torch.zeros(2, 24, dtype=torch.complex128), []
    for t in range(90):
        q, k, v = qkv(mixer, x[:, t])
        magnitude, phase = mixer.to_a(x[:, t]).chunk(2, -1)
        h = magnitude.sigmoid() * torch.exp(1j * phase) * h + k * v
        o = (q * h).real
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
        gate = x[:, t] @ mixer.to_gate.weight.T
        outputs.append((o * gate * gate.sigmoid()) @ mixer.out.weight.T)
    y, state = mixer(x)
    assert_parity("gateloop", "the recurrence as a loop", y, torch.stack(outputs, 1), 1e-10)
    assert_close("state", state.hidden, torch.view_as_real(h), 1e-10)


def test_parity_of_constant_real_gates_with_retention() -> None:
    """As many heads as channels, each with its own fixed gamma; with gamma = 1 it is linear attention."""
    x = inputs()
    for gamma in (torch.linspace(0.5, 0.99, 24, dtype=torch.float64), torch.full((24,), 1 - 1e-15, dtype=torch.float64)):
        mixer = constant(gamma, torch.zeros(24, dtype=torch.float64))
        q, k, v = (part[..., None] for part in qkv(mixer, x))
        want, _ = outer(q, k, v, gamma.log().expand(2, 90, -1))
        assert_parity("gateloop", "retention with a fixed gamma a channel", mixer.loop(x, None, None)[0], want[..., 0], 1e-10)
    assert_close("linear attention", mixer.loop(x, None, None)[0], qkv(mixer, x)[0] * (k * v)[..., 0].cumsum(1), 1e-10)


def test_parity_of_constant_complex_gates_with_a_convolution() -> None:
    """As in S4: o = q * (K conv kv) with the kernel K_t = |a|^t cos(t phase)."""
    x, magnitude = inputs(), torch.linspace(0.8, 0.999, 24, dtype=torch.float64)
    phase = torch.linspace(-3.0, 3.0, 24, dtype=torch.float64)
    mixer, at = constant(magnitude, phase), torch.arange(90)[:, None]
    q, k, v = qkv(mixer, x)
    kernel = magnitude**at * torch.cos(at * phase)
    long = torch.fft.irfft(torch.fft.rfft(kernel, 180, 0) * torch.fft.rfft(k * v, 180, 1), 180, 1)[:, :90]
    assert_parity("gateloop", "convolution with powers of a complex number", mixer.loop(x, None, None)[0], q * long, 1e-10)


def test_a_shut_gate_forgets_everything() -> None:
    mixer, x = layer(), inputs()
    with torch.no_grad():
        mixer.to_a.bias[:24] = -500.0
    q, k, v = qkv(mixer, x)
    assert_close("o", mixer.loop(x, None, None)[0], q * k * v, 1e-12)
