"""GEMFormer: what the rules select, entropies segment by segment, and the second pass."""

from __future__ import annotations

import math

import pytest
import torch

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.memory.gemformer import GEMFormer, entropy, or_softmax_loss, select
from remanence.models.encoder import Encoder

VOCAB, S = 13, 5


def build(**hyper: object) -> GEMFormer:
    torch.manual_seed(0)
    backbone = rm.Decoder(rm.ModelConfig(vocab=VOCAB, dim=16, layers="2 x attention", embedding_std=1.0)).double()
    return rm.find("gemformer").builder(backbone, segment=S, **hyper)


QUESTION, DOCUMENT = torch.tensor([1, 2, 3]), torch.arange(17) % VOCAB


def test_entropy() -> None:
    logits = torch.randn(4, 7, dtype=torch.float64)
    assert_close("entropy", entropy(logits), torch.distributions.Categorical(logits=logits).entropy(), 1e-12)
    assert abs(float(entropy(torch.zeros(10))) - math.log(10)) < 1e-6
    assert float(entropy(torch.tensor([0.0, -torch.inf]))) == 0.0


def test_rules() -> None:
    h = torch.tensor([0.9, 0.1, torch.inf, 0.5, 0.2, torch.nan, 0.7])
    assert select(h, "low", threshold=0.6).tolist() == [1, 3, 4]
    assert select(h, "low", threshold=0.6, budget=2).tolist() == [1, 4]
    assert select(h, "lowest", budget=4).tolist() == [1, 3, 4, 6]
    assert select(h, "high", threshold=0.6).tolist() == [0, 6]
    assert select(h, "highest", budget=1).tolist() == [0]
    assert select(h, "low", threshold=0.0).tolist() == [] and select(h, "lowest", budget=99).tolist() == [0, 1, 3, 4, 6]


def test_uncertainty_is_that_of_each_segment_after_the_question() -> None:
    model = build()
    got = model.uncertainty(QUESTION, DOCUMENT)
    for start in range(0, 17, S):
        part = DOCUMENT[start : start + S]
        with torch.no_grad():
            logits = model.backbone(torch.cat([QUESTION, part])[None]).logits[0]
        for j in range(len(part)):  # what stands before a token predicts it
            p = logits[len(QUESTION) + j - 1].softmax(0)
            assert_close("H", got[start + j], -(p * p.log()).sum(), 1e-10)
    alone = model.uncertainty(QUESTION[:0], DOCUMENT)
    assert alone[::S].isinf().all() and alone.isfinite().sum() == 17 - 4


def test_the_memory_is_tokens_in_document_order() -> None:
    model = build(rule="lowest", budget=4)
    h, memory = model.uncertainty(QUESTION, DOCUMENT), model.collect(QUESTION, DOCUMENT)
    want = sorted(sorted(range(17), key=lambda j: float(h[j]))[:4])
    assert memory.tolist() == DOCUMENT[want].tolist()
    with torch.no_grad():
        got = model(QUESTION, DOCUMENT)
        for start in range(0, 17, S):
            whole = torch.cat([QUESTION, memory, DOCUMENT[start : start + S]])
            assert_close("second pass", got[start : start + S], model.backbone(whole[None]).logits[0, 7:], 1e-12)


def test_parity_an_empty_memory_is_the_baseline() -> None:
    model = build(rule="low", threshold=0.0)
    assert len(model.collect(QUESTION, DOCUMENT)) == 0
    with torch.no_grad():
        parts = [model.backbone(torch.cat([QUESTION, part])[None]).logits[0, 3:] for part in DOCUMENT.split(S)]
        assert_parity("gemformer", "the backbone on [question | segment]", model(QUESTION, DOCUMENT), torch.cat(parts), 1e-12)


def test_a_masked_encoder_predicts_the_token_where_it_stands() -> None:
    encoder = Encoder(VOCAB, dim=16, depth=1, heads=2, recurrence=None).double().eval()
    model = GEMFormer(encoder, segment=S)
    with torch.no_grad():
        logits = encoder(torch.cat([QUESTION, DOCUMENT[:S]])[None])[0, 3:]
    assert_close("H", model.uncertainty(QUESTION, DOCUMENT)[:S], entropy(logits), 1e-12)


def test_or_softmax_is_over_all_segments() -> None:
    scores, gold = [torch.randn(4), torch.randn(3)], [torch.tensor([False, True, False, False]), torch.tensor([True, False, False])]
    p = torch.cat(scores).softmax(0)
    assert_close("loss", or_softmax_loss(scores, gold), -(p[1] + p[4]).log(), 1e-6)


def test_bad_arguments() -> None:
    for make, message in (
        (lambda: build(rule="lower"), "rule 'lower' is not known; did you mean low"),
        (lambda: build(budget=0), "budget is 0"),
        (lambda: GEMFormer(None), "backbone is a NoneType"),  # type: ignore[arg-type]
        (lambda: select(torch.zeros(2, 2)), "expected .N., one number a token"),
        (lambda: or_softmax_loss([torch.zeros(2)], [torch.zeros(2, dtype=torch.bool)]), "at least one of them must be gold"),
        (lambda: build()(QUESTION, DOCUMENT[:0]), "question and document have shapes"),
    ):
        with pytest.raises(rm.errors.UsageError, match=message):
            make()
