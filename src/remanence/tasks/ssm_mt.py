"""Translation as a language model does it: source, SEP, target (Pitorro et al. 2024, arXiv 2407.05489); by length and by named entity.

The paper trains on IWSLT17, WMT14/16 and WMT23; `SSMMT(data=...)` reads such files from the user. Without files the languages are ours,
after the analyses of the paper: a random dictionary, words that change places, and named entities that are copied letter by letter. The
format, the special ids and the layer patterns are those of the public code (deep-spin/ssm-mt). COMET needs a model and is left out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..catalog import system
from ..errors import UsageError, positive
from ..models.decoder import ModelConfig
from .base import IGNORE, TokenExample, Tokenizer, default_tokenizer
from .symbols import Arrays, SymbolTask

PAD, EOS, SEP, BOS, STOP = range(5)
"""Special ids in the order of the public code, and the full stop; then come the pieces of names, the target words, the source words."""
FIRST = STOP + 1
WORDS, PIECES = 64, 32
MODIFIERS = 4
"""One source word in as many is a modifier: it stands before its noun in the source, and behind it in the target."""
NAME, LONGEST = 0.15, 3
"""How often a unit is a name, and the most pieces of one."""

EDGES = ".,;:!?()[]{}\"'«»„“”‚‘’"
"""What may stand at the edges of a word and is not of it."""

K = TypeVar("K", bound=Hashable)
File = str | PathLike[str]


def dictionary(words: int = WORDS, language: int = 0) -> np.ndarray:
    """The target word, int64 [words] in 0 .. words - 1, of each source word: a permutation, the same in every example of a language."""
    return np.random.default_rng(language).permutation(words)


def batch(
    rng: np.random.Generator, n: int, length: int = 16, sentences: int = 1, words: int = WORDS, pieces: int = PIECES, language: int = 0
) -> Arrays:
    """n pairs -> ids and targets, int64 [n, 2 sentences length + 2]: source, SEP, target, EOS; the loss is on the target side alone.

    Each sentence has `length` tokens with its full stop, and a pair has `sentences` of them, one after the other (the paper's concatenated
    paragraphs have 5 or 10). A unit is a word or, with probability NAME and never twice in a row, a name of 1 .. LONGEST random pieces; the
    last name is cut at the full stop. In the target the words are `dictionary`'s, names are copied, and a modifier (the first words //
    MODIFIERS) that stands before a noun or a name changes places with it. Ids: see FIRST; words start at FIRST + pieces.
    """
    positive(n=n, length=length, sentences=sentences, words=words, pieces=pieces)
    if length < 2 or words < MODIFIERS:
        raise UsageError(f"length={length}, words={words}; a sentence has a token and a full stop, and a language {MODIFIERS} words.")
    rows, size = n * sentences, length - 1
    name = rng.random((rows, size)) < NAME  # of each unit; a row has at most `size` units
    name[:, 1:] &= ~name[:, :-1]
    sizes = np.where(name, rng.integers(1, LONGEST + 1, (rows, size)), 1)
    word = rng.integers(words, size=(rows, size))
    starts = sizes.cumsum(1) - sizes
    begins = np.zeros((rows, size + LONGEST * size), np.int64)
    np.put_along_axis(begins, starts, 1, 1)
    unit = begins[:, :size].cumsum(1) - 1  # of each token
    piece = FIRST + rng.integers(pieces, size=(rows, size))
    is_name, said = np.take_along_axis(name, unit, 1), np.take_along_axis(word, unit, 1)
    target_word = FIRST + pieces
    source = np.where(is_name, piece, target_word + words + said)
    target = np.where(is_name, piece, target_word + dictionary(words, language)[said])
    modifier = ~name & (word < words // MODIFIERS)
    swap = modifier[:, :-1] & ~modifier[:, 1:] & (starts[:, 1:] < size)
    place = np.tile(np.arange(size), (rows, 1))
    place[:, :-1] += swap
    place[:, 1:] -= swap
    target = np.take_along_axis(target, np.take_along_axis(place, unit, 1).argsort(1, kind="stable"), 1)
    texts = [np.pad(text, ((0, 0), (0, 1)), constant_values=STOP).reshape(n, -1) for text in (source, target)]
    ids = np.concatenate([texts[0], np.full((n, 1), SEP), texts[1], np.full((n, 1), EOS)], 1)
    return ids, masked(ids, SEP)


def masked(ids: np.ndarray, sep: int) -> np.ndarray:
    """What to predict at each position of source, sep, target, end: the next id from `sep` on, IGNORE before and at the end."""
    targets = np.full_like(ids, IGNORE)
    at = int((ids[0] if ids.ndim == 2 else ids).tolist().index(sep))
    targets[..., at:-1] = ids[..., at + 1 :]
    return targets


class Pair(NamedTuple):
    """A text and its translation."""

    source: str
    target: str


def read_parallel(source: File, target: File | None = None) -> list[Pair]:
    """The pairs of two text files whose lines belong together, or of one TSV file (source, tab, target); pairs of blank lines are skipped.

    Raises UsageError, naming the file, if one is missing, is not UTF-8, is empty, has another number of lines, or a line has no partner.
    """
    first = _lines(source)
    if target is None:
        rows = [line.split("\t") for line in first]
        for number, row in enumerate(rows, start=1):
            if len(row) != 2 and row != [""]:
                raise UsageError(f"line {number} of {source} has {len(row)} columns; it must be a source, a tab and a target.")
        pairs = [Pair(row[0].strip(), row[-1].strip()) if len(row) == 2 else Pair("", "") for row in rows]
    else:
        second = _lines(target)
        if len(first) != len(second):
            raise UsageError(f"{source} has {len(first)} lines and {target} {len(second)}; line by line, one must translate the other.")
        pairs = [Pair(a.strip(), b.strip()) for a, b in zip(first, second)]
    for number, pair in enumerate(pairs, start=1):
        if bool(pair.source) != bool(pair.target):
            side, file = ("target", target or source) if pair.source else ("source", source)
            raise UsageError(f"line {number} of {file} has no {side}; both sides must say something, or both nothing.")
    pairs = [pair for pair in pairs if pair.source]
    if not pairs:
        raise UsageError(f"{source} holds no pair; it must hold one.")
    return pairs


def _lines(file: File) -> list[str]:
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{path} does not exist; it must be a text file with one sentence a line.")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # not splitlines: U+2028 and the like are letters of a sentence
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text (byte {error.start}).") from None
    return [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def concatenated(pairs: Sequence[Pair], sentences: int) -> list[Pair]:
    """Paragraphs of `sentences` pairs that follow each other in the file, joined by spaces on either side; the last may be shorter.

    The paper shifts its training data to longer sequences so, with 5 and with 10.
    """
    positive(sentences=sentences)
    groups = (pairs[i : i + sentences] for i in range(0, len(pairs), sentences))
    return [Pair(" ".join(pair.source for pair in group), " ".join(pair.target for pair in group)) for group in groups]


def encoded(pair: Pair, tokenizer: Tokenizer | None = None) -> TokenExample:
    """source, SEP, target, EOS as ids, int64 [T], and its targets; the special ids are behind the tokenizer's: vocab_size + PAD, EOS ..."""
    tokenizer = tokenizer or default_tokenizer()
    base = tokenizer.vocab_size
    ids = np.array([*tokenizer.encode(pair.source), base + SEP, *tokenizer.encode(pair.target), base + EOS], np.int64)
    return TokenExample(ids, masked(ids, base + SEP))


