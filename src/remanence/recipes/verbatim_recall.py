"""verbatim-recall: is a list of words, and its order, still there after some text? (arXiv 2210.13569)

Text of Zipf tokens in which a list of 3 to 10 words stands after a mark and, at the end, after another mark, again: the same, in another
order, or other words. `surprisal_percent` is the paper's repeat surprisal: the surprisal of the words 2 .. N of the second list in percent
of the first's, the median over the sequences and its bootstrap interval. Low means retrieval, repeat well below permute that the order is
kept. By the number of words, and by the tokens of text between the lists (`gap_from` .. `gap_to`). `accuracy`: how often the likeliest
token is the word, of the words 2 .. N of a repeated list. Published, 10 arbitrary nouns: 88 % repeated, 92 % permuted, 99 % new for a
transformer of 12 layers trained on Wikitext-103; GPT-2 is far lower on repeated lists, at every distance; an LSTM hardly below 100 %, for
the first words and short distances only, and in any order alike. To check: attention is below 10 %, a recurrence knows which words a
list had rather than their order.

`remanence train verbatim-recall`; one cell: `--mixers mamba2@state_size=64`. All decoders have as many parameters as one of attention.

What differs: the published models were trained on natural text only, where a repeated list is rare, and read English lists. Here the
training text is generated, of 128 tokens, first 16, then 32, then 64 to a sequence; half of its lists come again in order, a quarter in
another order, and after a quarter comes a new one; and only the words of the lists are learned, so that small models do in minutes. So the
figures say what a layer can hold, not what natural text teaches it. (`tasks.verbatim_stm.repeat_surprisal` measures any model on the
English lists.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..evaluate.plots import save_figure
from ..models import Model
from ..tasks.base import IGNORE
from ..tasks.symbols import Arrays
from ..tasks.verbatim_stm import CONDITIONS, batch, ratio, summary
from ._grid import Cell, Grid, grid_recipe
from ._results import Row
from .copying import EqualGrid

VOCAB, LENGTH = 128, 64
STAGES = (16, 32, LENGTH)
"""Tokens of a training sequence: a quarter of the updates each, the last takes the rest."""
WORDS = (3, 5, 7, 10)
SHARES = {"repeat": 2, "permute": 1, "novel": 1}
"""Of four training sequences."""
GAPS = ((0, LENGTH), (1, 8), (9, 24), (25, LENGTH))
"""Tokens between the lists: from, to. The first is all of them."""
MIXERS: dict[str, tuple[dict[str, Any], ...]] = {
    "attention": ({},),
    "gated-deltanet": ({},),
    "mamba2": ({"state_size": 32},),
    "flashrnn": ({"cell": "lstm", "heads": 1},),
}


def make(rng: np.random.Generator, rows: int, length: int) -> Arrays:
    """Training sequences, with lists of one length each. Targets are the words of both lists: the text is but noise."""
    words = int(rng.integers(WORDS[0], min(WORDS[-1], (length - 3) // 2) + 1))
    whole = sum(SHARES.values())
    counts = [max(1, rows * share // whole) for share in SHARES.values()]
    parts = [batch(rng, count, length, words, VOCAB, condition) for condition, count in zip(SHARES, counts, strict=True)]
    ids, targets, places = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    wanted = np.full_like(targets, IGNORE)
    np.put_along_axis(wanted, places - 1, np.take_along_axis(targets, places - 1, 1), 1)  # a word is the target one place before
    return ids, wanted


def surprisals(model: Model, seed: int, words: int, n: int) -> list[Row]:
    """Rows of every condition and gap, on n sequences a condition that depend on seed and words only."""
    rows: list[Row] = []
    for number, condition in enumerate(CONDITIONS):
        ids, targets, places = batch(np.random.default_rng([seed, words, number, 0x7E57]), n, LENGTH, words, VOCAB, condition)
        found = ratio(model, ids, targets, places)
        between = places[:, words] - places[:, words - 1] - 2  # the mark stands between, too
        for low, high in GAPS:
            chosen = (low <= between) & (between <= high)
            if chosen.any():
                some = summary(found.first[chosen], found.second[chosen])
                rows.append(
                    {"condition": condition, "gap_from": low, "gap_to": high, "sequences": int(chosen.sum())}
                    | {"surprisal_percent": some.median, "percent_low": some.low, "percent_high": some.high}
                    | {"by_position": [round(float(value), 2) for value in some.by_position]}
                )
    return rows


@torch.no_grad()
def recalled(model: Model, seed: int, words: int, n: int) -> float:
    """The fraction of the words 2 .. N of repeated lists that are the likeliest token."""
    ids, targets, places = batch(np.random.default_rng([seed, words, 0, 0x7E57]), n, LENGTH, words, VOCAB)
    logits = model(torch.from_numpy(ids).to(model.device)).logits
    assert logits is not None  # logits="all"
    at = places[:, words + 1 :] - 1
    return float((np.take_along_axis(logits.argmax(-1).cpu().numpy(), at, 1) == np.take_along_axis(targets, at, 1)).mean())


@dataclass
class Verbatim(EqualGrid):
    """A grid whose rows are surprisals by condition and gap."""

    found: dict[int, list[Row]] = field(default_factory=dict)
    """Of the cell tested last, by the number of words."""

    def test(self, model: Model, cell: Cell, size: int, seed: int, n: int) -> tuple[float, int]:
        """How much of repeated lists is recalled, and the length of the sequences."""
        self.found[size] = surprisals(model, seed, size, n) if n == self.n else []  # fewer while it trains
        return recalled(model, seed, size, n), LENGTH

    def _run(self, cell: Cell, out: Path, resume: bool, quiet: bool) -> list[Row]:
        rows = super()._run(cell, out, resume, quiet)
        return [row | more for row in rows for more in self.found[row["words"]]]


def figure(rows: list[Row], path: Path) -> None:
    """Repeat surprisal by the number of words and by the gap, at the longest lists, a column a cell."""
    cells = list(dict.fromkeys(row["memory"] for row in rows))

    def drawn(canvas: Any) -> None:
        panels = canvas.subplots(2, len(cells), squeeze=False, sharey=True)
        for column, cell in enumerate(cells):
            mine = [row for row in rows if row["memory"] == cell]
            most = max(row["words"] for row in mine)
            for condition, mark in zip(CONDITIONS, "os^", strict=True):
                by_words = [row for row in mine if row["condition"] == condition and (row["gap_from"], row["gap_to"]) == GAPS[0]]
                by_gap = [row for row in mine if row["condition"] == condition and row["words"] == most and row["gap_from"]]
                for axes, chosen, at in zip(
                    panels[:, column],
                    (by_words, by_gap),
                    ([row["words"] for row in by_words], [f"{row['gap_from']}-{row['gap_to']}" for row in by_gap]),
                ):
                    value = [row["surprisal_percent"] for row in chosen]
                    low = [max(0.0, row["surprisal_percent"] - row["percent_low"]) for row in chosen]
                    high = [max(0.0, row["percent_high"] - row["surprisal_percent"]) for row in chosen]
                    axes.errorbar(at, value, yerr=[low, high], marker=mark, capsize=3, label=condition)
            panels[0, column].set(title=cell, xlabel="words of the list")
            panels[1, column].set(xlabel=f"tokens between lists of {most}")
        panels[0, 0].set_ylabel("repeat surprisal, %")
        panels[1, 0].set_ylabel("repeat surprisal, %")
        canvas.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

    save_figure(path, drawn, width=1.5 + 3.0 * len(cells), height=6.0)


def grid(cells: list[Cell], steps: int | None, fast: bool, **where: Any) -> Grid:
    """The recipe's grid; where: seed and device. No cell stops early, so that all have read the same."""
    tested = WORDS[:2] if fast else WORDS
    return Verbatim(
        "verbatim-recall", "verbatim-stm", cells, make, VOCAB, STAGES[:1] if fast else STAGES, tested, "words", figure,
        steps or (4 if fast else 2500), n=16 if fast else 512, rows=4 if fast else 32, dim=32 if fast else 64, goal=2.0, lr=4e-3,
        stop_at=tested[-1], **where,
    )  # fmt: skip


recipe = grid_recipe(grid, MIXERS, "verbatim-recall makes its own text")
