"""Sparse recurrent networks: magnitude pruning and random-graph masks of their weights, kept through training (arXiv 2407.20601)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import ShapeError, UsageError, unknown

WHICH = ("input", "recurrent", "both")


class Masks:
    """Weights of a module that are held at zero. `apply` sets them to zero; `attach` does so after every step of an optimiser."""

    def __init__(self, pairs: Mapping[str, tuple[nn.Parameter, Tensor]]):
        self.pairs = dict(pairs)
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Multiply every weight by its mask. Needed after whatever changes the weights: momentum and decay move pruned ones too."""
        for weight, mask in self.pairs.values():
            weight.mul_(mask.to(weight))

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
        """`apply` after every optimizer.step(), until the handle that is returned is removed."""
        return optimizer.register_step_post_hook(lambda *_: self.apply())

    @property
    def density(self) -> float:
        """The fraction of the masked tensors' weights that are kept."""
        masks = [mask for _, mask in self.pairs.values()]
        return float(sum(mask.sum() for mask in masks) / sum(mask.numel() for mask in masks))


def recurrent_weights(module: nn.Module, which: str = "recurrent") -> Iterator[tuple[str, nn.Parameter]]:
    """(name, matrix) of the input-to-hidden weights, the hidden-to-hidden ones, or both, of every recurrent layer in `module`.

    These are torch's RNN, GRU and LSTM, and mixers with `recurrent` blocks (flashrnn, slstm), whose inputs enter by `to_gates`.
    """
    if which not in WHICH:
        raise unknown("which", which, WHICH)
    for path, layer in module.named_modules():
        kinds: list[tuple[str, str]] = []
        if isinstance(layer, nn.RNNBase):
            parts = (("weight_ih", "input"), ("weight_hh", "recurrent"))
            kinds = [(name, kind) for name, _ in layer.named_parameters() for start, kind in parts if name.startswith(start)]
        elif isinstance(getattr(layer, "recurrent", None), nn.Parameter):
            inputs = "to_gates" if isinstance(getattr(layer, "to_gates", None), nn.Parameter) else "to_gates.weight"
            kinds = [(inputs, "input"), ("recurrent", "recurrent")]
        for name, kind in kinds:
            if which in (kind, "both"):
                yield f"{path}.{name}" if path else name, layer.get_parameter(name)


def _checked(module: nn.Module, which: str) -> dict[str, nn.Parameter]:
    found = dict(recurrent_weights(module, which))
    if not found:
        raise UsageError(f"a {type(module).__name__} has no recurrent layer to prune (torch's RNN, GRU or LSTM, flashrnn, slstm).")
    return found


@system(
    "rnn-sparsity",
    kind="training",
    paper="arXiv:2407.20601",
    year=2021,
    name="Sparse recurrent networks",
    parity="torch.nn.utils.prune.l1_unstructured; p=0 is the module itself",
    claim="More than 60% of the recurrent weights can be pruned, and often one epoch of retraining brings the accuracy back.",
)
def prune_recurrent(module: nn.Module, p: float = 0.5, which: str = "recurrent") -> Masks:
    """Set the fraction `p` of smallest magnitude of each recurrent layer's weights to zero, tensor by tensor, and return the masks.

    which: 'input' (input to hidden), 'recurrent' (hidden to hidden) or 'both'; biases are never pruned. Raises UsageError if p is not in
    [0, 1] or there is no recurrent layer.
    """
    if not 0 <= p <= 1:
        raise UsageError(f"p is {p}; it must be in [0, 1], the fraction of weights to prune.")
    pairs = {}
    for name, weight in _checked(module, which).items():
        mask = torch.ones_like(weight, dtype=torch.bool)
        smallest = weight.detach().abs().flatten().topk(round(p * weight.numel()), largest=False).indices
        mask.view(-1)[smallest] = False
        pairs[name] = (weight, mask)
    return Masks(pairs)


