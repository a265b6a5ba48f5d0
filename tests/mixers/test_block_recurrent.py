"""The Block-Recurrent layer against the published one in a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence.mixers.block_recurrent import BlockRecurrentTransformer, bucket

DIM, H, W, N = 16, 2, 5, 3


def build(gate: str) -> BlockRecurrentTransformer:
    mixer = rm.mixer("block-recurrent-transformer", dim=DIM, heads=H, segment=W, slots=N, gate=gate).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer  # type: ignore[return-value]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """q [B, n, H, D], k, v [B, m, H, D]: lengths 1, a scale a head; 0 if there is no key."""
    if not k.shape[1]:
        return torch.zeros_like(q)
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    score = torch.einsum("bihd,bjhd->bhij", q, k) * scale.abs()[:, None, None] + bias
    return torch.einsum("bhij,bjhd->bihd", score.softmax(-1), v)


def loop(mixer: BlockRecurrentTransformer, x: Tensor) -> tuple[Tensor, Tensor]:
    C, outputs = mixer.initial.expand(len(x), -1, -1), []
    q1, q2, k, v = (y.unflatten(-1, (H, -1)) for y in mixer.to_qqkv(x).chunk(4, -1))
    for block in range(0, x.shape[1], W):
        normed = C / (C.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight + mixer.place
        s1, s2, sk, sv = (y.unflatten(-1, (H, -1)) for y in mixer.slots_to_qqkv(normed).chunk(4, -1))
        end = min(block + W, x.shape[1])
        for t in range(block, end):
            keys = slice(max(t - W, 0), t)
            bias = mixer.bias[:, bucket(t - torch.arange(keys.start, t))][:, None]
            local = attend(q1[:, t : t + 1], k[:, keys], v[:, keys], mixer.scale[0], bias)
            state = attend(q2[:, t : t + 1], sk, sv, mixer.scale[1])
            outputs.append(mixer.out(torch.cat([local, state], -1).flatten(2)))
        if end == block + W:
            keys = slice(max(block - W, 0), end)
            a = torch.cat([attend(s1, sk, sv, mixer.scale[2]), attend(s2, k[:, keys], v[:, keys], mixer.scale[3])], -1).flatten(2)
            z = mixer.candidate(a)
            if mixer.gate is None:
                g = mixer.gate_bias.sigmoid()
                C = g * C + (1 - g) * z
            else:
                (w_i, w_f), (b_i, b_f) = mixer.gate.weight.chunk(2), mixer.gate_bias.chunk(2)
                C = (a @ w_f.T + b_f + 1).sigmoid() * C + (a @ w_i.T + b_i - 1).sigmoid() * z
    return torch.cat(outputs, 1), C


@pytest.mark.parametrize("gate", ["bias", "lstm"])
def test_parity_with_the_published_layer(gate: str) -> None:
    mixer, x = build(gate), torch.randn(2, 4 * W + 2, DIM, dtype=torch.float64)
    (got, state), (want, C) = mixer(x), loop(mixer, x)
    source = f"google-research/meliad, fixed:skip with the {gate} gate, nothing seen before the start (re-derived)"
    assert_parity("block-recurrent-transformer", source, got, want, 1e-10)
    assert_close("C", state.slots, C, 1e-10)
    grads = []
    for y in (got, want):
        found = torch.autograd.grad(y.square().sum(), list(mixer.parameters()))
        grads.append(dict(zip(dict(mixer.named_parameters()), found)))
    assert_gradients_close("block-recurrent-transformer", *grads, tol=1e-9)


def test_parity_of_the_buckets_with_t5() -> None:
    distance = torch.arange(600)
    want = T5Attention._relative_position_bucket(-distance, bidirectional=False, num_buckets=32, max_distance=128)
    assert_parity("block-recurrent-transformer", "transformers T5Attention, relative buckets", bucket(distance), want)


def test_a_gate_of_one_keeps_the_state() -> None:
    mixer = build("bias")
    with torch.no_grad():
        mixer.gate_bias.fill_(1e9)
        _, state = mixer(torch.randn(2, 4 * W, DIM, dtype=torch.float64))
        assert_close("C", state.slots, mixer.initial.expand(2, -1, -1), 1e-12)


def test_without_places_the_states_would_stay_equal() -> None:
    mixer = build("bias")
    with torch.no_grad():
        mixer.initial.copy_(mixer.initial[:1].expand(N, -1))
        apart = mixer(torch.randn(1, W, DIM, dtype=torch.float64))[1].slots
        mixer.place.copy_(mixer.place[:1].expand(N, -1))
        same = mixer(torch.randn(1, W, DIM, dtype=torch.float64))[1].slots
    assert_close("equal", same, same[:, :1].expand_as(same), 1e-12)
    assert bool((apart.std(1) > 1e-3).any())
