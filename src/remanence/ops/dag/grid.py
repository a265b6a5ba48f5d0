"""The source-transition-mark rule on a two-dimensional grid, in waves of anti-diagonals."""

from __future__ import annotations

import torch
from torch import Tensor, einsum

from ...errors import ShapeError, unknown
from ..backend import accumulate_dtype
from .graph import grid_graph
from .naive import naive
from .paths import paths
from .wave import wave

FORMS = ("auto", "states", "weights", "naive")
Border = tuple[Tensor, Tensor]


def choose(form: str, nodes: int, size: int, borders: bool = False) -> str:
    """The form to run for that many nodes and numbers in a state. Raises UnknownName on one that is not known."""
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    return form if form != "auto" else "weights" if nodes <= size and not borders else "states"


def grid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor,
    transition: Tensor,
    mark: Tensor,
    direct: Tensor | None = None,
    initial: Border | None = None,
    final: bool = False,
    form: str = "auto",
) -> tuple[Tensor, Border | None]:
    """The rule with an edge to the right (0) and one down (1) out of every node: along a row, and from a row to the next.

    q, k [B, X, Y, H, K] and v [B, X, Y, H, V], X rows and Y columns; source [B, X, Y, H, 2] of the edges out of a node; transition
    [B, X, Y, H, 2, 2], [out, in], in: 0 from the left, 1 from above; mark [B, X, Y, H, 2] of the edges into it; direct [B, X, Y, H] or None
    (zero). initial: the states that enter, left [B, X, H, K, V] and top [B, Y, H, K, V], or None (zeros). Returns o [B, X, Y, H, V] in v's
    dtype, and if `final` the states that leave, right and bottom like them in float32 at least, else None.

    form: "states" moves K x V matrices; "weights" moves, for every node, its weight in what the others read, N = X Y numbers, and then
    takes matrix products as attention does (no borders; first-order gradients); "auto" takes the smaller. Raises ShapeError if shapes do
    not fit, UnknownName on a form.
    """
    batch, rows, columns, heads, width = v.shape
    nodes, key = (batch, rows, columns, heads), q.shape[-1]
    if q.shape != k.shape or q.shape[:4] != nodes:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ShapeError(f"q, k, v have shapes {shapes}; expected [B, X, Y, H, K] twice and [B, X, Y, H, V].")
    wanted = {"source": (source, (2,)), "transition": (transition, (2, 2)), "mark": (mark, (2,)), "direct": (direct, ())}
    for name, (gate, more) in wanted.items():
        if gate is not None and gate.shape != (*nodes, *more):
            raise ShapeError(f"{name} has shape {list(gate.shape)}; expected {[*nodes, *more]}.")
    for name, border, side in zip(("left", "top"), initial or (), (rows, columns)):
        if border.shape != (batch, side, heads, key, width):
            raise ShapeError(f"initial's {name} has shape {list(border.shape)}; expected {[batch, side, heads, key, width]}.")
    form = choose(form, rows * columns, key * width, initial is not None or final)
    dtype = accumulate_dtype(q, k, v)
    given = [None if x is None else x.to(dtype) for x in (q, k, v, source, transition, mark, direct)]
    given[:6] = (x.movedim(3, 1) for x in given[:6] if x is not None)  # [B, H, X, Y, ...]
    given[6] = None if direct is None else direct.to(dtype).movedim(3, 1)
    initial = None if initial is None else (initial[0].to(dtype).transpose(1, 2), initial[1].to(dtype).transpose(1, 2))
    with torch.autocast(v.device.type, enabled=False):
        o, ends = {"states": states, "weights": weights, "naive": loop}[form](*given, initial, final)  # type: ignore[operator]
    return o.movedim(1, 3).to(v.dtype), None if ends is None else (ends[0].transpose(1, 2), ends[1].transpose(1, 2))


def _own(q: Tensor, k: Tensor, v: Tensor, direct: Tensor) -> Tensor:
    return (direct * (q * k).sum(-1))[..., None] * v


