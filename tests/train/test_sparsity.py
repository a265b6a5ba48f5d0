"""Sparse recurrent networks: torch's own pruning, masks that last through training, random graphs as masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import remanence as rm
from parity import assert_parity
from remanence import Decoder, ModelConfig
from remanence.errors import ShapeError, UsageError
from remanence.train.sparsity import barabasi_albert, graph_mask, layered_dag, mask_recurrent, prune_recurrent, watts_strogatz

NETWORKS = {
    "lstm": lambda: nn.LSTM(6, 8, num_layers=2),
    "gru": lambda: nn.GRU(6, 8, bidirectional=True),
    "relu": lambda: nn.RNN(6, 8, nonlinearity="relu"),
    "flashrnn": lambda: rm.mixer("flashrnn", dim=8, heads=2),
    "slstm": lambda: Decoder(ModelConfig(vocab=9, dim=8, layers="2 x slstm")),
}


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_parity_p_0_is_the_module(name: str) -> None:
    module = NETWORKS[name]()
    before = [weight.clone() for weight in module.parameters()]
    masks = prune_recurrent(module, 0.0, "both")
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters())) and masks.density == 1


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("which", ["input", "recurrent", "both"])
def test_parity_torch_prune(p: float, which: str) -> None:
    prefixes = {"input": ["weight_ih"], "recurrent": ["weight_hh"], "both": ["weight_ih", "weight_hh"]}[which]
    torch.manual_seed(0)
    ours = nn.LSTM(6, 8, num_layers=2)
    theirs = nn.LSTM(6, 8, num_layers=2)
    theirs.load_state_dict(ours.state_dict())
    prune_recurrent(ours, p, which)
    for name in [name for name, _ in theirs.named_parameters() if name.startswith(tuple(prefixes))]:
        prune.l1_unstructured(theirs, name, p)
    for name, weight in ours.named_parameters():
        assert_parity("rnn-sparsity", f"torch.nn.utils.prune.l1_unstructured (p={p}, {which})", weight, getattr(theirs, name))


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_masks_last_through_training(name: str) -> None:
    module = NETWORKS[name]()
    masks = prune_recurrent(module, 0.6)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    handle = masks.attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        sum((weight - 1).square().sum() for weight in module.parameters()).backward()
        optimizer.step()

    for _ in range(3):
        step()
    for weight, mask in masks.pairs.values():
        assert not weight[~mask].any() and weight[mask].all()
    assert abs(masks.density - 0.4) < 0.02
    handle.remove()
    step()
    assert any(weight[~mask].any() for weight, mask in masks.pairs.values())


def test_a_mask_from_unit_to_unit() -> None:
    """A unit that the mask cuts off from all others does not hear of them, in torch's layout and in ours."""
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[:3, 3] = False  # unit 3 reads itself alone
    for module in (nn.GRU(2, 4, batch_first=True), rm.mixer("flashrnn", dim=4, cell="gru", heads=1)):
        mask_recurrent(module, mask)
        if not isinstance(module, nn.GRU):
            module.out = nn.Identity()
        weight = module.weight_ih_l0 if isinstance(module, nn.GRU) else module.to_gates.weight
        with torch.no_grad():
            weight.view(3, 4, -1)[:, 3] = 0  # nor does unit 3 read the input
        x = torch.randn(1, 9, 2 if isinstance(module, nn.GRU) else 4)
        y, other = module(x)[0], module(x + 1)[0]
        assert torch.equal(y[..., 3], other[..., 3]) and not torch.equal(y[..., 0], other[..., 0])


def test_watts_strogatz() -> None:
    ring = watts_strogatz(12, 4, 0.0)
    assert (ring == ring.T).all() and (ring.sum(1) == 4).all() and ring[0, [1, 2, 10, 11]].all()
    moved = watts_strogatz(12, 4, 1.0, seed=3)
    assert (moved == moved.T).all() and not moved.diagonal().any() and moved.sum() == ring.sum() and (moved != ring).any()
    assert (watts_strogatz(12, 4, 1.0, seed=3) == moved).all()


def test_barabasi_albert() -> None:
    graph = barabasi_albert(200, 3)
    assert (graph == graph.T).all() and not graph.diagonal().any()
    assert graph.sum() == 2 * (3 + 3 * (200 - 4)) and (graph.sum(1) >= 1).all()
    assert graph.sum(1).max() > 20  # hubs: at random no node of mean degree 6 would have so many


def test_layered_dag() -> None:
    graph = np.zeros((5, 5), bool)
    for a, b in ((0, 1), (1, 2), (0, 2), (3, 4)):
        graph[a, b] = graph[b, a] = True
    dag, layer = layered_dag(graph)
    assert not np.tril(dag).any() and (dag | dag.T == graph).all() and layer.tolist() == [0, 1, 2, 0, 1]
    for edge in zip(*np.nonzero(dag)):
        assert layer[edge[0]] < layer[edge[1]]


@pytest.mark.parametrize("graph", [watts_strogatz(10, 4, 0.3), barabasi_albert(10, 2)])
def test_graph_masks_are_layered_and_keep_the_diagonal(graph: np.ndarray) -> None:
    mask = graph_mask(graph, 32)
    assert mask.shape == (32, 32) and mask.diagonal().all()
    order = torch.triu(torch.ones(32, 32, dtype=torch.bool))
    blocks = mask & mask.T  # units of one node
    assert not (mask & ~order & ~blocks).any()  # units are in the order of their layers, and read only from below
    masks = mask_recurrent(nn.LSTM(5, 32), mask)
    assert abs(masks.density - float(mask.float().mean())) < 1e-6


def test_what_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(UsageError, match="p is 1.5; it must be in .0, 1."):
        prune_recurrent(nn.LSTM(2, 3), 1.5)
    with pytest.raises(UsageError, match="which 'hidden' is not known"):
        prune_recurrent(nn.LSTM(2, 3), 0.5, "hidden")
    with pytest.raises(UsageError, match="a Linear has no recurrent layer"):
        prune_recurrent(nn.Linear(2, 3))
    with pytest.raises(ShapeError, match="the mask has shape .2, 2.; the recurrent weights weight_hh_l0 need .3, 3."):
        mask_recurrent(nn.LSTM(2, 3), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(UsageError, match="neighbours is 3; it must be even"):
        watts_strogatz(10, 3)
    with pytest.raises(UsageError, match="edges is 10"):
        barabasi_albert(10, 10)
    with pytest.raises(UsageError, match="size is 5; a graph of 10 nodes"):
        graph_mask(barabasi_albert(10), 5)
    assert rm.find("rnn-sparsity").builder is prune_recurrent
