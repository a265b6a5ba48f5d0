"""Benchmarks: data with an exact generator, a scorer, an oracle and the published numbers."""

from .assoc_retrieval import AssocRetrieval
from .babi import BabiGen, Story, read_official, stories, write_official
from .babilong import BABILong
from .base import Example, Fact, Published, Task, TokenExample, Tokenizer
from .passkey import Passkey

__all__ = [
    "AssocRetrieval", "BABILong", "BabiGen", "Example", "Fact", "Passkey", "Published", "Story", "Task", "TokenExample", "Tokenizer",
    "read_official", "stories", "write_official",
]  # fmt: skip
