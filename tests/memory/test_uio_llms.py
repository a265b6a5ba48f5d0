"""UIO-LLMs: memory tokens by state forks are those of one masked pass, and reading in a stream is reading all memories as a prefix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence.mixers.attention import rotate
from segment_memories import build, ids_of

S, N, H = 6, 3, 4
HYPER = {"segment": S, "slots": N, "rank": 2, "train_base": True}


def attention(block: torch.nn.Module, h: Tensor, weight: Tensor, position: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (part.unflatten(-1, (H, -1)) for part in (block.norm(h) @ weight.T).chunk(3, -1))
    q, k = (rotate(part, position.expand(len(h), -1), 10000.0, part.shape[-1]) for part in (q, k))
    score = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    o = torch.einsum("bhij,bjhd->bihd", score.masked_fill(~mask, -torch.inf).softmax(-1), v).flatten(2)
    return h + o @ block.mixer.out.weight.T


def encoded(model: rm.Model, e: Tensor) -> list[Tensor]:
    """[text | memory tokens] in one pass: text is causal, memory token i sees the text before (i + 1) S / N and itself."""
    h = torch.cat([e, model.prompt.expand(len(e), -1, -1)], 1)
    mask = torch.zeros(S + N, S + N, dtype=torch.bool)
    mask[:S, :S] = torch.ones(S, S).tril().bool()
    for i in range(N):
        mask[S + i, : (i + 1) * S // N] = True
        mask[S + i, S + i] = True
    position = torch.tensor([*range(S), *((i + 1) * S // N for i in range(N))])
    kept = []
    for layer, block in enumerate(model.backbone.blocks):
        kept.append(h[:, S:])
        h = attention(block, h, model.lora.weights(model.backbone, layer)["mixer.to_qkv.weight"], position, mask)
        h = h + block.ffn(block.ffn_norm(h))
    return kept


def loop(model: rm.Model, ids: Tensor) -> Tensor:
    """Every segment over [LoRA's keys and values of all memories of the layer | its own], positions from 0."""
    decoder, bank, outputs = model.backbone, None, []
    for x in ids.split(S, 1):
        h = e = decoder.embedding(x)
        for layer, block in enumerate(decoder.blocks):
            memory = e[:, :0] if bank is None else bank[layer]
            m, n = memory.shape[1], h.shape[1]
            changed = model.lora.weights(decoder, layer)["mixer.to_qkv.weight"]
            position = torch.arange(m + n).expand(len(ids), -1)
            q, k, v = (part.unflatten(-1, (H, -1)) for part in (block.norm(h) @ block.mixer.to_qkv.weight.T).chunk(3, -1))
            _, k_m, v_m = (part.unflatten(-1, (H, -1)) for part in (block.norm(memory) @ changed.T).chunk(3, -1))
            q = rotate(q, position[:, m:], 10000.0, q.shape[-1])
            k, v = rotate(torch.cat([k_m, k], 1), position, 10000.0, q.shape[-1]), torch.cat([v_m, v], 1)
            score = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
            seen = torch.cat([torch.ones(n, m), torch.ones(n, n).tril()], 1).bool()
            o = torch.einsum("bhij,bjhd->bihd", score.masked_fill(~seen, -torch.inf).softmax(-1), v).flatten(2)
            h = h + o @ block.mixer.out.weight.T
            h = h + block.ffn(block.ffn_norm(h))
        outputs.append(decoder.unembedding(decoder.norm(h)))
        if x.shape[1] == S:
            new = encoded(model, e)
            bank = new if bank is None else [torch.cat(pair, 1) for pair in zip(bank, new)]
    return torch.cat(outputs, 1)


def test_parity_the_encoder_is_one_masked_pass() -> None:
    model, ids = build("uio-llms", "2 x attention", **HYPER), ids_of(S)
    e = model.embed(ids)
    for got, want in zip(model.compress(e), encoded(model, e), strict=True):
        assert_parity("uio-llms", "wenhaoli-xmu/UIO-LLMs' encoder masks in one pass", got, want, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parity_with_the_loop(dtype: torch.dtype) -> None:
    model, ids = build("uio-llms", "2 x attention", dtype, **HYPER), ids_of(3 * S + 4)
    out, want, wide = model(ids), loop(model, ids), dtype == torch.float64
    assert_parity("uio-llms", "the equation in a loop", out.logits, want, 1e-10 if wide else 1e-5)
    if wide:
        grads, named = [], dict(model.named_parameters())
        for logits in (out.logits, want):
            found = torch.autograd.grad(logits.square().sum(), list(named.values()), allow_unused=True)
            grads.append({name: g for name, g in zip(named, found) if g is not None})
        assert_gradients_close("uio-llms", *grads, tol=1e-9)


def test_compress_and_read_are_the_stream() -> None:
    model, ids = build("uio-llms", **HYPER), ids_of(3 * S)
    with torch.no_grad():
        memories, outputs = [], []
        for x in ids.split(S, 1):
            outputs.append(model.read(x, memories))
            memories.append(model.compress(model.embed(x)))
        out = model(ids)
        assert_close("outputs", out.logits, torch.cat(outputs, 1), 1e-12)
        for layer, bank in enumerate(out.state.memory.bank):
            assert_close("bank", bank, torch.cat([memory[layer] for memory in memories], 1), 1e-12)
    assert bank.shape[1] == 3 * N


def test_bad_arguments() -> None:
    backbone = rm.Decoder(rm.ModelConfig(vocab=13, dim=16))
    for hyper, message in (
        ({"segment": 8, "slots": 3}, "slots=3 does not divide segment=8"),
        ({"slots": 0}, "slots is 0"),
        ({"rank": 0}, "rank is 0"),
    ):
        with pytest.raises(rm.errors.UsageError, match=message):
            rm.memory("uio-llms", backbone=backbone, **hyper)
