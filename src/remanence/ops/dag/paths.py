"""How much every node of a grid reads of every other: the wave of weights, in place of states, with a hand-written backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .wave import diagonals, later

SCHEMA = "(Tensor gates, Tensor source, Tensor mark) -> (Tensor, Tensor, Tensor)"
BACKWARD = "(Tensor gates, Tensor mark, Tensor L, Tensor U, Tensor dW) -> (Tensor, Tensor, Tensor)"


@torch.library.custom_op("remanence::paths", mutates_args=(), schema=SCHEMA)
def paths(gates: Tensor, source: Tensor, mark: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the paths between any two nodes, by the wave in which a node adds its source at its own place of N = X Y.

    gates [2, 2, M, X, Y] as `wave` has them; source of the edges out of a node and mark of those into it [2, M, X, Y]. Returns
    W = mark[0] L + mark[1] U, [M, N, N], by reader and then by source, and L, U [M, (X + 1) (Y + 1), N] for the gradient. First-order
    gradients of W only.
    """
    many, rows, columns = source.shape[1:]
    nodes = rows * columns
    L, U = (source.new_zeros(many, (rows + 1) * (columns + 1), nodes) for _ in range(2))
    W = source.new_empty(many, nodes, nodes)
    gates, source, mark = gates.flatten(3)[..., None], source.flatten(2), mark.flatten(2)[..., None]
    own = torch.arange(nodes, device=source.device)
    for _, count, node, here in diagonals(rows, columns):
        left, up = L[:, here], U[:, here]
        torch.mul(mark[0, :, node], left, out=W[:, node]).addcmul_(mark[1, :, node], up)
        for way, out in enumerate((L[:, later(here, 1)], U[:, later(here, columns + 1)])):
            torch.mul(gates[way, 0, :, node], left, out=out).addcmul_(gates[way, 1, :, node], up)
            out[:, own[:count], own[node]] = source[way, :, node]
    return W, L, U


@paths.register_fake
def _(gates: Tensor, source: Tensor, mark: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    many, rows, columns = source.shape[1:]
    nodes, edges = rows * columns, (rows + 1) * (columns + 1)
    return source.new_empty(many, nodes, nodes), source.new_empty(many, edges, nodes), source.new_empty(many, edges, nodes)


@torch.library.custom_op("remanence::paths_backward", mutates_args=(), schema=BACKWARD)
def paths_backward(gates: Tensor, mark: Tensor, L: Tensor, U: Tensor, dW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `paths` to gates, source and mark: the transposed wave, from the last anti-diagonal back to the first."""
    many, rows, columns = mark.shape[1:]
    d_gates, d_source, d_mark = (dW.new_empty(*shape, many, rows * columns) for shape in ((2, 2), (2,), (2,)))
    gates, mark = gates.flatten(3)[..., None], mark.flatten(2)[..., None]
    to_left, to_up = (dW.new_zeros(many, rows + 1, dW.shape[-1]) for _ in range(2))  # of what enters row x's node of the diagonal done
    own = torch.arange(rows * columns, device=dW.device)
    for top, count, node, here in reversed(list(diagonals(rows, columns))):
        entered, d = (L[:, here], U[:, here]), dW[:, node]
        back = to_left[:, top : top + count], to_up[:, top + 1 : top + 1 + count]  # of what leaves to the right, and down
        into = []
        for j, x in enumerate(entered):
            d_mark[j, :, node] = (d * x).sum(-1)
            for i, h in enumerate(back):
                d_gates[i, j, :, node] = (h * x).sum(-1)
            new = mark[j, :, node] * d
            into.append(new.addcmul_(gates[0, j, :, node], back[0]).addcmul_(gates[1, j, :, node], back[1]))
        for i, h in enumerate(back):
            d_source[i, :, node] = h[:, own[:count], own[node]]
        to_left[:, top : top + count], to_up[:, top : top + count] = into
    return tuple(d.unflatten(-1, (rows, columns)) for d in (d_gates, d_source, d_mark))  # type: ignore[return-value]


@paths_backward.register_fake
def _(gates: Tensor, mark: Tensor, L: Tensor, U: Tensor, dW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return gates.new_empty(gates.shape), mark.new_empty(mark.shape), mark.new_empty(mark.shape)


def _save_paths(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    gates, _, mark = inputs
    ctx.save_for_backward(gates, mark, *output[1:])
    ctx.set_materialize_grads(False)  # L and U have none


def _backward_paths(ctx: Any, dW: Tensor, dL: Tensor | None, dU: Tensor | None) -> tuple[Tensor, ...]:
    return paths_backward(*ctx.saved_tensors, dW)


paths.register_autograd(_backward_paths, setup_context=_save_paths)
