"""What a benchmark is: examples from a seed, a scorer, a perfect solver, and the numbers that others have published."""

from __future__ import annotations

import functools
import inspect
import operator
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from ..errors import UsageError, unknown

IGNORE = -100
"""The target of a position that has no loss and no score."""

T = TypeVar("T")


class Tokenizer(Protocol):
    """Anything that maps text to ids and back. `encode` adds no special tokens; an `encode_batch` is used where there is one."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str, /) -> list[int]: ...
    def decode(self, ids: Sequence[int], /) -> str: ...


@functools.cache
def default_tokenizer() -> Tokenizer:
    """The tokenizer of a task that is given none: raw UTF-8 bytes. One instance, so that caches keyed by tokenizer find it again."""
    from ..tokenizers import ByteTokenizer

    return ByteTokenizer()


@dataclass(frozen=True)
class Fact:
    """A sentence that matters; `position` is the index, in the context's ids, of its first token."""

    text: str
    position: int


@dataclass(frozen=True, eq=False)
class Example:
    """A context and a question about it.

    ids: the context, int64 [T]. facts: in the order of the context. support: indices of the facts that settle the answer.
    labels: every answer that is possible in this task; empty where the answer is open.
    """

    ids: np.ndarray
    question: str
    answer: str
    facts: tuple[Fact, ...]
    support: tuple[int, ...]
    labels: tuple[str, ...]

    @property
    def distance(self) -> int:
        """Tokens from the start of the last supporting fact to the end of the context: how long it must be remembered, at least."""
        return self.length - max((self.facts[i].position for i in self.support), default=0)

    @property
    def length(self) -> int:
        """Tokens of the context."""
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        """ids[start:stop]. A task whose contexts are long makes no more of them than is read, so a stream needs no memory for the rest."""
        return self.ids[start:stop]

    def text(self, tokenizer: Tokenizer | None = None) -> str:
        """The context as text; `tokenizer` is the one that the example was made with (None: bytes, the default)."""
        return (tokenizer or default_tokenizer()).decode(self.ids.tolist())


@dataclass(frozen=True, eq=False)
class TokenExample:
    """A sequence of symbols, int64 [T], and what to predict AT each position: targets[t] = ids[t + 1], or IGNORE: not scored."""

    ids: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Published:
    """One number of the literature: accuracy in percent, as printed; `length` in tokens as the source counts them, or None."""

    model: str
    setting: str
    length: int | None
    value: float
    source: str


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """A uniform choice. Only `random.Random.random` is promised to be the same in every Python version, so digests rest on it alone."""
    return options[int(rng.random() * len(options))]


def stream(slug: str, *key: object) -> random.Random:
    """A generator of its own for each key: example i is the same whatever n is."""
    return random.Random("/".join(map(str, (slug, *key))))


class Task(ABC):
    """A benchmark.

    labels: the possible answers, empty where they are open. chance: the expected accuracy of a uniform guess among them.
    Every `sample` refuses, with a UsageError, an option it does not know, a negative seed or length, and n < 1.
    """

    slug: ClassVar[str]
    published: tuple[Published, ...] = ()
    labels: tuple[str, ...] = ()
    chance: float

    @abstractmethod
    def sample(self, *args: Any, **options: Any) -> list[Any]:
        """`sample(seed=0, n=8, length=..., ...)` -> n examples; the same arguments give the same examples."""

    @abstractmethod
    def score(self, example: Any, output: Any) -> bool:
        """Is the output right? The text that a model wrote; for symbol tasks the ids it predicted."""

    @abstractmethod
    def oracle(self, example: Any) -> Any:
        """The right output, worked out from the example's ids and question alone, by rule."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "sample" in cls.__dict__:
            cls.sample = _checked(cls.sample)


def _checked(sample: Any) -> Any:
    """`sample` with its arguments checked in the same words for every task."""
    signature = inspect.signature(sample)
    options = [name for name in signature.parameters if name != "self"]

    @functools.wraps(sample)
    def checked(self: Task, *args: Any, **given: Any) -> list[Any]:
        for name in given:
            if name not in options:
                raise unknown(f"option of {self.slug}", name, options)
        bound = signature.bind(self, *args, **given).arguments
        for name, least in (("seed", 0), ("n", 1), ("length", 0)):
            if bound.get(name) is not None:
                bound[name] = _integer(name, bound[name], least)
        return sample(**bound)

    return checked


def _integer(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise UsageError(f"{name} is {value!r}; it must be an integer >= {least}.")
    return number
