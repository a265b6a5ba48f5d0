"""ParaRNN: Newton's method against the equations in a loop, in value and gradient, for both cells."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence.ops.scan import scan


def moved(cell: str, **hyper) -> rm.Mixer:
    torch.manual_seed(0)
    mixer = rm.mixer("pararnn", dim=8, cell=cell, **hyper).double()
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return mixer


def equations(mixer: rm.Mixer, x: torch.Tensor) -> torch.Tensor:
    """The public recurrence steps, token by token: B block-diagonal over heads, diagonal weights on h (and c)."""
    a = mixer.diagonal
    heads = mixer.to_gates.shape[0]
    blocks = [torch.block_diag(*(mixer.to_gates[h, :, gate] for h in range(heads))) for gate in range(3)]
    h = c = torch.zeros(len(x), a.shape[1], dtype=x.dtype)
    outputs = []
    for token in x.unbind(1):
        p, q, s = (token @ block + bias for block, bias in zip(blocks, mixer.bias))
        if mixer.cell == "gru":
            z, r = torch.sigmoid(a[0] * h + p), torch.sigmoid(a[1] * h + q)
            h = (1 - z) * h + z * torch.tanh(a[2] * (h * r) + s)
        else:
            f = torch.sigmoid(a[0] * h + p + a[3] * c)
            c = f * c + (1 - f) * torch.tanh(a[2] * h + s)
            h = torch.sigmoid(a[1] * h + q + a[4] * c) * torch.tanh(c)
        outputs.append(mixer.out(h))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_parity_loop(cell: str) -> None:
    mixer, x = moved(cell, inner=12), torch.randn(2, 200, 8, dtype=torch.float64)
    got, want = mixer(x)[0], equations(mixer, x)
    assert_parity("pararnn", f"the recurrence of the official code in a loop ({cell})", got, want)
    weights = dict(mixer.named_parameters())
    grads = [dict(zip(weights, torch.autograd.grad(y.sin().sum(), list(weights.values())))) for y in (got, want)]
    assert_gradients_close(cell, *grads, 1e-9)


def test_parity_mingru_without_recurrent_weights() -> None:
    """With a = 0 the gates read the input only: minGRU's recurrence, with a tanh on the candidate."""
    mixer, x = moved("gru"), torch.randn(2, 50, 8, dtype=torch.float64)
    with torch.no_grad():
        mixer.diagonal.zero_()
    u = torch.einsum("bthi,higj->btghj", x.unflatten(-1, (2, -1)), mixer.to_gates).flatten(3) + mixer.bias
    z, _, c = u.unbind(2)
    h, _ = scan(torch.nn.functional.logsigmoid(-z), z.sigmoid() * c.tanh())
    assert_parity("pararnn", "the linear scan at a = 0", mixer(x)[0], mixer.out(h))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_few_iterations_change_nothing(cell: str) -> None:
    """Where they do not converge the loop runs; the weights are large enough for one iteration to fail."""
    mixer, x = moved(cell), torch.randn(1, 300, 8, dtype=torch.float64)
    few = moved(cell, iterations=1)
    assert_close("y", few(x)[0], mixer(x)[0], 1e-9)


def test_wrong_hyper_parameters_are_refused() -> None:
    with pytest.raises(rm.errors.UsageError, match="cell 'elman' is not known"):
        rm.mixer("pararnn", dim=32, cell="elman")
    with pytest.raises(rm.errors.UsageError, match="heads=3 does not divide dim=32"):
        rm.mixer("pararnn", dim=32, heads=3)
    with pytest.raises(rm.errors.UsageError, match="iterations is 0"):
        rm.mixer("pararnn", dim=32, iterations=0)
