"""BABILong: the facts of a bAbI story scattered, in order, through book text of any length (arXiv 2406.10149)."""

from __future__ import annotations

import bisect
import random
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import accumulate, chain
from os import PathLike
from typing import Any

import numpy as np

from ..catalog import system
from ..errors import UsageError
from .babi import LABELS, BabiTask, Story, draw, encode_facts, facts_alone, pool_of, task_name, task_of
from .base import Example, Fact, Published, Tokenizer, default_tokenizer, stream

MIN_SENTENCE = 10
"""Sentences of fewer tokens are not used as noise."""

# The end of a sentence: its last mark with any closing quotes, then white space before a capital or an opening quote. Titles end none. A
# blank line ends one too.
_BREAK = re.compile(
    r"""(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)[.!?]["'”’)\]]*(?P<gap>\s+)(?=["'“‘(\[_]*[A-ZÀ-Þ])|(?P<blank>\n[^\S\n]*\n\s*)"""
)


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, without the white space between them."""
    found, start = [], 0
    for match in _BREAK.finditer(text):
        gap = "gap" if match.group("gap") else "blank"
        found.append(text[start : match.start(gap)].strip())
        start = match.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if sentence]


@dataclass(frozen=True)
class Haystack:
    """Book text as tokens: sentence i is tokens[bounds[i] : bounds[i + 1]]. It is read as a ring: after its end comes its beginning.

    tokens: int32 [N]. bounds: int64 [S + 1]. A place is a count of tokens from the start of the text; a lap later it is N larger.
    """

    tokens: np.ndarray
    bounds: np.ndarray

    @classmethod
    def encode(cls, text: str, tokenizer: Tokenizer) -> Haystack:
        """Split into sentences, encode each with a leading space, keep those of 10 tokens or more. Raises UsageError if there is none."""
        batch = getattr(tokenizer, "encode_batch", None)
        pieces, lengths = [], []
        spaced = [" " + sentence for sentence in sentences(text)]
        for start in range(0, len(spaced), 4096):  # in blocks, because lists of integers take ten times the memory of an array
            block = spaced[start : start + 4096]
            encoded: Any = batch(block) if batch else [tokenizer.encode(sentence) for sentence in block]
            kept = [ids for ids in (getattr(ids, "ids", ids) for ids in encoded) if len(ids) >= MIN_SENTENCE]
            lengths += map(len, kept)
            pieces.append(np.fromiter(chain.from_iterable(kept), np.int32))
        if not lengths:
            raise UsageError(f"the haystack has {len(text)} characters and no sentence of {MIN_SENTENCE} tokens or more; it must have one.")
        return cls(np.concatenate(pieces), np.cumsum([0, *lengths]))

    def start(self, rng: random.Random) -> int:
        """The place of a sentence that follows a uniformly random token."""
        token = int(rng.random() * len(self.tokens))
        return int(self.bounds[bisect.bisect_right(self.bounds, token)])

    def before(self, place: int) -> int:
        """How many sentences, over all laps, begin before a place."""
        lap, rest = divmod(place, len(self.tokens))
        return lap * (len(self.bounds) - 1) + bisect.bisect_left(self.bounds, rest)

    def place(self, sentence: int) -> int:
        """Where a sentence begins; the inverse of `before`."""
        lap, rest = divmod(sentence, len(self.bounds) - 1)
        return lap * len(self.tokens) + int(self.bounds[rest])

    def copy(self, place: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from a place on."""
        done, at = 0, place % len(self.tokens)
        while done < len(out):
            piece = self.tokens[at : at + len(out) - done]
            out[done : done + len(piece)] = piece
            done, at = done + len(piece), 0


_HAYSTACKS: OrderedDict[tuple[bytes, int], tuple[Tokenizer, Haystack]] = OrderedDict()


