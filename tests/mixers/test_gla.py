"""Gated linear attention against the published recurrence, one token at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.errors import ShapeError, UsageError


def layer(**hyper) -> rm.Mixer:
    torch.manual_seed(0)
    mixer = rm.mixer("gla", dim=32, **hyper)
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return mixer


def recurrent_gla(q: Tensor, k: Tensor, v: Tensor, gk: Tensor) -> Tensor:
    """fla's naive_recurrent_gla in our words: all [T, K or V] of one head; queries scaled by K^-0.5."""
    memory, outputs = torch.zeros(k.shape[-1], v.shape[-1], dtype=q.dtype), []
    for t in range(len(q)):
        memory = torch.diag(gk[t].exp()) @ memory + torch.outer(k[t], v[t])
        outputs.append(memory.T @ (q[t] * q.shape[-1] ** -0.5))
    return torch.stack(outputs)


def published(mixer: nn.Module, x: Tensor) -> Tensor:
    """The layer of fla, head by head."""
    H, K, V = mixer.heads, mixer.key_dim, mixer.value_dim
    q, k, v = mixer.to_qkv(x).split([H * K, H * K, H * V], -1)
    low, high = mixer.to_decay
    gk = torch.log(torch.sigmoid(x @ low.weight.T @ high.weight.T + high.bias)) / 16
    rows = []
    for b in range(len(x)):
        heads = []
        for h in range(H):
            a, c = slice(h * K, h * K + K), slice(h * V, h * V + V)
            o = recurrent_gla(q[b, :, a], k[b, :, a], v[b, :, c], gk[b, :, a])
            heads.append(o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight)
        rows.append(torch.cat(heads, -1))
    gate = x @ mixer.to_gate.weight.T
    return (torch.stack(rows) * gate * gate.sigmoid()) @ mixer.out.weight.T


@pytest.mark.parametrize("hyper", [{}, {"heads": 2, "expand_k": 1.0, "expand_v": 1.5, "gate_rank": 5}])
def test_parity_with_the_published_recurrence(hyper: dict) -> None:
    mixer = layer(**hyper)
    x, dy = torch.randn(2, 2, 100, 32)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    got, want = mixer(xs[0])[0], published(mixer, xs[1])
    assert_parity("gla", "fla naive_recurrent_gla (re-derived)", got, want)
    assert_close("gradient", *(torch.autograd.grad(y, x, dy)[0] for y, x in zip((got, want), xs)), 1e-5)


def test_no_forgetting_is_linear_attention() -> None:
    """As the gate's bias grows, a goes to 1 and the output to causal attention without softmax."""
    mixer = layer().double()
    with torch.no_grad():
        mixer.to_decay[1].weight.zero_()
        mixer.to_decay[1].bias.fill_(60.0)
    x = torch.randn(1, 80, 32, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in mixer.to_qkv(x).split(mixer.sizes, -1))
    o = mixer.norm(((q @ k.mT).tril() * mixer.key_dim**-0.5 @ v).transpose(1, 2)).flatten(2)
    assert_close("y", mixer(x)[0], mixer.out(o * F.silu(mixer.to_gate(x))), 1e-10)


def test_wrong_use() -> None:
    with pytest.raises(UsageError, match="expand_k=0.5 of dim=32 is 16 channels, which heads=5"):
        rm.mixer("gla", dim=32, heads=5)
    with pytest.raises(UsageError, match="expand_v"):
        rm.mixer("gla", dim=32, expand_v=0.01)
    with pytest.raises(UsageError, match="gate_normalizer"):
        rm.mixer("gla", dim=32, gate_normalizer=0.0)
    with pytest.raises(ShapeError, match="empty"):
        layer()(torch.zeros(1, 0, 32))
