"""MCSD: its two sections with the weights written out, and the limits that its entry names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import remanence as rm
from helpers import assert_close
from parity import assert_parity


def parts(ours, x):
    """u, v, u', v' [B, T, D] of the channels."""
    mixed = [xc @ w for xc, w in zip(x.chunk(ours.channels, -1), ours.weight)]
    return [torch.cat(part, -1) for part in zip(*(m.chunk(4, -1) for m in mixed))]


def test_parity_the_weights_written_out():
    ours = rm.mixer("mcsd", dim=8, channels=4, decays=[0.0, 0.3, 0.9, 0.99]).double()
    x = torch.randn(2, 50, 8, dtype=torch.float64)
    u, v, u_decay, v_decay = parts(ours, x)
    gap = (torch.arange(50)[:, None] - torch.arange(50)).clamp(min=0).double()
    causal = torch.ones(50, 50).tril().double()
    s, r = torch.zeros_like(v), torch.zeros_like(v)
    for d in range(8):
        m, gamma = 2.0 ** (-8 * (d // 2 + 1) / 4), ours.decays[d // 2]
        weight = torch.exp(-m * gap) * causal
        s[..., d] = v[..., d] @ (weight / weight.sum(-1, keepdim=True)).T
        r[..., d] = v_decay[..., d] @ ((1 - gamma) * gamma**gap * causal).T
    want = ours.out(F.silu(ours.to_gate(x)) * (u * s + u_decay * r))
    assert_parity("mcsd", "its two sections, weights written out (float64)", ours(x)[0], want, 1e-10)


def test_parity_no_decay_and_no_slope_are_pointwise():
    """gamma = 0 and a steep slope: the past has no weight, and every token is on its own."""
    ours = rm.mixer("mcsd", dim=8, channels=2, slopes=[200.0, 200.0], decays=[0.0, 0.0]).double()
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    alone = torch.cat([ours(x[:, t : t + 1])[0] for t in range(20)], 1)
    assert_parity("mcsd", "gamma = 0: pointwise", ours(x)[0], alone, 1e-12)


def test_a_constant_input_stays_what_it_is():
    """The slope's weights sum to 1 at every position, the first included."""
    ours = rm.mixer("mcsd", dim=8, decays=[0.0] * 4).double()
    y, _ = ours(torch.randn(1, 1, 8, dtype=torch.float64).expand(-1, 600, -1))
    assert_close("constant", y, y[:, :1].expand_as(y), 1e-10)


def test_hyper_parameters():
    with pytest.raises(rm.UsageError, match="channels=3 does not divide dim=8"):
        rm.mixer("mcsd", dim=8, channels=3)
    with pytest.raises(rm.UsageError, match=r"decays are \[1.0, 1.0, 1.0, 1.0\]"):
        rm.mixer("mcsd", dim=8, decays=[1.0] * 4)
    with pytest.raises(rm.UsageError, match=r"slopes are \[1.0\]"):
        rm.mixer("mcsd", dim=8, slopes=[1.0])
