"""The ten tasks of WorM as one benchmark (arXiv 2307.10768)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...catalog import system
from ...errors import UsageError, positive
from ..base import IGNORE, Published, TokenExample
from ..symbols import Arrays, SymbolTask, outputs_of
from . import measures
from .problems import PROBLEMS, TRAINED, draw, problem
from .rules import solve
from .trials import PAD, VOCAB_SIZE, Meta

JOINT = "joint"
"""Of `batch`: the rows take turns with the 14 tasks of TRAINED."""


def batch(
    rng: np.random.Generator,
    n: int,
    task: str = "smu",
    list_lengths: Any = None,
    set_sizes: Any = None,
    retentions: Any = None,
    differences: Any = None,
    parts: Any = None,
    updates: Any = None,
    distractors: Any = None,
    modalities: Any = None,
) -> Arrays:
    """n trials of a task of PROBLEMS -> ids and targets, int64 [n, longest], with PAD after the end of shorter ones.

    Settings are one option or several, of which each trial has one, uniformly; None: the published ones. Raises UnknownName on another
    task, UsageError on a setting that the task does not have or an option that does not fit. task JOINT takes no settings.
    """
    given = {
        "list_lengths": list_lengths, "set_sizes": set_sizes, "retentions": retentions, "differences": differences, "parts": parts,
        "updates": updates, "distractors": distractors, "modalities": modalities,
    }  # fmt: skip
    if task != JOINT:
        return draw(rng, n, task, given)[:2]
    positive(n=n)
    if any(value is not None for value in given.values()):
        raise UsageError("the joint tasks have no settings in common; every one has its published options.")
    some = {i: draw(rng, len(range(i, n, len(TRAINED))), name, {}) for i, name in enumerate(TRAINED) if i < n}
    width = max(part[0].shape[1] for part in some.values())
    ids, targets = np.full((n, width), PAD), np.full((n, width), IGNORE)
    for i, (said, wanted, _) in some.items():
        ids[i :: len(TRAINED), : said.shape[1]], targets[i :: len(TRAINED), : said.shape[1]] = said, wanted
    return ids, targets


@dataclass(frozen=True, eq=False)
class Trial(TokenExample):
    """A trial of `task`.

    meta: its option of each setting ("list_length", "set_size", "retention", "difference", "part", "updates", "distractors", "modality")
    and, for each scored position, int64 [k], the "position" of what is asked for in the list, the "switch" of a rule or the "box".
    """

    task: str
    meta: Meta = field(default_factory=dict)

    def correct(self, output: Any) -> np.ndarray:
        """Which answers are right, bool [k]. output: predicted ids at every position [T], or at the k scored ones alone."""
        got, wanted = outputs_of(self, output)
        return got == wanted

    def choices(self) -> tuple[np.ndarray, np.ndarray]:
        """The answers that are possible at each scored position, low .. high - 1: two arrays, int64 [k]."""
        wanted = self.targets[self.targets != IGNORE]
        if self.task != "cs":
            return np.zeros_like(wanted), np.full_like(wanted, problem(self.task).answers)
        bounds = np.array([0, 2, 4, 12, 20])
        at = np.searchsorted(bounds, wanted, side="right")
        return bounds[at - 1], bounds[at]


CODE = "people in the study that the task is after, as plotted in the notebooks of ZhangLab-DeepNeuroCogLab/WorM"
PEOPLE: dict[str, dict[int, float]] = {
    "smu, set size {}": {1: 100, 2: 94, 3: 82.5, 4: 68},
    "vir, list of 4, retention 0, position {}": {1: 65.5, 2: 66, 3: 64.5, 4: 81},
    "vir, list of 4, retention 5, position {}": {1: 65.5, 2: 70.5, 3: 68, 4: 71},
    "cd-color, set size {}": {2: 98.5, 4: 94.5, 6: 84},
    "cd-orientation, set size {}": {2: 95.5, 4: 90, 6: 81},
    "cd-size, set size {}": {2: 97.5, 4: 93, 6: 82},
    "cd-gap, set size {}": {2: 94.5, 4: 89, 6: 80},
    "cd-conjunction, set size {}": {2: 96.5, 4: 92, 6: 83},
}


@system("worm", kind="benchmark", paper="arXiv:2307.10768", year=2023, name="WorM", aliases=("worm-symbolic",))
class WorMSymbolic(SymbolTask):
    """Ten tests of human working memory, in symbols: recall, recognition, change, symmetry, paths, updating, switching and complex span.

    Which errors a model makes, and at which list length, delay and place in the list, is compared with people; see `measures`.
    """

    batch = staticmethod(batch)
    problems, trained = PROBLEMS, TRAINED
    accuracy_by, serial_position = staticmethod(measures.accuracy_by), staticmethod(measures.serial_position)
    switch_cost, frame_ends = staticmethod(measures.switch_cost), staticmethod(measures.frame_ends)
    top_recall = staticmethod(measures.top_recall)
    task_variance, clusters = staticmethod(measures.task_variance), staticmethod(measures.clusters)
    vocab_size = VOCAB_SIZE
    labels = tuple(map(str, range(9)))
    chance = 1 / 9
    """Of the default task; of others see `chance_of`."""
    published = tuple(
        Published("people", setting.format(value), None, float(percent), CODE)
        for setting, found in PEOPLE.items()
        for value, percent in found.items()
    )

    def sample(
        self,
        seed: int = 0,
        n: int = 8,
        task: str = "smu",
        list_lengths: Any = None,
        set_sizes: Any = None,
        retentions: Any = None,
        differences: Any = None,
        parts: Any = None,
        updates: Any = None,
        distractors: Any = None,
        modalities: Any = None,
    ) -> list[Trial]:
        """n trials of a task of PROBLEMS, without PAD; see `batch`.

        list_lengths: items of sfr, vsr, vsrec, vir, sc, frames of sts-*. set_sizes: visible cells of sfr, bars of cd-*, boxes of smu.
        retentions: blank frames of vir and cd-*. differences: cells of vsrec and vir, of the half of sc, segments of si. parts: segments of
        a part of si. updates: arrows of smu. distractors: decisions in each gap of cs. modalities: of MODALITIES, of cs.
        """
        given = {
            "list_lengths": list_lengths, "set_sizes": set_sizes, "retentions": retentions, "differences": differences, "parts": parts,
            "updates": updates, "distractors": distractors, "modalities": modalities,
        }  # fmt: skip
        rows = zip(*draw(np.random.default_rng(seed), n, task, given), strict=True)
        return [Trial(ids[ids != PAD], targets[ids != PAD], task, meta) for ids, targets, meta in rows]

    @staticmethod
    def chance_of(task: str) -> float:
        """Of a uniform guess at one scored position; of cs, at a probe (a decision has 1/2)."""
        return 1 / problem(task).answers

    def oracle(self, example: TokenExample) -> np.ndarray:
        """The answers, worked out from the ids alone, at the positions where they are asked, and 0 elsewhere: int64 [T]."""
        return solve(example.ids)
