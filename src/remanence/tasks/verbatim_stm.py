"""Verbatim short-term memory: a list of nouns, a text, and the list again. How much less surprising is it? (arXiv 2210.13569)

The second list repeats the first, permutes it, or is a new one. A model that holds the words finds a repeated list easy; one that holds
their order finds it easier than a permuted one. `repeat_surprisal` measures that of any model; `VerbatimSTM` asks for the list as a text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..catalog import system
from ..errors import UsageError, positive, unknown
from ..models import Model
from ..span import Span
from .base import Example, Fact, Published, Task, Tokenizer, default_tokenizer, pick, stream

NOUNS: dict[str, tuple[str, ...]] = {
    "animals": ("horse", "rabbit", "eagle", "tiger", "donkey", "beaver", "salmon", "spider", "camel", "goose"),
    "tools": ("hammer", "chisel", "ladder", "shovel", "needle", "scissors", "wrench", "saw", "pliers", "axe"),
    "food": ("bread", "cheese", "pepper", "butter", "noodle", "cabbage", "honey", "soup", "garlic", "rice"),
    "furniture": ("table", "cupboard", "mirror", "sofa", "pillow", "drawer", "carpet", "lamp", "bench", "shelf"),
    "clothes": ("jacket", "glove", "shirt", "sandal", "scarf", "button", "helmet", "belt", "apron", "sock"),
    "places": ("harbor", "village", "castle", "tunnel", "library", "market", "bridge", "garden", "prison", "station"),
    "instruments": ("violin", "trumpet", "drum", "flute", "guitar", "organ", "harp", "bell", "piano", "whistle"),
    "weather": ("thunder", "rainbow", "frost", "breeze", "storm", "cloud", "hail", "fog", "snow", "sunset"),
    "jobs": ("baker", "lawyer", "sailor", "doctor", "painter", "farmer", "singer", "judge", "miner", "tailor"),
    "ideas": ("honor", "reason", "anger", "luck", "memory", "fashion", "debt", "courage", "theory", "habit"),
}
"""Nouns by what they have in common; no noun stands twice."""
PREFIX = "Before the meeting, Mary wrote down the following list of words:"
PROMPT = "When she got back, she read the list again:"
TEXT = (
    "After the meeting she went out for a short walk.",
    "The air was cool and the street behind the office lay quiet.",
    "At the corner two children were feeding pigeons with old bread crumbs.",
    "She stopped for a while and thought about what her colleagues had said.",
    "None of it seemed urgent, and most of it could wait until next week.",
    "A bus went by, almost empty, and turned towards the river.",
    "She bought a cup of tea from a small stand and drank it slowly.",
    "The man who sold it asked her whether it would rain in the afternoon.",
    "She did not know, but she looked up politely before she answered.",
    "On the way back she met an old friend and they talked about their holidays.",
    "He told her a long story about a train that never arrived.",
    "When the clock struck three she said goodbye and hurried back to her desk.",
)
"""The intervening text, as long as wished: its sentences are told in turn."""
LISTS = ("random", "coherent")
CONDITIONS = ("repeat", "permute", "novel")
FILLERS = ("intact", "shuffled", "incongruent")
INCONGRUENT = (
    "The treaty was signed by both governments and printed in four languages.",
    "Copper conducts heat far better than most other common metals do.",
    "The bacteria double every twenty minutes if nothing stops them.",
    "A second engine was fitted to the wing to shorten the flight.",
)
PAPER = "arXiv:2210.13569"


def noun_lists(seed: int = 0, n: int = 200, words: int = 5, kind: str = "random") -> list[list[str]]:
    """n lists of `words` different nouns. kind: "random", from all groups; "coherent", from one. List i is the same whatever n is."""
    positive(n=n, words=words)
    if kind not in LISTS:
        raise unknown("kind of list", kind, LISTS)
    every = [noun for group in NOUNS.values() for noun in group]
    most = len(every) // 2 if kind == "random" else min(map(len, NOUNS.values()))
    if words > most:
        raise UsageError(f"words is {words}; a {kind} list has at most {most}.")
    found = []
    for i in range(n):
        rng = stream("verbatim-stm", seed, kind, words, i)
        found.append(_drawn(rng, every if kind == "random" else pick(rng, tuple(NOUNS.values())), words))
    return found


def second_list(first: Sequence[str], condition: str, rng: random.Random) -> list[str]:
    """The second list: `first` itself, in another order, or nouns that are not in it, of one group where all of `first` are of one."""
    if condition not in CONDITIONS:
        raise unknown("condition", condition, CONDITIONS)
    if condition == "repeat":
        return list(first)
    if condition == "permute":
        if len(set(first)) < 2:
            raise UsageError(f"the list {list(first)} has no other order.")
        while (other := _drawn(rng, first, len(first))) == list(first):
            pass
        return other
    groups = [group for group in NOUNS.values() if set(group).isdisjoint(first)]
    coherent = any(set(first) <= set(group) for group in NOUNS.values()) and len(first) > 1
    pool = pick(rng, groups) if coherent and groups else [noun for group in NOUNS.values() for noun in group if noun not in first]
    if len(pool) < len(first):
        raise UsageError(f"the list has {len(first)} words; there are only {len(pool)} other nouns.")
    return _drawn(rng, pool, len(first))


def filler(sentences: int, kind: str, rng: random.Random) -> str:
    """The intervening text. kind: "intact", "incongruent", on something else, or "shuffled", the intact one's words in any order."""
    positive(sentences=sentences)
    if kind not in FILLERS:
        raise unknown("filler", kind, FILLERS)
    text = INCONGRUENT if kind == "incongruent" else TEXT
    told = " ".join(text[i % len(text)] for i in range(sentences))
    if kind != "shuffled":
        return told
    words = re.findall(r"\w+", told)
    return " ".join(_drawn(rng, words, len(words))) + "."


