"""RULER (arXiv 2404.06654): needles, variable tracking, word counts and questions over distractors, at any length.

The structure follows github.com/NVIDIA/RULER (scripts/synthetic.yaml, scripts/data/synthetic/*.py): its 13 configurations, its counts and
places, its scoring. The wording is ours, as are the words (of the books that ship), the book (a shipped novel) and, unless a SQuAD or
HotpotQA file is given, the documents (generated); a `Template` brings any other wording.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import accumulate, chain, islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..catalog import system
from ..corpus import default_haystack, training_texts
from ..errors import UsageError, unknown
from .babilong import Haystack, Scattered, Source, haystack_of
from .base import Example, Fact, Published, Task, Tokenizer, default_tokenizer
from .fact_update import OBJECTS, SUBJECTS
from .passkey import FILLER

KINDS = ("niah", "vt", "cwe", "fwe", "qa")
HAYSTACKS = ("noise", "essay", "needles")
VALUES = ("numbers", "words", "uuids")
TOKENS_TO_GENERATE = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
"""What RULER leaves for the answer."""
GRID = np.round(np.linspace(0, 100, 40)) / 100
"""The depths, as fractions of the sentences of a book, at which facts are hidden, each at most once."""
LONG = 4096
"""From this length on words are repeated 30 and 3 times (cwe), below it 6 and 1 times."""


@dataclass(frozen=True)
class Setting:
    """One configuration.

    niah: haystack, what keys and values are, how many keys, values of each, and keys asked for (num_keys is raised to num_queries). vt:
    haystack (noise, essay), chains of `hops` assignments after the first. cwe: how many common words, and how often they and the others
    come (None: by length). fwe: the exponent alpha > 1. qa: documents that hold the answer. shots: solved examples before the prompt.
    """

    kind: str
    haystack: str = "noise"
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    chains: int = 1
    hops: int = 4
    common: int = 10
    common_count: int | None = None
    rare_count: int | None = None
    alpha: float = 2.0
    gold: int = 1
    shots: int = 0

    def __post_init__(self) -> None:
        haystacks = HAYSTACKS if self.kind == "niah" else HAYSTACKS[:2]
        for name, known in (("kind", KINDS), ("haystack", haystacks), ("keys", VALUES), ("values", VALUES)):
            if getattr(self, name) not in known:
                raise unknown(f"{name} of a RULER setting", str(getattr(self, name)), known)
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "shots" else 1
            if "int" in str(field.type) and value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise UsageError(f"{field.name} is {value!r}; it must be an integer >= {least}.")
        if not self.alpha > 1:
            raise UsageError(f"alpha is {self.alpha!r}; it must be a number > 1.")
        if self.gold > 2:
            raise UsageError(f"gold is {self.gold}; it may be 1 or 2.")


SETTINGS = {
    "niah-single-1": Setting("niah"),
    "niah-single-2": Setting("niah", "essay"),
    "niah-single-3": Setting("niah", "essay", values="uuids"),
    "niah-multikey-1": Setting("niah", "essay", num_keys=4),
    "niah-multikey-2": Setting("niah", "needles"),
    "niah-multikey-3": Setting("niah", "needles", keys="uuids", values="uuids"),
    "niah-multivalue": Setting("niah", "essay", num_values=4),
    "niah-multiquery": Setting("niah", "essay", num_queries=4),
    "vt": Setting("vt", shots=1),
    "cwe": Setting("cwe", shots=1),
    "fwe": Setting("fwe"),
    "qa-1": Setting("qa"),
    "qa-2": Setting("qa", gold=2),
}
"""The 13 configurations of RULER; of the names, '-' and '_' are the same."""


@dataclass(frozen=True)
class Template:
    """The words around a context and of a fact in it.

    prompt: holds {context} once. answer_prefix: what the answer goes on from. fact: a needle, with {key} and {value}. Other fields:
    {query}, {count} answers (also {num_v}, {num_cw}) and {kind}, "number" or, of several, "numbers" (also {type_needle_v}, which in a fact
    is always plural, as in RULER). RULER's words for a single answer are those of its template with "A" and "is": give them so.
    """

    prompt: str
    answer_prefix: str
    fact: str = "VAR {key} = {value}"

    def __post_init__(self) -> None:
        if self.prompt.count("{context}") != 1 or "{key}" not in self.fact or "{value}" not in self.fact:
            raise UsageError("a RULER template must have {context} once in its prompt, and {key} and {value} in its fact.")

    def around(self, **known: object) -> tuple[str, str, str]:
        """The words before the context, those after it, and the answer prefix, filled in."""
        head, tail = self.prompt.split("{context}")
        return _filled(head, known), _filled(tail, known), _filled(self.answer_prefix, known)


TEMPLATES = {
    "niah": Template(
        "Secret {kinds} stand somewhere in the text below. Remember them: a question about them follows.\n{context}\n"
        "Which secret {kind} does the text give for {query}?",
        " For {query} the text gives the secret {kind}",
        "The secret {kind} of {key} is {value}.",
    ),
    "vt": Template(
        "The text below assigns values to variables. Follow the assignments.\n\n{context}\n"
        "Question: Which variables have the value {query}, directly or through others?",
        " Answer: The {count} variables with the value {query} are",
    ),
    "cwe": Template(
        "Some words of the list below come more often than others. Count them.\n{context}\n"
        "Question: Which {count} words are the most frequent ones of the list?",
        " Answer: The {count} most frequent words are",
    ),
    "fwe": Template(
        "The text below is written in code words; dots are no words. Count the words. {context}\n"
        "Question: Which {count} code words come most often?",
        " Answer: The {count} most frequent code words are",
    ),
    "qa": Template(
        "Answer a question from these documents, with the answer alone.\n\n{context}\n\n"
        "Answer from the documents above, with the answer alone.\n\nQuestion: {query}",
        " Answer:",
    ),
}
"""Our wording, by kind."""


def _filled(text: str, known: dict[str, Any]) -> str:
    try:
        return text.format(**known)
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(f"the template {text!r} cannot be filled in ({error}); its fields may be {', '.join(known)}.") from None


class RulerExample(Scattered):
    """A context that is made as it is read, what stands around it, and every reference answer.

    head, tail: the prompt's words before and after the context. answer_prefix: what the model's answer goes on from; `question` is the
    tail and it. answers: all references; `answer` names them in one line. tokens_to_generate: what the answer may take.
    """

    task: str
    answers: tuple[str, ...]
    answer_prefix: str
    head: str
    tail: str
    setting: Setting
    template: Template
    tokens_to_generate: int

    def __init__(self, made: _Made, around: tuple[str, str, str], setting: Setting, template: Template, task: str):
        head, tail, prefix = around
        own = {"question": (tail + prefix).strip(), "answer": ", ".join(made.answers), "facts": made.facts, "support": made.support}
        own |= {"labels": made.labels, "task": task, "answers": made.answers, "answer_prefix": prefix, "head": head, "tail": tail}
        own |= {"setting": setting, "template": template, "tokens_to_generate": TOKENS_TO_GENERATE[setting.kind]}
        if setting.kind == "qa":
            own["answer"] = made.answers[0]  # references of a question are alternatives
        self.__dict__.update(own, _noise=made.noise, _start=made.start, _pieces=made.pieces, _length=made.length)


@dataclass(frozen=True)
class _Made:
    """A context: noise from the place `start` on with `pieces` before it reads on at each fact's position; without pieces, noise alone."""

    noise: Haystack
    start: int
    pieces: Sequence[Sequence[int]]
    length: int
    facts: tuple[Fact, ...]
    support: tuple[int, ...]
    query: str
    answers: tuple[str, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Request:
    """What every generator is given. length: as it was asked for; room: the tokens of it that are for the context, 0 for no haystack."""

    setting: Setting
    rng: np.random.Generator
    length: int
    room: int
    tokenizer: Tokenizer
    template: Template
    book: Source
    depth: tuple[float, float]


@lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    """Every word of 5 to 10 lower-case letters in the books that ship, sorted."""
    texts = (default_haystack(), *training_texts().values())
    return tuple(sorted(set(chain.from_iterable(re.findall(r"\b[a-z]{5,10}\b", text) for text in texts))))


def _encode(texts: Iterable[str], tokenizer: Tokenizer) -> list[list[int]]:
    batch: Any = getattr(tokenizer, "encode_batch", None)
    texts = list(texts)
    encoded = batch(texts) if batch and texts else map(tokenizer.encode, texts)
    return [list(getattr(ids, "ids", ids)) for ids in encoded]


def _pool(pieces: Sequence[Sequence[int]]) -> Haystack:
    return Haystack(np.fromiter(chain.from_iterable(pieces), np.int32), np.cumsum([0, *map(len, pieces)]))


def _sequence(pool: Haystack, order: np.ndarray) -> Haystack:
    """The pieces of a pool in an order, one after the other."""
    sizes = np.diff(pool.bounds)[order]
    ends = np.cumsum(sizes)
    at = np.arange(ends[-1]) + np.repeat(pool.bounds[order] - (ends - sizes), sizes)
    return Haystack(pool.tokens[at], np.concatenate([[0], ends]))


def _drawn(rng: np.random.Generator, kind: str, n: int) -> list[str]:
    """Numbers of seven digits, pairs of words with a hyphen, or random UUIDs (version 4)."""
    if kind == "numbers":
        return list(map(str, rng.integers(10**6, 10**7, n).tolist()))
    if kind == "uuids":
        data = rng.bytes(16 * n)
        return [str(uuid.UUID(bytes=data[i : i + 16], version=4)) for i in range(0, 16 * n, 16)]
    words = vocabulary()
    return [f"{words[a]}-{words[b]}" for a, b in rng.integers(len(words), size=(n, 2)).tolist()]


def _distinct(rng: np.random.Generator, kind: str, n: int, others: Collection[str] = ()) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < n:
        found |= dict.fromkeys(text for text in _drawn(rng, kind, n - len(found)) if text not in others)
    return list(found)


def _letters(rng: np.random.Generator, n: int, size: int, first: str) -> list[str]:
    """n different strings of `size` letters, in the case of the letter `first`."""
    found: dict[str, None] = {}
    while len(found) < n:
        drawn = (rng.integers(26, size=(n - len(found), size)) + ord(first)).astype(np.uint8)
        found |= dict.fromkeys(row.tobytes().decode() for row in drawn)
    return list(found)


def _squeeze(place: float, depth: tuple[float, float], count: int) -> int:
    """A place in 0 .. count, moved into the window of depths."""
    return int(count * depth[0] + (depth[1] - depth[0]) * place)


def _hide(ask: _Request, texts: Sequence[str], known: Collection[str] = (), **rest: Any) -> _Made:
    """Facts, in their order, between lines of noise or sentences of the book.

    Noise: whole lines, as many as fit; the lines before which facts come are different ones, uniformly. A book: sentences from a random
    one on, cut to fit; the facts come at different depths of GRID. Raises UsageError where the facts do not fit.
    """
    essay, rng = ask.setting.haystack == "essay", ask.rng
    pieces = _encode((f" {text}" if essay else f"{text}\n" for text in texts), ask.tokenizer)
    budget = ask.room - sum(map(len, pieces)) if ask.room else 0
    _check_room(budget, ask.room, f"the {len(texts)} facts")
    if not essay:
        noise, units = _lines(ask, budget, known)
        start, budget = 0, noise.place(units)
        drawn = sorted(rng.choice(units, len(texts), replace=units < len(texts)).tolist()) if units else [0] * len(texts)
        places = [noise.place(_squeeze(slot, ask.depth, units)) for slot in drawn]
    else:
        noise = haystack_of(ask.book, ask.tokenizer)
        start = int(noise.bounds[np.searchsorted(noise.bounds, rng.random() * len(noise.tokens), side="right")])
        first = noise.before(start)
        units = noise.before(start + budget) - first
        drawn = sorted(rng.choice(GRID, len(texts), replace=len(texts) > len(GRID)).tolist())
        places = [min(budget, noise.place(first + _squeeze(units * depth, ask.depth, units)) - start) for depth in drawn]
    told = accumulate(map(len, pieces), initial=0)
    facts = tuple(Fact(text, place + before) for text, place, before in zip(texts, places, told))
    return _Made(noise, start, pieces, budget + sum(map(len, pieces)), facts, **rest)


def _lines(ask: _Request, budget: int, known: Collection[str]) -> tuple[Haystack, int]:
    """As many lines as fit, and their number: the line of noise again and again, or needles without a key or value of `known`."""
    setting, rng = ask.setting, ask.rng
    if setting.haystack == "noise":
        line = _pool(_encode([FILLER.strip() + "\n"], ask.tokenizer))
        return line, budget // len(line.tokens)
    pieces: list[list[int]] = []
    used = 0
    while True:
        count = max(16, (budget - used) // max(1, used // len(pieces) if pieces else 32))
        pairs = zip(_drawn(rng, setting.keys, count), _drawn(rng, setting.values, count))
        lines = [_needle(ask, key, value) + "\n" for key, value in pairs if key not in known and value not in known]
        for piece in _encode(lines, ask.tokenizer):
            if used + len(piece) > budget:
                return _pool(pieces or [piece]), len(pieces)
            pieces.append(piece)
            used += len(piece)


def _check_room(left: int, length: int, what: str) -> None:
    if left < 0:
        raise UsageError(f"length is {length}; {what} alone take {length - left} tokens, so it must be at least that, or 0.")


def _needle(ask: _Request, key: str, value: str) -> str:
    plural = ask.setting.values
    return _filled(ask.template.fact, {"key": key, "value": value, "kind": plural[:-1], "kinds": plural, "type_needle_v": plural})


def _niah(ask: _Request) -> _Made:
    """Needles "the secret of KEY is VALUE"; the values of num_queries of the keys are asked for."""
    s, rng = ask.setting, ask.rng
    count = max(s.num_keys, s.num_queries)
    keys = _distinct(rng, s.keys, count)
    values = _distinct(rng, s.values, count * s.num_values, keys)
    order = rng.permutation(len(values)).tolist()
    asked = rng.permutation(count)[: s.num_queries].tolist()
    names = [keys[i] for i in asked]
    query = f"{', '.join(names[:-1])}, and {names[-1]}" if len(names) > 1 else names[0]
    answers = tuple(values[i * s.num_values + j] for i in asked for j in range(s.num_values))
    support = tuple(at for at, i in enumerate(order) if i // s.num_values in asked)
    texts = [_needle(ask, keys[i // s.num_values], values[i]) for i in order]
    return _hide(ask, texts, query=query, answers=answers, support=support, known={*keys, *values})


def _vt(ask: _Request, letters: int = 5) -> _Made:
    """Chains VAR A = 12345, VAR B = VAR A, ...; every variable of the first is asked for. Several chains are mixed, each in its order."""
    s, rng = ask.setting, ask.rng
    size = s.hops + 1
    names = np.array(_letters(rng, size * s.chains, letters, "A")).reshape(s.chains, size).tolist()
    values: dict[int, None] = {}
    while len(values) < s.chains:
        values[int(rng.integers(10_000, 99_999))] = None
    told = [list(zip(row, [str(value), *(f"VAR {name}" for name in row)])) for row, value in zip(names, values)]
    owner = rng.permutation(np.repeat(np.arange(s.chains), size)).tolist()
    turns = [iter(pairs) for pairs in told]
    end = "." if s.haystack == "essay" else ""
    texts = [_needle(ask, *next(turns[i])) + end for i in owner]
    support = tuple(at for at, i in enumerate(owner) if i == 0)
    return _hide(ask, texts, query=str(next(iter(values))), answers=tuple(names[0]), support=support)


def _cwe(ask: _Request, counts: tuple[int, int] | None = None, rare: int | None = None) -> _Made:
    """A numbered list in which `common` words come often and the others, as many as fit (or `rare`), seldom."""
    s, rng, words = ask.setting, ask.rng, vocabulary()
    often, seldom = counts or ((30, 3) if ask.length >= LONG else (6, 1))
    often, seldom = s.common_count or often, s.rare_count or seldom
    if often <= seldom or s.common >= len(words):
        raise UsageError(f"{s.common} words are to come {often} times and others {seldom}; it must be fewer words, and more often.")
    order = rng.permutation(len(words))
    names = [words[i] for i in order]
    pool, fixed = haystack_of(words, ask.tokenizer), s.common * often
    most = rare if rare is not None else ask.room // (2 * seldom) + 1  # an entry takes two tokens or more
    while True:
        count = min(most, len(names) - s.common)
        entries = fixed + seldom * np.arange(count + 1)
        number = haystack_of(_numbers(1 << int(entries[-1]).bit_length()), ask.tokenizer)
        sizes = np.diff(pool.bounds)[order[: s.common + count]]
        cost = often * sizes[: s.common].sum() + seldom * np.cumsum([0, *sizes[s.common :]]) + number.bounds[entries]
        fits = rare if rare is not None else int(np.searchsorted(cost, ask.room, side="right")) - 1 if ask.room else 0
        _check_room(0 if fits >= 0 else int(ask.room - cost[0]), ask.room, f"the {s.common} common words")
        if fits < count or count == most:
            break
        names += _distinct(rng, "words", len(names), set(names))  # more than the books have: pairs of words
        pool, order = _pool(_encode((" " + name for name in names), ask.tokenizer)), np.arange(len(names))
    listed = rng.permutation(np.repeat(np.arange(s.common + fits), [often] * s.common + [seldom] * fits))
    both = Haystack(np.concatenate([number.tokens, pool.tokens]), np.concatenate([number.bounds, number.bounds[-1] + pool.bounds[1:]]))
    text = _sequence(both, np.stack([np.arange(len(listed)), len(number.bounds) - 1 + order[listed]], 1).ravel())
    return _Made(text, 0, (), len(text.tokens), (), (), "", tuple(names[: s.common]))


@lru_cache(maxsize=2)
def _numbers(size: int) -> tuple[str, ...]:
    return tuple(f"{i}." for i in range(1, size + 1))


def zeta(s: float) -> float:
    """Riemann's zeta function of s > 1, by Euler and Maclaurin's sum from 1000 on."""
    n = 1000
    return sum(k**-s for k in range(1, n)) + n ** (1 - s) / (s - 1) + n**-s / 2 + s * n ** (-s - 1) / 12


def _fwe(ask: _Request) -> _Made:
    """Code words of six letters, the k-th of them floor(N k^-alpha / zeta(alpha)) times; the first is dots, the next three are wanted."""
    s, rng = ask.setting, ask.rng
    rank = np.arange(1, 1 + max(5, min(ask.room // 50, int(ask.room ** (1 / s.alpha)) + 2)) if ask.room else 21)  # the rest never comes
    weight = rank**-s.alpha / zeta(s.alpha)
    names = ["...", *_letters(rng, len(rank) - 1, 6, "a")]
    pool = _pool(_encode((" " + name for name in names), ask.tokenizer))

    def counts(total: int) -> np.ndarray:
        found = np.floor(total * weight).astype(np.int64)
        return np.concatenate([found[:4], np.minimum(found[4:], found[3] - 1)])  # no tie for the third place

    def cost(total: int) -> int:
        return int((counts(total) * np.diff(pool.bounds)).sum())

    low = high = max(math.ceil(1 / weight[3]), 0 if ask.room else 100)
    if ask.room:
        _check_room(ask.room - cost(low), ask.room, "the three frequent words")
        high = max(low, ask.room)
    while low < high:  # the largest N that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= ask.room else (low, middle - 1)
    text = _sequence(pool, rng.permutation(np.repeat(np.arange(len(rank)), counts(low))))
    return _Made(text, 0, (), len(text.tokens), (), (), "", tuple(names[1:4]))


JOBS = (
    "baker", "barber", "boatman", "brewer", "butcher", "carpenter", "chemist", "clockmaker", "cook", "dancer", "dentist", "doctor",
    "driver", "farmer", "fisher", "florist", "gardener", "glazier", "grocer", "hatter", "hunter", "jeweller", "judge", "librarian",
    "locksmith", "mason", "miller", "nurse", "painter", "pilot", "tailor", "weaver",
)  # fmt: skip
SYLLABLES = tuple(a + b for a in "bdfgklmnprstvz" for b in "aeiou")
QUESTIONS = {"born": "In which city was {} born?", "home": "In which city does {} live?", "work": "What is the work of {}?"}
_DOCUMENT = re.compile(
    r"^(?P<name>.+)\n(?P=name) was born in (?P<born>\w+)\. (?P=name) lives in (?P<home>\w+) and works as a (?P<work>\w+)\."
    r" The teacher of (?P=name) was (?P<teacher>[^.]+)\.",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Question:
    """A question over documents: indices of those that must be there, and of others that come before any else as distractors."""

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    more: tuple[int, ...] = ()


def read_questions(path: str | PathLike[str]) -> tuple[list[Question], list[str]]:
    """The questions and the documents of a SQuAD (v1, v2) or HotpotQA JSON file.

    SQuAD: the paragraph is the gold document, the others of its article come first as distractors; impossible questions are left out.
    HotpotQA: all documents of a question, title and text, must be there. Raises UsageError on any other file.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}.") from None
    try:
        found = _squad(data["data"]) if isinstance(data, dict) else _hotpot(data)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is neither a SQuAD nor a HotpotQA file: {type(error).__name__} {error}.") from None
    if not found[0]:
        raise UsageError(f"{path} has no question with an answer; it must have one.")
    return found


def _squad(articles: list[Any]) -> tuple[list[Question], list[str]]:
    index = {text: i for i, text in enumerate(sorted({p["context"] for article in articles for p in article["paragraphs"]}))}
    questions = []
    for article in articles:
        own = [index[p["context"]] for p in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            gold = index[paragraph["context"]]
            for qa in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in qa["answers"]))
                if answers and not qa.get("is_impossible", False):
                    questions.append(Question(qa["question"], answers, (gold,), tuple(dict.fromkeys(i for i in own if i != gold))))
    return questions, list(index)


def _hotpot(rows: list[Any]) -> tuple[list[Question], list[str]]:
    def documents(row: Any) -> list[str]:
        return [f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]]

    index = {text: i for i, text in enumerate(sorted({text for row in rows for text in documents(row)}))}
    gold = (tuple(dict.fromkeys(index[text] for text in documents(row))) for row in rows)
    return [Question(row["question"], (row["answer"],), docs) for row, docs in zip(rows, gold)], list(index)


@lru_cache(maxsize=2)
def _read_again(path: Path, _marks: tuple[int, int]) -> tuple[list[Question], list[str]]:
    return read_questions(path)


def _people(rng: np.random.Generator, last: str | None = None) -> Iterator[str]:
    """Different names without end, or, of one last name, one for each first name."""
    if last:
        yield from (f"{SUBJECTS[i]} {last}" for i in rng.permutation(len(SUBJECTS)).tolist())
        return
    seen = set()
    while True:
        first, parts = SUBJECTS[int(rng.integers(len(SUBJECTS)))], rng.integers(len(SYLLABLES), size=3).tolist()
        name = f"{first} {''.join(SYLLABLES[i] for i in parts).capitalize()}"
        if name not in seen:
            seen.add(name)
            yield name


def _about(rng: np.random.Generator, name: str, teacher: str) -> tuple[str, dict[str, str]]:
    """The document of a person, and what it tells."""
    born, home = (OBJECTS[i] for i in rng.integers(len(OBJECTS), size=2).tolist())
    work = JOBS[int(rng.integers(len(JOBS)))]
    text = f"{name}\n{name} was born in {born}. {name} lives in {home} and works as a {work}. The teacher of {name} was {teacher}."
    return text, {"born": born, "home": home, "work": work}


def _invented(rng: np.random.Generator, gold: int) -> tuple[list[str], Iterator[str], str, tuple[str, ...], tuple[str, ...]]:
    """Documents that settle a question, distractors (three namesakes first), the question, its answers and the labels.

    gold 1: a property of a person. gold 2: of the teacher of a person, who is named in one document and told about in another.
    """
    everyone = _people(rng)
    people = [next(everyone) for _ in range(gold + 1)]
    told = [_about(rng, *pair) for pair in zip(people, people[1:])]
    what = ("born", "home", "work")[int(rng.integers(3))]
    who = people[0] if gold == 1 else f"the teacher of {people[0]}"
    namesakes = [name for name in islice(_people(rng, people[0].split()[1]), 5) if name not in people][:3]
    others = (name for name in everyone if name not in namesakes)
    rest = (_about(rng, name, next(everyone))[0] for name in chain(namesakes, others))
    return [text for text, _ in told], rest, QUESTIONS[what].format(who), (told[-1][1][what],), JOBS if what == "work" else OBJECTS


def _qa(ask: _Request, source: tuple[list[Question], list[str]] | None = None) -> _Made:
    """Numbered documents in random order: the gold ones and as many distractors as fit."""
    rng, labels = ask.rng, ()
    if source is None:
        gold, rest, query, answers, labels = _invented(rng, ask.setting.gold)
    else:
        questions, texts = source
        q = questions[int(rng.integers(len(questions)))]
        fixed = {*q.gold, *q.more}
        order = chain(rng.permutation(q.more).astype(int).tolist(), (i for i in rng.permutation(len(texts)).tolist() if i not in fixed))
        gold, rest, query, answers = [texts[i] for i in q.gold], (texts[i] for i in order), q.query, q.answers
    bodies = _encode((f"{text}\n\n" for text in gold), ask.tokenizer)
    heads = _encode((f"Document {i}:\n" for i in range(1, len(gold) + 1)), ask.tokenizer)
    used = sum(map(len, bodies)) + sum(map(len, heads))
    _check_room(ask.room - used if ask.room else 0, ask.room, "the documents with the answer")
    while used < ask.room:
        block = _encode((f"{text}\n\n" for text in islice(rest, 64)), ask.tokenizer)
        more = _encode((f"Document {len(heads) + i}:\n" for i in range(1, len(block) + 1)), ask.tokenizer)
        ends = used + np.cumsum([len(head) + len(body) for head, body in zip(more, block)])
        fits = int(np.searchsorted(ends, ask.room, side="right"))
        bodies, heads = bodies + block[:fits], heads + more[:fits]
        if fits < 64:
            break
        used = int(ends[-1])
    golds, others = len(gold), len(bodies) - len(gold)
    drawn = sorted(rng.choice(len(bodies), golds, replace=False).tolist())
    places = [_squeeze(place - i, ask.depth, others) + i for i, place in enumerate(drawn)]
    order = np.empty(len(bodies), np.int64)
    order[places] = rng.permutation(golds)
    order[np.setdiff1d(np.arange(len(bodies)), places)] = np.arange(golds, len(bodies))
    both = _pool([*heads, *bodies])
    text = _sequence(both, np.stack([np.arange(len(bodies)), len(bodies) + order], 1).ravel())
    facts = tuple(Fact(gold[order[place]], int(text.bounds[2 * place])) for place in places)
    return _Made(text, 0, (), len(text.tokens), facts, tuple(range(golds)), query, answers, labels)


def _chance(setting: Setting) -> float:
    """How often a guess that has not read the context names all answers."""
    if setting.kind == "niah":
        space = {"numbers": 9_000_000, "uuids": 2**122}.get(setting.values) or len(vocabulary()) ** 2
        return float(space) ** -(setting.num_queries * setting.num_values)
    if setting.kind == "qa":
        return 1 / len(OBJECTS)
    space, count = {"vt": (26**5, setting.hops + 1), "fwe": (26**6, 3)}.get(setting.kind) or (len(vocabulary()), setting.common)
    return 1 / math.comb(space, count)


_LENGTHS = (4_096, 8_192, 16_384, 32_768, 65_536, 131_072)
_AVERAGES = {
    "Llama2 (7B)": (85.6,),
    "Jamba-1.5-large": (96.7, 96.6, 96.4, 96.0, 95.4, 95.1),
    "Gemini-1.5-pro": (96.7, 95.8, 96.0, 95.9, 95.9, 94.4),
    "Qwen2.5-14B-Instruct-1M": (97.5, 97.1, 94.6, 94.9, 94.9, 92.2),
    "GPT-4-1106-preview": (96.6, 96.3, 95.2, 93.2, 87.0, 81.2),
    "Llama3.1 (70B)": (96.5, 95.8, 95.4, 94.8, 88.4, 66.6),
    "Llama3.1 (8B)": (95.5, 93.8, 91.6, 87.4, 84.7, 77.0),
    "Mistral (7B), v0.2": (93.6, 91.2, 87.2, 75.4, 49.0, 13.8),
}


@system("ruler", kind="benchmark", paper="arXiv:2404.06654", year=2024, name="RULER")
class Ruler(Task):
    """Needles of many kinds, chains of variables, word counts and questions over distractors: 13 tasks that grow with the length.

    task: one of SETTINGS, or a `Setting`; the default of `sample`. Published numbers are averages over the 13, in RULER's own wording.
    """

    published = tuple(
        Published(model, "average of the 13 tasks", length, value, "README of github.com/NVIDIA/RULER")
        for model, values in _AVERAGES.items()
        for length, value in zip(_LENGTHS, values)
    )

    def __init__(self, task: str | Setting = "niah-single-1", template: Template | None = None):
        self.task, self.setting = setting_of(task)
        self.template = template
        self.tokens_to_generate = TOKENS_TO_GENERATE[self.setting.kind]
        self.chance = _chance(self.setting)

    def sample(
        self,
        seed: int = 0,
        n: int = 8,
        length: int = 4096,
        tokenizer: Tokenizer | None = None,
        task: str | Setting | None = None,
        haystack: Source = None,
        depth: float | Sequence[float] = (0.0, 1.0),
        documents: str | PathLike[str] | None = None,
        template: Template | None = None,
        reserve: int | None = 0,
    ) -> list[Example]:
        """n contexts of at most `length - reserve` tokens, less than one line, word or document below that (a book is cut to fit).

        length 0: no haystack. tokenizer: None for bytes. haystack: the book of 'essay' tasks (see `babilong.haystack_of`). depth: where the
        hidden facts or gold documents may be, as fractions (low, high) of the lines around them; one number puts all of them there.
        documents: a SQuAD or HotpotQA JSON file for qa. template: other words. reserve: what is left for the prompt's words and the answer;
        None for just what they take, so that `length` counts as RULER counts. Needles of example i depend on (task, seed, i) alone.
        Raises UsageError where the facts do not fit.
        """
        name, setting = setting_of(task) if task is not None else (self.task, self.setting)
        tokenizer, kind, depth = tokenizer or default_tokenizer(), setting.kind, _window(depth)
        if haystack is not None and (kind not in ("niah", "vt") or setting.haystack != "essay"):
            raise UsageError(f"haystack is given, but {name} hides nothing in a book; niah-single-2 does, for one.")
        if depth != (0.0, 1.0) and kind in ("cwe", "fwe"):
            raise UsageError(f"depth is {depth}, but {name} hides no facts; niah, vt and qa do.")
        if documents is not None and kind != "qa":
            raise UsageError(f"documents is given, but {name} asks about none; qa-1 and qa-2 do.")
        if reserve is not None and (isinstance(reserve, bool) or not isinstance(reserve, int) or reserve < 0 or 0 < length <= reserve):
            raise UsageError(f"reserve is {reserve!r}; it must be None or an integer >= 0 and less than the length, {length}.")
        words = template or self.template or TEMPLATES[kind]
        source = _source(documents) if documents is not None else None
        examples: list[Example] = []
        for i in range(n):
            key = [seed, i, *name.encode()]
            room = length - (reserve or 0) if length else 0
            ask = _Request(setting, np.random.default_rng(key), length, room, tokenizer, words, haystack, depth)
            if reserve is None and length:
                bare = replace(ask, room=0)
                around = _around(bare, _make(bare, source), key)
                taken = len(tokenizer.encode("".join(around))) + TOKENS_TO_GENERATE[kind]
                if taken >= length:
                    raise UsageError(f"length is {length}; the prompt's words and the answer alone take {taken} tokens.")
                ask = replace(ask, rng=np.random.default_rng(key), room=length - taken)
            made = _make(ask, source)
            examples.append(RulerExample(made, _around(ask, made, key), setting, words, name))
        return examples

    def prompt(self, example: Example, tokenizer: Tokenizer | None = None) -> str:
        """The whole prompt, ending in the answer prefix, which the model continues."""
        head, tail = getattr(example, "head", ""), getattr(example, "tail", "\n" + example.question)
        return head + example.text(tokenizer).strip() + tail + getattr(example, "answer_prefix", "")

    def accuracy(self, example: Example, output: str) -> float:
        """RULER's score: the fraction of the references that the output names; for qa whether it names any. Case does not matter."""
        found = [answer.lower() in output.lower() for answer in getattr(example, "answers", (example.answer,))]
        return float(any(found)) if _kind(example) == "qa" else sum(found) / len(found)

    def score(self, example: Example, output: str) -> bool:
        """Does the output name all references, for qa any of them?"""
        return self.accuracy(example, output) == 1

    def oracle(self, example: Example, tokenizer: Tokenizer | None = None) -> str:
        """The answers, by rule, from the context's text and the question. Raises UsageError on documents that were not generated."""
        assert isinstance(example, RulerExample)
        kind, text, question = _kind(example), example.text(tokenizer), example.question
        if kind in ("cwe", "fwe"):
            found = re.findall(r"\d+\. (\S+)", text) if kind == "cwe" else re.findall(r"[a-z]+", text)
            return ", ".join(word for word, _ in Counter(found).most_common(example.setting.common if kind == "cwe" else 3))
        if kind == "qa":
            return _read_documents(text, question)
        told = _told(example.template.fact, example.setting, text)
        if kind == "niah":
            return ", ".join(value for key, value in told if re.search(rf"(?<![\w-]){re.escape(key)}(?![\w-])", question))
        known = dict.fromkeys(value for _, value in told if re.search(rf"(?<!\w){re.escape(value)}(?!\w)", question))
        for key, value in told:  # an assignment stands behind the one that it reads
            if value in known:
                known[f"VAR {key}"] = None
        return ", ".join(name.removeprefix("VAR ") for name in known if name.startswith("VAR "))


def setting_of(task: str | Setting) -> tuple[str, Setting]:
    """The name and the setting of a task, or of a Setting, whose name is its kind. Raises UnknownName on a name that is none."""
    if isinstance(task, Setting):
        return task.kind, task
    name = str(task).replace("_", "-")
    if name not in SETTINGS:
        raise unknown("task of ruler", str(task), SETTINGS)
    return name, SETTINGS[name]


def _kind(example: Example) -> str:
    return example.setting.kind if isinstance(example, RulerExample) else "niah"


def _window(depth: float | Sequence[float]) -> tuple[float, float]:
    try:
        low, high = map(float, (depth, depth) if isinstance(depth, int | float) else depth)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise UsageError(f"depth is {depth!r}; it must be a fraction or two, 0 <= low <= high <= 1.")
    return low, high


def _source(path: str | PathLike[str]) -> tuple[list[Question], list[str]]:
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise UsageError(f"{path} cannot be read as JSON: {error.strerror}.") from None
    return _read_again(Path(path), (stat.st_mtime_ns, stat.st_size))


def _make(ask: _Request, source: tuple[list[Question], list[str]] | None) -> _Made:
    kind = ask.setting.kind
    return _qa(ask, source) if kind == "qa" else {"niah": _niah, "vt": _vt, "cwe": _cwe, "fwe": _fwe}[kind](ask)


def _around(ask: _Request, made: _Made, key: list[int] | None = None) -> tuple[str, str, str]:
    """What stands before and after the context, and the answer prefix; with the solved examples of an example's key."""
    count, plural = len(made.answers) if ask.setting.kind != "qa" else 1, ask.setting.values
    kind = plural if count > 1 else plural[:-1]
    known = {"query": made.query, "count": count, "num_v": count, "num_cw": count, "kind": kind, "kinds": plural, "type_needle_v": kind}
    head, tail, prefix = ask.template.around(**known)
    return (_shots(ask, key) if key else "") + head, tail, prefix


def _shots(ask: _Request, key: list[int]) -> str:
    """Solved examples: vt with names of three letters and some 250 tokens of noise; cwe with 40 words, 10 and 3 times (20, 3 and 1)."""
    text = ""
    for i in range(ask.setting.shots if ask.setting.kind in ("vt", "cwe") else 0):
        small = replace(ask, rng=np.random.default_rng([*key, 0, i]), room=0, depth=(0.0, 1.0))
        if ask.setting.kind == "vt":
            facts = _vt(small, 3)
            made = _vt(replace(small, rng=np.random.default_rng([*key, 0, i]), room=facts.length + 250), 3)
            answer = " ".join(made.answers)
        else:
            words, counts = (40, (10, 3)) if ask.length >= LONG else (20, (3, 1))
            made = _cwe(small, counts, max(1, words - ask.setting.common))
            answer = " ".join(f"{i}. {word}" for i, word in enumerate(made.answers, 1))
        around = _around(small, made)
        context = RulerExample(made, around, ask.setting, ask.template, ask.setting.kind).text(ask.tokenizer).strip()
        text += f"{around[0]}{context}{around[1]}{around[2]} {answer}\n\n"
    return text


def _told(fact: str, setting: Setting, text: str) -> list[tuple[str, str]]:
    """Every (key, value) of a text whose facts have the form `fact`."""
    plural = setting.values
    known = {"kind": plural[:-1], "kinds": plural, "type_needle_v": plural, "key": "\0", "value": "\1"}
    form = re.escape(_filled(fact, known))
    value = r"(?P<value>(?:VAR )?\w+)" if setting.kind == "vt" else r"(?P<value>[\w-]+)"
    found = re.finditer(form.replace("\0", r"(?P<key>[\w-]+)", 1).replace("\1", value, 1), text)
    return [(match["key"], match["value"]) for match in found]


def _read_documents(text: str, question: str) -> str:
    known = {match["name"]: match.groupdict() for match in _DOCUMENT.finditer(text)}
    name = next((name for name in known if name in question), None)
    what = next((what for what, form in QUESTIONS.items() if form.split("{}")[0] in question and form.split("{}")[1] in question), None)
    if name is None or what is None:
        raise UsageError("these documents were not generated; their questions have no rule.")
    if f"teacher of {name}" in question:
        name = known[name]["teacher"]
    return known[name][what]
