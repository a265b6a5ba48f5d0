"""MultiresNet: the published layer by torch's own convolutions, the Haar transform, and what the tree can see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import remanence as rm
from helpers import assert_close
from parity import assert_parity


@pytest.mark.parametrize(("width", "length"), [(2, 32), (3, 20), (4, 100)])
def test_parity_the_published_layer(width, length):
    """Its "fading" tree, re-derived: conv1d with growing dilation over zero-padded channels."""
    ours = rm.mixer("multiresnet", dim=6, width=width, length=length)
    x = torch.randn(2, 90, 6)
    low, total, gap = x.mT, ours.weight[:, -1:] * x.mT, 1
    for level in range(ours.depth, 0, -1):
        padded = F.pad(low, (gap * (width - 1), 0))
        total = total + ours.weight[:, level : level + 1] * F.conv1d(padded, ours.high[:, None], dilation=gap, groups=6)
        low, gap = F.conv1d(padded, ours.low[:, None], dilation=gap, groups=6), 2 * gap
    total = total + ours.weight[:, :1] * low
    value, gate = ours.out(F.gelu(total).mT).chunk(2, -1)
    assert_parity("multiresnet", "its layer (thjashin/multires-conv), re-derived", ours(x)[0], value * gate.sigmoid())


def test_parity_haar_is_the_undecimated_transform():
    """b^j is 2^(-j/2) (sum of the older 2^(j-1) inputs - sum of the newer), a^J 2^(-J/2) the sum of the last 2^J: blocks, no filters."""
    ours = rm.mixer("multiresnet", dim=1, length=16, init="haar").double()
    x = torch.randn(1, 50, 1, dtype=torch.float64)
    before = F.pad(x[0, :, 0], (16, 0))
    want = []
    for level in range(1, 5):
        half = 2 ** (level - 1)
        newer = torch.stack([before[t + 17 - half : t + 17].sum() for t in range(50)])
        older = torch.stack([before[t + 17 - 2 * half : t + 17 - half].sum() for t in range(50)])
        want.append(2 ** (-level / 2) * (older - newer))
    want.append(2 ** (-4 / 2) * torch.stack([before[t + 1 : t + 17].sum() for t in range(50)]))
    seen = []
    ours.out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for band in range(5):
        with torch.no_grad():
            ours.weight.zero_()
            ours.weight[:, ours.depth - band if band < 4 else 0] = 1
            ours(x)
    got = torch.stack(seen)[:, 0, :, 0]
    assert_parity("multiresnet", "the undecimated Haar transform, from block sums", got, F.gelu(torch.stack(want)), 1e-6)


def test_it_sees_length_tokens_and_none_ahead():
    mixer = rm.mixer("multiresnet", dim=3, length=20, width=3)
    x = torch.randn(1, 80, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(mixer(x)[0][0, 60].sum(), x)
    alive = grad[0].abs().sum(-1).nonzero()[:, 0]
    assert alive.max() == 60 and 60 - alive.min() >= 19
    _, state = mixer(x)
    assert sum(level.shape[1] for level in state.levels) == 2 * (2**mixer.depth - 1)
    assert_close("state", state.levels[0], x[:, -2:], 0)


def test_hyper_parameters():
    with pytest.raises(rm.UsageError, match="width is 1"):
        rm.mixer("multiresnet", dim=4, width=1)
    with pytest.raises(rm.UsageError, match="Haar wavelet has 2 taps"):
        rm.mixer("multiresnet", dim=4, width=3, init="haar")
    with pytest.raises(rm.UsageError, match="init is 'db2'"):
        rm.mixer("multiresnet", dim=4, init="db2")