def states(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, transition: Tensor, mark: Tensor, direct: Tensor | None, initial: Border | None,
    final: bool = True,
) -> tuple[Tensor, Border | None]:  # fmt: skip
    """The wave of K x V matrices. All of `grid`'s tensors with the heads after the batch: [B, H, X, Y, ...], borders [B, H, side, K, V]."""
    shape = (k.shape[-1], v.shape[-1])
    write = (k[..., :, None] * v[..., None, :]).flatten(-2)  # [B, H, X, Y, K V]
    if initial is None:
        initial = tuple(write.new_zeros(*q.shape[:2], side, *shape) for side in q.shape[2:4])  # type: ignore[assignment]
    left, up = (border.flatten(-2) for border in initial)  # type: ignore[union-attr]
    add = source.movedim(-1, 0)[..., None] * write
    given = (transition.movedim((4, 5), (0, 1)).flatten(2, 3), add.flatten(1, 2), left.flatten(0, 1), up.flatten(0, 1))
    L, U = (x.unflatten(0, q.shape[:2]) for x in wave(*given))  # [B, H, X + 1, Y + 1, K V]
    read = mark[..., :1] * L[:, :, :-1, :-1] + mark[..., 1:] * U[:, :, :-1, :-1]
    o = einsum("bhxykv,bhxyk->bhxyv", read.unflatten(-1, shape), q)
    o = o if direct is None else o + _own(q, k, v, direct)
    return o, (L[:, :, :-1, -1].unflatten(-1, shape), U[:, :, -1, :-1].unflatten(-1, shape)) if final else None


def weights(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, transition: Tensor, mark: Tensor, direct: Tensor | None, initial: Border | None = None,
    final: bool = False,
) -> tuple[Tensor, None]:  # fmt: skip
    """As `states`, of the weights of all paths from every node, [N] in place of a matrix: o = (W * Q K^T + D) V. No borders."""
    if initial is not None or final:
        raise ShapeError("the form 'weights' takes no initial states and gives no final ones; use 'states'.")
    rows, columns = q.shape[2:4]
    q, k, v = (x.flatten(2, 3) for x in (q, k, v))  # [B, H, N, ...]
    gates = (x.movedim(-1, 0).flatten(1, 2) for x in (source, mark))
    W = paths(transition.movedim((4, 5), (0, 1)).flatten(2, 3), *gates)[0].unflatten(0, q.shape[:2])  # [B, H, N, N]
    o = (W * (q @ k.mT)) @ v
    o = o if direct is None else o + _own(q, k, v, direct.flatten(2))
    return o.unflatten(2, (rows, columns)), None


def loop(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, transition: Tensor, mark: Tensor, direct: Tensor | None, initial: Border | None,
    final: bool = True,
) -> tuple[Tensor, Border | None]:  # fmt: skip
    """As `states`, by `naive` on the edges of the grid one by one."""
    rows, columns = q.shape[2:4]
    graph = grid_graph(rows, columns)
    split = rows * (columns + 1)  # where the edges down begin

    def nodes(x: Tensor) -> Tensor:
        return x.flatten(2, 3).transpose(1, 2)  # [B, N, H, ...]

    flat_source, flat_mark, flat_transition = nodes(source), nodes(mark), nodes(transition)
    none = torch.zeros_like(flat_source[:, 0, :, 0])
    ends = [(a, b, int(e >= split)) for e, (a, b) in enumerate(graph.edges)]
    edge_source = torch.stack([flat_source[:, a, :, way] if a >= 0 else none for a, _, way in ends], 1)
    edge_mark = torch.stack([flat_mark[:, b, :, way] if b >= 0 else none for _, b, way in ends], 1)
    pairs = [(graph.edges[before][1], int(after >= split), int(before >= split)) for before, after in graph.pairs]
    edge_transition = torch.stack([flat_transition[:, node, :, out, into] for node, out, into in pairs], 1)
    start = None
    if initial is not None:
        start = q.new_zeros(len(q), len(graph.edges), q.shape[1], k.shape[-1], v.shape[-1])
        start[:, : split : columns + 1] = initial[0].transpose(1, 2)
        start[:, split : split + columns] = initial[1].transpose(1, 2)
    flat_direct = None if direct is None else nodes(direct)
    o, C = naive(nodes(q), nodes(k), nodes(v), edge_source, edge_transition, edge_mark, flat_direct, graph, start)
    left = (C[:, columns : split : columns + 1].transpose(1, 2), C[:, split + rows * columns :].transpose(1, 2))
    return o.transpose(1, 2).unflatten(2, (rows, columns)), left if final else None