def haystack_of(text: str | None, tokenizer: Tokenizer) -> Haystack:
    """The tokens of a haystack text, encoded once for each text and tokenizer; the last 4 are kept. None: the shipped book."""
    if text is None:
        from ..corpus import default_haystack

        text = default_haystack()
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"the haystack is {text!r}; it must be a text.")
    key = (_digest(text), id(tokenizer))
    if key not in _HAYSTACKS:
        # The tokenizer is kept as well, so that its id is not given to another one.
        _HAYSTACKS[key] = (tokenizer, Haystack.encode(text, tokenizer))
        while len(_HAYSTACKS) > 4:
            _HAYSTACKS.popitem(last=False)
    _HAYSTACKS.move_to_end(key)
    return _HAYSTACKS[key][1]


@lru_cache(maxsize=4)
def _digest(text: str) -> bytes:
    return sha256(text.encode("utf-8", "surrogatepass")).digest()


def slots(noise: Haystack, start: int, budget: int, length: int, facts: int, depth: tuple[float, float]) -> tuple[int, int]:
    """Before which noise sentences facts may go, as a range of sentence numbers; the noise is `budget` tokens from place `start` on.

    The whole of (0, 1): before each sentence and after the last. Else: before the sentences that begin, in the noise, at or after
    depth[0] * length and before depth[1] * length less the `facts` tokens, so that the facts end inside the window. Raises UsageError if
    there is none.
    """
    first, end = noise.before(start), noise.before(start + budget)
    if depth == (0.0, 1.0):
        return first, end + 1
    low = noise.before(start + int(length * depth[0]))
    high = min(end, noise.before(start + max(0, int(length * depth[1]) - facts)))
    if low >= high:
        raise UsageError(
            f"no noise sentence begins in the depth window {depth} of {length} tokens, {facts} of them facts; give a wider window."
        )
    return low, high


