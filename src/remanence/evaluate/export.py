"""Our tasks as files that other harnesses read: JSON lines in the layouts of BABILong and of RULER."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..catalog import find
from ..errors import UsageError, positive, unknown
from ..files import write_atomic
from ..tasks import Example, Task, Tokenizer
from ..tasks.base import default_tokenizer
from ..tasks.ruler import RulerExample
from .longrange import samples_of, short
from .run import Cell, cells, prompt_of

Row = dict[str, Any]


def babilong_row(task: Task, example: Example, index: int, tokenizer: Tokenizer) -> Row:
    """{"input": the context, "question", "target"}, as in the dataset RMT-team/babilong that booydar/babilong and lm-eval read."""
    return {"input": example.text(tokenizer), "question": example.question, "target": example.answer}


def ruler_row(task: Task, example: Example, index: int, tokenizer: Tokenizer) -> Row:
    """{"index", "input": the whole prompt, "outputs": every string that must be named, "length", "answer_prefix"}: NVIDIA/RULER.

    The model is to continue input + answer_prefix. `length` counts their tokens and, as RULER's does, those that the answer may take
    (`tokens_to_generate`, where the example or the task has that). `index` is the number of the example (RULER's niah.py writes a position
    in the text there, its other scripts the number, by which its caller tells what is done).
    """
    prompt = prompt_of(task, example, tokenizer)
    prefix = getattr(example, "answer_prefix", "")
    body = prompt.removesuffix(prefix)
    outputs = [str(answer) for answer in getattr(example, "answers", None) or (example.answer,)]
    answer = getattr(example, "tokens_to_generate", getattr(task, "tokens_to_generate", 0))
    length = len(tokenizer.encode(body + prefix)) + int(answer)
    return {"index": index, "input": body, "outputs": outputs, "length": length, "answer_prefix": prefix}


Form = Callable[[Task, Example, int, Tokenizer], Row]
LAYOUTS: Mapping[str, tuple[Form, Callable[[Cell], str]]] = {
    "babilong": (babilong_row, lambda cell: f"data/{cell.qa or cell.task.slug}/{short(cell.length) if cell.length else '0k'}.jsonl"),
    "ruler": (ruler_row, lambda cell: f"{cell.length}/data/{_ruler_name(cell)}/validation.jsonl"),
}
"""name -> (a row of it, where in the folder its file stands): data/TASK/LENGTH.jsonl, and LENGTH/data/TASK/validation.jsonl."""


def _ruler_name(cell: Cell) -> str:
    """RULER's own name of one of its tasks, niah_single_1; else the task's slug and which of its questions."""
    if isinstance(cell.first, RulerExample):
        return cell.first.task.replace("-", "_")
    return f"{cell.task.slug}_{cell.qa}" if cell.qa else cell.task.slug


def export(
    task: str | Task,
    layout: str,
    lengths: Sequence[int],
    n: int,
    out: str | Path,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    qa: str | Sequence[str] = "qa1",
    options: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write n examples of a task in words at each length (tokens; tokenizer None: bytes), one file each; returns the files.

    The examples are those that `evaluate` asks for the same seed, tokenizer and options. Raises UnknownName on a task or layout,
    UsageError on a task of symbols and on what `cells` refuses, before anything is written; FileError if a file cannot be written.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    positive(n=n)
    form, place = LAYOUTS[layout]
    tokenizer = tokenizer or default_tokenizer()
    benchmark = find(task, ("benchmark",)).builder() if isinstance(task, str) else task
    grid = cells(benchmark, lengths, seed, tokenizer, qa, options)
    for cell in grid:
        if not isinstance(cell.first, Example):
            raise UsageError(f"{cell.task.slug} gives symbols; layout {layout!r} is for tasks with a text, a question and an answer.")
    paths = []
    for cell in grid:
        examples = samples_of(cell.task, tokenizer, cell.asked, n, seed, cell.qa, options or {})
        paths.append(Path(out) / place(cell))
        write_lines(paths[-1], (form(cell.task, example, i, tokenizer) for i, example in enumerate(examples)))
    return paths


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line, one row in memory at a time, whole or not at all."""

    def write(beside: Path) -> None:
        with open(beside, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    write_atomic(path, write)
