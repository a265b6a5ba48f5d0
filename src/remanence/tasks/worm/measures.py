"""What WorM measures besides accuracy: how behaviour depends on load, delay, place and likeness, and which units serve which tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ...errors import UsageError, positive
from .trials import END


class HasMeta(Protocol):
    """Anything that says what is known of it."""

    @property
    def meta(self) -> Mapping[str, Any]: ...


def accuracy_by(trials: Sequence[HasMeta], correct: Sequence[np.ndarray], *keys: str) -> dict[Any, float]:
    """Mean accuracy for every value of a key of `meta`, ascending; of several keys, for every tuple of values that occurs.

    correct: `Trial.correct` of each trial, bool [k]. A key that differs between the answers of a trial ("position", "switch", "box") sorts
    its answers; those with a negative value (a cell not listed, a decision, the first rule, no change) are left out. "list_length",
    "set_size" and "retention" give the published curves; "difference" is 0 where a probe of sc or si was the same.
    Raises UsageError on no key, one that the trials do not have, or shapes that do not fit.
    """
    if len(trials) != len(correct) or not keys:
        raise UsageError(f"there are {len(trials)} trials, {len(correct)} results and {len(keys)} keys; give a result for each, and a key.")
    right: dict[Any, list[float]] = {}
    for trial, result in zip(trials, correct, strict=True):
        columns = []
        for key in keys:
            if key not in trial.meta:
                raise UsageError(f"a trial has no {key!r}; it has {', '.join(trial.meta)}.")
            value = trial.meta[key]
            if isinstance(value, np.ndarray) and len(value) != len(result):
                raise UsageError(f"a result has {len(result)} answers; the trial asks for {len(value)}.")
            columns.append(value.tolist() if isinstance(value, np.ndarray) else [value] * len(result))
        for *values, good in zip(*columns, result.tolist(), strict=True):
            if not any(isinstance(value, int) and value < 0 for value in values):
                right.setdefault(values[0] if len(keys) == 1 else tuple(values), []).append(float(good))
    return {value: float(np.mean(right[value])) for value in sorted(right)}


def serial_position(trials: Sequence[HasMeta], correct: Sequence[np.ndarray], list_length: int | None = None) -> np.ndarray:
    """Accuracy at each position of the list, float64 [positions], NaN where there is none. list_length: only of lists of this length.

    Primacy is a high first, recency a high last value. In sfr it is how often the cell of a position is recalled.
    """
    chosen = [i for i, trial in enumerate(trials) if list_length in (None, trial.meta.get("list_length"))]
    if not chosen:
        raise UsageError(f"no trial has a list of {list_length}.")
    found = accuracy_by([trials[i] for i in chosen], [correct[i] for i in chosen], "position")
    return np.array([found.get(position, np.nan) for position in range(max(found, default=-1) + 1)])


def top_recall(trial: HasMeta, scores: np.ndarray) -> np.ndarray:
    """`Trial.correct` of sfr as published: of the 100 cells, the list is said to be the `list_length` with the highest scores, [100].

    scores: how much more likely than no (0) yes (1) is at each cell, such as the difference of their logits. Returns bool [100].
    """
    listed = np.asarray(trial.meta.get("position", ())) >= 0
    scores = np.asarray(scores)
    if listed.shape != (100,) or scores.shape != (100,):
        raise UsageError(f"scores have shape {scores.shape}; a trial of sfr needs (100,).")
    said = np.zeros(100, bool)
    said[np.argsort(-scores, kind="stable")[: listed.sum()]] = True
    return said == listed


def switch_cost(trials: Sequence[HasMeta], correct: Sequence[np.ndarray]) -> float:
    """Accuracy where the rule is that of the answer before less that where it has just changed, in task switching with cues.

    Raises UsageError where there are not both: rules that alternate without cues change every time.
    """
    found = accuracy_by(trials, correct, "switch")
    if set(found) != {0, 1}:
        raise UsageError("the trials do not have both answers after a switch and others; take sts-cued.")
    return found[0] - found[1]


def frame_ends(ids: np.ndarray) -> np.ndarray:
    """The positions of a sequence, int64 [T], at which a frame is complete: where a state is that of a time step of the paper."""
    return np.flatnonzero(ids == END)


def task_variance(states: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray:
    """How much each unit varies between the trials of each task, as a part of the most in any task: float64 [tasks, units].

    states: for every task those of its trials, each [frames, units], at `frame_ends`, as a rule without the probes. A variance is over
    the trials at a time step, then averaged over time steps, then divided by the unit's largest; a unit that never varies has 0. (As in
    the public notebook, where the five tasks of change detection are one.) Raises UsageError on no task or trial, or units that differ.
    """
    shapes = {np.shape(state)[1:] for trials in states.values() for state in trials}
    if len(shapes) != 1 or not all(len(trials) for trials in states.values()):
        raise UsageError(f"the states have units {sorted(shapes)}; every task needs trials, [frames, units], all of the same units.")
    rows = []
    for trials in states.values():
        steps = [np.stack([state[t] for state in trials if len(state) > t]) for t in range(max(map(len, trials)))]
        rows.append(np.mean([step.astype(np.float64).var(0) for step in steps], 0))
    found = np.stack(rows)
    most = found.max(0)
    return np.divide(found, most, out=np.zeros_like(found), where=most > 0)


def clusters(variance: np.ndarray, count: int | None = None, seed: int = 0) -> tuple[np.ndarray, float]:
    """Units sorted by the tasks that they vary in: labels, int64 [units], by k-means, and the mean silhouette, in [-1, 1].

    variance: `task_variance`, [tasks, units]. count: of clusters; None: that of 2 .. 30 with the best silhouette (public notebook: to 99).
    """
    points = np.asarray(variance, np.float64).T
    if points.ndim != 2 or len(points) < 3:
        raise UsageError(f"variance has shape {np.shape(variance)}; it must be [tasks, units] with at least 3 units.")
    if count is not None:
        positive(count=count)
        if not 2 <= count < len(points):
            raise UsageError(f"count is {count}; {len(points)} units make 2 to {len(points) - 1} clusters.")
    rng, apart = np.random.default_rng(seed), _distances(points, points)
    tries = []
    for k in range(2, min(30, len(points) - 1) + 1) if count is None else (count,):
        labels = _means(rng, points, k)
        tries.append((_silhouette(apart, labels), labels))
    score, labels = max(tries, key=lambda found: found[0])
    return labels, score


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0))


def _means(rng: np.random.Generator, points: np.ndarray, k: int, starts: int = 5, rounds: int = 100) -> np.ndarray:
    """The best of `starts` runs of Lloyd's algorithm from centres that are drawn far apart (k-means++)."""
    best, lowest = np.zeros(len(points), np.int64), np.inf
    for _ in range(starts):
        centres = points[rng.integers(len(points))][None]
        while len(centres) < k:
            near = _distances(points, centres).min(1) ** 2
            weights = near / near.sum() if near.sum() > 0 else None
            centres = np.concatenate([centres, points[rng.choice(len(points), p=weights)][None]])
        labels = _distances(points, centres).argmin(1)
        for _ in range(rounds):
            centres = np.stack([points[labels == j].mean(0) if (labels == j).any() else centres[j] for j in range(k)])
            before, labels = labels, _distances(points, centres).argmin(1)
            if (before == labels).all():
                break
        spread = float((_distances(points, centres).min(1) ** 2).sum())
        if spread < lowest:
            best, lowest = labels, spread
    return best


def _silhouette(apart: np.ndarray, labels: np.ndarray) -> float:
    """Mean over points of (b - a) / max(a, b): a to the others of its cluster, b to the nearest other cluster; 0 where it is alone."""
    used, labels = np.unique(labels, return_inverse=True)
    if len(used) < 2:
        return -1.0
    members = np.eye(len(used))[labels]
    sizes = members.sum(0)
    total = apart @ members
    rows = np.arange(len(labels))
    own = total[rows, labels] / np.maximum(sizes[labels] - 1, 1)
    mean = total / sizes
    mean[rows, labels] = np.inf
    other, most = mean.min(1), np.maximum(mean.min(1), own)
    score = np.divide(other - own, most, out=np.zeros_like(own), where=most > 0)
    return float(np.where(sizes[labels] > 1, score, 0).mean())