class Scattered(Example):
    """A context that is made as it is read: noise from the place `start` of a haystack on, and between its sentences the facts.

    pieces: each fact's tokens; places: after how many tokens of noise it comes, ascending. Only `ids` makes the whole context.
    """

    _noise: Haystack
    _start: int
    _pieces: Sequence[Sequence[int]]
    _length: int

    def __init__(
        self, story: Story, task: str, noise: Haystack, start: int, pieces: Sequence[Sequence[int]], places: Sequence[int], length: int
    ):
        told = [0, *accumulate(map(len, pieces))]  # tokens of the facts before fact i
        facts = tuple(Fact(fact, place + before) for fact, place, before in zip(story.facts, places, told))
        own = {"question": story.question, "answer": story.answer, "facts": facts, "support": story.support, "labels": LABELS[task]}
        self.__dict__.update(own, _noise=noise, _start=start, _pieces=pieces, _length=length)

    @property
    def ids(self) -> np.ndarray:  # type: ignore[override]
        return self.read(0, self._length)

    @property
    def length(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> np.ndarray:
        start, stop, _ = slice(start, stop).indices(self._length)
        out = np.empty(max(0, stop - start), np.int64)
        at, told = start, 0  # context position, tokens of facts before it
        for fact, piece in zip(self.facts, self._pieces):
            first, last = fact.position, fact.position + len(piece)
            if last <= at:
                told += len(piece)
                continue
            if first >= stop:
                break
            if at < first:
                self._noise.copy(self._start + at - told, out[at - start : first - start])
                at = first
            end = min(last, stop)
            out[at - start : end - start] = piece[at - first : end - first]
            at, told = end, told + len(piece)
        self._noise.copy(self._start + at - told, out[at - start :])
        return out


def scatter(
    story: Story, task: str, pieces: list[list[int]], length: int, noise: Haystack, depth: tuple[float, float], rng: random.Random
) -> Example:
    """One context of exactly `length` tokens: noise from a random sentence on, cut to fit, and each fact in a slot between its sentences.

    Slots are drawn uniformly with replacement and sorted, so the facts keep their order and those that share a slot are neighbours.
    """
    facts = sum(map(len, pieces))
    budget, start = length - facts, noise.start(rng)
    low, high = slots(noise, start, budget, length, facts, depth)
    drawn = sorted(low + int(rng.random() * (high - low)) for _ in pieces)
    places = [min(noise.place(slot) - start, budget) for slot in drawn]  # the slot after the last sentence lies where that was cut
    return Scattered(story, task, noise, start, pieces, places, length)


_WHERE = (
    "The text below is a book with a few extra sentences about people mixed in. Use only those sentences to answer the question at the end."
)
_CARRY = " Whatever a person holds goes along to every room that the person enters, and stays where it is put down."
GENERAL_PROMPT = (_WHERE, (), "Answer in as few words as you can and add nothing.")
PROMPTS: dict[str, tuple[str, tuple[tuple[str, str], ...], str]] = {
    "qa1": (
        _WHERE + " People move around: what counts is the last room that someone went to.",
        (
            ("Nina went to the cellar. Omar moved to the porch. Nina journeyed to the attic. Where is Nina?", "Nina is in the attic."),
            ("Omar travelled to the porch. Pia went back to the attic. Where is Omar?", "Omar is in the porch."),
        ),
        "Answer with one sentence of the form: <person> is in the <room>. Add nothing to it.",
    ),
    "qa2": (
        _WHERE + _CARRY,
        (
            ("Nina went to the cellar. Nina took the lamp. Nina moved to the attic. Where is the lamp?", "The lamp is in the attic."),
            (
                "Omar got the rope. Omar went to the porch. Omar left the rope. Omar moved to the attic. Where is the rope?",
                "The rope is in the porch.",
            ),
        ),
        "Answer with one sentence of the form: The <thing> is in the <room>. Add nothing to it.",
    ),
    "qa3": (
        _WHERE + _CARRY,
        (
            (
                "Nina took the lamp. Nina went to the cellar. Nina moved to the attic. Where was the lamp before the attic?",
                "Before the attic the lamp was in the cellar.",
            ),
            (
                "Omar went to the porch. Omar got the rope. Pia went to the attic. Omar moved to the cellar. "
                "Where was the rope before the cellar?",
                "Before the cellar the rope was in the porch.",
            ),
        ),
        "Answer with one sentence of the form: Before the <room> the <thing> was in the <other room>. Add nothing to it.",
    ),
    "qa4": (
        "The text below is a book with two extra sentences mixed in, which say how rooms lie to each other. Use only those two.",
        (
            ("The attic is north of the porch. The cellar is south of the porch. What is north of the porch?", "attic"),
            ("The porch is east of the cellar. The attic is east of the porch. What is the porch east of?", "cellar"),
        ),
        "Answer with the name of the room, one word, and nothing else.",
    ),
    "qa5": (
        "The text below is a book with extra sentences about people who hand things to each other. Use only the last that applies.",
        (
            ("Nina got the lamp. Nina passed the lamp to Omar. Pia went to the attic. Who did Nina give the lamp to?", "Omar"),
            ("Omar took the rope. Omar gave the rope to Pia. Who gave the rope to Pia?", "Omar"),
            ("Pia grabbed the lamp. Pia handed the lamp to Nina. What did Pia give to Nina?", "lamp"),
        ),
        "Answer with one word, a person or a thing, and nothing else.",
    ),
    "qa6": (
        _WHERE + " People move around: what counts is the last room that someone went to.",
        (
            ("Nina went to the cellar. Nina moved to the attic. Is Nina in the attic?", "yes"),
            ("Omar travelled to the porch. Pia went to the cellar. Omar went to the attic. Is Omar in the porch?", "no"),
        ),
        "Answer with one word, yes or no, and nothing else.",
    ),
}
"""For each task: the instruction, solved examples (story, answer) and the form of the answer. The names in them occur in no story."""

_FIGURE = "arXiv:2406.10149 fig. 3b, read by a third party"
_PAPER = "arXiv:2406.10149, read by a third party"
_TUNED = "qa1, fine-tuned: segments of 512, curriculum 1 -> 32 segments"


def _rows(model: str, setting: str, source: str, values: dict[int, float]) -> tuple[Published, ...]:
    return tuple(Published(model, setting, length, value, source) for length, value in values.items())


PUBLISHED = (
    *_rows("Mamba 130M", _TUNED, _FIGURE, {128_000: 100, 1_000_000: 84, 10_000_000: 66}),
    *_rows("RMT 137M (GPT-2), 16 memory tokens", _TUNED, _FIGURE, {128_000: 94, 1_000_000: 55}),
    *_rows("RMT 137M (GPT-2), 16 memory tokens", _TUNED, _FIGURE + "; above its value at 1M, so doubtful", {10_000_000: 66}),
    *_rows("ARMT 137M (GPT-2), 10 memory tokens", _TUNED, _FIGURE, {128_000: 100, 1_000_000: 99, 10_000_000: 89, 50_000_000: 77}),
    *_rows("ARMT 137M (GPT-2)", "qa1, fine-tuned", "arXiv:2407.04841 abstract", {50_000_000: 79.9}),
    *(
        Published(model, f"{task}, not fine-tuned, facts alone", 0, value, _PAPER)
        for model, scores in {"GPT-4": (88, 56), "Gemini": (89, 79), "Llama-3.1-8B": (70, 43)}.items()
        for task, value in zip(("qa2", "qa3"), scores, strict=True)
    ),
    Published("GPT-4 with retrieval of sentences", "qa1, not fine-tuned", 128_000, 56, _PAPER),
    Published("Llama-3 with retrieval of sentences", "qa1, not fine-tuned", 128_000, 64, _PAPER),
)


@system("babilong", kind="benchmark", paper="arXiv:2406.10149", year=2024, name="BABILong")
class BABILong(BabiTask):
    """Reasoning in a haystack: bAbI facts hidden in book text of any length, with a question at the end."""

    published = PUBLISHED

    def sample(
        self,
        seed: int = 0,
        n: int = 8,
        length: int = 4096,
        task: str | None = None,
        tokenizer: Tokenizer | None = None,
        haystack: str | None = None,
        depth: tuple[float, float] = (0.0, 1.0),
        facts: Sequence[Story] | str | PathLike[str] | None = None,
    ) -> list[Example]:
        """n contexts of exactly `length` tokens each, facts included; length 0 gives the facts alone.

        task: 'qa1' to 'qa6'; with `facts` (stories, or an official bAbI file to draw them from) any of the 20. tokenizer: None for bytes.
        haystack: the book text, read as a ring; None for the book that the library ships. depth: where in the context the facts may be.

        Stories of more than length // 8 lines (the official filter), or of more tokens than the context, are drawn again. The story of
        example i depends on task, seed and i alone wherever it fits. Raises UsageError where no story or no slot fits.
        """
        task, tokenizer = task_name(task or self.task), tokenizer or default_tokenizer()
        depth = _depth(depth)
        noise = haystack_of(haystack, tokenizer) if length else None

        def admit(story: Story) -> bool:
            # The official filter counts the line of the question too.
            return not length or (len(story.facts) < length // 8 and sum(map(len, encode_facts(story, tokenizer))) <= length)

        wanted = f"in {length} tokens and length // 8 lines; give a longer length, or 0 for the facts alone"
        examples = []
        for i, story in enumerate(draw(task, n, seed, pool_of(facts), admit, wanted)):
            if noise is None:
                examples.append(facts_alone(story, task, tokenizer))
            else:
                rng = stream("babilong", task, seed, i, length)
                examples.append(scatter(story, task, encode_facts(story, tokenizer), length, noise, depth, rng))
        return examples

    def prompt(self, example: Example, tokenizer: Tokenizer | None = None) -> str:
        """The example as a prompt for an instructed model, in the official layout; the instructions follow the form of the question."""
        instruction, shots, form = PROMPTS.get(task_of(example.question) or "", GENERAL_PROMPT)
        examples = "\n\n".join(f"<example>\n{story}\nAnswer: {answer}\n</example>" for story, answer in shots)
        context = example.text(tokenizer).strip()
        parts = [instruction, examples, form, f"<context>\n{context}\n</context>", f"Question: {example.question}"]
        return "\n\n".join(part for part in parts if part)


def _depth(depth: Sequence[float]) -> tuple[float, float]:
    try:
        low, high = map(float, depth)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise UsageError(f"depth is {depth!r}; it must be two fractions, 0 <= start < end <= 1.")
    return low, high
