"""Source, transition and mark gates on a directed acyclic graph: linear attention along every path (pLSTM, arXiv 2506.11997)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ShapeError
from ..backend import accumulate_dtype
from .corners import FLIPS, corners
from .graph import OUTSIDE, Graph, grid_graph
from .grid import FORMS, grid
from .naive import naive

__all__ = ["FLIPS", "FORMS", "OUTSIDE", "Graph", "corners", "dag", "grid", "grid_graph", "naive"]


def dag(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor,
    transition: Tensor,
    mark: Tensor,
    direct: Tensor | None,
    graph: Graph,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rule on any graph; see `naive` for shapes, and `grid` for the two-dimensional one, which runs in parallel.

    Returns o [B, N, H, V] in v's dtype and the edges' states [B, E, H, K, V] in float32 at least. Raises ShapeError if shapes do not fit.
    """
    batch, nodes, heads, width = v.shape
    if nodes != graph.nodes or q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ShapeError(f"q, k, v have shapes {shapes}; expected [B, N, H, K] twice and [B, N, H, V] with N={graph.nodes} nodes.")
    wanted = {"source": (source, len(graph.edges)), "transition": (transition, len(graph.pairs)), "mark": (mark, len(graph.edges))}
    for name, (gate, count) in wanted.items():
        if gate.shape != (batch, count, heads):
            raise ShapeError(f"{name} has shape {list(gate.shape)}; expected [B, {count}, H] = {[batch, count, heads]}.")
    if direct is not None and direct.shape != (batch, nodes, heads):
        raise ShapeError(f"direct has shape {list(direct.shape)}; expected [B, N, H] = {[batch, nodes, heads]}.")
    states = (batch, len(graph.edges), heads, q.shape[3], width)
    if initial is not None and initial.shape != states:
        raise ShapeError(f"initial has shape {list(initial.shape)}; expected [B, E, H, K, V] = {list(states)}.")
    dtype = accumulate_dtype(q, k, v)
    given = [None if x is None else x.to(dtype) for x in (q, k, v, source, transition, mark, direct, initial)]
    with torch.autocast(v.device.type, enabled=False):
        o, C = naive(*given[:7], graph, given[7])  # type: ignore[arg-type]
    return o.to(v.dtype), C
