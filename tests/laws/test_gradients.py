"""Law 2, the other half: gradients flow through a state, and equal those of the whole sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import example, given, settings
from torch import Tensor

from helpers import assert_close, assert_gradients_close, cuts, pieces, relative_error, rms
from remanence import State

from .systems import System, law

T = 90


def gradients(system: System, dtype: torch.dtype, where: Sequence[int], start: State | None = None) -> dict[str, Tensor]:
    """Gradients of a random projection of outputs and final state, to the input, the parameters, and the initial state if there is one."""
    module, x = system.module(dtype), system.inputs(2, T, dtype=dtype)
    leaves = dict(module.named_parameters())
    if not system.tokens:
        leaves["x"] = x.requires_grad_()

    def leaf(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()
        if tensor.is_floating_point() or tensor.is_complex():
            leaves[f"state {len(leaves)}"] = tensor.requires_grad_()
        return tensor

    start = start and start.map(leaf)
    y, end = system.run_pieces(module, pieces(x, where), start)
    random = torch.Generator().manual_seed(2)
    loss = 0.0
    for tensor in [y, *end.tensors()]:
        if tensor.requires_grad:
            tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            loss = loss + (tensor * torch.randn(tensor.shape, generator=random, dtype=torch.float64).to(tensor.dtype)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in zip(leaves.items(), grads)}


def together(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"everything": torch.cat([grad.flatten() for grad in grads.values()])}


def check(system: System, where: Sequence[int], start: State | None) -> None:
    """In float64 every gradient of the pieces is that of the whole to 1e-9: the mathematics is the same.

    In float32 they are 1e-5 from it as one vector and 1e-4 one by one (a decay rate's gradient is a few numbers, each a sum over all tokens
    that cancels); where the whole in float32 is itself not as good as that, within 5 times its error.
    """
    exact = gradients(system, torch.float64, [], start)
    assert start is None or any(name.startswith("state ") and rms(grad) > 0 for name, grad in exact.items())
    assert_gradients_close(f"{system.name} float64", gradients(system, torch.float64, where, start), exact, 1e-9)
    start = start and start.to(dtype=torch.float32)
    whole, parts = gradients(system, torch.float32, [], start), gradients(system, torch.float32, where, start)
    for tol, form in ((1e-5, together), (1e-4, dict)):
        want, got, near = form(exact), form(parts), form(whole)
        floor = 1e-4 * max(map(rms, want.values()))
        for name in want:
            rounding = relative_error(near[name], want[name], floor)
            assert rounding < 1e-2, f"{system.name}: gradient to {name} is off by {rounding:.1e} in float32 without any cut"
            assert_close(f"{system.name} float32: gradient to {name}", got[name], want[name], max(tol, 5 * rounding), floor)


@law("gradients")
@settings(max_examples=3)
@given(where=cuts(T))
@example(where=[1, 2, 45, T - 1])
def test_gradients_of_pieces_are_those_of_the_whole(system: System, where: list[int]) -> None:
    check(system, where, None)


@law("gradients")
def test_gradient_to_an_initial_state(system: System) -> None:
    with torch.no_grad():
        _, start = system.run(system.module(torch.float64), system.inputs(2, 13, seed=1, dtype=torch.float64))
    check(system, [5, 6, 50], start)