@dataclass(frozen=True)
class Surprisals:
    """What `repeat_surprisal` found; surprisals are in nats, in float64.

    first, second [n, N]: of every word of the two lists. percent [n]: 100 x the mean of `second` / the mean of `first`, both over
    positions 2 .. N; median, low and high: its median and the bootstrap interval of 95 %. by_position [N]: the ratio at each position, of
    the means over the lists.
    """

    first: np.ndarray
    second: np.ndarray
    percent: np.ndarray
    median: float
    low: float
    high: float

    @property
    def by_position(self) -> np.ndarray:
        return 100 * self.second.mean(0) / self.first.mean(0)


def repeat_surprisal(
    model: Model,
    lists: Sequence[Sequence[str]],
    fillers: str | Sequence[str],
    tokenizer: Tokenizer | None = None,
    condition: str = "repeat",
    prefix: str = PREFIX,
    prompt: str = PROMPT,
    seed: int = 0,
    rows: int = 16,
) -> Surprisals:
    """How surprising the second list is, in percent of the first, in "`prefix` w1, w2, ... wN. `filler` `prompt` w1, ..., wN.".

    lists: all of one length N >= 2. fillers: one text, or one for each list. condition: see `second_list`. A word's surprisal is the sum
    of its tokens', without commas; word 1 is left out of the percentage, for even a perfect copier cannot know that a list begins. (As in
    the public code on both sides; repeat well below permute means that order is kept.) tokenizer: None for bytes. rows: documents at once.
    The model is left in the mode it is in. Raises UsageError on lists that do not fit.
    """
    positive(rows=rows)
    tokenizer = tokenizer or default_tokenizer()
    sizes = {len(words) for words in lists}
    if len(sizes) != 1 or min(sizes) < 2:
        raise UsageError(f"the lists have {sorted(sizes)} words; there must be lists, all of one length of 2 or more.")
    texts = [fillers] * len(lists) if isinstance(fillers, str) else list(fillers)
    if len(texts) != len(lists):
        raise UsageError(f"there are {len(texts)} fillers for {len(lists)} lists; give one for each, or one text for all.")
    documents = []
    for i, (words, text) in enumerate(zip(lists, texts, strict=True)):
        other = second_list(words, condition, stream("verbatim-stm second", seed, i))
        documents.append(_document([(prefix, words), (f"{text} {prompt}", other)], tokenizer))
    found = [_surprisals(model, documents[at : at + rows]) for at in range(0, len(documents), rows)]
    first, second = np.split(np.concatenate(found), 2, axis=1)
    return summary(first, second, seed)


