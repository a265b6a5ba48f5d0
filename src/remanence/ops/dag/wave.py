"""Two currents on a grid, one to the right and one down, that mix in every node: run an anti-diagonal at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def diagonals(rows: int, columns: int) -> Iterator[tuple[int, int, slice, slice]]:
    """For every anti-diagonal: its first row, its length, and its nodes in a flat grid and in one with a row and a column more."""
    for d in range(rows + columns - 1):
        top = max(0, d - columns + 1)
        count = min(rows - 1, d) - top + 1

        def nodes(stride: int, d: int = d, top: int = top, count: int = count) -> slice:
            start, step = top * stride + d - top, max(1, stride - 1)
            return slice(start, start + (count - 1) * step + 1, step)

        yield top, count, nodes(columns), nodes(columns + 1)


def later(nodes: slice, by: int) -> slice:
    """The places `by` further on."""
    return slice(nodes.start + by, nodes.stop + by, nodes.step)


SCHEMA = "(Tensor gates, Tensor add, Tensor left, Tensor up) -> (Tensor, Tensor)"


@torch.library.custom_op("remanence::wave", mutates_args=(), schema=SCHEMA)
def wave(gates: Tensor, add: Tensor, left: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """What enters every node from the left, L, and from above, U:

        L[x, y + 1] = G[0, 0] L[x, y] + G[0, 1] U[x, y] + A[0]        U[x + 1, y] = G[1, 0] L[x, y] + G[1, 1] U[x, y] + A[1]

    gates G [2, 2, M, X, Y], of the node (x, y); add A [2, M, X, Y, P]; L[:, :, 0] = left [M, X, P], U[:, 0] = up [M, Y, P]. Returns L and U
    [M, X + 1, Y + 1, P]: what leaves the grid is L[:, :X, Y] and U[:, X, :Y]; their last row or column besides is zero. X + Y - 1 steps,
    differentiable any number of times.
    """
    many, rows, columns, width = add.shape[1:]
    L, U = (add.new_zeros(many, (rows + 1) * (columns + 1), width) for _ in range(2))  # nodes of an anti-diagonal are `columns` apart
    L.unflatten(1, (rows + 1, -1))[:, :rows, 0].copy_(left)
    U.unflatten(1, (rows + 1, -1))[:, 0, :columns].copy_(up)
    gates, add = gates.flatten(3)[..., None], add.flatten(2, 3)
    for _, _, node, here in diagonals(rows, columns):
        for out, A, (from_left, from_up) in (
            (L[:, later(here, 1)], add[0, :, node], gates[0, :, :, node]),
            (U[:, later(here, columns + 1)], add[1, :, node], gates[1, :, :, node]),
        ):
            torch.addcmul(A, from_left, L[:, here], out=out).addcmul_(from_up, U[:, here])
    return L.unflatten(1, (rows + 1, -1)), U.unflatten(1, (rows + 1, -1))


@wave.register_fake
def _(gates: Tensor, add: Tensor, left: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    many, rows, columns, width = add.shape[1:]
    return add.new_empty(many, rows + 1, columns + 1, width), add.new_empty(many, rows + 1, columns + 1, width)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output)


def _backward(ctx: Any, dL: Tensor, dU: Tensor) -> tuple[Tensor, ...]:
    """The transpose of the wave is the wave from the other corner, G transposed; a gate gets (what it multiplied) x (what came back)."""
    gates, L, U = ctx.saved_tensors
    add = torch.stack([dL[:, :-1, :-1], dU[:, :-1, :-1]]).flip(2, 3)
    hL, hU = wave(gates.transpose(0, 1).flip(3, 4), add, dL[:, :-1, -1].flip(1), dU[:, -1, :-1].flip(1))
    back = torch.stack([hL[:, :-1, :-1], hU[:, :-1, :-1]]).flip(2, 3)  # [2, M, X, Y, P]
    forth = torch.stack([L[:, :-1, :-1], U[:, :-1, :-1]])
    d_gates = torch.einsum("imxyp,jmxyp->ijmxy", back, forth)
    return d_gates, back, hL[:, :-1, -1].flip(1), hU[:, -1, :-1].flip(1)


wave.register_autograd(_backward, setup_context=_save)
