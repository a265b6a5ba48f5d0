"""Small segment memories for the tests of their equations, and a backbone in a loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import remanence as rm
from remanence import Decoder, Model, ModelConfig

VOCAB, DIM = 13, 16
LAYERS = "attention, gated-deltanet"


def build(slug: str, mixers: str = LAYERS, dtype: torch.dtype = torch.float64, seed: int = 0, **hyper: object) -> Model:
    """A memory whose weights are moved off their initial values, so that no zero hides anything."""
    torch.manual_seed(seed)
    backbone = Decoder(ModelConfig(vocab=VOCAB, dim=DIM, layers=mixers, ffn=1))
    memory = rm.memory(slug, backbone=backbone, **hyper)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return memory.to(dtype).eval()


def ids_of(length: int, batch: int = 2) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def through(decoder: Decoder, h: Tensor, before: Callable | None = None, after: Callable | None = None) -> Tensor:
    """h [B, T, dim] through fresh blocks and the last norm."""
    for index, block in enumerate(decoder.blocks):
        h = before(index, h) if before else h
        h, _ = block(h, None, None)
        h = after(index, h) if after else h
    return decoder.norm(h)


def softmax_loop(scores: Tensor) -> Tensor:
    """exp / sum over the last dimension, written out."""
    weight = (scores - scores.amax(-1, keepdim=True)).exp()
    return weight / weight.sum(-1, keepdim=True)


def head_slices(width: int, heads: int) -> list[slice]:
    size = width // heads
    return [slice(i * size, (i + 1) * size) for i in range(heads)]


def cross_attention(layer: torch.nn.Module, x: Tensor, memory: Tensor) -> Tensor:
    """CrossAttention, head by head: queries from x, keys and values from the memory."""
    k_w, v_w = layer.to_kv.weight.chunk(2)
    q, k, v = x @ layer.to_q.weight.T, memory @ k_w.T, memory @ v_w.T
    parts = [softmax_loop(q[..., s] @ k[..., s].mT / (s.stop - s.start) ** 0.5) @ v[..., s] for s in head_slices(q.shape[-1], layer.heads)]
    return torch.cat(parts, -1) @ layer.out.weight.T


def slot_attention(layer: torch.nn.Module, slots: Tensor, x: Tensor) -> Tensor:
    """SlotAttention as one attention over [slots | x] in which a slot sees itself of the slots: the mask of the public code."""
    k_w, v_w = layer.to_kv.weight.chunk(2)
    both, m = torch.cat([slots, x], 1), slots.shape[1]
    q, k, v = slots @ layer.to_q.weight.T, both @ k_w.T, both @ v_w.T
    others = torch.cat([~torch.eye(m, dtype=torch.bool), torch.zeros(m, x.shape[1], dtype=torch.bool)], 1)
    parts = []
    for s in head_slices(q.shape[-1], layer.heads):
        score = q[..., s] @ k[..., s].mT / ((s.stop - s.start) ** 0.5 * layer.tau)
        parts.append(softmax_loop(score.masked_fill(others, -torch.inf)) @ v[..., s])
    return torch.cat(parts, -1) @ layer.out.weight.T
