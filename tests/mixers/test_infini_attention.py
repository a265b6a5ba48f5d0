"""Infini-attention against the published layer re-derived segment by segment, and at its two limits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence.mixers.attention import rotate
from remanence.mixers.infini_attention import InfiniAttention

DIM, H, S = 16, 2, 5


def build(segment: int = S, beta: float | None = None, rule: str = "linear", dtype: torch.dtype = torch.float64) -> InfiniAttention:
    mixer = rm.mixer("infini-attention", dim=DIM, heads=H, segment=segment, rule=rule).to(dtype)
    with torch.no_grad():
        mixer.beta.copy_(torch.randn(H) if beta is None else torch.full((H,), beta))
    return mixer  # type: ignore[return-value]


def loop(mixer: InfiniAttention, x: Tensor) -> Tensor:
    """One segment after the other, each with a softmax of its own and the memory that the ones before it left."""
    outputs, A, z = [], 0.0, 0.0
    gate = mixer.beta.sigmoid()[None, :, None, None]
    for part in x.split(mixer.segment, 1):
        q, k, v = mixer.to_qkv(part).unflatten(-1, (3, H, -1)).unbind(2)
        at = torch.arange(part.shape[1])[None].expand(len(x), -1)
        rq, rk = (rotate(y, at, mixer.theta, DIM // H).transpose(1, 2) for y in (q, k))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [B, H, n, D]
        score = (rq @ rk.mT) * (DIM // H) ** -0.5
        o = score.masked_fill(torch.ones(score.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1) @ v
        sq, sk = F.elu(q) + 1, F.elu(k) + 1
        if isinstance(A, Tensor):
            old = (sk @ A) / (sk @ z[..., None]).clamp(min=1e-10)
            o = gate * (sq @ A) / (sq @ z[..., None]).clamp(min=1e-10) + (1 - gate) * o
        else:
            old, o = 0.0, (1 - gate) * o
        if part.shape[1] == mixer.segment:
            A, z = A + sk.mT @ (v - (old if mixer.rule == "delta" else 0.0)), z + sk.sum(2)
        outputs.append(mixer.out(o.transpose(1, 2).flatten(2)))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_parity_with_the_published_layer(rule: str) -> None:
    """That layer's gate multiplies the local part (g = -beta), and it has no gate in the first segment."""
    mixer, x = build(rule=rule, dtype=torch.float32), torch.randn(2, 4 * S + 3, DIM)
    source = f"lucidrains/infini-transformer-pytorch, {rule} rule, from the second segment on (re-derived)"
    assert_parity("infini-attention", source, mixer(x)[0][:, S:], loop(mixer, x)[:, S:])


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_agrees_with_the_loop_in_value_and_gradient(rule: str) -> None:
    mixer, x = build(rule=rule), torch.randn(2, 4 * S + 3, DIM, dtype=torch.float64)
    grads = []
    for y in (got := mixer(x)[0], want := loop(mixer, x)):
        found = torch.autograd.grad(y.square().sum(), list(mixer.parameters()))
        grads.append(dict(zip(dict(mixer.named_parameters()), found)))
    assert_close("y", got, want, 1e-10)
    assert_gradients_close("infini-attention", *grads, tol=1e-9)


def test_parity_with_softmax_attention_when_the_gate_is_shut() -> None:
    mixer, attention = build(segment=40, beta=-1e9), rm.mixer("attention", dim=DIM, heads=H).double()
    attention.to_qkv.weight, attention.out.weight = mixer.to_qkv.weight, mixer.out.weight
    x = torch.randn(2, 40, DIM, dtype=torch.float64)
    assert_parity("infini-attention", "softmax attention, one segment, beta = -inf", mixer(x)[0], attention(x)[0], 1e-10)


def test_parity_with_linear_attention_when_segments_are_tokens() -> None:
    mixer, x = build(segment=1, beta=1e9), torch.randn(2, 13, DIM, dtype=torch.float64)
    q, k, v = mixer.to_qkv(x).unflatten(-1, (3, H, -1)).unbind(2)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    before = torch.ones(13, 13, dtype=torch.float64).tril(-1)  # all tokens but the current one
    weight = torch.einsum("bihd,bjhd->bhij", q, k) * before
    o = torch.einsum("bhij,bjhd->bihd", weight / weight.sum(-1, keepdim=True).clamp(min=1e-10), v)
    assert_parity("infini-attention", "linear attention to the past, S = 1, beta = +inf", mixer(x)[0], mixer.out(o.flatten(2)), 1e-10)


def test_what_is_stored_is_float32() -> None:
    _, state = rm.mixer("infini-attention", dim=16, segment=4).bfloat16()(torch.randn(1, 9, 16).bfloat16())
    assert state.matrix.dtype == state.norm.dtype == torch.float32 and state.keys.dtype == torch.bfloat16