def mask_recurrent(module: nn.Module, mask: Tensor) -> Masks:
    """Hold the hidden-to-hidden weights of every recurrent layer to `mask` [E, E] bool, from unit to unit, the same for every gate.

    For a layer with heads E is the head size. Raises ShapeError where it does not fit.
    """
    pairs = {}
    for name, weight in _checked(module, "recurrent").items():
        size = weight.shape[1]  # of torch's [G E, E], to and from, and of [H, E, G, E], from and to
        if mask.shape != (size, size):
            raise ShapeError(f"the mask has shape {list(mask.shape)}; the recurrent weights {name} need [{size}, {size}].")
        full = mask.t().repeat(len(weight) // size, 1) if weight.ndim == 2 else mask[:, None].expand_as(weight)
        pairs[name] = (weight, full.bool().clone())
    return Masks(pairs)


def watts_strogatz(nodes: int, neighbours: int = 4, p: float = 0.3, seed: int = 0) -> np.ndarray:
    """The adjacency, bool [nodes, nodes] and symmetric, of a small-world graph (Watts and Strogatz 1998).

    A ring in which each node knows its `neighbours` (even) nearest; each edge's far end is moved to a random node with probability p.
    """
    if neighbours % 2 or not 0 < neighbours < nodes:
        raise UsageError(f"neighbours is {neighbours}; it must be even and in 2..{nodes - 1}.")
    if not 0 <= p <= 1:
        raise UsageError(f"p is {p}; it must be in [0, 1].")
    rng, graph = np.random.default_rng(seed), np.zeros((nodes, nodes), bool)
    edges = [(i, (i + j) % nodes) for j in range(1, neighbours // 2 + 1) for i in range(nodes)]
    for a, b in edges:
        graph[a, b] = graph[b, a] = True
    for a, b in edges:
        free = np.flatnonzero(~graph[a] & (np.arange(nodes) != a))
        if len(free) and rng.random() < p:
            c = rng.choice(free)
            graph[a, b] = graph[b, a] = False
            graph[a, c] = graph[c, a] = True
    return graph


def barabasi_albert(nodes: int, edges: int = 2, seed: int = 0) -> np.ndarray:
    """The adjacency, bool [nodes, nodes] and symmetric, of a scale-free graph (Barabasi and Albert 1999).

    It starts as a star of edges + 1 nodes; every further node is joined to `edges` others, drawn in proportion to their degrees.
    """
    if not 0 < edges < nodes:
        raise UsageError(f"edges is {edges}; it must be in 1..{nodes - 1}.")
    rng, graph = np.random.default_rng(seed), np.zeros((nodes, nodes), bool)
    graph[0, 1 : edges + 1] = graph[1 : edges + 1, 0] = True
    for node in range(edges + 1, nodes):
        degree = graph[:node].sum(1)
        chosen = rng.choice(node, edges, replace=False, p=degree / degree.sum())
        graph[node, chosen] = graph[chosen, node] = True
    return graph


def layered_dag(graph: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The graph's edges directed from the lower to the higher node, and each node's layer, [nodes]: its longest path from a source."""
    dag = np.triu(np.asarray(graph, bool), 1)
    layer = np.zeros(len(dag), int)
    for node in range(1, len(dag)):
        layer[node] = (layer[dag[:, node]] + 1).max(initial=0)
    return dag, layer


def graph_mask(graph: np.ndarray, size: int) -> Tensor:
    """A mask [size, size] bool, from unit to unit, for `mask_recurrent`: the layered DAG of a random graph, each node a group of units.

    Units are dealt to the nodes in the order of their layers, in equal shares. A unit reads the units of the nodes that point to its own,
    and those of its own, so that it keeps a memory: without that a DAG forgets after as many tokens as it has layers. Our reading.
    """
    nodes = len(graph)
    if size < nodes:
        raise UsageError(f"size is {size}; a graph of {nodes} nodes needs at least that many units.")
    dag, layer = layered_dag(graph)
    node = np.argsort(layer, kind="stable")[np.arange(size) * nodes // size]
    return torch.from_numpy((dag | np.eye(nodes, dtype=bool))[np.ix_(node, node)])
