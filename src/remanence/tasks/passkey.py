"""Passkey retrieval, in the form of Landmark Attention (arXiv 2305.16300): one number in a text that repeats itself."""

from __future__ import annotations

import re

import numpy as np

from ..catalog import system
from ..errors import UsageError
from .base import Example, Fact, Task, Tokenizer, default_tokenizer, stream

TASK = (
    "Somewhere in the dull text that follows stands one important piece of information. Find it and remember it: you will be asked for it."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
QUESTION = "What is the pass key? The pass key is"
HIGHEST = 50_000
"""Pass keys are uniform over 1 .. 50000."""


@system("passkey", kind="benchmark", paper="arXiv:2305.16300", year=2023, name="Passkey retrieval")
class Passkey(Task):
    """Five lines: the task, filler, the pass key, filler, the question. Finding it needs memory and no reasoning."""

    chance = 1 / HIGHEST

    def sample(self, seed: int = 0, n: int = 8, length: int = 4096, tokenizer: Tokenizer | None = None) -> list[Example]:
        """n contexts (all lines but the question) of exactly `length` tokens; length 0 leaves the filler out. tokenizer: None for bytes.

        The filler is one repeated text, of which both parts take the beginning, cut at a uniform place; unlike in the paper's script,
        lengths and cuts are counted in tokens, not characters. Raises UsageError where the lines without filler are longer.
        """
        tokenizer = tokenizer or default_tokenizer()
        head, line_break = tokenizer.encode(TASK + "\n"), tokenizer.encode("\n")
        filler = np.array(tokenizer.encode(FILLER * 32))  # long enough that the joints, where a tokenizer may merge otherwise, are rare
        examples = []
        for i in range(n):
            # Of their own, so that key and depth are the same at every length.
            rng = stream("passkey", seed, i)
            key, depth = 1 + int(rng.random() * HIGHEST), rng.random()
            fact = f"The pass key is {key}. Remember it. {key} is the pass key."
            told = tokenizer.encode(fact + "\n")
            fixed = len(head) + len(line_break) + len(told)
            if length and length < fixed:
                raise UsageError(
                    f"length is {length}; the task and the pass key alone take {fixed} tokens, so it must be at least that, or 0."
                )
            room = max(0, length - fixed)
            before = int(depth * (room + 1))
            position = len(head) + before + len(line_break)
            ids = np.concatenate([head, np.resize(filler, before), line_break, told, np.resize(filler, room - before)]).astype(np.int64)
            examples.append(Example(ids, QUESTION, str(key), (Fact(fact, position),), (0,), ()))
        return examples

    def prompt(self, example: Example, tokenizer: Tokenizer | None = None) -> str:
        """The context and, on a line of its own, the question, which the model completes."""
        return f"{example.text(tokenizer)}\n{example.question}"

    def score(self, example: Example, output: str) -> bool:
        """Is the first integer in the output the pass key?"""
        first = re.search(r"\d+", output)
        return first is not None and int(first.group()) == int(example.answer)

    def oracle(self, example: Example, tokenizer: Tokenizer | None = None) -> str:
        """The pass key, read from the context's text."""
        found = re.search(r"The pass key is (\d+)\.", example.text(tokenizer))
        if found is None:
            raise UsageError("the context holds no pass key.")
        return found.group(1)
