"""Mixture-of-Memories: with one memory it is Gated DeltaNet; with several, each memory alone on the tokens that are its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence import Span
from remanence.errors import ShapeError, UsageError
from remanence.mixers.mom import MoM
from remanence.ops.delta import naive


def layer(seed: int = 0, **hyper: object) -> MoM:
    """dim 32, float64, every weight moved off its initial value."""
    torch.manual_seed(seed)
    mixer = rm.mixer("mom", dim=32, **hyper)
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return mixer.double()


def alone(mixer: MoM, x: Tensor, weight: Tensor) -> Tensor:
    """One memory over the tokens x [L, D] of one document from a fresh start, token by token -> what each reads, [L, H, V]."""
    H, K, V = mixer.heads, mixer.key_dim, mixer.value_dim
    k, v, b, a = (x @ weight).split([H * K, H * V, H, H], -1)
    qkv = torch.cat([x @ mixer.to_q.weight.T, k, v], -1)
    taps, padded = mixer.conv.weight, F.pad(qkv, (0, 0, 3, 0))
    qkv = F.silu(sum(padded[j : j + len(x)] * taps[:, j] for j in range(4)))
    q, k, v = (part.unflatten(-1, (H, -1)) for part in qkv.split([H * K, H * K, H * V], -1))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    g = -mixer.A_log.exp() * torch.log1p(torch.exp(a + mixer.dt_bias))
    return naive(*(part[None] for part in (q * K**-0.5, k, v, g, torch.sigmoid(b))))[0][0]


def dense(mixer: MoM, x: Tensor) -> Tensor:
    """One document x [T, D], memory by memory."""
    p = torch.softmax(x @ mixer.router.weight.T, -1)
    kept = p.sort(-1, descending=True).indices[:, : mixer.topk]
    o = alone(mixer, x, mixer.to_kvba[-1]) if mixer.shared else torch.zeros(len(x), mixer.heads, mixer.value_dim).double()
    for m in range(mixer.memories):
        mine = (kept == m).any(-1)
        w = p[mine, m] / p[mine].gather(1, kept[mine]).sum(-1)
        if mine.any():
            o = o.index_add(0, mine.nonzero()[:, 0], w[:, None, None] * alone(mixer, x[mine], mixer.to_kvba[m]))
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    return (o.flatten(1) * F.silu(x @ mixer.to_gate.weight.T)) @ mixer.out.weight.T


@pytest.mark.parametrize("hyper", [{}, {"shared": False, "topk": 1}, {"memories": 6, "topk": 3, "value_dim": 5}, {"topk": 4}], ids=str)
def test_parity_of_grouped_and_dense(hyper: dict) -> None:
    """Values and every gradient."""
    mixer, x = layer(**hyper), torch.randn(2, 70, 32).double().requires_grad_()
    leaves = {"x": x, **dict(mixer.named_parameters())}
    got, want = mixer(x)[0], torch.stack([dense(mixer, row) for row in x])
    assert_parity("mom", "each memory alone on its tokens", got, want, 1e-10)
    dy = torch.randn_like(want)
    one, other = (dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy))) for y in (got, want))
    assert_gradients_close("mom", one, other, 1e-9)


@pytest.mark.parametrize("value_dim", [8, 12])
def test_parity_of_one_memory_and_gated_deltanet(value_dim: int) -> None:
    mom = layer(memories=1, topk=1, shared=False, value_dim=value_dim).float()
    gated = rm.mixer("gated-deltanet", dim=32, value_dim=value_dim)
    k, v, b, a = mom.to_kvba[0].T.split([32, 4 * value_dim, 4, 4])
    with torch.no_grad():
        gated.to_qkv.weight.copy_(torch.cat([mom.to_q.weight, k, v]))
        gated.to_beta.weight.copy_(b)
        gated.to_decay.weight.copy_(a)
        for name in ("A_log", "dt_bias"):
            getattr(gated, name).copy_(getattr(mom, name))
        for name in ("conv", "to_gate", "norm", "out"):
            getattr(gated, name).load_state_dict(getattr(mom, name).state_dict())
    x = torch.randn(2, 150, 32)
    (got, state), (want, end) = mom(x), gated(x)
    assert_parity("mom", "our gated-deltanet, one memory", got, want)
    assert_close("memory", state.memory[:, 0], end.memory, 1e-5)
    assert_close("conv", state.conv[:, 0], end.conv, 1e-5)


@given(st.integers(0, 99), st.integers(1, 30), st.integers(0, 29), st.integers(0, 29))
def test_documents_and_padding(seed: int, length: int, start: int, end: int) -> None:
    """Memories that a document, or the whole call, sends no token to included."""
    mixer = layer(memories=6, topk=1)
    x = torch.randn(1, length + 1, 32, generator=torch.Generator().manual_seed(seed)).double()
    start, end = min(start, length), max(min(end, length), min(start, length))
    reset, valid = torch.zeros(1, length + 1, dtype=torch.bool), torch.ones(1, length + 1, dtype=torch.bool)
    reset[0, start], valid[0, end:] = True, False
    with torch.no_grad():
        y, state = mixer(x, span=Span(valid, reset))
        if start:
            assert_close("first document", y[0, :start], dense(mixer, x[0, :start]), 1e-10)
        last = x[0, start:end] if end > start else x[0, :end]
        after, _ = mixer(x.flip(1), state)
        assert_close("what follows", after[0], dense(mixer, torch.cat([last, x[0].flip(0)]))[len(last) :], 1e-10)


def test_a_memory_that_is_not_chosen_stays_as_it_was() -> None:
    mixer, x = layer(memories=3, topk=1, shared=False), torch.randn(1, 40, 32).double()
    with torch.no_grad():
        mixer.router.weight.zero_()
        mixer.router.weight[1] = 1.0
        _, state = mixer(x.abs())  # all to memory 1
        assert state.memory[:, 1].any() and not state.memory[:, [0, 2]].any() and not state.conv[:, [0, 2]].any()
        _, then = mixer(-x[:, :7].abs(), state)  # none to memory 1: bit for bit the same
        assert torch.equal(then.memory[:, 1], state.memory[:, 1]) and torch.equal(then.conv[:, 1], state.conv[:, 1])


def test_balance_loss() -> None:
    mixer, x = layer(memories=4, topk=2), torch.randn(2, 50, 32).double()
    p = torch.softmax(x @ mixer.router.weight.T, -1).flatten(0, 1)
    chosen = F.one_hot(p.topk(2).indices, 4).double().sum(1)
    loss = mixer.balance_loss(x)
    assert_close("loss", loss, 4 * (chosen.mean(0) * p.mean(0)).sum(), 1e-12)
    assert torch.autograd.grad(loss, mixer.router.weight)[0].any()
    real = Span.from_lengths([50, 20], 50)
    apart = torch.cat([x[0], x[1, :20]])[None]
    assert_close("padding does not count", mixer.balance_loss(x, real), mixer.balance_loss(apart), 1e-12)
    with torch.no_grad():
        mixer.router.weight.mul_(1e-9)  # near uniform probabilities: topk whatever the choice
        assert abs(mixer.balance_loss(x).item() - 2) < 1e-6
        mixer.router.weight.fill_(0)[:2] = 1e3  # two memories take everything of a positive x
        assert abs(mixer.balance_loss(x.abs()).item() - 4) < 1e-6


def test_training_with_the_balance_loss_evens_the_load() -> None:
    mixer, x = layer(memories=4, topk=1).float(), torch.randn(4, 64, 32) + 0.5
    with torch.no_grad():
        mixer.router.weight[0] += 0.5  # memory 0 takes nearly all
    load = (mixer.route(x)[1] > 0).float().mean((0, 1))
    optimizer = torch.optim.Adam([mixer.router.weight], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        mixer.balance_loss(x).backward()
        optimizer.step()
    after = (mixer.route(x)[1] > 0).float().mean((0, 1))
    assert load.max() > 0.8 and after.max() < 0.5, (load, after)


def test_wrong_use() -> None:
    with pytest.raises(UsageError, match="topk is 3; it may be 1..2"):
        rm.mixer("mom", dim=32, memories=2, topk=3)
    with pytest.raises(UsageError, match="heads=5 does not divide dim=32"):
        rm.mixer("mom", dim=32, heads=5)
    with pytest.raises(ShapeError, match="empty"):
        rm.mixer("mom", dim=32)(torch.zeros(1, 0, 32))
