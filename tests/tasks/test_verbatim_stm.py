"""Verbatim short-term memory: the lists and texts, the oracle, and the measure on models whose surprisals are known."""

from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import remanence as rm
from remanence.errors import UsageError
from remanence.tasks.base import stream
from remanence.tasks.verbatim_stm import CONDITIONS, NOUNS, batch, filler, noun_lists, ratio, repeat_surprisal, second_list, summary
from remanence.tokenizers import BPETokenizer

TASK = rm.task("verbatim-stm")
EVERY = [noun for group in NOUNS.values() for noun in group]


class Copier:
    """An induction head: what followed the last `order` ids before has p = 0.9 (split if there are more), the rest is uniform."""

    device = torch.device("cpu")

    def __init__(self, vocab: int, order: int):
        self.vocab, self.order = vocab, order

    def __call__(self, ids, state=None, span=None):
        logits = torch.zeros(*ids.shape, self.vocab)
        for row, line in zip(logits, ids.tolist()):
            for t in range(self.order - 1, len(line)):
                last = line[t - self.order + 1 : t + 1]
                after = {line[s] for s in range(self.order, t + 1) if line[s - self.order : s] == last}
                p = torch.full((self.vocab,), (0.1 if after else 1.0) / self.vocab)
                for one in after:
                    p[one] += 0.9 / len(after)
                row[t] = p.log()
        return SimpleNamespace(logits=logits)


def test_the_texts_of_a_seed_never_change():
    ids = [e.ids for e in TASK.sample(seed=3, n=4, words=7, sentences=3, between="shuffled")]
    lists = str([noun_lists(1, 3, 5, kind) for kind in ("random", "coherent")]).encode()
    assert sha256(np.concatenate(ids).astype("<i8").tobytes() + lists).hexdigest()[:16] == "2035b1414002c582"


def test_lists():
    assert len(set(EVERY)) == len(EVERY) == 100
    for words in noun_lists(2, 20, 10, "coherent"):
        assert any(set(words) == set(group) for group in NOUNS.values())
    for i, words in enumerate(noun_lists(2, 20, 5)):
        rng = stream("test", i)
        assert len(set(words)) == 5 and second_list(words, "repeat", rng) == words
        other = second_list(words, "permute", rng)
        assert other != words and sorted(other) == sorted(words)
        assert set(second_list(words, "novel", rng)).isdisjoint(words)
    assert noun_lists(2, 20, 5)[:3] == noun_lists(2, 3, 5)
    (words,) = noun_lists(4, 1, 5, "coherent")
    other = second_list(words, "novel", stream("test"))
    assert any(set(other) <= set(group) for group in NOUNS.values()) and set(other).isdisjoint(words)


def test_fillers():
    intact, shuffled = (filler(3, kind, stream("test")) for kind in ("intact", "shuffled"))
    assert intact.count(".") == 3 and intact != shuffled and sorted(intact.replace(".", "").split()) == sorted(shuffled.strip(".").split())
    assert len(filler(30, "incongruent", stream("test"))) > len(filler(12, "incongruent", stream("test")))


@pytest.mark.parametrize("options", [{}, {"words": 10, "lists": "coherent", "sentences": 14, "between": "incongruent"}])
def test_the_oracle_is_right_and_a_guess_is_not(options):
    for e in TASK.sample(seed=5, n=6, **options):
        assert TASK.oracle(e) == e.answer and TASK.score(e, " " + e.answer.upper() + ". Then") and TASK.prompt(e).endswith("again:")
        words = e.answer.split(", ")
        assert not TASK.score(e, ", ".join(words[::-1])) and not TASK.score(e, ", ".join(words[:-1]))
        assert e.facts[0].position + len(e.answer) + 2 < e.length  # bytes
    rng = np.random.default_rng(0)
    hits = sum(TASK.score(e, ", ".join(rng.choice(EVERY, 3))) for e in TASK.sample(n=100, words=3))
    assert hits == 0 == TASK.chance


