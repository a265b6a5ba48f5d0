"""MEGA: the published block in its step form, re-derived, and the moving average by its kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import remanence as rm
from helpers import assert_close
from parity import assert_parity


def block_of(slug: str = "mega", **hyper):
    """With weights large enough for the attention to matter."""
    torch.manual_seed(0)
    mixer = rm.mixer(slug, dim=8, chunk=6, **hyper)
    with torch.no_grad():
        for linear in (mixer.to_v, mixer.to_gzrh, mixer.to_h):
            linear.weight.normal_(std=0.5)
            linear.bias.normal_()
        mixer.kappa.normal_()
        mixer.mu.normal_()
        mixer.bias.normal_()
    return mixer


def rest_of_the_block(ours, m, x, attention):
    """The published block after its moving average: one token at a time, with a list of the chunk's keys and values."""
    outputs, keys, values = [], [], []
    dim, key_dim, value_dim, _ = ours.sizes
    for t in range(x.shape[1]):
        if t % ours.chunk == 0:
            keys, values = [], []
        base = ours.to_gzrh(m[:, t])
        gate, zr, hx = base[:, :dim].sigmoid(), F.silu(base[:, dim : dim + key_dim + value_dim]), base[:, -dim:]
        z, r = zr[:, :key_dim], zr[:, key_dim:]
        keys.append(z * ours.kappa[1] + ours.mu[1])
        values.append(F.silu(ours.to_v(x[:, t])))
        q = z * ours.kappa[0] + ours.mu[0]
        score = torch.stack([(q * k).sum(-1) for k in keys], -1)
        bias = torch.stack([ours.bias[len(keys) - 1 - j] for j in range(len(keys))])
        if attention == "softmax":
            weight = (score * key_dim**-0.5 + bias).softmax(-1)
        else:
            score = score / len(keys) + bias
            weight = score.relu() ** 2 if attention == "relu2" else 0.5 * (1 + torch.erf((score - 0.707107) / (0.282095 * 2**0.5)))
        o = torch.einsum("bj,bje->be", weight, torch.stack(values, 1))
        h = F.silu(hx + ours.to_h(o * r))
        outputs.append(x[:, t] + gate * (h - x[:, t]))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("attention", ["softmax", "laplace", "relu2"])
def test_parity_the_published_block(attention):
    ours = block_of(attention=attention, modes=4)
    x = torch.randn(2, 40, 8)
    a, d = ours.alpha.sigmoid(), ours.delta.sigmoid()
    h, m = torch.zeros(2, 8, 4), []
    for t in range(40):
        h = (1 - a * d) * h + a * ours.beta * x[:, t, :, None]
        m.append(F.silu((h * ours.gamma * 0.25**0.5).sum(-1) + ours.omega * x[:, t]))
    want = rest_of_the_block(ours, torch.stack(m, 1), x, attention)
    y, state = ours(x)
    assert_parity("mega", f"its block (facebookresearch/mega) in steps, {attention}, re-derived", x + y, want)
    assert_close("averages", state.moved, h, 1e-5)


def test_parity_the_averages_are_the_published_kernel():
    """Its whole-sequence form: k = sum_n a beta q^t gamma / sqrt(N), by FFT."""
    ours = block_of(modes=4).double()
    x = torch.randn(2, 90, 8, dtype=torch.float64)
    a, d = ours.alpha.sigmoid(), ours.delta.sigmoid()
    power = (torch.arange(90)[None, None] * torch.log(1 - a * d)[..., None]).exp()
    kernel = torch.einsum("dn,dnt->dt", a * ours.beta * ours.gamma * 0.5, power)
    spectrum = torch.fft.rfft(x, n=180, dim=1) * torch.fft.rfft(kernel, n=180).mT
    want = F.silu(torch.fft.irfft(spectrum, n=180, dim=1)[:, :90] + ours.omega * x)
    assert_parity("mega", "its EMA's FFT form, re-derived (float64)", ours.move(x, None, None)[0], want, 1e-10)


def test_an_average_that_forgets_at_once():
    """a d = 1 to the last bit: the average is its last input, with finite gradients."""
    ours = block_of(modes=2)
    with torch.no_grad():
        ours.alpha.fill_(60.0)
        ours.delta.fill_(60.0)
    x = torch.randn(1, 80, 8)
    want = F.silu((ours.beta * ours.gamma * 0.5**0.5).sum(-1) * x + ours.omega * x)
    assert_close("average", ours.move(x, None, None)[0], want, 1e-5)
    ours(x)[0].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in ours.parameters())


def test_chunks_do_not_see_each_other():
    ours = block_of(modes=2)
    x = torch.randn(1, 18, 8)
    with torch.no_grad():
        ours.gamma.zero_()  # no average: only the attention carries anything
    moved = x.clone()
    moved[:, 5] += 1.0
    changed = (ours(x)[0] != ours(moved)[0]).any(-1)[0]
    assert changed.nonzero()[:, 0].tolist() == [5]
    moved = x.clone()
    moved[:, 6] += 1.0
    assert (ours(x)[0] != ours(moved)[0]).any(-1)[0].nonzero()[:, 0].tolist() == list(range(6, 12))


def test_hyper_parameters():
    with pytest.raises(rm.UsageError, match="attention is 'cosine'"):
        rm.mixer("mega", dim=8, attention="cosine")
    with pytest.raises(rm.UsageError, match="chunk is 0"):
        rm.mixer("mega", dim=8, chunk=0)