def tokens_13a(text: str) -> list[str]:
    """Words as mteval-v13a, sacrebleu's default, has them: punctuation stands alone, but for . and , between digits."""
    for old, new in (("<skipped>", ""), ("-\n", ""), ("\n", " "), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(old, new)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def bleu(outputs: Sequence[str], references: Sequence[str | Sequence[str]], words: str = "13a", own: bool = False) -> float:
    """Corpus BLEU, 0 .. 100, of four n-gram orders (Papineni et al. 2002), by sacrebleu if it is installed; else, or with `own`, by us.

    references: one text, or several, for each output. words: "13a", or "none" for text that is split by spaces alone. As sacrebleu has it:
    clipped counts over the corpus, the reference of nearest length (the shorter one of two), and an order without a match counts 1 / 2,
    1 / 4 ... of one ("exp"). Raises UsageError if there are not as many references as outputs.
    """
    if words not in ("13a", "none"):
        raise UsageError(f"words is {words!r}; it may be '13a' or 'none'.")
    several = [[given] if isinstance(given, str) else list(given) for given in references]
    if isinstance(outputs, str) or not len(outputs) or len(several) != len(outputs) or not all(several):
        raise UsageError(f"there are {len(outputs)} outputs and {len(several)} references; there must be a list of them, one for each.")
    if find_spec("sacrebleu") is not None and not own:
        from sacrebleu import corpus_bleu  # type: ignore[import-not-found]

        most = max(map(len, several))
        columns = [[given[i] if i < len(given) else None for given in several] for i in range(most)]
        return float(corpus_bleu(list(outputs), columns, tokenize=words).score)  # type: ignore[arg-type]
    split: Callable[[str], list[str]] = tokens_13a if words == "13a" else str.split
    right, total = [0] * 4, [0] * 4
    said = wanted = 0
    for output, given in zip(outputs, several):
        got, refs = split(output.rstrip()), [split(text.rstrip()) for text in given]
        said += len(got)
        wanted += min((abs(len(ref) - len(got)), len(ref)) for ref in refs)[1]
        for n in range(4):
            counts, most_of = _grams(got, n + 1), Counter()
            for ref in refs:
                most_of |= _grams(ref, n + 1)
            right[n] += sum((counts & most_of).values())
            total[n] += sum(counts.values())
    if not any(right) or not all(total):
        return 0.0
    smooth, logs = 1.0, 0.0
    for hits, of in zip(right, total):
        smooth = smooth if hits else smooth * 2
        logs += math.log(hits / of if hits else 1 / (smooth * of)) / 4
    return 100 * math.exp(logs + min(0.0, 1 - wanted / said))


def _grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n))))


