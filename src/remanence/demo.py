"""The demonstration: a text with facts planted along it is read once, at constant memory; now and then the place of every person is
asked of the memory, and of the same model that sees only the last tokens."""

from __future__ import annotations

import json
import math
import random
import re
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .corpus import default_haystack, iter_text
from .errors import FileError, UsageError, positive
from .evaluate import plots
from .evaluate.longrange import WINDOW, PeakMemory, Row, by_distance, short, stream
from .evaluate.report import Section, write_report
from .files import write_text
from .inspect import Recall
from .models import Model
from .session import PIECE, Session, answer, load_reader, shipped
from .tasks.babi import ACTORS, PHRASES, ROOMS
from .tasks.babilong import sentences
from .tokenizers import Tokenizer
from .train.environment import environment

QUESTIONS = 32
"""Places along the stream where everyone is asked for."""
SHORTEST, LONGEST = 40, 2000
"""Characters of a sentence of the text: shorter ones are joined to the next, longer ones are cut."""
LAP = 1 << 24
"""Tokens of a text that are kept, so that a second lap need not tokenise it again (64 MiB); a longer text is tokenised on every lap."""
LEDGER = 4096
"""Written tokens of the book whose words are kept, to be shown."""
SHOWN = 10
"""Tokens or facts shown of what an answer attended to."""

_TOLD = re.compile(rf"\b(?:{'|'.join(ACTORS)}) (?:{'|'.join(PHRASES['move'])}) the (?:{'|'.join(ROOMS)})\b")


@dataclass
class Planted:
    """A fact in the stream: who went where, the position of its first token, how many it has, and the strongest gate that wrote it."""

    actor: str
    room: str
    text: str
    position: int
    length: int
    weight: float | None = None


@dataclass(frozen=True)
class Asked:
    """One question: where in the stream, whom, the right answer, what memory and control said, and the tokens since the fact began."""

    position: int
    actor: str
    room: str
    distance: int
    memory: str
    window: str
    fact: Planted = field(repr=False)

    @property
    def right(self) -> bool:
        return self.memory == self.room

    @property
    def window_right(self) -> bool:
        return self.window == self.room


class Noise:
    """The text, sentence by sentence as token ids, over and over. A sentence that itself tells of one of the four people is left out."""

    def __init__(self, tokenizer: Tokenizer, path: Path | None):
        self.tokenizer, self.path, self.laps, self.left_out = tokenizer, path, 0, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        kept: list[np.ndarray] | None = []
        size = 0
        while True:
            tokens = 0
            for text in self._sentences():
                if _TOLD.search(text):
                    self.left_out += self.laps == 0
                    continue
                ids = np.array(self.tokenizer.encode(" " + text), np.int32)
                tokens += len(ids)
                size += len(ids)
                if kept is not None:
                    kept.append(ids)
                    kept = kept if size <= LAP else None
                yield ids
            if not tokens:
                raise UsageError(f"{self.path} holds no text but moves of {', '.join(ACTORS)}; it must have some other.")
            self.laps += 1
            while kept is not None:
                yield from kept
                self.laps += 1

    def _sentences(self) -> Iterator[str]:
        """Sentences of SHORTEST to LONGEST characters, in bounded memory whatever the size of the file."""
        held = ""
        for piece in [default_haystack()] if self.path is None else iter_text(self.path):
            *whole, held = sentences(held + piece) or [""]
            yield from _sized(whole)
        yield from _sized([held])


def _sized(parts: Sequence[str]) -> Iterator[str]:
    short_ones = ""
    for part in parts:
        text = f"{short_ones} {part}".strip()
        short_ones = text if len(text) < SHORTEST else ""
        if not short_ones:
            yield from (text[start : start + LONGEST] for start in range(0, len(text), LONGEST))
    if short_ones:
        yield short_ones


