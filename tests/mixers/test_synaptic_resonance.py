"""Synaptic resonance: its equation in a loop, with F held as a matrix of every row, and attention where eta is zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close
from parity import assert_parity

DIM, T = 16, 23


def build(dtype: torch.dtype = torch.float64, **hyper: object) -> rm.Mixer:
    torch.manual_seed(0)
    return rm.mixer("synaptic-resonance", dim=DIM, **hyper).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, T, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def projections(mixer: rm.Mixer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(W + eta F_t) x_t, F and the running mean at the end; with F [O, dim] scaled row by row as it is built."""
    W, lam, outputs = mixer.to_qkv.weight, mixer.decay, []
    F = W.new_zeros(len(x), *W.shape)
    mean = x.new_zeros(len(x), DIM)
    eps = 1e-6
    for t in range(T):
        unit = x[:, t] / (x[:, t].square().sum(-1, keepdim=True) + eps).sqrt()
        y = x[:, t] @ W.T
        r = (unit * mean / (mean.square().sum(-1, keepdim=True) + eps).sqrt()).sum(-1)
        y_unit = y / (y.square().sum(-1, keepdim=True) + eps).sqrt()
        rows = y_unit * W.norm(dim=1)
        F = lam * F + (1 - lam) * r[:, None, None] * rows[:, :, None] * unit[:, None]
        mean = lam * mean + (1 - lam) * x[:, t]
        outputs.append(torch.einsum("boi,bi->bo", W + mixer.eta * F, x[:, t]))
    return torch.stack(outputs, 1), F, mean


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_parity_with_the_equation_in_a_loop(backend: str, dtype: torch.dtype, tol: float) -> None:
    mixer, x = build(dtype, eta=3.0, window=7, backend=backend), inputs(dtype)
    y, state = mixer(x)
    qkv, F, mean = projections(mixer, x)
    plain = rm.mixer("attention", dim=DIM, window=7).to(dtype)
    plain.to_qkv = torch.nn.Identity()
    plain.out = mixer.out
    want, _ = rm.mixers.attention.Attention.forward(plain, qkv)
    assert_parity("synaptic-resonance", "the equation in a loop", y, want, tol)
    scaled = state.trace.mT * mixer.to_qkv.weight.norm(dim=1)[:, None]
    assert_close("F", scaled, F, tol)
    assert_close("mean", state.mean, mean, tol)


def test_parity_without_eta_it_is_attention() -> None:
    mixer, x = build(eta=0.0, window=7), inputs()
    plain = rm.mixer("attention", dim=DIM, window=7).double()
    plain.load_state_dict(mixer.state_dict())
    assert_parity("synaptic-resonance", "attention (eta = 0)", mixer(x)[0], plain(x)[0], 1e-12)


def test_rows_of_the_trace_never_exceed_those_of_the_weight() -> None:
    mixer, x, state = build(window=4, decay=0.5), inputs(), None
    with torch.no_grad():
        for _ in range(5):
            _, state = mixer(x * 10, state)
            assert bool((state.trace.norm(dim=1) <= 1).all())


def test_the_state_is_bounded_with_a_window() -> None:
    mixer, state, sizes = build(torch.float32, window=4), None, set()
    with torch.no_grad():
        for part in torch.randn(1, 20480, DIM).split(2048, 1):
            _, state = mixer(part, state)
            sizes.add(state.nbytes)
    assert len(sizes) == 1 and state.tokens == 20480


def test_bad_arguments() -> None:
    for hyper, message in (
        ({"decay": 1.0}, "decay is 1.0"),
        ({"eta": float("nan")}, "eta is nan"),
        ({"heads": 3}, "heads=3 does not divide"),
    ):
        with pytest.raises(rm.errors.UsageError, match=message):
            build(**hyper)
