"""What a rule on a DAG needs to know of it: an order of the nodes, and which edges meet in which node."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from ...errors import UsageError, positive

OUTSIDE = -1
"""In the place of a node: the edge comes from, or leads to, beyond the graph."""


class Graph:
    """Nodes 0 .. nodes - 1 and directed edges (from, to); several may join two nodes, and either end may be OUTSIDE.

    Raises UsageError if an edge names a node that is not there or the edges close a cycle.
    """

    def __init__(self, nodes: int, edges: Sequence[tuple[int, int]]):
        positive(nodes=nodes)
        self.nodes, self.edges = nodes, tuple((int(a), int(b)) for a, b in edges)
        for edge in self.edges:
            if not all(OUTSIDE <= end < nodes for end in edge) or edge == (OUTSIDE, OUTSIDE):
                raise UsageError(f"edge {edge} does not fit a graph of {nodes} nodes; ends are 0..{nodes - 1}, or one of them {OUTSIDE}.")
        self.into: list[list[int]] = [[] for _ in range(nodes)]
        self.out_of: list[list[int]] = [[] for _ in range(nodes)]
        for index, (a, b) in enumerate(self.edges):
            if a != OUTSIDE:
                self.out_of[a].append(index)
            if b != OUTSIDE:
                self.into[b].append(index)
        self.order = self._order()

    def _order(self) -> list[int]:
        """The nodes, every one after those that it reads."""
        waits = [sum(self.edges[e][0] != OUTSIDE for e in into) for into in self.into]
        order = [node for node in range(self.nodes) if not waits[node]]
        for node in order:
            for e in self.out_of[node]:
                after = self.edges[e][1]
                if after != OUTSIDE:
                    waits[after] -= 1
                    if not waits[after]:
                        order.append(after)
        if len(order) < self.nodes:
            raise UsageError(f"the edges close a cycle among the nodes {[node for node in range(self.nodes) if waits[node]]}.")
        return order

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """(edge into a node, edge out of it), the order of transitions: by node, then by edge into it, then by edge out of it."""
        return [(before, after) for node in range(self.nodes) for before in self.into[node] for after in self.out_of[node]]


def grid_graph(rows: int, columns: int) -> Graph:
    """The grid, node x * columns + y: an edge to the right and one down from every node, and those from outside into its left and top.

    Edges: all to the right, from outside first in every row (x * (columns + 1) + y enters node (x, y)); then all down, row by row.
    """
    positive(rows=rows, columns=columns)

    def node(x: int, y: int) -> int:
        return x * columns + y if 0 <= x < rows and 0 <= y < columns else OUTSIDE

    right = [(node(x, y - 1), node(x, y)) for x in range(rows) for y in range(columns + 1)]
    down = [(node(x - 1, y), node(x, y)) for x in range(rows + 1) for y in range(columns)]
    return Graph(rows * columns, right + down)
