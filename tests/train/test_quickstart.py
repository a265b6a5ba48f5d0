"""The recipe of the shipped model: its streams, its questions, a few steps of it, and the checkpoint itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import remanence as rm
from remanence.corpus import default_haystack
from remanence.recipes import quickstart
from remanence.recipes.quickstart import Facts, answer_loss, plain, reader, recipe
from remanence.tasks.babi import ACTORS, ROOMS
from remanence.tokenizers import BPETokenizer

TEXT = "It was a long day for the old sailor, who had seen many of them. " * 40
TEXT += "\n\n“Where to?” he said. “Home, and by the next tide!”\n\n" * 30


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train([TEXT], 700, [*ACTORS, *ROOMS, "went", "moved", "journeyed", "travelled", "back"])


@pytest.fixture(scope="module")
def facts(tokenizer) -> Facts:
    return Facts({"sea": TEXT}, tokenizer, tokens=512, stages=(64, 128))


@pytest.fixture(scope="module")
def hard(tokenizer) -> Facts:
    return Facts({"sea": TEXT}, tokenizer, hard=True, tokens=512, stages=(64, 128))


FACT = re.compile(rf"({'|'.join(ACTORS)}) (?:moved to|went to|went back to|journeyed to|travelled to) the ({'|'.join(ROOMS)})\.")


def told(text: str) -> dict[str, str]:
    """Where everyone is, by the last sentence about them."""
    return dict(FACT.findall(text))


def test_streams_have_their_length_and_the_places_are_what_the_text_says(facts, hard, tokenizer):
    rng = np.random.default_rng(0)
    for i in range(200):
        length = (64, 128, 300)[i % 3]
        ids, places = (hard if i % 2 else facts).stream(rng, length)
        assert len(ids) == length and places
        assert told(tokenizer.decode(ids)) == places


def test_hard_streams_have_decoys_and_more_facts(facts, hard, tokenizer):
    rng = np.random.default_rng(1)
    plain_ones, hard_ones = ([tokenizer.decode(source.stream(rng, 1000)[0]) for _ in range(40)] for source in (facts, hard))
    others = re.compile(rf"(?:{'|'.join(quickstart.OTHERS)}) (?:moved|went|journeyed|travelled) (?:back )?to the (?:{'|'.join(ROOMS)})\.")
    assert any(others.search(text) for text in hard_ones) and not any(others.search(text) for text in plain_ones)
    line = re.compile(rf"\n(?:{'|'.join(ACTORS)}) ")
    assert any(line.search(text) for text in hard_ones) and any(line.search(text) for text in plain_ones)
    most = [max(len(FACT.findall(text)) for text in texts) for texts in (plain_ones, hard_ones)]
    assert most[0] <= 10 < most[1] <= 1000 // 48


def test_batches_are_a_function_of_seed_and_index(facts):
    one, two, other = facts.batch(0, 5), facts.batch(0, 5), facts.batch(0, 6)
    assert torch.equal(one.ids, two.ids) and torch.equal(one.answers, two.answers)
    assert not torch.equal(one.ids, other.ids)
    assert one.ids.shape == (8, 64) and one.count == len(one.rows) == len(one.questions)


def test_answers_are_asked_after_the_question_mark_and_end_with_eos(facts, tokenizer):
    batch = facts.batch(0, 0)
    for question, answer in zip(batch.questions, batch.answers):
        wanted = answer[answer != -100].tolist()
        assert tokenizer.decode(wanted).strip() in ROOMS and wanted[-1] == tokenizer.eos
        first = int((answer != -100).nonzero()[0])
        assert re.fullmatch(r" Where is \w+\?", tokenizer.decode(question[: first + 1].tolist()))


def test_plain_text_is_whole_and_its_bounds_end_sentences(tokenizer):
    noise = plain(TEXT, tokenizer)
    assert tokenizer.decode(noise.tokens.tolist()) == TEXT
    for bound in noise.bounds[1:-1][:50]:
        assert tokenizer.decode(noise.tokens[:bound].tolist()).endswith((".", "!", "?", ".”", "!”", "?”"))


def test_loss_is_of_the_answers_and_reaches_the_memory(facts, tokenizer):
    torch.manual_seed(0)
    model = reader(tokenizer.vocab_size, dim=32)
    batch = facts.batch(0, 1)
    loss, state, metrics = answer_loss(model, batch, None)
    loss.backward()
    assert loss.item() / batch.count == pytest.approx(np.log(tokenizer.vocab_size), rel=0.1)
    assert state.batch == len(batch.ids) and 0 <= float(metrics["open"]) <= 1
    assert float(model.blocks[1].mixer.to_beta.weight.grad.abs().sum()) > 0


def test_a_few_steps_leave_a_model_a_tokenizer_and_results(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "STAGES", (64,))
    monkeypatch.setattr(quickstart, "accuracy", lambda *args, **kwargs: 0.5)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "sea.txt").write_text(TEXT, encoding="utf-8")
    run = recipe(out=tmp_path / "out", steps=2, data=str(folder))
    run.start(tmp_path / "out", quiet=True)
    model, tokenizer = rm.load(tmp_path / "out" / "model"), quickstart.BPETokenizer
    assert model.vocab <= quickstart.VOCAB and tokenizer is BPETokenizer
    assert [row["length"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]] == [1000, 4000, 16000]


def test_the_shipped_model_answers_and_fits_in_8_MB():
    model, tokenizer = rm.reader()
    folder = Path(rm.__file__).parent / "checkpoints" / "reader"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000
    assert json.loads((folder / "config.json").read_text())["provenance"]["recipe"] == "quickstart"
    session = rm.Session(model, tokenizer)
    session.read("Mary went to the garden. John moved to the office.\n" + default_haystack()[:60_000] + "\nMary moved to the kitchen.")
    assert session.ask("Where is Mary?").text == "kitchen" and session.ask("Where is John?").text == "office"


def test_the_shipped_model_keeps_facts_for_tens_of_thousands_of_tokens():
    """QA1 at 16k tokens of a book that it never saw; the recorded run goes to a million (results/)."""
    model, tokenizer = rm.reader()
    assert quickstart.accuracy(model, tokenizer, 16_000, 16, seed=3) >= 0.9
