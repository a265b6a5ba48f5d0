"""Memory replay back-propagation: the exact gradients of full back-propagation through time in the memory of one piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import UsageError
from ..state import State

Item = TypeVar("Item")
Step = Callable[[Item, State | None], tuple[Tensor | None, State]]
"""step(piece, state) -> (the piece's loss, a scalar, or None where it has none; the state after it)."""


def torch_rng() -> list[Tensor]:
    """The state of torch's generators: the CPU's, then every CUDA device's that is in use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def set_torch_rng(states: Sequence[Tensor]) -> None:
    """Put back what `torch_rng` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(list(states[1:]))


def replay(step: Step, pieces: Sequence[Item], state: State | None = None) -> tuple[Tensor, State]:
    """Add to every parameter's .grad that of L = sum_t loss_t; returns L, detached, and the final state, detached.

        forward    s_{t+1} = f(x_t, s_t) without a graph, keeping every s_t
        backward   for t = n .. 1: (loss_t, s_{t+1}) = f(x_t, s_t) again, with a graph, from the kept s_t;
                   back-propagate loss_t and, into s_{t+1}, the gradient g_{t+1}; what arrives at s_t is g_t

    Equals back-propagation through the whole sequence (up to the order of sums), costs one more forward pass, and holds the graph of one
    piece at a time. torch's random state is replayed for every piece, so dropout is the same in both passes, and is left as one forward
    pass leaves it. `state` is a constant: no gradient goes into it. Memformer, Wu et al. 2020 (arXiv 2010.06891), algorithm 1.
    """
    if not pieces:
        raise UsageError("replay got no pieces; it needs at least one.")
    befores, clocks = [state and state.detach()], [torch_rng()]
    with torch.no_grad():
        for piece in pieces[:-1]:  # the last piece has no successor: one pass, with its graph, is enough
            befores.append(step(piece, befores[-1])[1])
            clocks.append(torch_rng())
    losses: list[Tensor] = []
    gradients: list[Tensor | None] = []  # of L with respect to the tensors of the state after the piece
    final, end = None, clocks[-1]
    for piece in reversed(pieces):
        before, leaves = _leaves(befores.pop())
        set_torch_rng(clocks.pop())
        with torch.enable_grad():
            loss, after = step(piece, before)
        roots: list[tuple[Tensor, Tensor | None]] = []
        if final is None:
            final, end = after.detach(), torch_rng()
        else:
            pairs = zip(after.tensors(), gradients, strict=True)
            roots = [(tensor, g) for tensor, g in pairs if g is not None and tensor.requires_grad]
        if loss is not None:
            losses.append(loss.detach())
            roots += [(loss, None)] if loss.requires_grad else []
        if roots:
            torch.autograd.backward([root for root, _ in roots], [g for _, g in roots])
        gradients = [leaf.grad for leaf in leaves]
        del loss, after, roots  # this piece's graph must be gone before the next one is built
    set_torch_rng(end)
    assert final is not None
    return sum(reversed(losses), torch.zeros(())), final


def _leaves(state: State | None) -> tuple[State | None, list[Tensor]]:
    """The same values as leaves of a new graph, and these leaves in the order of `state.tensors()`."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().requires_grad_(tensor.is_floating_point()))
        return leaves[-1]

    return state and state.map(leaf), leaves