def facts(rng: random.Random, total: int) -> Iterator[tuple[int, str, str, str]]:
    """(tokens of text before it, actor, room, sentence) for ever. Gaps are log-uniform from 16 to total / 8, so every distance occurs."""
    rooms: dict[str, str] = {}
    while True:
        actor = rng.choice(list(ACTORS))
        room = rng.choice([room for room in ROOMS if room != rooms.get(actor)])
        rooms[actor] = room
        gap = math.exp(rng.uniform(math.log(16), math.log(max(total / 8, 64))))
        yield int(gap), actor, room, f"{actor} {rng.choice(PHRASES['move'])} the {room}."


@dataclass
class Result:
    """What a run found.

    points: cost by position. written: share of the text's own tokens that were written into the memory. attended: of one answer, what its
    read came from, (text, share, role) with the largest first. The last two are None where `inspect.Recall` cannot follow the model.
    """

    asked: list[Asked]
    planted: list[Planted]
    points: list[Row]
    tokens: int
    seconds: float
    state_bytes: int
    peak_rss_mb: float
    laps: int
    left_out: int
    written: float | None
    attended: tuple[Asked, list[tuple[str, float, str]]] | None


def follow(model: Model) -> Recall | None:
    """The ledger of a model's memory, or None if it has no memory whose reads can be traced."""
    try:
        return Recall(model)
    except UsageError:
        return None