def summary(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Surprisals:
    """`Surprisals` of the words of n first and second lists [n, N]."""
    percent = 100 * second[:, 1:].mean(1) / np.maximum(first[:, 1:].mean(1), 1e-300)
    drawn = np.random.default_rng(seed).integers(len(percent), size=(1000, len(percent)))
    low, high = np.quantile(np.median(percent[drawn], 1), [0.025, 0.975])
    return Surprisals(first, second, percent, float(np.median(percent)), float(low), float(high))


def batch(
    rng: np.random.Generator, n: int, length: int = 128, words: int = 5, vocab: int = 512, condition: str = "repeat"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The paradigm as symbols, to train and compare layers: ids and targets (what follows, everywhere), int64 [n, length], and places.

    Zipf tokens of 2 .. vocab - 1, p ~ 1 / rank; a list of `words` different uniform tokens stands after a mark (0) at a uniform place, and
    again, by `condition`, after a mark (1) at the end. places int64 [n, 2 words]: where the words of both lists are; `ratio` takes them.
    """
    positive(n=n, length=length, words=words, vocab=vocab)
    if condition not in CONDITIONS:
        raise unknown("condition", condition, CONDITIONS)
    if length < 2 * words + 3 or vocab < 2 * words + 2:
        raise UsageError(
            f"length is {length} and vocab {vocab}; two lists of {words} need length >= {2 * words + 3}, vocab >= {2 * words + 2}."
        )
    rank = np.cumsum(1 / np.arange(1, vocab - 1))
    said = 2 + np.searchsorted(rank, rng.random((n, length + 1)) * rank[-1], side="right").clip(max=vocab - 3)
    drawn = 2 + rng.random((n, vocab - 2)).argsort(1)[:, : 2 * words]
    one, other = drawn[:, :words], drawn[:, words:]
    order = rng.random((n, words)).argsort(1)
    same = (order == np.arange(words)).all(1)
    order[same] = np.roll(order[same], 1, 1)  # surely another order
    two = {"repeat": one, "permute": np.take_along_axis(one, order, 1), "novel": other}[condition]
    start = rng.integers(length - 2 * words - 1, size=n)[:, None]
    at = start + 1 + np.arange(words)
    np.put_along_axis(said, start, 0, 1)
    np.put_along_axis(said, at, one, 1)
    said[:, length - words], said[:, length - words + 1 :] = 1, two
    again = np.tile(np.arange(length - words + 1, length + 1), (n, 1))
    return said[:, :-1], said[:, 1:].copy(), np.concatenate([at, again], 1)


@torch.no_grad()
def ratio(model: Model, ids: np.ndarray, targets: np.ndarray, places: np.ndarray) -> Surprisals:
    """`Surprisals` of a model on a `batch`."""
    logits = model(torch.as_tensor(ids, device=model.device)).logits
    assert logits is not None  # logits="all"
    log_p = logits.double().log_softmax(-1).gather(2, torch.as_tensor(targets, device=logits.device)[..., None])[..., 0].cpu().numpy()
    first, second = np.split(-np.take_along_axis(log_p, places - 1, 1), 2, axis=1)  # a word is the target one place before
    return summary(first, second)


def _drawn(rng: random.Random, options: Sequence[str], count: int) -> list[str]:
    """`count` of the options without replacement."""
    keyed = sorted(range(len(options)), key=[rng.random() for _ in options].__getitem__)
    return [options[i] for i in keyed[:count]]


Document = tuple[list[int], list[tuple[int, int]]]
"""The ids of a text and [start, stop) of every noun in it."""


def _document(parts: Sequence[tuple[str, Sequence[str]]], tokenizer: Tokenizer) -> Document:
    """ "text w1, w2, ... wN." for each part, a space between; pieces are encoded apart, so that words are whole tokens of their own."""
    ids: list[int] = []
    places: list[tuple[int, int]] = []
    for number, (text, words) in enumerate(parts):
        ids += tokenizer.encode(" " * (number > 0) + text)
        for i, word in enumerate(words):
            ids += tokenizer.encode(",") if i else []
            start = len(ids)
            ids += tokenizer.encode(f" {word}")
            places.append((start, len(ids)))
        ids += tokenizer.encode(".")
    return ids, places


@torch.no_grad()
def _surprisals(model: Model, documents: Sequence[Document]) -> np.ndarray:
    """-log p of every noun, summed over its tokens: float64 [documents, nouns]."""
    lengths = [len(ids) for ids, _ in documents]
    ids = torch.zeros(len(documents), max(lengths), dtype=torch.long)
    for row, (known, _) in zip(ids, documents, strict=True):
        row[: len(known)] = torch.tensor(known)
    ids = ids.to(model.device)
    span = Span.from_lengths(lengths, ids.shape[1], device=ids.device) if min(lengths) < max(lengths) else None
    logits = model(ids, span=span).logits
    assert logits is not None  # logits="all"
    log_p = logits[:, :-1].double().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    total = np.pad(-log_p.cpu().numpy(), [(0, 0), (2, 0)]).cumsum(1)  # total[t + 1] is of the tokens up to t
    return np.array([[total[i, stop] - total[i, start] for start, stop in places] for i, (_, places) in enumerate(documents)])


@system("verbatim-stm", kind="benchmark", paper=PAPER, year=2022, name="Verbatim short-term memory")
class VerbatimSTM(Task):
    """Write the list of words again, in order, after a text in between. The paper's own measure is `repeat_surprisal`.

    The published values are that measure, the second list's surprisal in percent of the first's, not accuracies.
    """

    repeat_surprisal, noun_lists, filler = staticmethod(repeat_surprisal), staticmethod(noun_lists), staticmethod(filler)
    batch, ratio = staticmethod(batch), staticmethod(ratio)
    chance = 0.0
    """Naming nouns at random is right once in some 100 ** words."""
    published = tuple(
        Published("transformer, 12 layers, Wikitext-103", f"surprisal of list 2 in percent, 10 arbitrary nouns, {name}", None, value, PAPER)
        for name, value in (("repeat", 88.0), ("permute", 92.0), ("novel", 99.0))
    )

    def sample(
        self,
        seed: int = 0,
        n: int = 8,
        words: int = 5,
        sentences: int = 1,
        lists: str = "random",
        between: str = "intact",
        tokenizer: Tokenizer | None = None,
    ) -> list[Example]:
        """n contexts: the list, then `sentences` of text. lists: see `noun_lists`; between: see `filler`; tokenizer: None for bytes.

        The paper's lists have 3, 5, 7 or 10 words, and its texts one sentence to several hundred tokens.
        """
        tokenizer = tokenizer or default_tokenizer()
        examples = []
        for i, nouns in enumerate(noun_lists(seed, n, words, lists)):
            told, text = ", ".join(nouns), filler(sentences, between, stream("verbatim-stm text", seed, i))
            head, known = tokenizer.encode(PREFIX), tokenizer.encode(f" {told}.")
            ids = np.array([*head, *known, *tokenizer.encode(f" {text}")], np.int64)
            examples.append(Example(ids, PROMPT, told, (Fact(told, len(head)),), (0,), ()))
        return examples

    def prompt(self, example: Example, tokenizer: Tokenizer | None = None) -> str:
        """The context and the words before the second list, which the model completes."""
        return f"{example.text(tokenizer)} {example.question}"

    def score(self, example: Example, output: str) -> bool:
        """Are the first words of the output those of the list, in order?"""
        wanted = example.answer.split(", ")
        return re.findall(r"[a-z]+", output.lower())[: len(wanted)] == wanted

    def oracle(self, example: Example, tokenizer: Tokenizer | None = None) -> str:
        """The list, read from the context's text."""
        found = re.search(rf"{re.escape(PREFIX)} ([^.]+)\.", example.text(tokenizer))
        if found is None:
            raise UsageError("the context holds no list.")
        return found.group(1)
