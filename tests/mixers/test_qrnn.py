"""QRNN and SRU: their equations in a loop, the window at a document's start, and the one as the other."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence import Decoder, ModelConfig, Span


@pytest.mark.parametrize("width", [1, 2, 4])
def test_parity_qrnn_loop(width: int) -> None:
    """fo-pooling over a masked convolution, torch's conv1d being the reference for the window."""
    mixer = rm.mixer("qrnn-hybrid", dim=6, inner=5, width=width).double()
    x = torch.randn(2, 30, 6, dtype=torch.float64)
    kernel = mixer.to_gates.weight.unflatten(1, (width, 6)).flip(1).mT  # [3 E, dim, W], oldest first
    z, f, o = torch.conv1d(torch.nn.functional.pad(x.mT, (width - 1, 0)), kernel, mixer.to_gates.bias).mT.chunk(3, -1)
    c, outputs = torch.zeros(2, 5, dtype=torch.float64), []
    for t in range(30):
        gate = torch.sigmoid(f[:, t])
        c = gate * c + (1 - gate) * torch.tanh(z[:, t])
        outputs.append(mixer.out(torch.sigmoid(o[:, t]) * c))
    assert_parity("qrnn-hybrid", f"fo-pooling in a loop (width {width})", mixer(x)[0], torch.stack(outputs, 1))


def test_the_window_does_not_reach_over_a_reset() -> None:
    mixer, x = rm.mixer("qrnn", dim=6, width=3), torch.randn(1, 12, 6)
    reset = torch.zeros(1, 12, dtype=torch.bool)
    reset[0, [0, 5, 11]] = True
    y, state = mixer(x, span=Span(reset=reset))
    assert_close("second document", y[:, 5:11], mixer(x[:, 5:11])[0], 1e-5)
    alone, end = mixer(x[:, 11:])
    assert_close("last document", y[:, 11:], alone, 1e-5)
    assert torch.equal(state.inputs, end.inputs) and torch.equal(state.seen, end.seen)


def test_the_hybrid_is_a_decoder() -> None:
    model = Decoder(ModelConfig(vocab=17, dim=32, layers="2 x qrnn-hybrid, 1 x attention"))
    assert model(torch.randint(17, (2, 9))).logits.shape == (2, 9, 17)


@pytest.mark.parametrize("peephole", [True, False])
def test_parity_sru_loop(peephole: bool) -> None:
    mixer = rm.mixer("sru", dim=6, peephole=peephole, bias=-1.0).double()
    x = torch.randn(2, 40, 6, dtype=torch.float64)
    v = mixer.v if peephole else torch.zeros(2, 6, dtype=torch.float64)
    if peephole:
        with torch.no_grad():
            v.mul_(5)
    c, outputs = torch.zeros(2, 6, dtype=torch.float64), []
    for token in x.unbind(1):
        candidate, f, r = mixer.to_gates(token).chunk(3, -1)
        f, r = torch.sigmoid(f + v[0] * c), torch.sigmoid(r + v[1] * c)
        c = f * c + (1 - f) * candidate
        outputs.append(mixer.out(r * c + (1 - r) * token * mixer.alpha))
    got, want = mixer(x)[0], torch.stack(outputs, 1)
    assert_parity("sru", f"the paper's equations in a loop (peephole {peephole})", got, want)
    weights = dict(mixer.named_parameters())
    grads = [dict(zip(weights, torch.autograd.grad(y.sin().sum(), list(weights.values())))) for y in (got, want)]
    assert_gradients_close("sru", *grads, 1e-9)


def test_a_linear_sru_is_a_qrnn_of_width_1_up_to_its_output() -> None:
    """The same recurrence: with the QRNN's tanh in its linear range their states agree."""
    sru, qrnn = rm.mixer("sru", dim=6, peephole=False).double(), rm.mixer("qrnn", dim=6, width=1).double()
    with torch.no_grad():
        for ours, theirs in ((qrnn.to_gates.weight, sru.to_gates.weight), (qrnn.to_gates.bias, sru.to_gates.bias)):
            ours.copy_(theirs)
            ours[:6] *= 1e-4
    x = torch.randn(2, 20, 6, dtype=torch.float64)
    assert_close("state", 1e4 * qrnn(x)[1].hidden, sru(x)[1].hidden, 1e-6)


def test_wrong_hyper_parameters_are_refused() -> None:
    with pytest.raises(rm.errors.UsageError, match="width is 0"):
        rm.mixer("qrnn", dim=8, width=0)
    with pytest.raises(rm.errors.UsageError, match="inner is 0"):
        rm.mixer("qrnn", dim=8, inner=0)
