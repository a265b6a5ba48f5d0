"""WorM by rule: what a reader of the symbols alone, who forgets nothing, answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...errors import UsageError
from .problems import PROBLEMS
from .trials import ARROW, BLANK, CELL, CUE, END, HEADINGS, LINES, MEMORY, NAME, PAD, PLACE, PROBE, STEPS, TINT

Shown = tuple[int, ...]


@dataclass(frozen=True)
class Frame:
    """One frame: its kind (MEMORY, BLANK or PROBE), what it shows, and the position of its END."""

    kind: int
    shown: Shown
    end: int


def frames(ids: np.ndarray) -> tuple[str, list[Frame]]:
    """The task and the frames that a sequence, int64 [T], tells. Raises UsageError where it is not one of WorM."""
    said = ids.tolist()
    said = said[: said.index(PAD)] if PAD in said else said
    if not said or not NAME <= said[0] < NAME + len(PROBLEMS) or said[-1] != END:
        raise UsageError("the ids are no trial of WorM: a task's name, then frames that each finish with END.")
    found, start = [], 1
    for t, token in enumerate(said):
        if token == END:
            if said[start] not in (MEMORY, BLANK, PROBE):
                raise UsageError(f"the frame at position {start} has no kind: MEMORY, BLANK or PROBE.")
            found.append(Frame(said[start], tuple(said[start + 1 : t]), t))
            start = t + 1
    return list(PROBLEMS)[said[0] - NAME], found


def alternatives(shown: Shown) -> dict[Shown, int]:
    """The place of everything that a probe shows."""
    starts = [i for i, token in enumerate(shown) if PLACE <= token < ARROW]
    return {shown[start + 1 : stop]: shown[start] - PLACE for start, stop in zip(starts, [*starts[1:], len(shown)])}


def _memories(trial: list[Frame]) -> list[Shown]:
    return [frame.shown for frame in trial if frame.kind == MEMORY]


def _probes(trial: list[Frame]) -> list[Shown]:
    return [frame.shown for frame in trial if frame.kind == PROBE]


def free_recall(trial: list[Frame]) -> list[int]:
    """Every cell of the probe: is it one that was red, the last that a frame told?"""
    red = {shown[-1] for shown in _memories(trial)}
    return [int(cell in red) for cell in _probes(trial)[0]]


def serial_recall(trial: list[Frame]) -> list[int]:
    """Where each pattern is, in the order of the list."""
    where = alternatives(_probes(trial)[0])
    return [where[item] for item in _memories(trial)]


def serial_recognition(trial: list[Frame]) -> list[int]:
    """Where the first pattern is in the first probe, the second in the second, .."""
    return [alternatives(probe)[item] for item, probe in zip(_memories(trial), _probes(trial), strict=True)]


def item_recognition(trial: list[Frame]) -> list[int]:
    """The place of the pattern that was in the list."""
    items = set(_memories(trial))
    return [place for shown, place in alternatives(_probes(trial)[0]).items() if shown in items]


def change_detection(trial: list[Frame]) -> list[int]:
    """Do the two arrays differ?"""
    return [int(_memories(trial) != _probes(trial))]


def symmetric(cells: set[int]) -> bool:
    """Does the right half of a 10x10 grid mirror the left?"""
    return cells == {10 * (cell // 10) + 9 - cell % 10 for cell in cells}


def spatial_coordination(trial: list[Frame]) -> list[int]:
    """Is the pattern of all cells symmetric?"""
    return [int(symmetric({shown[0] - CELL for shown in _memories(trial)}))]


def segments(line: Shown) -> set[frozenset[int]]:
    """The segments between the points of a line, without direction."""
    return {frozenset(pair) for pair in zip(line, line[1:])}


def spatial_integration(trial: list[Frame]) -> list[int]:
    """Do the parts together have the segments of the probe?"""
    return [int(set().union(*map(segments, _memories(trial))) == segments(_probes(trial)[0]))]


def memory_updating(trial: list[Frame]) -> list[int]:
    """Where the arrows take the markers."""
    first, *updates = _memories(trial)
    marker = {box: cell - CELL for box, cell in zip(first[::2], first[1::2])}
    for box, arrow in updates:
        down, right = STEPS[arrow - ARROW]
        marker[box] += 3 * down + right
    return [marker[shown[0]] for shown in _probes(trial)]


def task_switching(cued: bool) -> Callable[[list[Frame]], list[int]]:
    """The rule of the last cue; or of the only one, and then the two in turn."""

    def solve(trial: list[Frame]) -> list[int]:
        answers, rule = [], 0
        for frame in trial:
            if frame.kind == MEMORY:
                rule = frame.shown[0] - CUE
                continue
            answers.append((frame.shown[0] - CELL) % 2 if rule else (frame.shown[0] - CELL) // 2)
            rule = rule if cued else 1 - rule
        return answers

    return solve


def complex_span(trial: list[Frame]) -> list[int]:
    """Decisions at once; then the place of each pattern, or of the arrow in the direction of each line."""
    said = _memories(trial)
    items, answers = [sum(said[:3], ()), sum(said[3:], ())], []
    for shown in _probes(trial):
        if where := alternatives(shown):
            item = items.pop(0)
            if len(item) == 3:
                line = np.array(item) - CELL
                answers.append(4 + where[(ARROW + int(HEADINGS[(line == LINES).all(1).argmax()]),)])
            else:
                answers.append(12 + where[item])
        elif shown[0] >= CELL:
            answers.append(2 + symmetric({cell - CELL for cell in shown}))
        else:
            answers.append(int(shown[0] >= TINT + 7))
    return answers


SOLVERS: dict[str, Callable[[list[Frame]], list[int]]] = {
    "sfr": free_recall,
    "vsr": serial_recall,
    "vsrec": serial_recognition,
    "vir": item_recognition,
    **{task: change_detection for task in PROBLEMS if task.startswith("cd-")},
    "sc": spatial_coordination,
    "si": spatial_integration,
    "smu": memory_updating,
    "sts-cued": task_switching(True),
    "sts-uncued": task_switching(False),
    "cs": complex_span,
}


def solve(ids: np.ndarray) -> np.ndarray:
    """The answers of a sequence at the positions where they are asked, 0 elsewhere: int64 [T] of int64 [T]."""
    task, trial = frames(ids)
    asked = [frame.end for frame in trial if frame.kind == PROBE]
    if task == "sfr":
        asked = list(range(asked[0] - len(trial[-1].shown), asked[0]))
    output = np.zeros_like(ids)
    output[asked] = SOLVERS[task](trial)
    return output
