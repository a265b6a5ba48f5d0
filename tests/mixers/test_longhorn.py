"""Longhorn: the authors' step in our own words, and the delta rule where its diagonal form is exact."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.ops.delta import delta

DIM, EXPAND, N = 32, 2, 5


def test_parity_step() -> None:
    """The published layer token by token: a rolling window for the convolution, then one update of the state [B, E, N]."""
    torch.manual_seed(0)
    ours = rm.mixer("longhorn", dim=DIM, state_size=N)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
        inner, rank = EXPAND * DIM, 2
        x = torch.randn(3, 60, DIM)
        window, S, want = torch.zeros(3, inner, 4), torch.zeros(3, inner, N), []
        for token in x.unbind(1):
            u, z = (token @ ours.to_xz.weight.T).chunk(2, -1)
            window = torch.cat([window[..., 1:], u[..., None]], -1)
            u = F.silu((window * ours.conv.weight).sum(-1) + ours.conv.bias)
            low, k, q = (u @ ours.to_rbc.weight.T).split([rank, N, N], -1)
            dt = torch.sigmoid(low @ ours.to_dt.weight.T + ours.to_dt.bias)
            dt = dt / (1 + dt * (k**2).sum(-1, keepdim=True))
            S = S * (1 - dt[..., None] * k[:, None] ** 2) + u[..., None] * dt[..., None] * k[:, None]
            want.append(((S * q[:, None]).sum(-1) + ours.D * u) * F.silu(z) @ ours.out.weight.T)
        y, state = ours(x)
    assert_parity("longhorn", "Cranial-XIX/longhorn step (re-derived)", y, torch.stack(want, 1))
    assert_close("state", state.memory, S, 1e-5)


def test_parity_delta_rule_on_one_hot_keys() -> None:
    """With one key dimension at a time the diagonal of k k^T is all of it: a delta rule that writes with b / (1 + b |k|^2)."""
    from remanence.ops.selective import selective

    torch.manual_seed(0)
    size = 1 + torch.rand(2, 70, 1).double()
    k = F.one_hot(torch.randint(N, (2, 70)), N) * size
    q, x = torch.randn(2, 70, N).double(), torch.randn(2, 70, 4).double()
    b = torch.rand(2, 70, 1).double()
    eps = b / (1 + b * k.square().sum(-1, keepdim=True))
    got, state = selective(eps.expand_as(x), k.square(), eps * x, k, q, decay="complement")
    want, S = delta(q[:, :, None], k[:, :, None], x[:, :, None], None, eps)
    assert_parity("longhorn", "the delta rule on one-hot keys", got, want[:, :, 0], 1e-10)
    assert_close("state", state.mT, S[:, 0], 1e-10)


def test_writing_moves_the_read_towards_the_value() -> None:
    """After a write with a large b, what the key reads is the value: the solution of the regression."""
    from remanence.ops.selective import selective

    k, x, b = torch.tensor([[[0.0, 2.0, 0.0]]]), torch.randn(1, 1, 4), 1e6
    eps = torch.full((1, 1, 4), b / (1 + b * 4.0))
    y, _ = selective(eps, k.square(), eps * x, k, k, torch.randn(1, 4, 3), decay="complement")
    assert_close("read", y, x, 1e-5)


def test_a_fresh_one_has_no_decay_rates() -> None:
    mixer = rm.mixer("longhorn", dim=DIM)
    assert not mixer.to_dt.bias.any() and "A_log" not in dict(mixer.named_parameters())
