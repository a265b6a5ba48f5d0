"""MemoryPrompt against torch's LSTM turn by turn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from segment_memories import build, ids_of, through

S, N = 5, 2
T = 3 * S + 2


def loop(model: rm.Model, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The published order of things: no prompt in turn 1, then the LSTM's output, as n vectors, before the embeddings."""
    decoder, outputs, prompt, state = model.backbone, [], None, None
    lstm = nn.LSTM(model.outer.out_features, N * 16).to(model.inner.weight)
    weights = {"weight_ih_l0": model.lstm_input.weight, "bias_ih_l0": model.lstm_input.bias}
    weights |= {"weight_hh_l0": model.lstm_hidden.weight, "bias_hh_l0": model.lstm_hidden.bias}
    for x in ids.split(S, 1):
        e = decoder.embedding(x)
        hidden = through(decoder, e if prompt is None else torch.cat([prompt, e], 1))[:, -x.shape[1] :]
        outputs.append(decoder.unembedding(hidden))
        if x.shape[1] == S:
            u = model.outer(torch.relu(model.inner(hidden[:, -1])))
            out, state = torch.func.functional_call(lstm, weights, (u[None], state))
            prompt = out[0].unflatten(1, (N, 16))
    return torch.cat(outputs, 1), state[0][0], state[1][0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parity_with_torch_lstm(dtype: torch.dtype) -> None:
    model, ids, wide = build("memoryprompt", dtype=dtype, segment=S, slots=N, hidden=24, train_base=True), ids_of(T), dtype == torch.float64
    out, (want, hidden, cell) = model(ids), loop(model, ids)
    assert_parity("memoryprompt", "ncarraz/MemoryPrompt with torch's LSTM", out.logits, want, 1e-10 if wide else 1e-5)
    assert_close("hidden", out.state.memory.hidden, hidden, 1e-10 if wide else 1e-5)
    assert_close("cell", out.state.memory.cell, cell, 1e-10 if wide else 1e-5)
    if wide:
        grads = []
        for logits in (out.logits, want):
            found = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
            grads.append(dict(zip(dict(model.named_parameters()), found)))
        assert_gradients_close("memoryprompt", *grads, tol=1e-9)


def test_without_prompt_tokens_it_is_the_backbone() -> None:
    model, ids = build("memoryprompt", segment=S, slots=0, hidden=8), ids_of(T)
    with torch.no_grad():
        want = torch.cat([model.backbone(x).logits for x in ids.split(S, 1)], 1)
        assert_close("n = 0", model(ids).logits, want, 1e-12)
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_a_row_in_its_first_turn_beside_one_in_its_second() -> None:
    """In step, but of different age: only one of them has a prompt."""
    model, ids = build("memoryprompt", segment=S, slots=N, hidden=24), ids_of(2 * S)
    reset = torch.zeros(2, 2 * S, dtype=torch.bool)
    reset[0, S] = True
    with torch.no_grad():
        got = model(ids, span=rm.Span(reset=reset))
        later = model(ids, got.state).logits
        assert_close("fresh row", got.logits[:1, S:], model(ids[:1, S:]).logits, 1e-12)
        assert_close("old row", got.logits[1:], model(ids[1:]).logits, 1e-12)
        assert_close("later", later[:1], model(ids[:1], model(ids[:1, S:]).state).logits, 1e-12)
        half = model(ids[:, :S]).state.rows([0, 1])
        mixed = half.replace(memory=half.memory.replace(turns=torch.tensor([0, 1])))
        assert_close("in step", model(ids[:, S:], mixed).logits[:1], model(ids[:1, S:]).logits, 1e-12)


def test_first_weights_and_bad_arguments() -> None:
    backbone = rm.Decoder(rm.ModelConfig(vocab=13, dim=16))
    model = rm.memory("memoryprompt", backbone=backbone, hidden=32)
    assert model.inner.weight.abs().max() < 1e-4 and not model.outer.bias.any()
    for hyper, message in (({"slots": -1}, "slots is -1"), ({"hidden": 0}, "hidden is 0"), ({"segment": 0}, "segment is 0")):
        with pytest.raises(rm.errors.UsageError, match=message):
            rm.memory("memoryprompt", backbone=backbone, **hyper)
