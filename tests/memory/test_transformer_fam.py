"""Feedback attention memory against the blocks in a loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence import Decoder, ModelConfig
from remanence.errors import UsageError
from remanence.memory.transformer_fam import TransformerFAM

VOCAB, S, M = 13, 6, 2


def build(tokens: int = M, memory: int = 9, layers: str = "gated-deltanet, attention") -> TransformerFAM:
    backbone = Decoder(ModelConfig(vocab=VOCAB, dim=16, layers=layers, ffn=1))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return rm.memory("transformer-fam", backbone=backbone, segment=S, memory=memory, tokens=tokens).double()  # type: ignore[return-value]


def loop(model: TransformerFAM, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Block by block, each layer by itself: its mixer reads [cache, F, block, F] from nothing."""
    decoder, F, outputs = model.backbone, [], []
    x = model.prompt.repeat(len(ids), 1, 1)
    for block in decoder.blocks:
        F.append(x)
        x = block(x, None, None)[0]
    cache = [x[:, :0] for _ in F]
    for part in ids.split(S, 1):
        h, whole = decoder.embedding(part), part.shape[1] == S
        for l, block in enumerate(decoder.blocks):
            old, before = F[l], cache[l]
            cache[l] = torch.cat([before, h], 1)[:, -model.memory :].detach()
            read = torch.cat([before, old, h, old] if whole else [before, old, h], 1)
            y = read + block.mixer(block.norm(read))[0]
            y = y + block.ffn(block.ffn_norm(y))
            start = before.shape[1] + old.shape[1]
            h = y[:, start : start + part.shape[1]]
            F[l] = y[:, start + part.shape[1] :] if whole else old
        outputs.append(decoder.unembedding(decoder.norm(h)))
    return torch.cat(outputs, 1), F


@pytest.mark.parametrize("layers", ["gated-deltanet, attention", "2 x relative-attention"])
def test_parity_with_the_blocks_in_a_loop(layers: str) -> None:
    model, ids = build(layers=layers), torch.randint(VOCAB, (2, 4 * S + 3))
    out, (want, F) = model(ids), loop(model, ids)
    assert_parity("transformer-fam", f"our reading in a loop over blocks and layers ({layers})", out.logits, want, 1e-10)
    for got, held in zip(out.state.memory.feedback, F):
        assert_close("F", got, held, 1e-10)
    grads = []
    for logits in (out.logits, want):
        found = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        grads.append(dict(zip(dict(model.named_parameters()), found)))
    assert_gradients_close("transformer-fam", *grads, tol=1e-9)


def test_without_feedback_it_is_transformer_xl() -> None:
    model, ids = build(tokens=0, layers="2 x attention"), torch.randint(VOCAB, (2, 4 * S + 3))
    other = rm.memory("transformer-xl", backbone=model.backbone, segment=S, memory=9)
    with torch.no_grad():
        assert_close("m = 0", model(ids).logits, other(ids).logits, 1e-12)


def test_feedback_reaches_beyond_every_window() -> None:
    """Two layers, no cache: a token reads nothing of other blocks but F, and F goes on from block to block."""
    model, ids = build(memory=0, layers="2 x attention"), torch.randint(VOCAB, (1, 6 * S))
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % VOCAB
    with torch.no_grad():
        change = (model(ids).logits - model(other).logits).abs().amax((0, 2))
        alone = build(tokens=0, memory=0, layers="2 x attention")
        cut = (alone(ids).logits - alone(other).logits).abs().amax((0, 2))
    assert bool((change[-S:] > 1e-9).any()) and not cut[S:].any()


def test_the_state_stays_as_large_as_it_is() -> None:
    backbone = Decoder(ModelConfig(vocab=VOCAB, dim=8, layers=[{"mixer": "attention", "heads": 2}], ffn=1))
    model, state, sizes = rm.memory("transformer-fam", backbone=backbone, segment=256, memory=64, tokens=4).eval(), None, set()
    with torch.no_grad():
        for _ in range(5):
            out = model(torch.randint(VOCAB, (1, 16 * 256)), state)
            state = out.state
            sizes.add(state.nbytes)
    assert state.tokens == 20480 and len(sizes) == 1 and bool(out.logits.isfinite().all())


def test_bad_sizes() -> None:
    with pytest.raises(UsageError, match="tokens is 7 and segment 6"):
        build(tokens=7)
    with pytest.raises(UsageError, match="memory is -1"):
        build(memory=-1)


def test_it_can_be_saved_as_data() -> None:
    model = build()
    again = type(model).build(model.config)
    assert again.config == model.config and again.header == model.header and again.prompt.shape == (M, 16)
