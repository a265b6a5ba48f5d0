"""sLSTM: the public layer written again, and its initial forget biases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence import Decoder, ModelConfig, Span


def moved(**hyper) -> rm.Mixer:
    torch.manual_seed(0)
    mixer = rm.mixer("slstm", dim=12, **hyper).double()
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(0.5 * torch.randn_like(weight))
    return mixer


@pytest.mark.parametrize("conv_width", [None, 4])
def test_parity_xlstm_layer(conv_width: int | None) -> None:
    """NX-AI/xlstm's layer: conv1d and SiLU for i and f, projections per head, the vanilla cell, layer norm per head times a weight."""
    heads, size, T = 3, 4, 30
    mixer, x = moved(heads=heads, conv_width=conv_width), torch.randn(2, T, 12, dtype=torch.float64)
    u = x
    if mixer.conv is not None:
        weight = mixer.conv.weight[:, None]
        u = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight, mixer.conv.bias, groups=12).mT)
    y = c = n = m = torch.zeros(2, heads, size, dtype=torch.float64)
    outputs = []
    for t in range(T):
        raw = []
        for gate in range(4):
            source = (u if gate < 2 else x)[:, t].view(2, heads, size)
            linear = torch.einsum("bhi,hij->bhj", source, mixer.to_gates[:, :, gate])
            raw.append(linear + torch.einsum("bhi,hij->bhj", y, mixer.recurrent[:, :, gate]) + mixer.bias[:, gate])
        i, f, z, o = raw
        kept = m + F.logsigmoid(f)
        m = i if t == 0 else torch.maximum(i, kept)
        i, f = (i - m).exp(), (kept - m).exp()
        c, n = f * c + i * z.tanh(), f * n + i
        y = o.sigmoid() * c / n
        centred = y - y.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        outputs.append(scaled.flatten(1) * mixer.norm.weight)
    got, state = mixer(x)
    assert_parity("slstm", f"the layer of NX-AI/xlstm (conv {conv_width})", got, torch.stack(outputs, 1))
    for held, want in zip(state.cell, (y, c, n, m)):
        assert_close("state", held, want, 1e-12)


def test_the_forget_bias_depends_on_the_layer() -> None:
    first, last = (rm.mixer("slstm", dim=32, heads=4, layer=layer, layers=3).bias[:, 1].detach() for layer in (1, 3))
    for bias in (first, last):
        assert torch.equal(bias[0], bias[3]) and float(bias[0, 0]) == 5 and float(bias[0, -1]) == -7
    assert (last[0, 1:-1] > first[0, 1:-1]).all()  # u^1.6 < u^0.3: the upper layers' units remember longer
    decoder = Decoder(ModelConfig(vocab=11, dim=32, layers="3 x slstm"))
    assert torch.equal(decoder.blocks[2].mixer.bias[:, 1], last)


def test_a_document_starts_fresh() -> None:
    """A reset clears the stabiliser, the normaliser and the convolution."""
    mixer, x = moved(), torch.randn(1, 20, 12, dtype=torch.float64)
    reset = torch.zeros(1, 20, dtype=torch.bool)
    reset[0, 7] = True
    y, state = mixer(x, span=Span(reset=reset))
    alone, end = mixer(x[:, 7:])
    assert_close("y", y[:, 7:], alone, 1e-12)
    for a, b in zip(state.tensors(), end.tensors(), strict=True):
        assert_close("state", a, b, 1e-12)


def test_wrong_hyper_parameters_are_refused() -> None:
    with pytest.raises(rm.errors.UsageError, match="heads=5 does not divide dim=32"):
        rm.mixer("slstm", dim=32, heads=5)
    with pytest.raises(rm.errors.UsageError, match="layer is 3; it must be at most layers=2"):
        rm.mixer("slstm", dim=32, layer=3, layers=2)
    assert rm.find("slstm-xlstm").slug == "slstm"
