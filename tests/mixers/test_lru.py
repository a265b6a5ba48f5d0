"""The linear recurrent unit: its equation as a loop, its initial values, and its stability."""

from __future__ import annotations

import math

import pytest
import torch

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.errors import UsageError


def layer(**hyper) -> rm.Mixer:
    torch.manual_seed(0)
    return rm.mixer("lru", **{"dim": 16} | hyper)


@pytest.mark.parametrize("hyper", [{}, {"state_size": 40}, {"r_min": 0.9, "r_max": 0.999, "max_phase": math.pi / 10}])
def test_parity_with_the_equation(hyper: dict) -> None:
    """x_k = Lambda x_{k-1} + exp(gamma) B u_k, y_k = Re(C x_k) + D u_k with complex matrices (the paper's appendix A)."""
    mixer = layer(**hyper).double()
    u = torch.randn(2, 120, 16, dtype=torch.float64)
    B = torch.complex(*mixer.to_h.weight.chunk(2, 0))
    C_re, minus_C_im = mixer.out.weight.chunk(2, 1)
    C = torch.complex(C_re, -minus_C_im)
    Lambda = torch.exp(-mixer.nu.exp() + 1j * mixer.theta.exp())
    h, outputs = torch.zeros(2, len(Lambda), dtype=torch.complex128), []
    for t in range(120):
        h = Lambda * h + mixer.gamma.exp() * (u[:, t].to(B.dtype) @ B.T)
        outputs.append((h @ C.T).real + mixer.D * u[:, t])
    y, state = mixer(u)
    assert_parity("lru", "the equation as a loop in complex128", y, torch.stack(outputs, 1), 1e-10)
    assert_parity("lru", "the equation as a loop in complex128 (ours in fp32)", layer(**hyper)(u.float())[0], y.float())
    assert_close("state", state.hidden, torch.view_as_real(h), 1e-10)


def test_eigenvalues_start_in_the_ring_and_stay_in_the_disc() -> None:
    mixer = layer(state_size=4000, r_min=0.5, r_max=0.9, max_phase=1.0)
    r, phase = (-mixer.nu.exp()).exp(), mixer.theta.exp()
    assert r.min() >= 0.5 and r.max() <= 0.9 and phase.min() > 0 and phase.max() <= 1.0
    inner = (r.square() < (0.25 + 0.81) / 2).double().mean().item()
    assert inner == pytest.approx(0.5, abs=0.03)  # uniform in area: half of it lies inside the root mean square radius
    assert_close("gamma", mixer.gamma.exp(), (1 - r.square()).sqrt(), 1e-5)
    with torch.no_grad():
        mixer.nu.copy_(torch.linspace(-60, 60, 4000))  # whatever it learns
    x = torch.randn(1, 300, 16)
    assert mixer(x)[0].isfinite().all()


def test_the_normalisation_keeps_the_state_the_size_of_its_input() -> None:
    """White noise in, a stationary |h|^2 of |B u|^2 out, also where |lambda| is nearly 1."""
    mixer = layer(state_size=64, r_min=0.98, r_max=0.99)
    x = torch.randn(8, 3000, 16)
    h = mixer(x)[1].hidden
    size = h.square().sum(-1).mean() / mixer.to_h(x).square().reshape(8, 3000, 2, 64).sum(2).mean()
    assert size.item() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("hyper", [{"r_min": 0.5, "r_max": 0.4}, {"r_max": 1.1}, {"max_phase": 0.0}, {"max_phase": 7.0}])
def test_wrong_use(hyper: dict) -> None:
    with pytest.raises(UsageError, match="need 0 <= r_min < r_max <= 1"):
        layer(**hyper)
