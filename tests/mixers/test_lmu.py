"""The LMU mixer: the published cell's FFT form, and the delay line that its matrices are made for."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.ops.lti import dense, hippo


@pytest.mark.parametrize("order", [8, 40])
def test_parity_the_published_cell(order):
    """Its parallel form, re-derived: m is the FFT convolution of u with the impulse response H_t = Abar^t Bbar."""
    ours = rm.mixer("lmuformer", dim=6, order=order, theta=50.0)
    x = torch.randn(2, 100, 6)
    n = torch.arange(order, dtype=torch.float64)
    a = torch.tensor([[(2 * i + 1) / 50 * (-1 if i < j else (-1) ** (i - j + 1)) for j in range(order)] for i in range(order)]).double()
    b = (2 * n + 1) * (-1) ** n / 50
    abar = torch.matrix_exp(a)
    bbar = torch.linalg.solve(a, (abar - torch.eye(order).double()) @ b)
    impulse = [bbar]
    for _ in range(99):
        impulse.append(abar @ impulse[-1])
    u = (x @ ours.to_u.weight.T + ours.to_u.bias).relu().double()  # [B, T, 1]
    spectrum = torch.fft.rfft(u, n=200, dim=1) * torch.fft.rfft(torch.stack(impulse), n=200, dim=0)
    m = torch.fft.irfft(spectrum, n=200, dim=1)[:, :100].float()
    want = (torch.cat([m, x], -1) @ ours.out.weight.T + ours.out.bias).relu()
    y, state = ours(x)
    assert_parity("lmuformer", "LMUFormer's LMU cell (zeyuliu1037/LMUFormer), FFT form re-derived", y, want)
    assert_close("memory", state.memory[:, 0], m[:, -1], 1e-5)


@pytest.mark.parametrize("delay", [0.0, 0.3, 1.0])
def test_the_legendre_delay_line(delay):
    """sum_n P_n(2 delay - 1) m_n is u(t - delay theta): what the memory is by construction, for a signal that it can resolve."""
    theta, order = 200.0, 12
    a, b = hippo.discretize(*hippo.hippo("lmu", order, theta), 1.0, "zoh")
    t = torch.arange(1200, dtype=torch.float64)
    u = torch.sin(2 * torch.pi * t / 300) + 0.5 * torch.cos(2 * torch.pi * t / 170)
    m, _ = dense(a, b, u[None, :, None])
    legendre = [torch.tensor(1.0).double(), torch.tensor(2 * delay - 1).double()]
    for n in range(1, order - 1):
        legendre.append(((2 * n + 1) * (2 * delay - 1) * legendre[n] - n * legendre[n - 1]) / (n + 1))
    got = m[0, 400:, 0] @ torch.stack(legendre)
    want = u[400 - int(delay * theta) : 1200 - int(delay * theta)]
    assert_close("delayed input", got, want, 2e-2)  # the hold shifts the signal by half a token, 1% of it here


def test_a_memory_of_theta_tokens():
    """What lies further back than theta fades, however the call is cut."""
    a, b = hippo.discretize(*hippo.hippo("lmu", 16, 60.0), 1.0, "zoh")
    pulse = torch.zeros(1, 200, 1, dtype=torch.float64)
    pulse[:, 0] = 1
    m, _ = dense(a, b, pulse)
    assert m[0, 150].norm() < 1e-2 * m[0, :60].norm(dim=-1).max()


def test_hyper_parameters():
    with pytest.raises(rm.UsageError, match="theta is 0.5"):
        rm.mixer("lmuformer", dim=8, theta=0.5)
    mixer = rm.mixer("lmuformer", dim=8)
    assert torch.equal(mixer.bfloat16().A, rm.mixer("lmuformer", dim=8).A)  # rounding the weights does not round the memory