def names_of(pair: Pair) -> set[str]:
    """The named entities of a target that its source has letter by letter: what a translation is asked to recall.

    The paper finds them with NLTK's tagger; ours are runs of words of two letters or more that start with a capital inside a sentence.
    """
    found: list[str] = []
    words = pair.target.split()
    inside = False  # a name that may go on
    for before, word in zip([".", *words], words):
        bare = word.strip(EDGES)
        if len(bare) > 1 and bare[0].isupper() and before[-1] not in ".!?:":
            if inside and before[-1] not in EDGES and word[0] not in EDGES:
                found[-1] += " " + bare
            else:
                found.append(bare)
            inside = True
        else:
            inside = False
    return {name for name in found if name in pair.source}


@dataclass(frozen=True)
class Recall:
    """Was a named entity of a source of `length` tokens in the output?"""

    name: Hashable
    length: int
    right: bool


def recall_by(recalls: Iterable[Recall], key: Callable[[Recall], K]) -> dict[K, tuple[float, int]]:
    """{key: (the share of names that were recalled, how many there were)}, in the order of the keys.

    By length: `key=lambda r: r.length`. By how often the training data had the name, the paper's other axis: `key=lambda r: seen[r.name]`.
    """
    groups: dict[K, list[bool]] = {}
    for recall in recalls:
        groups.setdefault(key(recall), []).append(recall.right)
    return {name: (sum(groups[name]) / len(groups[name]), len(groups[name])) for name in sorted(groups)}  # type: ignore[type-var]


@dataclass(frozen=True)
class Row:
    """The translations of sources of least <= tokens < below: exact matches and recalled names as shares (names None: there were none)."""

    least: int
    below: float
    n: int
    exact: float
    bleu: float
    names: float | None


MODELS = ("mamba", "mamba-mha", "mamba-local", "retnet", "transformer")


