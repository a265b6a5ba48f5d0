"""TCNCA: MEGA when its taps are a truncated average, the reach of its convolutions, and its network written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import remanence as rm
from helpers import assert_close
from parity import assert_parity


def test_parity_taps_of_an_average_give_mega():
    """One level of K taps, a single average that is below 1e-7 after K tokens."""
    torch.manual_seed(0)
    mega = rm.mixer("mega", dim=6, modes=1, chunk=8)
    ours = rm.mixer("tcnca", dim=6, levels=1, width=40, chunk=8)
    with torch.no_grad():
        mega.alpha.fill_(1.0)
        mega.delta.fill_(1.0)
        for name, parameter in ours.named_parameters():
            if name not in ("direction", "scale"):
                parameter.copy_(dict(mega.named_parameters())[name])
        a = mega.alpha.sigmoid()
        kernel = a * mega.beta * mega.gamma * (1 - a * mega.delta.sigmoid()) ** torch.arange(40).flip(0)  # [D, K], the last tap is now
        ours.direction.copy_(kernel[None])
        ours.scale.copy_(kernel.norm(dim=-1)[None, :, None])
    x = torch.randn(2, 70, 6)
    assert_parity("tcnca", "MEGA, its taps a truncated average", ours(x)[0], mega(x)[0])


def test_move_is_its_equation():
    ours = rm.mixer("tcnca", dim=5, levels=3, width=3, growth=2).double()
    x = torch.randn(2, 40, 5, dtype=torch.float64)
    a = x.mT
    for level in range(3):
        taps = ours.scale[level] * ours.direction[level] / ours.direction[level].norm(dim=-1, keepdim=True)
        y = F.conv1d(F.pad(a, (2 * 2**level, 0)), taps[:, None], dilation=2**level, groups=5)
        a = y if level == 2 else F.silu(y) + a
    assert_close("move", ours.move(x, None, None)[0], F.silu(a.mT + ours.omega * x), 1e-10)


def test_reach():
    ours = rm.mixer("tcnca", dim=4, levels=3, width=3, growth=3)
    x = torch.randn(1, 80, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(ours.move(x, None, None)[0][0, 60].sum(), x)
    alive = grad[0].abs().sum(-1).nonzero()[:, 0]
    assert alive.max() == 60 and 60 - alive.min() + 1 == 1 + 2 * (3**3 - 1) // 2
    assert ours(x)[1].levels[2].shape == (1, 18, 4)


def test_hyper_parameters():
    with pytest.raises(rm.UsageError, match="width is 1"):
        rm.mixer("tcnca", dim=4, width=1)
