"""FlashRNN: torch's own layers at one head, the public equations with heads, and the laws for every cell."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import remanence as rm
from helpers import assert_close, assert_gradients_close, assert_states_close, cuts, pieces, relative_error
from parity import assert_parity
from remanence import Span
from remanence.ops.cell import GATES

TORCH = {"lstm": nn.LSTM, "gru": nn.GRU, "elman": nn.RNN}


def from_torch(kind: str, dim: int, size: int) -> tuple[rm.Mixer, nn.RNNBase]:
    """A flashrnn of one head with a torch layer's weights; its output projection is the identity."""
    torch.manual_seed(0)
    theirs = TORCH[kind](dim, size, batch_first=True)
    ours = rm.mixer("flashrnn", dim=dim, cell=kind, heads=1, inner=size)
    with torch.no_grad():
        ours.to_gates.weight.copy_(theirs.weight_ih_l0)
        ours.recurrent.copy_(theirs.weight_hh_l0.T.unflatten(1, (-1, size))[None])  # [1, from, gate, to]
        bias = theirs.bias_hh_l0.clone()
        if kind == "gru":
            ours.inner_bias.copy_(bias[None, 2 * size :])
            bias[2 * size :] = 0
        ours.to_gates.bias.copy_(theirs.bias_ih_l0 + bias)
    ours.out = nn.Identity()
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", sorted(TORCH))
def test_parity_torch(kind: str, dtype: torch.dtype) -> None:
    ours, theirs = (module.to(dtype) for module in from_torch(kind, 12, 16))
    x, dy = (torch.randn(2, 80, size, dtype=dtype) for size in (12, 16))
    xs = [x.clone().requires_grad_() for _ in range(2)]
    (y, state), (want, last) = ours(xs[0]), theirs(xs[1])
    source = f"torch.nn.{TORCH[kind].__name__} (heads=1, {str(dtype).removeprefix('torch.')})"
    assert_parity("flashrnn", source, y, want)
    assert_parity("flashrnn", f"{source}: gradient of x", *(torch.autograd.grad(out, x, dy)[0] for out, x in zip((y, want), xs)))
    for held, end in zip(state.cell, last if isinstance(last, tuple) else (last,)):
        assert_close("state", held[:, 0], end[0], 1e-5)
    pieced, state = [], None
    for part in pieces(x, [1, 30, 31]):
        y, state = ours(part, state)
        pieced.append(y)
    assert_close("in pieces", torch.cat(pieced, 1), want, 1e-5)


@pytest.mark.parametrize("kind", sorted(GATES))
def test_parity_flashrnn_equations(kind: str) -> None:
    """The public pointwise functions, written again: gates of every head from Wx + Ry + b, the sLSTM's first token by its branch."""
    heads, size, dim = 3, 4, 12
    ours = rm.mixer("flashrnn", dim=dim, cell=kind, heads=heads).double()
    x = 2 * torch.randn(2, 25, dim, dtype=torch.float64)
    wx = ours.to_gates(x).view(2, 25, heads, GATES[kind], size)
    y = c = n = m = torch.zeros(2, heads, size, dtype=torch.float64)
    outputs = []
    for t in range(25):
        ry = torch.stack([(y[:, h] @ ours.recurrent[h].flatten(1)).view(2, -1, size) for h in range(heads)], 1)
        if kind == "gru":
            r, z = torch.sigmoid(wx[:, t, :, 0] + ry[:, :, 0]), torch.sigmoid(wx[:, t, :, 1] + ry[:, :, 1])
            y = z * y + (1 - z) * torch.tanh(wx[:, t, :, 2] + r * (ry[:, :, 2] + ours.inner_bias))
        elif kind == "elman":
            y = torch.tanh(wx[:, t, :, 0] + ry[:, :, 0])
        else:
            i, f, z, o = (wx[:, t] + ry).unbind(2)
            if kind == "lstm":
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
                y = torch.sigmoid(o) * torch.tanh(c)
            else:
                kept = m + torch.log(torch.sigmoid(f))
                m = i if t == 0 else torch.maximum(i, kept)
                i, f = torch.exp(i - m), torch.exp(kept - m)
                c, n = f * c + i * torch.tanh(z), f * n + i
                y = torch.sigmoid(o) * c / n
        outputs.append(y.flatten(1))
    assert_parity("flashrnn", f"the equations of NX-AI/flashrnn ({kind}, 3 heads)", ours(x)[0], ours.out(torch.stack(outputs, 1)))


def test_heads_do_not_see_each_other() -> None:
    mixer = rm.mixer("flashrnn", dim=8, cell="gru", heads=2)
    mixer.out = nn.Identity()
    with torch.no_grad():
        mixer.to_gates.weight.unflatten(0, (2, -1))[1, :, :4] = 0  # head 2 does not read channels 0 .. 3
        x = torch.randn(1, 20, 8)
        moved = x.clone()
        moved[..., :4] += 1
        y, other = mixer(x)[0], mixer(moved)[0]
    assert torch.equal(y[..., 4:], other[..., 4:]) and relative_error(other[..., :4], y[..., :4]) > 0.1


@pytest.mark.parametrize("kind", sorted(GATES))
@given(where=cuts(40), resets=st.lists(st.integers(0, 39), max_size=3), size=st.integers(0, 40))
def test_any_cut_padding_and_resets(kind: str, where: list[int], resets: list[int], size: int) -> None:
    mixer = rm.mixer("flashrnn", dim=8, cell=kind, heads=2)
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[1, resets] = True
    span = Span(Span.from_lengths([40, size], 40, "left").valid, reset)
    x = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    whole, end = mixer(x, span=span)
    state, parts, edges = None, [], [0, *where, 40]
    for a, b in zip(edges, edges[1:]):
        y, state = mixer(x[:, a:b], state, span[a:b])
        parts.append(y)
    assert_close("y", torch.cat(parts, 1), whole, 1e-5)
    assert_states_close(kind, state, end, 1e-5)
    real = x[1:, 40 - size :]
    if size and not resets:
        assert_close("alone", whole[1:, 40 - size :], mixer(real)[0], 1e-5)


@pytest.mark.parametrize("kind", sorted(GATES))
def test_float32_gradients(kind: str) -> None:
    mixer = rm.mixer("flashrnn", dim=16, cell=kind)
    x = torch.randn(2, 60, 16)
    results = []
    for dtype in (torch.float32, torch.float64):
        mixer = mixer.to(dtype)
        out = mixer(x.to(dtype))[0]
        weights = dict(mixer.named_parameters())
        results.append(dict(zip(weights, torch.autograd.grad(out.sin().sum(), list(weights.values())))))
    assert_gradients_close(kind, *results, 1e-4)  # sums over all tokens, in float32


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"cell": "lstmm"}, "cell 'lstmm' is not known; did you mean"),
        ({"heads": 3}, "heads=3 does not divide inner=32"),
        ({"inner": 0}, "inner is 0"),
        ({"head": 2}, "it takes dim, cell, heads"),
    ],
)
def test_wrong_hyper_parameters_are_refused(wrong: dict, says: str) -> None:
    with pytest.raises(rm.errors.UsageError, match=says):
        rm.mixer("flashrnn", dim=32, **wrong)