def mt_config(
    model: str, vocab: int, dim: int | None = None, depth: int | None = None, where: str | None = None, window: int = 64
) -> ModelConfig:
    """The configuration of a decoder-only model of the paper, for `Decoder`; its prompt is source, SEP. Defaults are the public code's.

    mamba: `depth` (24) blocks without feed-forward, dim 610. mamba-mha: the same, dim 624, with attention in the place of some blocks;
    where: "late", two of them, at half and at the end (the 12th and 24th: the code's reverse_h3), "early" (the 2nd and 12th: h3) or
    "interleaved", every second one. mamba-local: attention in a sliding window of 64. retnet: 12 blocks, 512. transformer: LLaMA's,
    12 blocks, 496, feed-forward 4. All with tied embeddings and 8 heads (retnet 4); attention has rotary positions. The models with an
    encoder are models/encdec.py.
    """
    sizes = {"mamba": (610, 24), "mamba-mha": (624, 24), "mamba-local": (624, 24), "retnet": (512, 12), "transformer": (496, 12)}
    if model not in sizes:
        raise UsageError(f"model is {model!r}; it may be {', '.join(MODELS)}.")
    hybrid = model in ("mamba-mha", "mamba-local")
    if where is not None and not hybrid:
        raise UsageError(f"where is {where!r}; a {model} is of one kind of block, so leave it out.")
    dim, depth = dim or sizes[model][0], depth or sizes[model][1]
    positive(dim=dim, depth=depth, window=window)
    if model == "retnet":
        return ModelConfig(vocab=vocab, dim=dim, layers=[{"mixer": "retnet", "heads": 4, "times": depth}])
    if model == "transformer":
        return ModelConfig(vocab=vocab, dim=dim, layers=[{"mixer": "attention", "heads": 8, "times": depth}], ffn=4)
    at: set[int] = set()
    if hybrid:
        half = depth // 2 - 1  # the 12th of 24
        places = {"late": {half, depth - 1}, "early": {1, half}, "interleaved": set(range(1, depth, 2))}
        where = where or "interleaved"
        if where not in places or depth < 4:
            raise UsageError(f"where={where!r}, depth={depth}; they may be {', '.join(places)}, and 4 blocks or more.")
        at = places[where]
    attention: dict[str, Any] = {"mixer": "attention", "heads": 8} | ({"window": window} if model == "mamba-local" else {})
    return ModelConfig(vocab=vocab, dim=dim, layers=[attention if i in at else {"mixer": "mamba"} for i in range(depth)], ffn=0)


