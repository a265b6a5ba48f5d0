"""RATE's memory against the published recurrence in a loop, and what it is without each of its parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence import Decoder, ModelConfig
from remanence.errors import RemanenceError
from remanence.memory.rate import RATE

VOCAB, S, M = 13, 6, 2


def build(tokens: int = M, memory: int = 9, valve: int = 2, layers: str = "gated-deltanet, attention", activation: str = "relu") -> RATE:
    backbone = Decoder(ModelConfig(vocab=VOCAB, dim=16, layers=layers, ffn=1))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = rm.memory("rate", backbone=backbone, segment=S, memory=memory, tokens=tokens, valve=valve, activation=activation)
    return model.double()  # type: ignore[return-value]


def retain(model: RATE, old: Tensor, written: Tensor) -> Tensor:
    """The valve, one head at a time."""
    valve = model.valve
    if valve is None:
        return written
    new, heads = written.clamp(min=0), []
    parts = valve.to_q(old), *valve.to_kv(new).chunk(2, -1)
    for q, k, v in zip(*(part.chunk(valve.heads, -1) for part in parts)):
        heads.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
    return valve.out(torch.cat(heads, -1))


def loop(model: RATE, ids: Tensor) -> tuple[Tensor, Tensor]:
    decoder, vectors, outputs = model.backbone, model.prompt.repeat(len(ids), 1, 1), []
    m = vectors.shape[1]
    cache = [vectors[:, :0] for _ in decoder.blocks]
    for part in ids.split(S, 1):
        n = part.shape[1]
        h = torch.cat([vectors, decoder.embedding(part), vectors] if n == S else [vectors, decoder.embedding(part)], 1)
        for l, block in enumerate(decoder.blocks):
            before = cache[l]
            cache[l] = torch.cat([before, h[:, m : m + n]], 1)[:, -model.memory :].detach() if model.memory else before
            y = block.mixer(block.norm(torch.cat([before, h], 1)))[0]
            h = h + y[:, before.shape[1] :]
            h = h + block.ffn(block.ffn_norm(h))
        h = decoder.norm(h)
        outputs.append(decoder.unembedding(h[:, m : m + n]))
        vectors = retain(model, vectors, h[:, m + n :]) if n == S else vectors
    return torch.cat(outputs, 1), vectors


@pytest.mark.parametrize(("memory", "valve"), [(9, 2), (0, 1), (4, 0)])
def test_parity_with_the_published_recurrence(memory: int, valve: int) -> None:
    model, ids = build(memory=memory, valve=valve), torch.randint(VOCAB, (2, 4 * S + 3))
    out, (want, vectors) = model(ids), loop(model, ids)
    source = f"CognitiveAISystems/RATE, causal masks, cache of {memory}, valve of {valve} heads (re-derived)"
    assert_parity("rate", source, out.logits, want, 1e-10)
    assert_close("memory", out.state.memory.vectors, vectors, 1e-10)
    grads = []
    for logits in (out.logits, want):
        found = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        grads.append(dict(zip(dict(model.named_parameters()), found)))
    assert_gradients_close("rate", *grads, tol=1e-9)


def test_without_valve_and_cache_it_is_rmt() -> None:
    model, ids = build(memory=0, valve=0), torch.randint(VOCAB, (2, 4 * S + 3))
    rmt = rm.memory("rmt", backbone=model.backbone, segment=S, tokens=M).double()
    rmt.prompt = model.prompt
    with torch.no_grad():
        assert_close("rmt", model(ids).logits, rmt(ids).logits, 1e-12)


def test_without_memory_each_window_stands_alone() -> None:
    model, ids = build(tokens=0, memory=0), torch.randint(VOCAB, (2, 3 * S + 2))
    with torch.no_grad():
        want = torch.cat([model.backbone(part).logits for part in ids.split(S, 1)], 1)
        assert_close("windows", model(ids).logits, want, 1e-12)


def test_it_reads_embeddings_of_a_trajectory() -> None:
    """Three tokens a step, whatever made them; a segment of two steps."""
    model, steps = build(), torch.randn(2, 5, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        hidden, _ = model.encode(steps.flatten(1, 2))
        first, state = model.encode(steps[:, :2].flatten(1, 2))
        rest, _ = model.encode(steps[:, 2:].flatten(1, 2), state)
    assert_close("in two calls", torch.cat([first, rest], 1), hidden, 1e-12)


def test_the_memory_starts_as_one_vector() -> None:
    model = build()
    assert torch.equal(model.prompt, model.prompt[:1].expand(M, -1))


@pytest.mark.parametrize("activation", ["leaky_relu", "elu", "tanh", "none"])
def test_activations(activation: str) -> None:
    model = build(activation=activation)
    assert bool(model(torch.randint(VOCAB, (1, 2 * S))).logits.isfinite().all())
    assert type(model).build(model.config).config == model.config


def test_the_state_stays_as_large_as_it_is() -> None:
    backbone = Decoder(ModelConfig(vocab=VOCAB, dim=8, layers=[{"mixer": "attention", "heads": 2}], ffn=1))
    model, state, sizes = rm.memory("rate", backbone=backbone, segment=256, memory=64, tokens=4).eval(), None, set()
    with torch.no_grad():
        for _ in range(5):
            state = model(torch.randint(VOCAB, (1, 16 * 256)), state).state
            sizes.add(state.nbytes)
    assert state.tokens == 20480 and len(sizes) == 1 and all(bool(tensor.isfinite().all()) for tensor in state.tensors())


def test_bad_sizes() -> None:
    for hyper, message in (
        ({"activation": "gelu"}, "activation 'gelu'"),
        ({"valve": -1}, "valve is -1"),
        ({"valve": 3}, "valve=3 does not divide dim=16"),
        ({"tokens": 7}, "tokens is 7 and segment 6"),
    ):
        with pytest.raises(RemanenceError, match=message):
            build(**hyper)
