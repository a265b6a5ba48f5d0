"""Minimal pairs: does a model give the sentence that is right more probability than one that differs in a word? (BLiMP, arXiv 1912.00582)

Official BLiMP files are read by `read_blimp`; `agreement` makes pairs of its own, of one kind: the number of a verb with nouns in between.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UsageError, positive
from ..models import Model
from ..span import Span
from ..tasks.base import Tokenizer, pick, stream

NOUNS = ("author", "pilot", "farmer", "teacher", "driver", "singer", "doctor", "guard", "lawyer", "baker", "sailor", "painter")
VERBS = ("laughs", "sleeps", "waits", "swims", "smiles", "works", "runs", "sings", "writes", "walks")
LINKS = ("near", "behind", "beside", "with", "above", "opposite")


@dataclass(frozen=True)
class Pair:
    """Two sentences that differ little, of which `good` is right. paradigm: what they test, the UID of a BLiMP file."""

    good: str
    bad: str
    paradigm: str


def agreement(seed: int = 0, n: int = 100, attractors: int = 1) -> list[Pair]:
    """n pairs such as "the pilots near the guard laugh" / "... laughs": subject and verb agree over `attractors` nouns of the other number.

    Singular and plural subjects alternate: always taking one form of the verb is right half the time. A seed always gives the same pairs.
    """
    positive(n=n)
    if attractors < 0:
        raise UsageError(f"attractors is {attractors}; it must be >= 0.")
    pairs = []
    for index in range(n):
        rng = stream("agreement", seed, attractors, index)
        plural = index % 2 == 1
        words = ["the", pick(rng, NOUNS) + "s" * plural]
        for _ in range(attractors):
            words += [pick(rng, LINKS), "the", pick(rng, NOUNS) + "s" * (not plural)]
        start, verb = " ".join(words), pick(rng, VERBS)
        forms = (verb.removesuffix("s"), verb) if plural else (verb, verb.removesuffix("s"))
        pairs.append(Pair(f"{start} {forms[0]}", f"{start} {forms[1]}", f"agreement_{attractors}_attractors"))
    return pairs


def read_blimp(path: str | Path) -> list[Pair]:
    """The pairs of an official BLiMP file, one JSON object a line (sentence_good, sentence_bad, UID), or of all .jsonl files of a folder.

    Raises UsageError, naming file and line, on anything else.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise UsageError(f"{path} is not a file and not a folder of .jsonl files; expected BLiMP's data.")
    pairs = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                pairs.append(Pair(item["sentence_good"], item["sentence_bad"], item.get("UID", file.stem)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(f"{file}, line {number} is not a pair of BLiMP ({type(error).__name__}: {error}).") from error
    return pairs


@torch.no_grad()
def log_probs(model: Model, rows: Sequence[Sequence[int]], start: int | None = None) -> Tensor:
    """sum_t log p(token t | those before) of each row of ids, [B] float32 at least. Rows may differ in length.

    start: an id put before every row (a "bos"); without one a row's first token is read and not scored. Raises UsageError on a row of
    which nothing would be scored.
    """
    rows = [list(row) if start is None else [start, *row] for row in rows]
    if not rows or min(map(len, rows)) < 2:
        raise UsageError("a sentence has no token to score; it needs two, or one and a `start`.")
    lengths = [len(row) for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long, device=model.device)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, device=ids.device)
    span = Span.from_lengths(lengths, ids.shape[1], device=ids.device)
    logits = model(ids, span=span).logits
    assert logits is not None and span.valid is not None
    log_p = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return log_p.gather(2, ids[:, 1:, None])[..., 0].masked_fill(~span.valid[:, 1:], 0).sum(1)


def minimal_pairs(model: Model, tokenizer: Tokenizer, pairs: Sequence[Pair], start: int | None = None, rows: int = 64) -> dict[str, float]:
    """The fraction of pairs whose good sentence has the larger sum of log p (equal is wrong), by paradigm, and over all as "all".

    start: see `log_probs`. The model is left in the mode it is in; put it into eval mode first. rows: sentences to a batch.
    """
    positive(rows=rows)
    if not pairs:
        raise UsageError("there are no pairs to score.")
    sentences = [tokenizer.encode(text) for pair in pairs for text in (pair.good, pair.bad)]
    scores = torch.cat([log_probs(model, sentences[at : at + rows], start) for at in range(0, len(sentences), rows)])
    right: dict[str, list[bool]] = {}
    for pair, better in zip(pairs, (scores[::2] > scores[1::2]).tolist(), strict=True):
        right.setdefault(pair.paradigm, []).append(better)
    everything = [better for group in right.values() for better in group]
    return {name: sum(group) / len(group) for name, group in {**right, "all": everything}.items()}
