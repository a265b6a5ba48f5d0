"""The gated recurrent cache against the published update in a loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence.mixers.attention import rotate
from remanence.mixers.grc_cache import GRCCache

DIM, H, S, M = 16, 2, 6, 4


def build() -> GRCCache:
    mixer = rm.mixer("grc-cache", dim=DIM, heads=H, segment=S, slots=M).double()
    with torch.no_grad():
        mixer.lam.normal_()
    return mixer  # type: ignore[return-value]


def heads(y: Tensor) -> Tensor:
    return y.unflatten(-1, (H, -1)).transpose(1, 2)


def loop(mixer: GRCCache, x: Tensor) -> tuple[Tensor, Tensor]:
    C, outputs, width = x.new_zeros(len(x), M, DIM // 2), [], DIM // 2
    (w_r, w_u), (b_r, b_u) = mixer.gates.weight.chunk(2), mixer.gates.bias.chunk(2)
    for part in x.split(S, 1):
        at = torch.arange(part.shape[1])[None].expand(len(x), -1)
        q, k, v = mixer.to_qkv(part).chunk(3, -1)
        q, k = (rotate(y.unflatten(-1, (H, -1)), at, mixer.theta, DIM // H).transpose(1, 2) for y in (q, k))
        o_self = F.scaled_dot_product_attention(q, k, heads(v), is_causal=True)
        k_mem, v_mem = mixer.to_kv(C).chunk(2, -1)
        o_mem = F.scaled_dot_product_attention(heads(mixer.to_q(part[..., :width])), heads(k_mem), heads(v_mem))
        alpha = mixer.lam.sigmoid()[:, None, None]
        o = alpha * torch.cat([o_mem, torch.zeros_like(o_mem)], -1) + (1 - alpha) * o_self
        outputs.append(mixer.out(o.transpose(1, 2).flatten(2)))
        if part.shape[1] == S:
            summary = F.interpolate(part[..., :width].transpose(1, 2), M).transpose(1, 2)
            both = torch.cat([C, summary], -1)
            r, u = (both @ w_r.T + b_r).sigmoid(), (both @ w_u.T + b_u).sigmoid()
            added = mixer.norm(F.gelu(mixer.candidate(torch.cat([r * C, summary], -1))))
            C = u * added + (1 - u) * C
    return torch.cat(outputs, 1), C


def test_parity_with_the_published_update() -> None:
    mixer, x = build(), torch.randn(2, 4 * S + 3, DIM, dtype=torch.float64)
    (got, state), (want, C) = mixer(x), loop(mixer, x)
    assert_parity("grc-cache", "annosubmission/GRC-Cache, read before the update (re-derived)", got, want, 1e-10)
    assert_close("cache", state.cache, C, 1e-10)
    grads = []
    for y in (got, want):
        found = torch.autograd.grad(y.square().sum(), list(mixer.parameters()))
        grads.append(dict(zip(dict(mixer.named_parameters()), found)))
    assert_gradients_close("grc-cache", *grads, tol=1e-9)


def test_with_the_gate_shut_it_is_attention_within_segments() -> None:
    mixer, attention = build(), rm.mixer("attention", dim=DIM, heads=H).double()
    attention.to_qkv.weight, attention.out.weight = mixer.to_qkv.weight, mixer.out.weight
    x = torch.randn(2, 3 * S, DIM, dtype=torch.float64)
    with torch.no_grad():
        mixer.lam.fill_(-1e9)
        assert_close("lambda = -inf", mixer(x)[0], torch.cat([attention(part)[0] for part in x.split(S, 1)], 1), 1e-10)


def test_the_cache_carries_what_segments_before_said() -> None:
    mixer, x = build(), torch.randn(1, 3 * S, DIM, dtype=torch.float64)
    other = torch.cat([torch.randn(1, S, DIM, dtype=torch.float64), x[:, S:]], 1)
    with torch.no_grad():
        change = (mixer(x)[0] - mixer(other)[0]).abs().amax((0, 2))
    assert bool((change[S:] > 1e-6).all())
