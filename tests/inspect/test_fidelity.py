"""The fidelities: 1 where everything is kept, about 0 where nothing is, and in between for a memory that fades."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from remanence.inspect.fidelity import eclmf, etmf, reconstruct, states_after


def test_linear_and_unrelated() -> None:
    torch.manual_seed(0)
    target = torch.randn(400, 6)
    assert reconstruct(target @ torch.randn(6, 9) + 3, target) > 0.999
    assert abs(reconstruct(torch.randn(400, 9), target)) < 0.1
    assert abs(reconstruct(torch.randn(60, 500), torch.randn(60, 6))) < 0.3  # more numbers than tokens: still scored on others


def test_etmf_of_a_delay_line() -> None:
    """A state that holds the last three tokens."""
    torch.manual_seed(0)
    x = torch.randn(2, 200, 4)
    states = torch.cat([torch.nn.functional.pad(x, (0, 0, d, 0))[:, :200] for d in range(3)], -1)
    values = [etmf(x, states, delay) for delay in range(5)]
    assert min(values[:3]) > 0.999 and max(map(abs, values[3:])) < 0.2


def test_etmf_of_a_mixer_fades() -> None:
    torch.manual_seed(0)
    mixer, x = rm.mixer("mamba", dim=8, state_size=4), torch.randn(3, 120, 8)
    states = states_after(mixer, x)
    assert states.shape == (3, 120, 16 * 4 + 3 * 16)
    assert etmf(x, states, 0) > 0.8 > etmf(x, states, 30)


def test_eclmf() -> None:
    torch.manual_seed(0)
    h = torch.randn(2, 150, 8)
    assert eclmf(h, h.tanh()) > 0.9
    assert eclmf(h, h) > eclmf(h, h + torch.randn_like(h)) > eclmf(h, torch.randn_like(h))


def test_bad_input() -> None:
    x = torch.randn(1, 10, 4)
    with pytest.raises(rm.errors.UsageError, match="delay is 10"):
        etmf(x, x, 10)
    with pytest.raises(rm.errors.ShapeError, match="first two dimensions"):
        eclmf(x, x[:, 1:])
    with pytest.raises(rm.errors.ShapeError, match="n >= 4"):
        etmf(x, x, 8)
