"""LMUFormer: the classifier streams, its layers are those of the published code, and spikes are trained through."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from helpers import assert_close, assert_states_close, cuts, pieces, spans
from parity import assert_parity
from remanence import Span, State, UsageError
from remanence.domains.audio.lmuformer import LIF, CausalConv, LMUFormer


def model(spiking: bool = False) -> LMUFormer:
    """A small one in float64 with running statistics of its own, so that no norm is the identity."""
    torch.manual_seed(0)
    net = LMUFormer(dim=5, classes=4, width=6, depth=2, order=4, theta=10.0, spiking=spiking).double()
    net.head.weight.data.normal_()
    for _ in range(3):
        net(2 * torch.randn(3, 40, 5, dtype=torch.float64))
    return net.eval()


@pytest.mark.parametrize("spiking", [False, True])
@settings(max_examples=5)
@given(where=cuts(30), span=spans(2, 30))
def test_any_cut_padding_and_packing(spiking, where, span):
    net = model(spiking)
    x = torch.randn(2, 30, 5, dtype=torch.float64)
    valid = torch.ones(2, 30, dtype=torch.bool) if span.valid is None else span.valid
    reset = torch.zeros(2, 30, dtype=torch.bool) if span.reset is None else span.reset & valid
    with torch.no_grad():
        state, outputs = None, []
        for part, v, r in zip(pieces(x, where), pieces(valid, where), pieces(reset, where)):
            y, state = net(part, state, Span(v, r))
            outputs.append(y)
        got = torch.cat(outputs, 1)
        for row in range(2):
            real, starts = x[row, valid[row]], reset[row, valid[row]].nonzero()[:, 0].tolist()
            edges = sorted({0, *starts, len(real)})
            wanted = [net(real[None, a:b])[0][0] for a, b in zip(edges, edges[1:])]
            if wanted:
                assert_close("scores", got[row, valid[row]], torch.cat(wanted), 1e-9)


@pytest.mark.parametrize("spiking", [False, True])
def test_state_is_a_value(spiking, tmp_path):
    net, x = model(spiking), torch.randn(2, 30, 5, dtype=torch.float64)
    with torch.no_grad():
        want, end = net(x)
        _, state = net(x[:, :11])
        state.save(tmp_path / "state")
        got, last = net(x[:, 11:], State.load(tmp_path / "state"))
    assert_close("scores", got, want[:, 11:], 1e-9)
    assert_states_close("state", last, end, 1e-9)
    assert last.tokens == 30


def test_parity_the_published_layers():
    """The network without spikes, re-derived channels-first with torch's convolutions, causal; its memory as a loop."""
    net, x = model(), torch.randn(2, 25, 5, dtype=torch.float64)

    def conv(layer: CausalConv, h: torch.Tensor) -> torch.Tensor:
        weight = layer.taps.weight.unflatten(1, (3, -1)).mT
        return F.conv1d(F.pad(h, (2, 0)), weight)

    def norm(layer, h):
        return F.batch_norm(h, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)

    def pointwise(layer, h):
        return F.conv1d(h, layer.weight[..., None], layer.bias)

    h = x.mT
    for layer, scale in zip(net.embedding.convs, net.embedding.norms):
        h = norm(scale, conv(layer, h).relu())
    h = h + conv(net.embedding.position, h)
    for block in net.blocks:
        u, m, memory = pointwise(block.to_u, h).relu(), torch.zeros(2, 4, dtype=torch.float64), []
        for t in range(25):
            m = m @ block.memory.A.T + u[:, :, t] @ block.memory.B[None]
            memory.append(m)
        y = pointwise(block.to_h, torch.cat([torch.stack(memory, -1), h], 1)).relu()
        h = h + norm(block.norm, pointwise(block.project, y))
        y = F.gelu(norm(block.norm_up, pointwise(block.up, h)))
        h = h + norm(block.norm_down, pointwise(block.down, y)).relu()
    want = pointwise(net.head, h).mean(-1)
    assert_parity("lmuformer", "LMUFormer's network (zeyuliu1037/LMUFormer), causal, re-derived (float64)", net(x)[0][:, -1], want, 1e-9)


def test_a_neuron():
    """tau 2, threshold 1: a constant 1.6 charges to 0.8, then 1.2, which fires and empties it."""
    x = torch.full((1, 6, 1), 1.6)
    spikes, v = LIF()(x, None, None)
    assert spikes[0, :, 0].tolist() == [0, 1, 0, 1, 0, 1] and v.item() == 0
    x = torch.full((1, 2, 1), 0.9, requires_grad=True)
    (grad,) = torch.autograd.grad(LIF()(x, None, None)[0].sum(), x)
    assert grad.abs().min() > 0  # below the threshold too: the surrogate's


@pytest.mark.parametrize("spiking", [False, True])
def test_training_reaches_every_parameter(spiking):
    net = model(spiking).train()
    scores, _ = net(torch.randn(3, 20, 5, dtype=torch.float64), span=Span.from_lengths([20, 12, 3], 20, "left"))
    scores[:, -1].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert sum(bool(p.grad.abs().sum() > 0) for p in net.parameters()) >= len(list(net.parameters())) - 3


def test_hyper_parameters():
    with pytest.raises(UsageError, match="theta is 0"):
        LMUFormer(dim=4, theta=0.0)
    with pytest.raises(UsageError, match="depth is 0"):
        LMUFormer(dim=4, depth=0)