class Reader:
    """Feeds a Session in calls of 4096 tokens and keeps the account: time, the last tokens for the control, the writes."""

    def __init__(self, model: Model, tokenizer: Tokenizer, total: int, progress: Callable[[int, int], None] | None):
        self.session, self.total, self.progress = Session(model, tokenizer), total, progress
        self.held: list[np.ndarray] = []
        self.size = 0
        self.last = np.empty(0, np.int64)
        self.recent: deque[Planted] = deque()  # facts whose tokens may still be in what is held
        self.points: list[Row] = []
        self.seconds = self.marked = 0.0
        self.recall = follow(model)
        self.counted = self.written = 0
        self.snippets: dict[int, str] = {}  # position -> the words up to a written token of the book

    def add(self, ids: np.ndarray, fact: Planted | None = None) -> None:
        self.held.append(ids)
        self.size += len(ids)
        if fact:
            self.recent.append(fact)
        if self.size >= PIECE:
            self.flush(whole=False)

    @property
    def position(self) -> int:
        return self.session.tokens + self.size

    def flush(self, whole: bool = True) -> None:
        """Read what is held; unless `whole`, only as far as it fills calls of 4096."""
        if not self.held:
            return
        ids = np.concatenate(self.held).astype(np.int64)
        end = len(ids) if whole else len(ids) // PIECE * PIECE
        self.held, self.size = ([ids[end:]], len(ids) - end) if end < len(ids) else ([], 0)
        for start in range(0, end, PIECE):
            self._read(ids[start : min(start + PIECE, end)])

    def _read(self, ids: np.ndarray) -> None:
        first = self.session.tokens
        with self.recall or nullcontext():
            start = time.perf_counter()
            self.session.feed(torch.from_numpy(ids))
            self.seconds += time.perf_counter() - start
        before, self.last = self.last, np.concatenate([self.last, ids])[-WINDOW:]
        if self.recall:
            self._account(first, ids, before[-12:])
        if self.session.tokens - (self.points[-1]["tokens"] if self.points else 0) >= max(PIECE, self.total // 128):
            self.mark()
        if self.progress:
            self.progress(len(ids), self.session.state_bytes)

    def mark(self) -> None:
        """A point of the curve of cost; there are 128 of them however long the stream."""
        before = self.points[-1]["tokens"] if self.points else 0
        read = self.session.tokens - before
        each = 1000 * (self.seconds - self.marked) / read
        self.points.append({"tokens": self.session.tokens, "seconds_per_1k": each, "state_bytes": self.session.state_bytes})
        self.marked = self.seconds

    def _account(self, first: int, ids: np.ndarray, before: np.ndarray) -> None:
        """Give each fact its strongest write, and count the writes of the rest. ids: of this call; before: the tokens before them."""
        assert self.recall is not None
        book: set[int] = set()
        for ledger in self.recall.ledgers:
            for write in takewhile(lambda write: write.position >= first, reversed(ledger)):
                fact = next((f for f in self.recent if f.position <= write.position < f.position + f.length), None)
                if fact:
                    fact.weight = max(fact.weight or 0.0, float(write.beta.max()))
                else:
                    book.add(write.position)
        near = np.concatenate([before, ids])
        for position in book if len(self.snippets) < LEDGER else ():
            end = position - first + len(before) + 1
            self.snippets[position] = " ".join(self.session.tokenizer.decode(near[max(0, end - 12) : end].tolist()).split())
        inside = sum(max(0, min(f.position + f.length, first + len(ids)) - max(f.position, first)) for f in self.recent)
        while self.recent and self.recent[0].position + self.recent[0].length <= first + len(ids):
            self.recent.popleft()
        self.counted += len(ids) - inside
        self.written += len(book)

    def attended(self, one: Asked, planted: Sequence[Planted]) -> list[tuple[str, float, str]]:
        """What the read behind an answer, asked now, came from: (text, share, role), the largest first, a fact's tokens together."""
        assert self.recall is not None
        question = torch.tensor(self.session.tokenizer.encode(f" Where is {one.actor}?"))
        starts = [fact.position for fact in planted]
        found: dict[str, tuple[float, str]] = {}
        for share in self.recall.attended(question, self.session.state):
            fact = planted[max(0, bisect_right(starts, share.position) - 1)] if planted else None
            ago = f"({short(one.position - share.position)} ago)"
            if share.position >= self.session.tokens:
                text, role = "the question itself", "other"
            elif fact and fact.position <= share.position < fact.position + fact.length:
                text = f"{fact.text} ({short(one.position - fact.position)} ago)"
                role = "answer" if fact is one.fact else "asked" if fact.actor == one.actor else "other"
            else:
                text, role = f"… {self.snippets.get(share.position, '')} {ago}", "book"
            found[text] = (found.get(text, (0.0, role))[0] + share.weight, role)
        rows = sorted(((text, weight, role) for text, (weight, role) in found.items()), key=lambda row: -row[1])
        return rows[:SHOWN]


def run(
    model: Model, tokenizer: Tokenizer, text: Path | None = None, tokens: int = 128_000, seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Result:  # fmt: skip
    """Read `tokens` tokens of a text (None: the shipped book), over and over if it is shorter, with facts planted, and ask on the way.

    progress(n, state bytes) is called after n tokens. Raises UsageError on a text that cannot be read.
    """
    positive(tokens=tokens)
    rng = random.Random(seed)
    memory = PeakMemory()
    memory.reset()
    noise = Noise(tokenizer, text)
    source, planned = iter(noise), facts(rng, tokens)
    reader = Reader(model, tokenizer, tokens, progress)
    where: dict[str, Planted] = {}
    planted: list[Planted] = []
    asked: list[Asked] = []
    stops = deque(tokens * (i + 1) // QUESTIONS for i in range(QUESTIONS))
    attended = None
    left, actor, room, told = next(planned)
    while stops:
        if reader.position >= stops[0]:
            stops.popleft()
            reader.flush()
            new = _ask(model, tokenizer, reader, where)
            asked += new
            if reader.recall and new and not stops:
                one = max(new, key=lambda one: (one.right, one.distance))
                attended = one, reader.attended(one, planted)
        elif left <= 0:
            ids = np.array(tokenizer.encode(" " + told), np.int32)
            where[actor] = Planted(actor, room, told, reader.position, len(ids))
            planted.append(where[actor])
            reader.add(ids, where[actor])
            left, actor, room, told = next(planned)
        else:
            ids = next(source)[: stops[0] - reader.position]  # a sentence is cut by the question, as at the end of a BABILong context
            reader.add(ids)
            left -= len(ids)
    if not reader.points:
        reader.mark()
    session = reader.session
    written = reader.written / reader.counted if reader.counted else None
    cost = (session.tokens, reader.seconds, session.state_bytes, memory.read())
    return Result(asked, planted, reader.points, *cost, noise.laps, noise.left_out, written, attended)


def _ask(model: Model, tokenizer: Tokenizer, reader: Reader, where: dict[str, Planted]) -> list[Asked]:
    """Ask for everyone who was seen, on forks, and the same of the control."""
    session, actors = reader.session, sorted(where)
    if not actors or session.state is None:
        return []
    rows, questions = [0] * len(actors), [f"Where is {actor}?" for actor in actors]
    memory = answer(model, tokenizer, session.state.rows(rows), questions)
    fresh = stream(model, [reader.last])
    window = answer(model, tokenizer, fresh and fresh.rows(rows), questions)
    asked = []
    for actor, kept, seen in zip(actors, memory, window, strict=True):
        fact = where[actor]
        asked.append(Asked(session.tokens, actor, fact.room, session.tokens - fact.position, _room(kept.text), _room(seen.text), fact))
    return asked


def _room(text: str) -> str:
    """The room that an answer names, or the answer as it is where it does not name exactly one."""
    named = [room for room in ROOMS if room in text.lower()]
    return named[0] if len(named) == 1 else text


def demo(
    text: str | Path | None = None, tokens: int = 128_000, out: str | Path = "demo", seed: int = 0, model: str | Path | None = None
) -> Result:
    """Run, with a live bar, and write report.html, figures and results.json into `out`. model: a folder, or None for the shipped one."""
    from rich.console import Console

    out = Path(out)
    if out.exists() and not out.is_dir():
        raise FileError(f"{out} is a file; the report needs a folder.")
    reader, tokenizer = load_reader(model)
    path = None if text is None else Path(text)
    if path is not None:
        next(iter_text(path))  # a file that cannot be read shows before anything is written
    write_text(out / "results.json", "{}\n")  # and a place that cannot be written before the work
    console = Console()
    name = model or f"the shipped {shipped().name}"
    console.print(f"Reading {short(tokens)} tokens of {path or 'Moby-Dick'} with {name}, once.", markup=False)
    with _bar(console, tokens) as progress:
        result = run(reader, tokenizer, path, tokens, seed, progress)
    sections = _figures(result, out)
    write_text(out / "results.json", json.dumps(_as_json(result, seed, tokens, path), indent=1) + "\n")
    right, windowed, n = _count(result)
    lead = (
        f"{short(result.tokens)} tokens read in {result.seconds:.0f} s; the state is {result.state_bytes / 1024:.1f} KiB at the end. "
        f"{right} of {n} questions were answered rightly, and {windowed} by the same model when it sees only the last {WINDOW} tokens."
    )
    write_report(out / "report.html", "A memory that reads", lead, sections)
    _summary(console, result, out, model)
    return result


class _bar:
    """A live bar: tokens, tokens/s, bytes of state, time left."""

    def __init__(self, console: Any, total: int):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.percentage:3.0f} %"), BarColumn(),
            TextColumn("{task.fields[speed]} tokens/s  state {task.fields[state]}  left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task("read", total=total, speed="-", state="-")

    def __enter__(self) -> Callable[[int, int], None]:
        self.progress.start()
        start, read = time.perf_counter(), 0

        def step(n: int, size: int) -> None:
            nonlocal read
            read += n
            speed = f"{read / (time.perf_counter() - start):,.0f}"
            self.progress.update(self.task, advance=n, speed=speed, state=f"{size / 1024:.1f} KiB")

        return step

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


def _count(result: Result) -> tuple[int, int, int]:
    return sum(one.right for one in result.asked), sum(one.window_right for one in result.asked), len(result.asked)


def _rows(result: Result) -> tuple[list[Row], list[Row]]:
    """Accuracy by distance, of the memory and of the control."""
    return (
        by_distance([(one.distance, one.right) for one in result.asked]),
        by_distance([(one.distance, one.window_right) for one in result.asked]),
    )


def _table(result: Result) -> list[list[object]]:
    lines: list[list[object]] = [["tokens since the fact", "questions", "with memory", f"last {WINDOW} tokens only"]]
    for on, off in zip(*_rows(result), strict=True):
        lines.append([f"{short(on['low'])} to {short(on['high'])}", on["n"], f"{on['accuracy']:.0%}", f"{off['accuracy']:.0%}"])
    right, windowed, n = _count(result)
    return [*lines, ["all", n, f"{right / n:.0%}" if n else "-", f"{windowed / n:.0%}" if n else "-"]]


def _figures(result: Result, out: Path) -> list[Section]:
    """Draw the figures into `out` and write what stands beside them."""
    text = f"{len(result.planted)} facts were planted; everyone who had been seen was asked for at {QUESTIONS} places."
    sections = [Section("What it answered", [text], _table(result))]
    if result.asked:
        image = out / "accuracy_by_distance.png"
        plots.accuracy_by_distance(*_rows(result), image, 1 / len(ROOMS))
        sections.append(Section("How far back it remembers", image=image, caption="Right answers by distance; bars are 95 % intervals."))
    if result.points:
        image = out / "cost_by_position.png"
        plots.cost_by_position(result.points, image)
        sections.append(Section("What it costs", image=image, caption="Time and size of the state, by position in the stream."))
    sections.append(_attended(result, out / "attended.png"))
    return sections


def _attended(result: Result, image: Path) -> Section:
    """What the read behind one answer came from: at the last place, the right one whose fact lies furthest back."""
    title = "What the memory attended to"
    if result.attended is None or not result.attended[1]:
        return Section(title, ["This model has no memory whose reads can be traced to the tokens that were written (inspect.Recall)."])
    one, items = result.attended
    said = one.memory if one.memory in ROOMS else "no room"
    plots.weights(items, image, f"Where is {one.actor}?  “{said}”", "share of what was read from the memory")
    text = [
        f"Asked {short(one.distance)} tokens after the fact, the memory said “{said}” ({'right' if one.right else 'wrong'}). "
        "A delta-rule memory is a sum over the tokens that were ever written into it, so what a question reads from it is an attention "
        "over the whole past; the bars are its weights, exactly."
    ]
    if result.written is not None:
        text.append(f"Of the tokens of the text that are no facts, {result.written:.3%} were written at all.")
    return Section(title, text, image=image, caption="What the answer was read from, by share.")


def _as_json(result: Result, seed: int, tokens: int, text: Path | None) -> Row:
    on, off = _rows(result)
    return {
        "rows": [{"memory": memory, **row} for memory, rows in (("on", on), ("off", off)) for row in rows],
        "asked": [{name: value for name, value in vars(one).items() if name != "fact"} for one in result.asked],
        "facts": [{"position": fact.position, "text": fact.text, "weight": fact.weight} for fact in result.planted],
        "points": result.points,
        "attended": result.attended and {
            "question": f"Where is {result.attended[0].actor}?",
            "answer": result.attended[0].memory,
            "shares": [{"text": text, "share": share, "role": role} for text, share, role in result.attended[1]],
        },
        "meta": {
            "tokens": result.tokens, "asked_for": tokens, "seed": seed, "window": WINDOW, "text": str(text) if text else "moby_dick",
            "laps": result.laps, "sentences_left_out": result.left_out, "seconds": result.seconds, "state_bytes": result.state_bytes,
            "peak_rss_mb": result.peak_rss_mb, "written": result.written, "environment": environment(),
        },
    }  # fmt: skip


def _summary(console: Any, result: Result, out: Path, model: str | Path | None) -> None:
    from rich.table import Table

    table = Table(title="Where is everyone?", title_justify="left")
    head, *body = _table(result)
    for i, name in enumerate(head):
        table.add_column(str(name), justify="left" if i == 0 else "right")
    for i, line in enumerate(body):
        table.add_row(*map(str, line), end_section=i == len(body) - 2)
    console.print(table)
    speed = result.tokens / result.seconds if result.seconds else 0
    console.print(f"{speed:,.0f} tokens/s, state {result.state_bytes / 1024:.1f} KiB, peak memory {result.peak_rss_mb:,.0f} MB.")
    console.print(f"Report: {out / 'report.html'}", markup=False, soft_wrap=True)
    chosen = f" --model {model}" if model else ""
    console.print("Next:", highlight=False)
    for command in (
        f"remanence demo --tokens 1M --text YOUR_BOOK.txt{chosen}",
        f"remanence read YOUR_BOOK.txt --state book.safetensors{chosen}",
        f"remanence eval babilong --lengths 0,1k,16k,128k --plot babilong.png{chosen}",
    ):
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)
