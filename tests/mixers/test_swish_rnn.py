"""SwishRNN: the equation in a loop, and the running maximum that it becomes."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("iterations", [None, 12])
def test_parity_loop(iterations: int | None) -> None:
    torch.manual_seed(0)
    mixer, x = rm.mixer("simple-recurrence-mlm", dim=6, inner=5, iterations=iterations).double(), draw(2, 60, 6)
    with torch.no_grad():
        for weight in (mixer.sharp, mixer.shift):
            weight.add_(0.3 * torch.randn_like(weight))
    u, gate = mixer.to_inputs(x).chunk(2, -1)
    c, outputs = torch.zeros(2, 5, dtype=torch.float64), []
    for t in range(60):
        v = c - u[:, t]
        c = v * torch.sigmoid(mixer.sharp[0] * v + mixer.sharp[1]) + u[:, t]
        outputs.append(mixer.out((c + mixer.shift[0]) * torch.sigmoid(gate[:, t] + mixer.shift[1])))
    got, want = mixer(x)[0], torch.stack(outputs, 1)
    assert_parity("simple-recurrence-mlm", f"the equation in a loop (iterations {iterations})", got, want)
    weights = dict(mixer.named_parameters())
    grads = [dict(zip(weights, torch.autograd.grad(y.sin().sum(), list(weights.values())))) for y in (got, want)]
    assert_gradients_close("swish", *grads, 1e-9)


@pytest.mark.parametrize(("alpha", "tol"), [(1e2, 2e-2), (1e4, 2e-4), (1e7, 1e-6)])
def test_parity_cummax(alpha: float, tol: float) -> None:
    """swish(v) -> max(v, 0), so c_t -> max(c_{t-1}, u_t) with c_0 = 0; the error falls like 1 / alpha."""
    mixer, x = rm.mixer("simple-recurrence-mlm", dim=6).double(), draw(2, 40, 6)
    with torch.no_grad():
        mixer.sharp[0] = alpha
        u, gate = mixer.to_inputs(x).chunk(2, -1)
        want = mixer.out(u.clamp(min=0).cummax(1).values * gate.sigmoid())
        got = mixer(x)[0]
    if alpha == 1e7:
        assert_parity("simple-recurrence-mlm", "cummax at alpha = 1e7", got, want)
    assert_close("cummax", got, want, tol)
