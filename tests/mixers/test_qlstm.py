"""The quantum LSTM against its equations with circuits gate by gate; it learns a damped oscillation."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from parity import assert_parity
from remanence.ops.qubits import circuit


def test_parity_the_loop_from_the_equations() -> None:
    torch.manual_seed(0)
    mixer = rm.mixer("qlstm", dim=5, qubits=3, depth=2).double()
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    h = c = torch.zeros(2, 3, dtype=torch.float64)
    want = []
    for x_t in x.unbind(1):
        v = x_t @ mixer.reduce.weight.T + mixer.reduce.bias + h @ mixer.recurrent
        q = [circuit(v, mixer.angles[i : i + 1])[:, 0] for i in range(4)]
        c = q[0].sigmoid() * c + q[1].sigmoid() * q[2].tanh()
        u = q[3].sigmoid() * c.tanh()
        h = circuit(u, mixer.angles[4:5])[:, 0]
        want.append(circuit(u, mixer.angles[5:])[:, 0] @ mixer.out.weight.T + mixer.out.bias)
    y, state = mixer(x)
    assert_parity("qlstm", "the equations, gate by gate", y, torch.stack(want, 1), 1e-12)
    assert_parity("qlstm", "the equations, gate by gate", state.hidden, h, 1e-12)


def test_one_and_nine_qubits_run() -> None:
    for qubits in (1, 9):
        y, _ = rm.mixer("qlstm", dim=4, qubits=qubits, depth=1)(torch.randn(1, 2, 4))
        assert y.shape == (1, 2, 4) and torch.isfinite(y).all()


def test_learns_a_sine() -> None:
    """The claim in small: 60 epochs of one step ahead on sines of any phase beat repeating the last value."""
    torch.manual_seed(0)
    series = torch.sin(torch.arange(13.0) / 2 + 0.8 * torch.arange(8.0)[:, None])[..., None]
    x, target = series[:, :-1], series[:, 1:]
    mixer = rm.mixer("qlstm", dim=1, qubits=4, depth=1)
    optimizer, losses = torch.optim.Adam(mixer.parameters(), lr=0.1), []
    for _ in range(60):
        losses.append((mixer(x)[0] - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    persistence = (x - target).square().mean()
    assert losses[-1] < min(0.2 * losses[0], 0.8 * persistence)


def test_wrong_use() -> None:
    with pytest.raises(rm.errors.UsageError, match="qubits is 13"):
        rm.mixer("qlstm", dim=4, qubits=13)
