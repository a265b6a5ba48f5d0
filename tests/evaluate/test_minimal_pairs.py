"""Minimal pairs: the sum of log p against a loop, the generated sentences, and BLiMP's files."""

from __future__ import annotations

import pytest
import torch

from remanence import Decoder, ModelConfig
from remanence.errors import UsageError
from remanence.evaluate.minimal_pairs import LINKS, NOUNS, Pair, agreement, log_probs, minimal_pairs, read_blimp
from remanence.tokenizers import ByteTokenizer
from remanence.train import Piece, TrainConfig, train


class Words:
    """One id a word."""

    def __init__(self, pairs: list[Pair]):
        self.words = sorted({word for pair in pairs for text in (pair.good, pair.bad) for word in text.split()})
        self.vocab_size = len(self.words) + 1

    def encode(self, text: str) -> list[int]:
        return [self.words.index(word) + 1 for word in text.split()]

    def decode(self, ids) -> str:
        return " ".join(self.words[i - 1] for i in ids)


def decoder(vocab: int, layers: str = "gated-deltanet") -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(vocab=vocab, dim=32, layers=layers, ffn=1)).eval()


def test_log_probs_are_those_of_a_loop() -> None:
    model, rows = decoder(20), [[3, 4, 5, 6, 7], [9, 8], [1, 1, 2]]
    for start in (None, 0):
        want = []
        for row in rows:
            ids = torch.tensor(row if start is None else [start, *row])
            log_p = model(ids[None]).logits[0].log_softmax(-1)
            want.append(sum(log_p[t - 1, ids[t]] for t in range(1, len(ids))))
        torch.testing.assert_close(log_probs(model, rows, start), torch.stack(want).detach(), rtol=1e-5, atol=1e-5)
    assert log_probs(model, [[3]], start=0).shape == (1,)
    with pytest.raises(UsageError, match="no token to score"):
        log_probs(model, [[3, 4], [3]])


def test_the_score_counts_strict_wins_by_paradigm() -> None:
    pairs = [Pair("ab", "ac", "one"), Pair("ac", "ab", "one"), Pair("ab", "ab", "two")]
    model, tokenizer = decoder(259), ByteTokenizer()
    got = minimal_pairs(model, tokenizer, pairs, start=tokenizer.bos, rows=3)
    assert got == {"one": 0.5, "two": 0.0, "all": pytest.approx(1 / 3)}
    assert got == minimal_pairs(model, tokenizer, pairs, start=tokenizer.bos)
    with pytest.raises(UsageError, match="no pairs"):
        minimal_pairs(model, tokenizer, [])


def test_agreement_sentences() -> None:
    pairs = agreement(seed=1, n=60, attractors=2)
    assert pairs == agreement(1, 60, 2) and pairs[:10] == agreement(1, 10, 2) and pairs != agreement(2, 60, 2)
    for pair in pairs:
        good, bad = pair.good.split(), pair.bad.split()
        assert good[:-1] == bad[:-1] and {good[-1], bad[-1] } == {max(good[-1], bad[-1]), max(good[-1], bad[-1])[:-1]}
        nouns = [word for word in good if word.removesuffix("s") in NOUNS]
        plural = [noun.endswith("s") for noun in nouns]
        assert len(nouns) == 3 and plural[1:] == [not plural[0]] * 2 and sum(word in LINKS for word in good) == 2
        assert good[-1].endswith("s") != plural[0]
    assert sum(pair.good.endswith("s") for pair in pairs) == 30
    assert len(agreement(n=4, attractors=0)[0].good.split()) == 3
    with pytest.raises(UsageError, match="attractors is -1"):
        agreement(attractors=-1)


def test_a_model_that_learns_the_rule_scores_well(tmp_path) -> None:
    """Trained on good sentences without attractors it knows agreement; before that it guesses."""
    torch.set_num_threads(1)
    lessons, exam = agreement(0, 400, 0), agreement(7, 60, 0)
    words = Words(lessons + agreement(0, 200, 1))
    model = decoder(words.vocab_size)
    before = minimal_pairs(model, words, exam)["all"]
    rows = torch.tensor([words.encode(pair.good) for pair in lessons])

    class Data:
        def batch(self, seed: int, index: int) -> Piece:
            part = rows[torch.arange(index * 32, index * 32 + 32) % 400]
            return Piece(part[:, :-1], part[:, 1:])

    train(model, Data(), TrainConfig(steps=60, lr=1e-2, checkpoint_every=0, device="cpu"), tmp_path, quiet=True)
    assert before < 0.8 < 0.95 <= minimal_pairs(model.eval(), words, exam)["all"]


def test_blimps_files(tmp_path) -> None:
    line = '{"sentence_good": "Who eats?", "sentence_bad": "Who eat?", "field": "syntax", "UID": "wh_agreement", "pairID": "0"}\n'
    (tmp_path / "b.jsonl").write_text(line + "\n")
    (tmp_path / "a.jsonl").write_text('{"sentence_good": "x", "sentence_bad": "y"}\n')
    assert read_blimp(tmp_path) == [Pair("x", "y", "a"), Pair("Who eats?", "Who eat?", "wh_agreement")]
    assert read_blimp(tmp_path / "b.jsonl") == [Pair("Who eats?", "Who eat?", "wh_agreement")]
    (tmp_path / "c.jsonl").write_text(line + '{"sentence_good": 1}\n')
    with pytest.raises(UsageError, match=r"c.jsonl, line 2 is not a pair of BLiMP \(KeyError"):
        read_blimp(tmp_path / "c.jsonl")
    (tmp_path / "c.jsonl").write_text("[1]\n")
    with pytest.raises(UsageError, match="line 1 is not a pair"):
        read_blimp(tmp_path / "c.jsonl")
    for missing in (tmp_path / "none.jsonl", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match="expected BLiMP's data"):
            read_blimp(missing)
