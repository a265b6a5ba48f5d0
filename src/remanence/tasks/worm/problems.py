"""The tasks of WorM: which settings each has, what they may be, and trials of any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import UsageError, positive, unknown
from ..base import IGNORE
from .trials import (
    GAPS,
    MODALITIES,
    PAD,
    TRAITS,
    Meta,
    Script,
    change_detection,
    complex_span,
    free_recall,
    item_recognition,
    memory_updating,
    serial_recall,
    serial_recognition,
    spatial_coordination,
    spatial_integration,
    task_switching,
)  # fmt: skip


@dataclass(frozen=True)
class Limit:
    """What the options of a setting may be, as a test and in words."""

    allows: Callable[[Any], bool]
    says: str


def between(low: int, high: int | None = None, step: int = 1) -> Limit:
    """Whole numbers from low to high (None: any) in steps."""
    kind = "an even number" if step == 2 else "a whole number"
    return Limit(
        lambda value: _whole(value) and value >= low and (high is None or value <= high) and (value - low) % step == 0,
        f"{kind} >= {low}" if high is None else f"{kind} from {low} to {high}",
    )


def one_of(options: Iterable[Any]) -> Limit:
    """One of these."""
    known = tuple(options)
    return Limit(lambda value: not isinstance(value, bool) and value in known, "one of " + ", ".join(map(str, known)))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Problem:
    """One task.

    make(rng, script, **condition) writes the frames and returns what is to be known of the trials, [rows], or of their answers, [rows, k].
    settings: for each, the published options, of which every trial has one, and what others may be. answers: possible ones at a probe.
    """

    make: Callable[..., Meta]
    settings: Mapping[str, tuple[tuple[Any, ...], Limit]]
    answers: int = 2


SINGULAR = {
    "list_lengths": "list_length", "set_sizes": "set_size", "retentions": "retention", "differences": "difference", "parts": "part",
    "updates": "updates", "distractors": "distractors", "modalities": "modality",
}  # fmt: skip
"""The settings, and what one of their options is called in a trial's meta."""
CD_SETTINGS = {"set_sizes": ((2, 4, 6, 8, 10, 12), between(1, 100)), "retentions": ((0, 6, 12, 18), between(0))}
PROBLEMS: dict[str, Problem] = {
    "sfr": Problem(free_recall, {"list_lengths": ((*range(1, 9), 10, 12, 15, 18), between(1, 100)), "set_sizes": ((30,), between(1, 100))}),
    "vsr": Problem(serial_recall, {"list_lengths": (tuple(range(2, 10)), between(1, 9))}, answers=9),
    "vsrec": Problem(
        serial_recognition,
        {"list_lengths": (tuple(range(2, 10)), between(1)), "differences": ((2, 4, 6, 8, 10), between(2, 36, 2))},
    ),
    "vir": Problem(
        item_recognition,
        {
            "list_lengths": ((4, 6, 8, 10), between(1)),
            "retentions": ((0, 2, 4, 5, 6), between(0)),
            "differences": ((4,), between(2, 36, 2)),
        },
    ),
    **{f"cd-{trait}": Problem(change_detection(i), CD_SETTINGS) for i, trait in enumerate(TRAITS)},
    "cd-conjunction": Problem(change_detection(None), CD_SETTINGS),
    "sc": Problem(
        spatial_coordination,
        {"list_lengths": ((10, 12, 14, 16, 18), between(2, 50, 2)), "differences": ((2, 4, 6, 8), between(2, 50, 2))},
    ),
    "si": Problem(
        spatial_integration,
        {"parts": ((1, 2, 3, 4, 6, 12), one_of((1, 2, 3, 4, 6, 12))), "differences": ((1, 2, 3, 4), between(1, 6))},
    ),
    "smu": Problem(memory_updating, {"set_sizes": (tuple(range(1, 9)), between(1, 9)), "updates": ((8,), between(0))}, answers=9),
    "sts-cued": Problem(task_switching(True), {"list_lengths": ((20,), between(2))}),
    "sts-uncued": Problem(task_switching(False), {"list_lengths": ((20,), between(2))}),
    "cs": Problem(complex_span, {"distractors": ((0, 1, 3, 5), one_of(GAPS)), "modalities": (MODALITIES, one_of(MODALITIES))}, answers=8),
}
TRAINED = tuple(task for task in PROBLEMS if task != "sts-uncued")
"""The 14 that the paper trains together."""


