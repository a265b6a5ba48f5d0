"""Transformer-XL against the paper's recurrence in a loop, and against one causal pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_gradients_close
from remanence import Decoder, ModelConfig
from remanence.memory.transformer_xl import TransformerXL

VOCAB, S = 13, 6


def build(memory: int, layers: str = "2 x relative-attention", dtype: torch.dtype = torch.float64) -> TransformerXL:
    backbone = Decoder(ModelConfig(vocab=VOCAB, dim=16, layers=layers, ffn=1))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return rm.memory("transformer-xl", backbone=backbone, segment=S, memory=memory).to(dtype)  # type: ignore[return-value]


def loop(model: TransformerXL, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Each layer reads [sg(mem) || h] from nothing and keeps what it gives at h; mem' = sg([mem || h][-M:])."""
    decoder, outputs = model.backbone, []
    memory = [torch.zeros(len(ids), 0, 16, dtype=model.backbone.embedding.weight.dtype) for _ in decoder.blocks]
    for x in ids.split(S, 1):
        h = decoder.embedding(x)
        for l, block in enumerate(decoder.blocks):
            both = torch.cat([memory[l], h], 1)
            memory[l] = both[:, max(both.shape[1] - model.memory, 0) :].detach()
            h = h + block.mixer(block.norm(both))[0][:, -x.shape[1] :]
            h = h + block.ffn(block.ffn_norm(h))
        outputs.append(decoder.unembedding(decoder.norm(h)))
    return torch.cat(outputs, 1), memory


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("memory", [0, 2, S, 15])
@pytest.mark.parametrize("layers", ["2 x relative-attention", "attention, gated-deltanet"])
def test_agrees_with_the_loop(layers: str, memory: int, dtype: torch.dtype, tol: float) -> None:
    model, ids = build(memory, layers, dtype), torch.randint(VOCAB, (2, 4 * S + 3))
    out, (want, held) = model(ids), loop(model, ids)
    assert_close("logits", out.logits, want, tol)
    assert out.state.memory.size.tolist() == [memory] * 2
    for got, inputs in zip(out.state.memory.inputs, held):
        assert_close("memory", got, inputs, tol)
    grads = []
    for logits in (out.logits, want):
        found = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        grads.append(dict(zip(dict(model.named_parameters()), found)))
    assert_gradients_close("transformer-xl", *grads, tol=tol if dtype == torch.float64 else 1e-4)  # fp32: sums over all tokens


@pytest.mark.parametrize("layers", ["2 x relative-attention", "2 x attention", "gated-deltanet, attention"])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a_memory_of_everything_is_one_causal_pass(layers: str, dtype: torch.dtype, tol: float) -> None:
    model, ids = build(5 * S, layers, dtype).eval(), torch.randint(VOCAB, (2, 4 * S + 3))
    with torch.no_grad():
        assert_close(layers, model(ids).logits, model.backbone(ids).logits, tol)


def test_no_gradient_crosses_a_segment() -> None:
    model = build(2 * S)
    h = torch.randn(1, 2 * S, 16, dtype=torch.float64, requires_grad=True)
    hidden, state = model.encode(h, None, None)
    (grad,) = torch.autograd.grad(hidden[:, S:].sum(), h, retain_graph=True)
    assert not grad[:, :S].any() and bool(grad[:, S:].any())
    with torch.no_grad():
        changed, _ = model.encode(h + torch.arange(2 * S)[:, None].lt(S), None, None)
    assert bool(((changed - hidden)[:, S:].abs() > 1e-6).any())  # what was cut is the gradient, not the memory
    assert not any(tensor.requires_grad for tensor in state.memory.tensors())