@system("ssm-mt", kind="benchmark", paper="arXiv:2407.05489", year=2024, name="State-space models for translation", aliases=("mamba-mt",))
class SSMMT(SymbolTask):
    """Say it in the other language, names letter by letter. A state must keep all names of a paragraph, attention looks back.

    words, pieces, language: of the synthetic languages, see `batch`. data: instead, a TSV file or two aligned files, see `read_parallel`,
    in the ids of `tokenizer` (bytes). Our expectation: a recurrent decoder recalls fewer names than a hybrid in texts longer than learnt.
    """

    batch = staticmethod(batch)

    def __init__(
        self,
        words: int = WORDS,
        pieces: int = PIECES,
        language: int = 0,
        data: File | tuple[File, File] | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        positive(words=words, pieces=pieces)
        self.pairs = None if data is None else read_parallel(*data) if isinstance(data, tuple) else read_parallel(data)
        self.tokenizer = tokenizer or default_tokenizer()
        self.languages = {"words": words, "pieces": pieces, "language": language}
        self.base = 0 if self.pairs is None else self.tokenizer.vocab_size
        self.vocab_size = FIRST + pieces + 2 * words if self.pairs is None else self.base + FIRST
        self.chance = 1 / (2 + pieces + words if self.pairs is None else self.base + 1)
        """Of a uniform guess at a position, of what a target may hold: full stop, EOS, pieces and target words; for files any id or EOS."""

    def sample(self, seed: int = 0, n: int = 8, length: int | None = None, sentences: int = 1) -> list[TokenExample]:
        """n pairs. length: tokens of a sentence (16); with files, the most bytes or tokens of an example, None for any.

        sentences: how many are concatenated. With files the n are different as far as there are so many; UsageError if all are too long.
        """
        rng = np.random.default_rng(seed)
        if self.pairs is None:
            return self._examples(batch(rng, n, 16 if length is None else length, sentences, **self.languages))
        paragraphs = concatenated(self.pairs, sentences)
        found: list[TokenExample] = []
        for i in rng.permutation(len(paragraphs)).tolist():
            example = encoded(paragraphs[i], self.tokenizer)
            found += [example] if length is None or len(example.ids) <= length else []
            if len(found) == n:
                break
        if not found:
            raise UsageError(f"length is {length}; every example of the files has more tokens.")
        return [found[i % len(found)] for i in range(n)]

    def sides(self, example: TokenExample) -> tuple[np.ndarray, np.ndarray]:
        """The ids of source and target, without SEP and EOS."""
        at = example.ids.tolist().index(self.base + SEP)
        return example.ids[:at], example.ids[at + 1 : -1]

    def prompt(self, example: TokenExample) -> np.ndarray:
        """What a model is given to translate: source, SEP."""
        return example.ids[: len(self.sides(example)[0]) + 1]

    def oracle(self, example: TokenExample) -> np.ndarray:
        """The scored ids, by rule: dictionary, changed places, copies. What is read from files has no rule."""
        if self.pairs is not None:
            raise UsageError("this example was read from a file; its translation has no rule.")
        words, pieces = self.languages["words"], self.languages["pieces"]
        new, first = dictionary(words, self.languages["language"]).tolist(), FIRST + pieces
        units: list[list[int]] = []  # a name is one unit
        for token in self.sides(example)[0].tolist():
            if FIRST <= token < first and units and FIRST <= units[-1][0] < first:
                units[-1].append(token)
            else:
                units.append([token])
        said: list[int] = []
        waiting: list[int] = []
        for unit in units:
            word = unit[0] - first - words
            if 0 <= word < words // MODIFIERS:
                said += waiting
                waiting = [first + new[word]]
            else:
                now = [first + new[word]] if word >= 0 else unit
                said += waiting + now if unit == [STOP] else now + waiting
                waiting = []
        return np.array([*said, EOS])

    def text(self, ids: Sequence[int] | np.ndarray) -> str:
        """What a model wrote, up to EOS: as text for files, else the ids with spaces between."""
        written = np.asarray(ids).tolist()
        end = self.base + EOS
        written = written[: written.index(end)] if end in written else written
        if self.pairs is None:
            return " ".join(map(str, written))
        return self.tokenizer.decode([i for i in written if i < self.base])

    def recalls(self, example: TokenExample, output: Sequence[int] | np.ndarray) -> list[Recall]:
        """Which names of the source stand in the output (ids as a model wrote them, EOS or not), each once, as the paper counts them."""
        source, target = self.sides(example)
        said = self.text(output)
        if self.pairs is not None:
            pair = Pair(self.text(source), self.text(target))
            return [Recall(name, len(source), name in said) for name in sorted(names_of(pair))]
        pattern = "".join("n" if FIRST <= i < FIRST + self.languages["pieces"] else "w" for i in source.tolist())
        found = sorted({self.text(source[run.start() : run.end()]) for run in re.finditer("n+", pattern)})
        return [Recall(name, len(source), f" {name} " in f" {said} ") for name in found]

    def report(
        self,
        examples: Sequence[TokenExample],
        outputs: Sequence[Sequence[int] | np.ndarray],
        edges: Sequence[int] = (0, 16, 32, 64, 128, 256),
    ) -> list[Row]:
        """The paper's figures as rows: quality and recalled names by the length of the source, in bins [edges[i], edges[i + 1]), the last
        one open. outputs: the ids that a model wrote after the prompt. Bins without examples are left out.
        """
        if len(examples) != len(outputs):
            raise UsageError(f"there are {len(examples)} examples and {len(outputs)} outputs; there must be as many.")
        if list(edges) != sorted(set(edges)) or not edges:
            raise UsageError(f"edges are {list(edges)}; they must increase.")
        rows = []
        for least, below in zip(edges, [*edges[1:], math.inf]):
            part = [(e, o) for e, o in zip(examples, outputs) if least <= len(self.sides(e)[0]) < below]
            if not part:
                continue
            said, wanted = [self.text(o) for _, o in part], [self.text(self.sides(e)[1]) for e, _ in part]
            right = [recall.right for e, o in part for recall in self.recalls(e, o)]
            rows.append(
                Row(
                    least, below, len(part), sum(a == b for a, b in zip(said, wanted)) / len(part),
                    bleu(said, wanted, "none" if self.pairs is None else "13a"), sum(right) / len(right) if right else None,
                )
            )  # fmt: skip
        return rows
