"""AGaLiTe against a loop over its equations, GaLiTe against its own, and the one as the limit of the other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close, pieces
from parity import assert_parity
from remanence import Span
from remanence.errors import UsageError

DIM, HEADS, ETA = 16, 2, 3
D = DIM // HEADS


def make(dtype: torch.dtype = torch.float64, **hyper) -> rm.Mixer:
    torch.manual_seed(0)
    mixer = rm.mixer("agalite", dim=DIM, heads=HEADS, eta=ETA, **hyper).to(dtype)
    with torch.no_grad():
        mixer.to_kqvbg.bias.normal_()
        mixer.to_p.bias.normal_()
    return mixer


def loop(mixer: rm.Mixer, x: Tensor, exact: bool) -> Tensor:
    """One row and one head after the other, one token after the other."""
    frequencies = torch.linspace(-math.pi, math.pi, mixer.oscillators, dtype=torch.float64)
    rows = []
    for row in x:
        heads = []
        for head in range(HEADS):
            k, q, v, beta, gamma = mixer.to_kqvbg(row).unflatten(-1, (HEADS, 5 * D))[:, head].split(D, -1)
            p1, p2, p3 = mixer.to_p(row).unflatten(-1, (HEADS, 3 * ETA))[:, head].split(ETA, -1)
            s, C, outputs = torch.zeros(ETA * D).to(x), torch.zeros(D, ETA * D).to(x), []
            keys, values = torch.zeros(mixer.oscillators, ETA * D).to(x), torch.zeros(mixer.oscillators, D).to(x)
            for t in range(len(row)):
                phi_k = torch.outer(p1[t].relu(), k[t].relu()).flatten()
                phi_q = torch.outer(p2[t].relu(), q[t].relu()).flatten()
                G, b = torch.outer(p3[t].sigmoid(), gamma[t].sigmoid()).flatten(), beta[t].sigmoid()
                s = (1 - G) * s + G * phi_k
                C = torch.outer(1 - b, 1 - G) * C + torch.outer(b * v[t], G * phi_k)
                c = (frequencies * (t + 2)).cos()[:, None]  # the memory's tick starts at 1 and is advanced before it is used
                keys, values = (1 - G) * keys + c * G * phi_k, (1 - b) * values + c * b * v[t]
                if exact:
                    outputs.append(C @ phi_q / (s @ phi_q + 1e-5))
                else:
                    outputs.append((values * (keys @ phi_q)[:, None]).sum(0) / (2 * mixer.oscillators * (s @ phi_q) + 1e-5))
            heads.append(torch.stack(outputs))
        rows.append(mixer.out(torch.cat(heads, -1)))
    return torch.stack(rows)


@pytest.mark.parametrize(("hyper", "source"), [
    ({"oscillators": 1}, "subho406/agalite, one oscillator"),
    ({"oscillators": 7}, "subho406/agalite"),
    ({"exact": True}, "GaLiTe's equations"),
])  # fmt: skip
def test_parity_loop(hyper, source):
    mixer = make(**hyper)
    x = torch.randn(2, 40, DIM, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    got, want = mixer(x)[0], loop(mixer, x, mixer.exact)
    assert_parity("agalite", f"{source}, as a loop, float64", got, want, 1e-10)
    for one, other in zip(*(torch.autograd.grad(y, [x, *mixer.parameters()], dy) for y in (got, want))):
        assert_close("gradient", one, other, 1e-9)


def test_parity_many_oscillators_approach_galite():
    """They sum to R / 2 of the exact product, over a normaliser of 2 R: a quarter. The error falls as 1 / R, to what eps / 2 R makes."""
    x = torch.randn(1, 20, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact, errors = make(exact=True), []
    with torch.no_grad():
        want = exact(x)[0] - exact.out.bias
        for oscillators in (50, 500, 5000):
            many = make(oscillators=oscillators)
            many.load_state_dict(exact.state_dict())
            errors.append(assert_close(f"{oscillators} oscillators", 4 * (many(x)[0] - many.out.bias), want, 1.0))
    assert errors[1] < errors[0] / 5 and errors[2] < errors[1] / 2
    assert_parity("agalite", "GaLiTe, from 5000 oscillators (the approximation's error)", 4 * (many(x)[0] - many.out.bias), want, 5e-3)


def test_exact_form_in_pieces_packed_and_padded():
    mixer, x = make(torch.float32, exact=True), torch.randn(2, 30, DIM)
    with torch.no_grad():
        y, end = mixer(x)
        outputs, state = [], None
        for part in pieces(x, [1, 2, 17]):
            out, state = mixer(part, state)
            outputs.append(out)
        assert_close("pieces", torch.cat(outputs, 1), y, 1e-5)
        assert_close("C", state.values, end.values, 1e-5)
        reset = torch.zeros(2, 34, dtype=torch.bool)
        reset[:, 4] = True
        packed, _ = mixer(torch.cat([torch.randn(2, 4, DIM), x], 1), end, Span(reset=reset))
        assert_close("packed", packed[:, 4:], y, 1e-5)
        _, held = mixer(torch.cat([x[:, :9], torch.full((2, 2, DIM), torch.nan)], 1), None, Span.from_lengths([9, 9], 11))
        assert_close("padded", mixer(x[:, 9:], held)[0], y[:, 9:], 1e-5)


def test_saturated_gates_are_finite():
    """Gates of exactly 0 and 1 in float32, and features that are all 0: no logarithm of 0, no 0 / 0."""
    for bias in (200.0, -200.0):
        mixer = make(torch.float32)
        with torch.no_grad():
            mixer.to_kqvbg.bias.fill_(bias)
            mixer.to_p.bias.fill_(bias)
        x = torch.randn(2, 12, DIM, requires_grad=True)
        y, state = mixer(x)
        for tensor in (y, *state.tensors(), *torch.autograd.grad(y.sum(), [x, *mixer.parameters()])):
            assert tensor.isfinite().all()


def test_it_is_a_mixer_of_kind_rl():
    entry = rm.find("galite")
    assert entry.slug == "agalite" and entry.kinds == ("rl", "mixer")


@pytest.mark.parametrize(("hyper", "message"), [({"heads": 3}, "heads=3 does not divide dim=16"), ({"oscillators": 0}, "oscillators is 0")])
def test_bad_hyper_parameters(hyper, message):
    with pytest.raises(UsageError, match=message):
        rm.mixer("agalite", dim=DIM, **hyper)
