"""ARMT against the equations in a loop over segments, layers and memory tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_gradients_close
from remanence import Decoder, ModelConfig
from remanence.memory.armt import ARMT, dpfp

VOCAB, S, M = 13, 6, 2


def build(dtype: torch.dtype, **hyper: object) -> ARMT:
    """Memory layers are moved off their initial values, where W_v is zero and nothing is held."""
    backbone = Decoder(ModelConfig(vocab=VOCAB, dim=16, layers="gated-deltanet, attention", ffn=1))
    model = rm.memory("armt", backbone=backbone, segment=S, **{"tokens": M, "key_dim": 16, **hyper})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)  # type: ignore[return-value]


def phi(a: Tensor, nu: int) -> Tensor:
    """DPFP by index: feature (j, i) is u_i u_{i-j}."""
    u = torch.cat([a.clamp(min=0), (-a).clamp(min=0)])
    return torch.stack([u[i] * u[(i - j) % len(u)] for j in range(1, nu + 1) for i in range(len(u))])


def loop(model: ARMT, ids: Tensor, nu: int, correction: bool) -> tuple[Tensor, list]:
    """One row at a time; A and z are None until the first write, as there is nothing to read."""
    decoder, rows, held = model.backbone, [], []
    for row in ids:
        memory: list = [None] * len(decoder.blocks)
        outputs = []
        for x in row.split(S):
            h = torch.cat([decoder.embedding(x), model.prompt] if len(x) == S else [decoder.embedding(x)])
            for l, (block, layer) in enumerate(zip(decoder.blocks, model.associations)):
                old = memory[l]
                if old is not None:
                    A, z = old
                    q = [phi(layer.to_q.weight @ token, nu) for token in h]
                    h = torch.stack([token + f @ A / (z @ f + 1e-5) for token, f in zip(h, q)])
                h = block(h[None], None, None)[0][0]
                if len(x) == S:
                    A = torch.zeros(model.width, model.dim, dtype=h.dtype) if old is None else old[0]
                    z = torch.zeros(model.width, dtype=h.dtype) if old is None else old[1]
                    for token in h[S:]:
                        k, v = phi(layer.to_k.weight @ token, nu), layer.to_v.weight @ token
                        b = torch.sigmoid(layer.to_beta.weight[0] @ token + layer.to_beta.bias[0])
                        gamma = torch.ones(())
                        if old is not None:
                            v = v - k @ old[0] / (old[1] @ k + 1e-5)
                            if correction:
                                gamma = (1 - old[1] @ k / (k @ k + 1e-5)).clip(0, 1).detach()
                        A, z = A + b * torch.outer(k, v), z + gamma * k
                    memory[l] = A, z
            outputs.append(decoder.unembedding(decoder.norm(h[: len(x)])))
        rows.append(torch.cat(outputs))
        held.append(memory)
    return torch.stack(rows), held


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("nu", "correction"), [(3, True), (2, False)])
def test_agrees_with_the_loop(nu: int, correction: bool, dtype: torch.dtype, tol: float) -> None:
    model, ids = build(dtype, nu=nu, correction=correction), torch.randint(VOCAB, (2, 3 * S + 4))
    out, (want, held) = model(ids), loop(model, ids, nu, correction)
    assert_close("logits", out.logits, want, tol)
    for l in range(2):
        assert_close("A", out.state.memory.matrix[l], torch.stack([row[l][0] for row in held]), tol)
        assert_close("z", out.state.memory.norm[l], torch.stack([row[l][1] for row in held]), tol)
    grads = []
    for logits in (out.logits, want):
        found = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        grads.append(dict(zip(dict(model.named_parameters()), found)))
    assert_gradients_close("armt", *grads, tol=tol if dtype == torch.float64 else 1e-4)  # fp32: quotients of sums, three segments deep


def test_with_values_of_zero_each_segment_stands_alone() -> None:
    model, ids = build(torch.float64), torch.randint(VOCAB, (2, 3 * S + 1))
    with torch.no_grad():
        for layer in model.associations:
            layer.to_v.weight.zero_()  # type: ignore[union-attr]
        want = torch.cat([model.backbone(x).logits for x in ids.split(S, 1)], 1)
        assert_close("W_v = 0", model(ids).logits, want, 1e-12)


def test_a_new_memory_does_nothing() -> None:
    model = rm.memory("armt", backbone=Decoder(ModelConfig(vocab=VOCAB, dim=16)), segment=S, tokens=M)
    assert all(not layer.to_v.weight.any() for layer in model.associations)  # type: ignore[union-attr]


def test_the_memory_is_float32_under_bf16() -> None:
    model, ids = build(torch.bfloat16), torch.randint(VOCAB, (2, 2 * S))
    memory = model(ids).state.memory
    assert {t.dtype for t in memory.tensors()} == {torch.float32}
    assert [list(t.shape) for t in memory.tensors()] == [[2, 96, 16]] * 2 + [[2, 96]] * 2


def test_dpfp() -> None:
    assert dpfp(torch.tensor([1.0, -2.0]), 1).tolist() == [2.0, 0.0, 0.0, 0.0]  # u = 1 0 0 2, u rolled by one = 2 1 0 0
    a = torch.randn(5, 7, dtype=torch.float64)
    assert_close("dpfp", dpfp(a, 3), torch.stack([phi(row, 3) for row in a]), 1e-15)
    assert bool((dpfp(a, 3) >= 0).all())
