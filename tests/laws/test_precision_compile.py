"""bfloat16 drifts within bounds on a long stream, and torch.compile changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers import assert_close, assert_states_close, pieces

from .systems import BY_NAME, System, law


@law("bf16")
def test_bf16_stays_near_fp32(system: System) -> None:
    """The same weights and inputs, both exact in bf16; 400 tokens in pieces. A rounding is 2^-9 = 0.2%, and a few of them add up."""
    low = copy.deepcopy(system.module()).bfloat16()
    high = copy.deepcopy(low).float()
    x = system.inputs(2, 400)
    x = x if system.tokens else x.bfloat16()
    where = [50, 51, 180, 181, 300]
    with torch.no_grad():
        want, _ = system.run_pieces(high, pieces(x if system.tokens else x.float(), where))
        got, _ = system.run_pieces(low, pieces(x, where))
    assert got.dtype == torch.bfloat16
    assert_close(f"{system.name} over all", got.float(), want, 5e-2)
    assert_close(f"{system.name} at the end", got[:, 300:].float(), want[:, 300:], 5e-2)  # it does not grow


def compiled(system: System, backend: str, from_the_start: bool) -> None:
    """Two calls, the second from the first's state; the first is compiled too if told."""
    torch._dynamo.reset()
    module, parts = system.module(), [system.inputs(2, 24, seed) for seed in (0, 1)]
    forward = torch.compile(lambda x, state: system.run(module, x, state), backend=backend, dynamic=False)
    with torch.no_grad():
        first, state = system.run(module, parts[0])
        second, end = system.run(module, parts[1], state)
        got, held = forward(parts[0], None) if from_the_start else (first, state)
        then, last = forward(parts[1], held)
    assert_close(f"{system.name} first call", got, first, 1e-5)
    assert_close(f"{system.name} second call", then, second, 1e-5)
    assert_states_close(system.name, last, end, 1e-5)


@law("compile")
def test_compile(system: System) -> None:
    compiled(system, "eager", True)


@pytest.mark.slow
def test_compile_to_machine_code() -> None:
    compiled(BY_NAME["gated-deltanet"], "inductor", False)
