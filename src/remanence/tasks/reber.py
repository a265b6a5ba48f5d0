"""Embedded Reber strings: a small grammar inside another, whose last choice repeats the first (benchmark of arXiv 2407.20601)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..catalog import system
from .base import IGNORE, TokenExample, pick, stream
from .symbols import SymbolTask

SYMBOLS = "BTPSXVE"
"""The ids 0 .. 6."""
ACCEPT, REJECT = 7, 8
VOCAB_SIZE = 9
GRAMMAR: tuple[dict[str, int], ...] = (
    {"B": 1},
    {"T": 2, "P": 3},
    {"S": 2, "X": 4},
    {"T": 3, "V": 5},
    {"X": 3, "S": 6},
    {"P": 4, "V": 6},
    {"E": 7},
)
"""The Reber grammar: from each node, the symbol of every edge and the node that it leads to; node 7 is the end."""
AGAIN = {4: "X", 5: "P"}
"""The nodes that one may leave for the end, and the symbol that does not."""
SHORTEST = 9
"""Tokens of the shortest embedded string."""


def reber(rng: random.Random, least: int = 0) -> str:
    """A string of the grammar; edges are taken with equal chances, but the end is not approached before `least` symbols are certain."""
    text, node = "", 0
    while node < len(GRAMMAR):
        certain = len(text) + 2  # what the string will have if it ends now
        symbol = AGAIN[node] if node in AGAIN and certain < least else pick(rng, tuple(GRAMMAR[node]))
        text, node = text + symbol, GRAMMAR[node][symbol]
    return text


def accepts_reber(text: str) -> bool:
    """Is it a string of the grammar?"""
    node = 0
    for symbol in text:
        if node == len(GRAMMAR) or symbol not in GRAMMAR[node]:
            return False
        node = GRAMMAR[node][symbol]
    return node == len(GRAMMAR)


def embedded(rng: random.Random, least: int = 0) -> str:
    """B c (Reber string) c E with c = T or P, the same twice."""
    c = pick(rng, "TP")
    return f"B{c}{reber(rng, least - 4)}{c}E"


def accepts(text: str) -> bool:
    """Is it an embedded Reber string?"""
    return len(text) >= SHORTEST and text[0] + text[-1] == "BE" and text[1] == text[-2] in "TP" and accepts_reber(text[2:-2])


def corrupted(rng: random.Random, text: str) -> str:
    """The string with one symbol changed so that it is not accepted: half the time the one that repeats the first choice."""
    if rng.random() < 0.5:
        return text[:-2] + ("P" if text[-2] == "T" else "T") + text[-1]
    while True:
        at = int(rng.random() * len(text))
        changed = text[:at] + pick(rng, SYMBOLS.replace(text[at], "")) + text[at + 1 :]
        if not accepts(changed):
            return changed


def encode(text: str) -> list[int]:
    return [SYMBOLS.index(symbol) for symbol in text]


def decode(ids: Sequence[int]) -> str:
    return "".join(SYMBOLS[i] for i in ids)


@system("embedded-reber", kind="benchmark", paper="arXiv:2407.20601", year=2021, name="Embedded Reber grammar")
class EmbeddedReber(SymbolTask):
    """B c ... c E: which of T and P must come again, after a string of any length that says nothing about it? Or: is the string valid?"""

    vocab_size = VOCAB_SIZE
    labels = ("T", "P")
    chance = 0.5

    def sample(self, seed: int = 0, n: int = 8, length: int | None = None, acceptance: bool = False) -> list[TokenExample]:
        """n strings, of at least `length` symbols if given (and seldom many more).

        The one scored position is that before the second c. acceptance: half of the strings are `corrupted`, each is followed by ACCEPT
        or REJECT, and that is scored, at its last symbol; which corruptions there are is our reading.
        """
        examples = []
        for i in range(n):
            rng = stream(self.slug, seed, length, acceptance, i)
            text = embedded(rng, length or 0)
            valid = not acceptance or rng.random() < 0.5
            ids = np.array(encode(text if valid else corrupted(rng, text)) + ([ACCEPT if valid else REJECT] if acceptance else []))
            targets = np.full_like(ids, IGNORE)
            at = len(ids) - (2 if acceptance else 3)
            targets[at] = ids[at + 1]
            examples.append(TokenExample(ids, targets))
        return examples

    def oracle(self, example: TokenExample) -> Any:
        """The predictions at every position [T], 0 where nothing is scored."""
        output = np.zeros_like(example.ids)
        if example.ids[-1] in (ACCEPT, REJECT):
            output[-2] = ACCEPT if accepts(decode(example.ids[:-1].tolist())) else REJECT
        else:
            output[-3] = example.ids[1]
        return output