def test_the_measure_on_models_that_are_known():
    """A uniform model finds both lists alike; an induction head on words knows a repeated list, and not a permuted or a new one."""
    lists = noun_lists(6, 4, 5)
    tokenizer = BPETokenizer.train([filler(12, "intact", stream("test")) + " ".join(EVERY)] * 3, 900, EVERY)
    text = filler(1, "intact", stream("test"))

    class Uniform(Copier):
        def __call__(self, ids, state=None, span=None):
            return SimpleNamespace(logits=torch.zeros(*ids.shape, self.vocab))

    even = repeat_surprisal(Uniform(tokenizer.vocab_size, 1), lists, text, tokenizer)
    assert np.allclose(even.percent, 100) and even.first.shape == (4, 5) and np.allclose(even.first, np.log(tokenizer.vocab_size))
    assert even.median == even.low == even.high == pytest.approx(100)
    copier = Copier(tokenizer.vocab_size, 2)  # after "noun ," comes the next noun
    found = {c: repeat_surprisal(copier, lists, text, tokenizer, c, rows=3) for c in CONDITIONS}
    assert found["repeat"].median < 5 and found["permute"].median > 60 and found["novel"].median > 95
    assert np.allclose(found["repeat"].second[:, 1:], -np.log(0.9 + 0.1 / tokenizer.vocab_size), atol=1e-4)
    assert found["repeat"].by_position.shape == (5,) and found["repeat"].low <= found["repeat"].median <= found["repeat"].high


def test_bytes_and_a_model_of_the_library():
    torch.manual_seed(0)
    model = rm.model(rm.ModelConfig(vocab=259, dim=16)).eval()
    lists = noun_lists(7, 3, 3)
    found = repeat_surprisal(model, lists, ["One. ", "Two and more.", "Three."], rows=2)
    one = repeat_surprisal(model, lists[1:2], ["Two and more."])
    assert np.allclose(found.first[1], one.first[0], atol=1e-4) and found.percent.shape == (3,) and (found.first > 0).all()


def test_symbols():
    rng = np.random.default_rng(8)
    for condition in CONDITIONS:
        ids, targets, places = batch(rng, 20, 40, 4, 64, condition)
        said = np.concatenate([ids, targets[:, -1:]], 1)
        assert (ids[:, 1:] == targets[:, :-1]).all() and ids.min() >= 0 and ids.max() < 64
        one, two = np.split(np.take_along_axis(said, places, 1), 2, 1)
        assert (np.take_along_axis(said, places[:, :1] - 1, 1) == 0).all() and (said[:, -5] == 1).all()
        same, alike = (one == two).all(1), (np.sort(one, 1) == np.sort(two, 1)).all(1)
        assert same.all() == (condition == "repeat") and same.any() == (condition == "repeat")
        assert alike.all() == (condition != "novel") and alike.any() == (condition != "novel")
        if condition == "permute":  # a rotation would keep two of three words behind the word they stood behind
            kept = ((one[:, None, :-1] == two[:, :-1, None]) & (one[:, None, 1:] == two[:, 1:, None])).any(2)
            assert kept.mean() < 0.4
    ids, targets, places = batch(np.random.default_rng(9), 4, 40, 4, 64)
    assert sha256(np.concatenate([ids, targets, places], 1).astype("<i8").tobytes()).hexdigest()[:16] == "28a13ce263fd5534"
    assert ratio(Copier(64, 1), ids, targets, places).median < 60


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"words": 11, "lists": "coherent"}, "at most 10"),
        ({"lists": "sorted"}, "kind of list 'sorted'"),
        ({"between": "nothing"}, "filler 'nothing'"),
        ({"sentences": 0}, "sentences is 0"),
        ({"length": 9}, "option of verbatim-stm"),
    ],
)
def test_bad_use_says_so_in_one_sentence(options, says):
    with pytest.raises(UsageError) as error:
        TASK.sample(**options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_lists_that_do_not_fit_are_refused():
    model = Copier(259, 1)
    for lists, fillers, says in (
        ([["a", "b"], ["a"]], "x", "of one length"),
        ([["a"]], "x", "of 2 or more"),
        ([["a", "b"]], ["x", "y"], "2 fillers for 1 lists"),
    ):
        with pytest.raises(UsageError, match=says):
            repeat_surprisal(model, lists, fillers)
    with pytest.raises(UsageError, match="condition 'same'"):
        repeat_surprisal(model, [["a", "b"]], "x", condition="same")
    with pytest.raises(UsageError, match="has no other order"):
        second_list(["a", "a"], "permute", stream("test"))
    with pytest.raises(UsageError, match="need length >= 13"):
        batch(np.random.default_rng(0), 1, 12, 5)
    assert summary(np.ones((3, 2)), np.full((3, 2), 0.5)).median == 50