def problem(task: str) -> Problem:
    """The entry of PROBLEMS. Raises UnknownName on another name."""
    if task not in PROBLEMS:
        raise unknown("task", task, PROBLEMS)
    return PROBLEMS[task]


def options_of(task: str, given: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Every setting of a task and its options: those given, one or several, else the published. Raises UsageError where they do not fit."""
    known = problem(task).settings
    options = {}
    for name in given:
        if name not in known and given[name] is not None:
            raise UsageError(f"{task} has no {name}; its settings are {', '.join(known)}.")
    for name, (published, limit) in known.items():
        value = given.get(name)
        several = isinstance(value, Iterable) and not isinstance(value, str)
        options[name] = published if value is None else tuple(value) if several else (value,)
        if not options[name]:
            raise UsageError(f"{name} is empty; give at least one option.")
        for option in options[name]:
            if not limit.allows(option):
                raise UsageError(f"{name} has {option!r}; in {task} it must be {limit.says}.")
    if task == "sfr" and max(options["list_lengths"]) > min(options["set_sizes"]):
        raise UsageError(f"list_lengths has {max(options['list_lengths'])}; only {min(options['set_sizes'])} cells are visible.")
    if task == "sc" and max(options["differences"]) > min(options["list_lengths"]):
        raise UsageError(f"differences has {max(options['differences'])}; a list has only {min(options['list_lengths'])} cells.")
    return options


Drawn = tuple[np.ndarray, np.ndarray, list[Meta]]


def draw(rng: np.random.Generator, n: int, task: str, given: Mapping[str, Any]) -> Drawn:
    """n trials: ids and targets, int64 [n, longest], with PAD and IGNORE after the end of shorter ones, and what is known of each.

    Each trial has one option of each setting, uniformly. Trials of one shape are made side by side.
    """
    options = options_of(task, given)
    positive(n=n)
    chosen = {name: rng.integers(len(values), size=n) for name, values in options.items()}
    shaping = [name for name in options if name != "differences"]
    groups, member = np.unique(np.stack([chosen[name] for name in shaping], 1), axis=0, return_inverse=True)
    parts = []
    for number, group in enumerate(groups):
        rows = np.flatnonzero(member.reshape(-1) == number)
        condition: Meta = {SINGULAR[name]: options[name][i] for name, i in zip(shaping, group, strict=True)}
        if "differences" in options:
            condition["difference"] = np.array(options["differences"])[chosen["differences"][rows]]
        script = Script(list(PROBLEMS).index(task), len(rows))
        meta = {**condition, **PROBLEMS[task].make(rng, script, **condition)}
        parts.append((rows, np.concatenate(script.ids, 1), np.concatenate(script.targets, 1), meta))
    width = max(part[1].shape[1] for part in parts)
    ids, targets, metas = np.full((n, width), PAD), np.full((n, width), IGNORE), [Meta() for _ in range(n)]
    for rows, some, wanted, meta in parts:
        ids[rows, : some.shape[1]], targets[rows, : some.shape[1]] = some, wanted
        for i, row in enumerate(rows):
            metas[row] = {name: _of_row(value, i) for name, value in meta.items()}
            if task.startswith("sts"):
                metas[row]["switch"] = metas[row]["switch"][metas[row]["switch"] > -2]
    return ids, targets, metas


def _of_row(value: Any, i: int) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return value[i] if value.ndim == 2 else int(value[i])
