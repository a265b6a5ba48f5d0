"""Law 4: the forms agree. The equation in a loop, in float64, is the ground truth of every faster form, in value and in gradient."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from helpers import assert_close, assert_gradients_close, assert_states_close, pieces
from remanence import Span, State, catalog

from .systems import System, law

WITH_BACKEND = {entry.slug for entry in catalog("mixer") if "backend" in inspect.signature(entry.builder).parameters}


def has_backend(system: System) -> bool:
    return system.name.partition("[")[0] in WITH_BACKEND


def outcome(system: System, dtype: torch.dtype, span: Span | None, **hyper: str) -> tuple[Tensor, State, dict[str, Tensor]]:
    """Outputs, final state, and the gradients of a random projection of the outputs, from a state that a prefix left."""
    module = system.module(dtype, **hyper)
    x = system.inputs(2, 100, dtype=dtype).requires_grad_()
    with torch.no_grad():
        _, state = system.run(module, system.inputs(2, 9, seed=1, dtype=dtype))
    y, end = system.run(module, x, state, span)
    leaves = {"x": x, **dict(module.named_parameters())}
    loss = (y * system.inputs(2, 100, seed=2, dtype=dtype)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return y, end, {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in zip(leaves.items(), gradients)}


@law("forms", where=has_backend)
def test_the_default_form_is_the_equation(system: System) -> None:
    random = torch.Generator().manual_seed(3)
    some = Span(torch.rand(2, 100, generator=random) < 0.8, torch.rand(2, 100, generator=random) < 0.05)
    for span in (None, some):
        y, end, grads = outcome(system, torch.float64, span, backend="naive")
        for dtype, tol, grad_tol in ((torch.float64, 1e-9, 1e-9), (torch.float32, 1e-5, 1e-4)):
            got, last, got_grads = outcome(system, dtype, span)
            assert_close(f"{system.name} {dtype} outputs", got, y, tol)
            for (name, tensor), (_, want) in zip(last.named_tensors(), end.named_tensors(), strict=True):
                assert_close(f"{system.name} {dtype} state {name}", tensor, want, tol)
            assert_gradients_close(f"{system.name} {dtype}", got_grads, grads, grad_tol)


@law("forms")
def test_steps_are_the_whole(system: System) -> None:
    """Token by token in float64: rounding cannot hide a wrong step."""
    module, x = system.module(torch.float64), system.inputs(2, 70, dtype=torch.float64)
    with torch.no_grad():
        want, end = system.run(module, x)
        got, state = system.run_pieces(module, pieces(x, range(1, 70)))
    assert_close(f"{system.name} outputs", got, want, 1e-9)
    assert_states_close(system.name, state, end, 1e-9)


@pytest.mark.parametrize("slug", sorted(WITH_BACKEND))
def test_a_backend_that_is_not_there_is_refused(slug: str) -> None:
    import remanence as rm

    with pytest.raises(rm.errors.RemanenceError, match="backend"):
        rm.mixer(slug, dim=32, backend="abacus")(torch.zeros(1, 2, 32))
