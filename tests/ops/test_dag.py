"""The rule on graphs: against sums over paths, and the grid's forms against the loop over its edges, in value and in every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import assert_close, assert_gradients_close
from remanence.errors import ShapeError, UnknownName, UsageError
from remanence.ops.dag import OUTSIDE, Graph, dag, grid, grid_graph
from remanence.ops.outer import outer


def paths(graph: Graph, start: int, end: int) -> list[list[int]]:
    """Every path from one node to another, as the list of its edges."""
    found, open_ = [], [[e] for e in graph.out_of[start]]
    while open_:
        path = open_.pop()
        node = graph.edges[path[-1]][1]
        found += [path] * (node == end)
        open_ += [[*path, e] for e in (graph.out_of[node] if node != OUTSIDE else [])]
    return found


def draw(graph: Graph, batch: int = 2, heads: int = 2, key: int = 3, value: int = 4) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    n, e, p = graph.nodes, len(graph.edges), len(graph.pairs)
    shapes = ((n, heads, key), (n, heads, key), (n, heads, value), (e, heads), (p, heads), (e, heads), (n, heads))
    return tuple(torch.randn(batch, *shape, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize(
    "graph",
    [
        Graph(5, [(0, 1), (0, 2), (1, 3), (2, 3), (3, 4), (0, 4), (0, 1)]),  # two edges join 0 and 1
        Graph(4, [(3, 1), (1, 0), (3, 0), (0, 2), (OUTSIDE, 1), (2, OUTSIDE)]),
        Graph(3, []),
        grid_graph(3, 2),
    ],
)
def test_a_node_reads_every_path(graph: Graph) -> None:
    q, k, v, source, transition, mark, direct = draw(graph)
    o, C = dag(q, k, v, source, transition, mark, direct, graph)
    cross = {pair: i for i, pair in enumerate(graph.pairs)}
    want = (direct * (q * k).sum(-1))[..., None] * v
    for start in range(graph.nodes):
        for end in range(graph.nodes):
            for path in paths(graph, start, end):
                weight = source[:, path[0]] * mark[:, path[-1]]
                for pair in zip(path, path[1:]):
                    weight = weight * transition[:, cross[pair]]
                want[:, end] += (weight * (q[:, end] * k[:, start]).sum(-1))[..., None] * v[:, start]
    assert_close("outputs", o, want, 1e-12)
    assert C.shape == (2, len(graph.edges), 2, 3, 4)


def test_a_chain_is_the_chain() -> None:
    """On a path graph the rule is the one-dimensional one, carried state included."""
    torch.manual_seed(0)
    length = 7
    chain = Graph(length, [(t - 1, t) for t in range(length)] + [(length - 1, OUTSIDE)])  # (-1, 0) comes from outside
    q, k, v, source, transition, mark, direct = draw(chain)
    initial = torch.randn(2, length + 1, 2, 3, 4, dtype=torch.float64)
    o, C = dag(q, k, v, source, transition.abs(), mark, direct, chain, initial)
    bonus = torch.zeros(2, 3, dtype=torch.float64)
    args = (q * mark[:, :length, :, None], k * source[:, 1:, :, None], v, transition.abs().log())
    want, last = outer(*args, initial[:, 0], bonus=bonus)
    assert_close("outputs", o, want + (direct * (q * k).sum(-1))[..., None] * v, 1e-12)
    assert_close("state", C[:, -1], last, 1e-12)


def outcome(inputs: dict[str, Tensor], form: str, carried: bool, final: bool = True) -> tuple[list[Tensor], dict[str, Tensor]]:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items() if carried or name not in ("left", "top")}
    gates = [leaves[name] for name in ("q", "k", "v", "source", "transition", "mark", "direct")]
    o, ends = grid(*gates, initial=(leaves["left"], leaves["top"]) if carried else None, final=final, form=form)
    random = torch.Generator().manual_seed(1)
    results = [o, *(ends or ())]
    loss = sum(((x * torch.randn(x.shape, generator=random, dtype=x.dtype)).sum() for x in results), torch.zeros(()))
    return results, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)))


def grid_inputs(rows: int, columns: int, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    node = (2, rows, columns, 2)
    shapes: dict[str, Any] = {
        "q": (*node, 3), "k": (*node, 3), "v": (*node, 4), "source": (*node, 2), "transition": (*node, 2, 2), "mark": (*node, 2),
        "direct": node, "left": (2, rows, 2, 3, 4), "top": (2, columns, 2, 3, 4),
    }  # fmt: skip
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@settings(max_examples=6, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), carried=st.booleans())
@example(rows=3, columns=5, carried=True)
@example(rows=4, columns=2, carried=False)
@example(rows=1, columns=1, carried=True)
@example(rows=1, columns=4, carried=False)
def test_the_forms_agree(rows: int, columns: int, carried: bool) -> None:
    inputs = grid_inputs(rows, columns)
    for final in (True, False):
        want, want_grads = outcome(inputs, "naive", carried, final)
        for form in ("states", "auto") if carried or final else ("states", "weights", "auto"):
            got, grads = outcome(inputs, form, carried, final)
            for name, x, y in zip(("o", "right", "bottom"), got, want, strict=False):
                assert_close(f"{form} {name}", x, y, 1e-11)
            assert_gradients_close(form, grads, want_grads, 1e-10)


def test_a_grid_cut_in_two_is_the_grid() -> None:
    """The states that leave one part enter the next, below or to the right of it."""
    inputs = grid_inputs(4, 5)
    gates = [inputs[name] for name in ("q", "k", "v", "source", "transition", "mark", "direct")]
    left, top = inputs["left"], inputs["top"]
    want, ends = grid(*gates, initial=(left, top), final=True)
    upper, (right, bottom) = grid(*(x[:, :2] for x in gates), initial=(left[:, :2], top), final=True)  # type: ignore[misc]
    lower, (right_2, bottom_2) = grid(*(x[:, 2:] for x in gates), initial=(left[:, 2:], bottom), final=True)  # type: ignore[misc]
    assert ends is not None
    assert_close("rows", torch.cat([upper, lower], 1), want, 1e-12)
    assert_close("right", torch.cat([right, right_2], 1), ends[0], 1e-12)
    assert_close("bottom", bottom_2, ends[1], 1e-12)
    first, (seam, _) = grid(*(x[:, :, :1] for x in gates), initial=(left, top[:, :1]), final=True)  # type: ignore[misc]
    second, _ = grid(*(x[:, :, 1:] for x in gates), initial=(seam, top[:, 1:]))
    assert_close("columns", torch.cat([first, second], 2), want, 1e-12)


def test_second_derivatives() -> None:
    inputs = {name: x[:1].requires_grad_() for name, x in grid_inputs(2, 3).items() if name not in ("left", "top")}

    def run(transition: Tensor) -> Tensor:
        return grid(*(transition if name == "transition" else x for name, x in inputs.items()), form="states")[0]

    assert torch.autograd.gradgradcheck(run, inputs["transition"][:, :, :, :1].repeat(1, 1, 1, 2, 1, 1))


def test_low_precision_keeps_its_type_and_accumulates_wide() -> None:
    inputs = {name: x.bfloat16() for name, x in grid_inputs(3, 3).items()}
    gates = [inputs[name] for name in ("q", "k", "v", "source", "transition", "mark", "direct")]
    o, ends = grid(*gates, final=True)
    want, _ = grid(*(x.double() for x in gates))
    assert o.dtype == torch.bfloat16 and ends is not None and ends[0].dtype == torch.float32
    assert_close("bf16", o.double(), want, 1e-2)


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(UsageError, match="close a cycle among the nodes \\[0, 1\\]"):
        Graph(3, [(0, 1), (1, 0), (2, 0)])
    with pytest.raises(UsageError, match="edge \\(0, 3\\) does not fit a graph of 3 nodes"):
        Graph(3, [(0, 3)])
    graph = Graph(2, [(0, 1)])
    given_ = list(draw(graph))
    with pytest.raises(ShapeError, match="with N=3 nodes"):
        dag(*given_, Graph(3, []))
    given_[3] = given_[3][:, :0]
    with pytest.raises(ShapeError, match="source has shape \\[2, 0, 2\\]; expected \\[B, 1, H\\]"):
        dag(*given_, graph)
    inputs = grid_inputs(2, 2)
    gates = {name: inputs[name] for name in ("q", "k", "v", "source", "transition", "mark")}
    with pytest.raises(UnknownName, match="form 'wave' is not known"):
        grid(**gates, form="wave")
    with pytest.raises(ShapeError, match="mark has shape"):
        grid(**gates | {"mark": inputs["transition"]})
    with pytest.raises(ShapeError, match="initial's top has shape"):
        grid(**gates, initial=(inputs["left"], inputs["top"][:, :1]))
    with pytest.raises(ShapeError, match="takes no initial states and gives no final ones"):
        grid(**gates, initial=(inputs["left"], inputs["top"]), form="weights")
