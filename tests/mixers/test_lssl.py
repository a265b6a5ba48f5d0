"""LSSL: the RNN-gate lemma of its paper, its recurrence written out, and the trained variant."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.ops.lti import dense, hippo


def test_parity_the_gate_lemma():
    """A = -1, B = 1, N = 1, backward Euler with dt = exp(z): h_t = (1 - sigmoid(z)) h_{t-1} + sigmoid(z) u_t, a gated RNN."""
    z = torch.randn(5, dtype=torch.float64)
    a, b = hippo.discretize(-torch.ones(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), z.exp(), "bilinear", alpha=1.0)
    u = torch.randn(2, 70, 5, dtype=torch.float64)
    got, _ = dense(a, b, u)
    h, want = torch.zeros(2, 5, dtype=torch.float64), []
    for t in range(70):
        h = (1 - z.sigmoid()) * h + z.sigmoid() * u[:, t]
        want.append(h)
    assert_parity("lssl", "the paper's RNN-gate lemma", got[..., 0], torch.stack(want, 1), 1e-12)


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
@pytest.mark.parametrize("learn", [False, True])
def test_equals_its_recurrence(measure, learn):
    ours = rm.mixer("lssl", dim=4, order=5, channels=3, measure=measure, alpha=0.7, learn=learn).double()
    x = torch.randn(2, 40, 4, dtype=torch.float64)
    a, b = hippo.hippo(measure, 5)
    one, dt = torch.eye(5, dtype=torch.float64), torch.logspace(-3, -1, 4, dtype=torch.float64)
    m, o = torch.zeros(2, 4, 5, dtype=torch.float64), []
    for t in range(40):
        right = torch.einsum("dij,bdj->bdi", one + 0.3 * dt[:, None, None] * a, m) + dt[:, None] * b * x[:, t, :, None]
        m = torch.linalg.solve(one - 0.7 * dt[:, None, None] * a, right[..., None])[..., 0]
        o.append(torch.einsum("dmn,bdn->bdm", ours.C, m) + ours.skip * x[:, t, :, None])
    y, state = ours(x)
    assert_close("y", y, ours.out(F.gelu(torch.stack(o, 1)).flatten(2)), 1e-6)  # the trained variant's A and dt pass through float32
    assert_close("state", state.memory, m, 1e-6)
    assert {"A", "log_dt"} <= {name for name, _ in ours.named_parameters()} or not learn


def test_training_reaches_a_and_dt():
    mixer = rm.mixer("lssl", dim=4, order=5, learn=True)
    mixer(torch.randn(2, 20, 4))[0].square().sum().backward()
    assert mixer.A.grad.abs().sum() > 0 and mixer.log_dt.grad.abs().sum() > 0
    assert not {"A", "log_dt"} & {name for name, _ in rm.mixer("lssl", dim=4).named_parameters()}


def test_hyper_parameters():
    with pytest.raises(rm.UsageError, match="measure is 'lmu'"):
        rm.mixer("lssl", dim=4, measure="lmu")
    with pytest.raises(rm.UsageError, match="alpha is 0.2"):
        rm.mixer("lssl", dim=4, alpha=0.2)
    with pytest.raises(rm.UsageError, match="dt_min is 0"):
        rm.mixer("lssl", dim=4, dt_min=0.0)
