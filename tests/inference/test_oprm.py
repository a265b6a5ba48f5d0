"""OPRM: one chunk is ordinary generation; the chunk chosen is the one of least entropy; the filter; padding of the last chunk."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from helpers import assert_close
from remanence.inference import greedy, oprm

torch.manual_seed(0)
LAYERS = "gated-deltanet, attention, mamba2"
MODEL = rm.model(rm.ModelConfig(vocab=40, dim=32, layers=LAYERS, ffn=1, embedding_std=1.0, tie=False)).eval()
with torch.no_grad():
    for block in MODEL.blocks:
        block.mixer.out.weight.mul_(4)  # so that what was read decides the answer, not the last token
PREFIX, CONTEXT, QUESTION = torch.randint(40, (5,)), torch.randint(40, (103,)), torch.randint(40, (4,))


def alone(*parts: torch.Tensor) -> tuple[torch.Tensor, rm.State]:
    """(logits of the next token [1, V], state) after the parts read as one text."""
    with torch.no_grad():
        out = MODEL(torch.cat(parts)[None], logits="last")
    return out.logits[:, 0], out.state


@pytest.mark.parametrize("prefix", [None, PREFIX])
def test_parity_one_chunk_is_ordinary_generation(prefix: torch.Tensor | None) -> None:
    found = oprm(MODEL, CONTEXT, QUESTION, prefix, chunk=103, max_new=12)
    logits, state = alone(*([] if prefix is None else [prefix]), CONTEXT, QUESTION)
    assert found.ids == greedy(MODEL, state, logits, 12)[0] and len(found.ids) == 12 and found.chunk == 0
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert_close("entropy", found.entropy, entropy, 1e-4)
    for (name, got), (_, want) in zip(found.state.named_tensors(), state.named_tensors(), strict=True):
        assert_close(name, got, want, 1e-5)


@pytest.mark.parametrize("at_once", [64, 2])
def test_the_most_certain_chunk_answers(at_once: int) -> None:
    chunks = CONTEXT.split(20)  # five of 20 tokens and one of 3, which is padded beside the others
    found = oprm(MODEL, CONTEXT, QUESTION, PREFIX, chunk=20, max_new=6, at_once=at_once)
    each = [alone(PREFIX, chunk, QUESTION) for chunk in chunks]
    entropy = torch.cat([torch.distributions.Categorical(logits=logits).entropy() for logits, _ in each])
    assert_close("entropy", found.entropy, entropy, 1e-4)
    assert found.chunk == int(entropy.argmin()) and found.kept.all()
    logits, state = each[found.chunk]
    assert found.ids == greedy(MODEL, state, logits, 6)[0]


def test_chunks_that_do_not_know_are_dropped_unless_all_are() -> None:
    plain = oprm(MODEL, CONTEXT, QUESTION, chunk=20, max_new=3)
    first = [int(alone(chunk, QUESTION)[0].argmax()) for chunk in CONTEXT.split(20)]
    says = first[plain.chunk]
    assert len(set(first)) > 1
    found = oprm(MODEL, CONTEXT, QUESTION, chunk=20, max_new=3, unknown=[says])
    assert found.kept.tolist() == [token != says for token in first] and found.chunk != plain.chunk
    assert found.chunk == int(found.entropy.masked_fill(~found.kept, torch.inf).argmin())
    everything = oprm(MODEL, CONTEXT, QUESTION, chunk=20, max_new=3, unknown=range(40))
    assert everything.kept.all() and everything.ids == plain.ids
    joined = oprm(MODEL, CONTEXT, QUESTION, chunk=20, max_new=3, unknown=[says], summarize=True)
    want = [greedy(MODEL, state, logits, 3)[0] for chunk in CONTEXT.split(20) for logits, state in [alone(chunk, QUESTION)]]
    assert joined.ids == [token for ids, token_1 in zip(want, first) if token_1 != says for token in ids] and joined.state is None


def test_generation_stops_at_eos_row_by_row() -> None:
    with torch.no_grad():
        out = MODEL(torch.randint(40, (3, 9)), logits="last")
    free = greedy(MODEL, out.state, out.logits[:, 0], 8)
    stop = free[1][2]
    assert greedy(MODEL, out.state, out.logits[:, 0], 8, [stop]) == [ids[: ids.index(stop)] if stop in ids else ids for ids in free]


def test_wrong_use() -> None:
    with pytest.raises(rm.errors.ShapeError, match="context has shape"):
        oprm(MODEL, CONTEXT[None], QUESTION)
    with pytest.raises(rm.errors.UsageError, match="empty"):
        oprm(MODEL, CONTEXT, QUESTION[:0])
    with pytest.raises(rm.errors.UsageError, match="chunk is 0"):
        oprm(MODEL, CONTEXT, QUESTION, chunk=0)
