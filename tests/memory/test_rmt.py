"""RMT against the equations in a loop over segments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_gradients_close
from remanence import Decoder, ModelConfig
from remanence.memory.rmt import RMT

VOCAB, S, M = 13, 6, 2


def build(dtype: torch.dtype, tokens: int = M, segment: int = S) -> RMT:
    backbone = Decoder(ModelConfig(vocab=VOCAB, dim=16, layers="gated-deltanet, attention", ffn=1))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return rm.memory("rmt", backbone=backbone, segment=segment, tokens=tokens).to(dtype)  # type: ignore[return-value]


def loop(model: RMT, ids: Tensor) -> tuple[Tensor, Tensor]:
    """[mem || x || mem] through the blocks, segment by segment; an unfinished last segment has no copy behind."""
    decoder, memory, outputs = model.backbone, model.prompt.repeat(len(ids), 1, 1), []
    for x in ids.split(S, 1):
        n = x.shape[1]
        h = torch.cat([memory, decoder.embedding(x), memory] if n == S else [memory, decoder.embedding(x)], 1)
        for block in decoder.blocks:
            h, _ = block(h, None, None)
        h = decoder.norm(h)
        outputs.append(decoder.unembedding(h[:, M : M + n]))
        if n == S:
            memory = h[:, M + n :]
    return torch.cat(outputs, 1), memory


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("length", [S, 3 * S, 3 * S + 4])
def test_agrees_with_the_loop(length: int, dtype: torch.dtype, tol: float) -> None:
    model, ids = build(dtype), torch.randint(VOCAB, (2, length))
    out, (want, memory) = model(ids), loop(model, ids)
    assert_close("logits", out.logits, want, tol)
    assert_close("memory", out.state.memory.vectors, memory, tol)
    grads = []
    for logits, held in ((out.logits, out.state.memory.vectors), (want, memory)):
        found = torch.autograd.grad(logits.square().sum() + held.sin().sum(), list(model.parameters()))
        grads.append(dict(zip(dict(model.named_parameters()), found)))
    assert len(grads[0]) == len(dict(model.named_parameters()))
    assert_gradients_close("rmt", *grads, tol=tol if dtype == torch.float64 else 2e-5)  # fp32: sums over three segments


def test_one_segment_is_the_backbone_after_a_prompt() -> None:
    model, ids = build(torch.float64, segment=10), torch.randint(VOCAB, (2, 9))
    with torch.no_grad():
        x = torch.cat([model.prompt.expand(2, -1, -1), model.embed(ids)], 1)
        hidden, _ = model.backbone.encode(x, None, None)
        assert_close("one segment", model(ids).logits, model.head(hidden[:, M:]), 1e-12)


def test_without_tokens_each_segment_stands_alone() -> None:
    model, ids = build(torch.float64, tokens=0), torch.randint(VOCAB, (2, 2 * S + 1))
    with torch.no_grad():
        want = torch.cat([model.backbone(x).logits for x in ids.split(S, 1)], 1)
        assert_close("m = 0", model(ids).logits, want, 1e-12)


def test_a_memory_larger_than_the_segment_must_be_asked_for() -> None:
    backbone, ids = Decoder(ModelConfig(vocab=VOCAB, dim=16)), torch.randint(VOCAB, (1, 11))
    model = rm.memory("rmt", backbone=backbone, segment=4, tokens=6, wide=True)
    again = type(model).build(model.config)
    assert again.config == model.config and model(ids).state.memory.vectors.shape == (1, 6, 16)
    with pytest.raises(rm.errors.UsageError, match="tokens is 6 and segment 4"):
        rm.memory("rmt", backbone=backbone, segment=4, tokens=6)


def test_the_prompt_starts_at_the_scale_of_the_embedding() -> None:
    model = rm.memory("rmt", backbone=Decoder(ModelConfig(vocab=100, dim=64)), segment=128, tokens=100)
    assert 0.9 < model.prompt.std() / model.backbone.embedding.weight.std() < 1.1  # type: ignore[union-attr]
    assert model.config["segment"] == 128 and model.config["tokens"] == 100 and model.config["backbone"]["kind"] == "decoder"
