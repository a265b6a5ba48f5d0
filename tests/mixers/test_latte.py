"""Latte against its O(T^2) formula, the authors' recurrence, and what it is with a single latent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.errors import UsageError

DIM, HEADS, L = 32, 4, 5


def projections(mixer: rm.Mixer, x: Tensor) -> list[Tensor]:
    return [part.unflatten(-1, (HEADS, -1)) for part in mixer.to_qkv(x).split(mixer.sizes, -1)]  # [B, T, H, L or D]


def direct(mixer: rm.Mixer, x: Tensor) -> Tensor:
    """A softmax over the prefix for every latent and every token, then the mixture."""
    q, k, v = projections(mixer, x)
    future = ~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    weight = k[:, None].expand(-1, x.shape[1], -1, -1, -1).masked_fill(future[..., None, None], -torch.inf).softmax(2)  # [B, T, S, H, L]
    return mixer.out(torch.einsum("bthl,btshl,bshd->bthd", q.softmax(-1), weight, v).flatten(2))


def recurrence(mixer: rm.Mixer, x: Tensor) -> Tensor:
    """The authors' stable scan: cumulative maxima, two accumulators that are rescaled at every token; the first maximum is k_0."""
    q, k, v = projections(mixer, x)
    top = k.cummax(1).values
    total, weighted, before, outputs = torch.zeros_like(k[:, 0]), k.new_zeros(*k[:, 0].shape, v.shape[-1]), k[:, 0], []
    for t in range(x.shape[1]):
        keep, add = (before - top[:, t]).exp(), (k[:, t] - top[:, t]).exp()
        total, weighted = keep * total + add, keep[..., None] * weighted + add[..., None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhl,bhld->bhd", q[:, t].softmax(-1) / total, weighted))
        before = top[:, t]
    return mixer.out(torch.stack(outputs, 1).flatten(2))


@pytest.fixture(scope="module")
def mixer() -> rm.Mixer:
    torch.manual_seed(0)
    mixer = rm.mixer("latte", dim=DIM, heads=HEADS, latents=L)
    with torch.no_grad():
        mixer.to_qkv.weight.mul_(4)
    return mixer


@pytest.mark.parametrize(("want", "source"), [(direct, "the O(T^2) formula"), (recurrence, "raresdolga/latte_transformer StableScanLatte")])
@pytest.mark.parametrize("length", [1, 16, 70])
def test_parity_formula_and_recurrence(mixer, want, source, length):
    torch.manual_seed(1)
    x, dy = torch.randn(2, length, DIM, requires_grad=True), torch.randn(2, length, DIM)
    got, wanted = mixer(x)[0], want(mixer, x)
    assert_parity("latte", source, got, wanted)
    for one, other in zip(*(torch.autograd.grad(y, [x, mixer.to_qkv.weight], dy) for y in (got, wanted))):
        assert_parity("latte", f"{source}, gradients", one, other)


def test_parity_one_latent_is_a_softmax_average():
    """With one latent q does not matter: o is the average of v under softmax(k) over the prefix."""
    torch.manual_seed(2)
    mixer = rm.mixer("latte", dim=DIM, heads=HEADS, latents=1)
    x = torch.randn(1, 40, DIM)
    with torch.no_grad():
        _, k, v = projections(mixer, x)
        o = torch.stack([(k[:, : t + 1].softmax(1) * v[:, : t + 1]).sum(1) for t in range(40)], 1)
        assert_parity("latte", "prefix softmax average (one latent)", mixer(x)[0], mixer.out(o.flatten(2)))


@pytest.mark.parametrize("slope", [40.0, -40.0])
def test_keys_that_rise_or_fall_by_hundreds_inside_a_chunk(slope):
    torch.manual_seed(3)
    mixer = rm.mixer("latte", dim=DIM, heads=HEADS, latents=L).double()
    x = torch.randn(1, 50, DIM, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        mixer.to_qkv.weight[HEADS * L : 2 * HEADS * L] = 0
        mixer.to_qkv.weight[HEADS * L : 2 * HEADS * L, 0] = slope
        x[..., 0] = torch.arange(50)
    low = rm.mixer("latte", dim=DIM, heads=HEADS, latents=L)
    low.load_state_dict(mixer.state_dict())
    y = low(x.float())[0]
    assert_close("y", y.double(), direct(mixer, x).detach(), 1e-5)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_bad_hyper_parameters():
    with pytest.raises(UsageError, match="heads=3 does not divide dim=32"):
        rm.mixer("latte", dim=DIM, heads=3)
    with pytest.raises(UsageError, match="latents is 0"):
        rm.mixer("latte", dim=DIM, latents=0)
