"""S4 and S4D: their equations, HiPPO at the start, and the paper's Cauchy route to the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence import Span
from remanence.ops.lti import hippo


@pytest.mark.parametrize("init", ["lin", "inv"])
def test_parity_s4d_is_the_convolution_of_its_paper(init):
    """K_l = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l), re-derived, then a plain causal convolution."""
    ours = rm.mixer("s4d", dim=6, order=8, init=init).double()
    x = torch.randn(2, 90, 6, dtype=torch.float64)
    ssm = ours.ssm
    n = torch.arange(4)
    imag = torch.pi * n if init == "lin" else 8 / torch.pi * (8 / (2 * n + 1) - 1)
    a = torch.complex(torch.full((4,), -0.5).double(), imag.float().double())
    assert_close("Im A", ssm.A_imag, a.imag.expand(6, -1), 1e-6)
    step = ssm.log_dt.exp()[:, None]
    cb = torch.view_as_complex(ssm.C) * (torch.exp(step * a) - 1) / a
    kernel = torch.stack([2 * (cb * torch.exp(step * a * l)).sum(1).real for l in range(90)], 1)
    o = torch.stack([sum(kernel[:, j] * x[:, t - j] for j in range(t + 1)) for t in range(90)], 1) + ours.skip * x
    value, gate = ours.out(F.gelu(o)).chunk(2, -1)
    assert_parity("s4d", "the kernel of arXiv 2206.11893, re-derived", ours(x)[0], value * gate.sigmoid(), 1e-6)


def test_zero_order_hold_is_the_matrix_exponential():
    ssm = rm.mixer("s4d", dim=3, order=8).double().ssm
    log_a, b = ssm.discrete()
    a = torch.complex(-ssm.A_log.exp(), ssm.A_imag)
    for d in range(3):
        abar, bbar = hippo.discretize(torch.diag(a[d]), torch.ones(4, dtype=a.dtype), ssm.log_dt[d].exp().to(a.dtype), "zoh")
        assert torch.allclose(abar.diagonal(), log_a[d].exp(), atol=1e-12) and torch.allclose(bbar, b[d], atol=1e-12)


def test_parity_s4_starts_as_hippo_legs():
    """In its eigenbasis the dense bilinear recurrence of LegS, with any read-out."""
    ours = rm.mixer("s4", dim=3, order=8).double()
    x = torch.randn(1, 60, 3, dtype=torch.float64)
    _, _, _, v = hippo.nplr_legs(8)
    a, b = hippo.hippo("legs", 8)
    abar, bbar = hippo.discretize(a, b, ours.log_dt.exp())
    row = 2 * (torch.view_as_complex(ours.C) @ v.mH).real  # C V* on a real state
    m, o = torch.zeros(1, 3, 8, dtype=torch.float64), []
    for t in range(60):
        m = torch.einsum("dij,bdj->bdi", abar, m) + bbar * x[:, t, :, None]
        o.append((row * m).sum(-1))
    value, gate = ours.out(F.gelu(torch.stack(o, 1) + ours.skip * x)).chunk(2, -1)
    y, state = ours(x)
    # the parameters pass through float32
    assert_parity("s4", "HiPPO-LegS by its bilinear recurrence, re-derived", y, value * gate.sigmoid(), 1e-5)
    z = m.to(v.dtype) @ v.conj()
    assert_close("state", state.memory, torch.cat([z.real, z.imag], -1), 1e-5)


@pytest.mark.parametrize("length", [2, 63, 64, 100])
def test_parity_cauchy_route(length):
    """Outputs and every gradient; the state goes on as from the chunked form."""
    torch.manual_seed(0)
    ours = rm.mixer("s4", dim=4, order=8).double()
    torch.manual_seed(0)
    other = rm.mixer("s4", dim=4, order=8, kernel="cauchy").double()
    x = torch.randn(2, length, 4, dtype=torch.float64)
    results = []
    for mixer in (ours, other):
        y, state = mixer(x)
        grads = torch.autograd.grad((y * x).sum() + state.memory.sum(), list(mixer.parameters()))
        results.append((y, state.memory, {name: grad for (name, _), grad in zip(mixer.named_parameters(), grads)}))
    assert_parity("s4", "its Cauchy kernel and FFT (float64)", results[1][0], results[0][0], 1e-10)
    assert_close("state", results[1][1], results[0][1], 1e-12)
    assert_gradients_close("s4", results[1][2], results[0][2], 1e-8)


def test_float32_long_stream():
    """2000 tokens at the default order, in float32 against float64, whole and token by token at the end."""
    torch.manual_seed(0)
    for slug in ("s4d", "s4"):
        mixer = rm.mixer(slug, dim=4)
        x = torch.randn(1, 2000, 4)
        with torch.no_grad():
            got, state = mixer(x[:, :1900])
            steps = []
            for t in range(1900, 2000):
                y, state = mixer(x[:, t : t + 1], state)
                steps.append(y)
            want, _ = mixer.double()(x.double())
        assert_close(slug, torch.cat([got, *steps], 1), want.float(), 1e-5)


def test_a_single_token_under_a_span():
    mixer = rm.mixer("s4", dim=4, order=8).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    _, state = mixer(x[:, :4])
    span = Span(torch.tensor([[True], [False], [True]]), torch.tensor([[False], [False], [True]]))
    y, new = mixer(x[:, 4:], state, span)
    assert_close("continued", y[0], mixer(x[:1])[0][0, 4:], 1e-10)
    assert torch.equal(new.memory[1], state.memory[1]) and not y[1].any()
    assert_close("restarted", y[2], mixer(x[2:, 4:])[0][0], 1e-10)


def test_hyper_parameters():
    for slug in ("s4", "s4d"):
        with pytest.raises(rm.UsageError, match="order is 7; it must be even"):
            rm.mixer(slug, dim=8, order=7)
        with pytest.raises(rm.UsageError, match="dt_min is 1.0 and dt_max 0.1"):
            rm.mixer(slug, dim=8, dt_min=1.0, dt_max=0.1)
    with pytest.raises(rm.UsageError, match="init is 'legs'"):
        rm.mixer("s4d", dim=8, init="legs")
    with pytest.raises(rm.UsageError, match="kernel is 'fft'"):
        rm.mixer("s4", dim=8, kernel="fft")
    assert rm.mixer("s4-s4d", dim=8).slug == "s4"
