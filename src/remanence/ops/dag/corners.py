"""The grid read from its four corners at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ShapeError
from ..backend import accumulate_dtype
from .grid import choose, grid
from .paths import paths

FLIPS = ((), (1,), (2,), (1, 2))
"""The axes of [B, X, Y, ...] that are turned over for each corner: top left, bottom left, top right, bottom right."""


def corners(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, transition: Tensor, mark: Tensor, direct: Tensor | None = None, form: str = "auto"
) -> Tensor:
    """The sum of `grid` from the four corners, each with gates of its own, source [B, X, Y, 4, H, 2] and so on; direct counts once.

    q, k, v as there; returns o [B, X, Y, H, V]. The form "weights" adds up the corners' weights, then takes one product for all.
    """
    batch, rows, columns, heads, width = v.shape
    for name, gate, more in (("source", source, (2,)), ("transition", transition, (2, 2)), ("mark", mark, (2,))):
        if gate.shape != (batch, rows, columns, len(FLIPS), heads, *more):
            wanted = [batch, rows, columns, len(FLIPS), heads, *more]
            raise ShapeError(f"{name} has shape {list(gate.shape)}; expected {wanted}.")
    source, transition, mark = (turned(gate) for gate in (source, transition, mark))  # [B, X, Y, 4 H, ...]
    if choose(form, rows * columns, q.shape[-1] * width) != "weights":
        qs, ks, vs = (torch.cat([x.flip(axes) for axes in FLIPS], 3) for x in (q, k, v))
        o = grid(qs, ks, vs, source, transition, mark, form=form)[0].unflatten(3, (len(FLIPS), heads))
        o = turned(o).unflatten(3, (len(FLIPS), heads)).sum(3)
        return o if direct is None else o + (direct * (q * k).sum(-1))[..., None] * v
    dtype = accumulate_dtype(q, k, v)
    moved = (gate.to(dtype).movedim(3, 1).flatten(0, 1) for gate in (source, transition, mark))  # [B 4 H, X, Y, ...]
    with torch.autocast(v.device.type, enabled=False):
        each, gates, read = moved
        W = paths(gates.movedim((3, 4), (0, 1)), each.movedim(-1, 0), read.movedim(-1, 0))[0]
        W = W.unflatten(0, (batch, len(FLIPS), heads)).unflatten(4, (rows, columns)).unflatten(3, (rows, columns))  # [B, 4, H, X, Y, X, Y]
        total = W[:, 0]
        for i, axes in enumerate(FLIPS[1:], start=1):
            total = total + W[:, i].flip([axis + shift for axis in axes for shift in (1, 3)])
        total = total.flatten(2, 3).flatten(3, 4)  # [B, H, N, N], zero on the diagonal
        if direct is not None:
            total = total + torch.diag_embed(direct.to(dtype).flatten(1, 2).mT)
        flat_q, flat_k, flat_v = (x.to(dtype).flatten(1, 2).transpose(1, 2) for x in (q, k, v))  # [B, H, N, ...]
        o = (total * (flat_q @ flat_k.mT)) @ flat_v
    return o.transpose(1, 2).unflatten(1, (rows, columns)).to(v.dtype)


def turned(x: Tensor) -> Tensor:
    """[B, X, Y, 4, H, ...] -> [B, X, Y, 4 H, ...], each corner's part turned over as FLIPS says: its own inverse."""
    return torch.cat([x[:, :, :, i].flip(axes) for i, axes in enumerate(FLIPS)], 3)
