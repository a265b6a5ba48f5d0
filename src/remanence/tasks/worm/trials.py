"""The trials of WorM in symbols: what is on the screen, frame by frame, and what is asked (arXiv 2307.10768).

A sequence is [the task's name ; its frames ; PAD ..]. A frame is [MEMORY, BLANK or PROBE ; what is new on the screen ; END]: what stays
from the frame before is not written again, so that an empty frame which is not BLANK has nothing new. What a PROBE frame asks is answered
AT its END; in free recall, AT each cell of the probe: was it in the list? Answers are ids of their own, 0 .. 19, which no input has.

The trials are those of ZhangLab-DeepNeuroCogLab/WorM (src/data), with its training settings as defaults. Symbols in place of pixels are
our reading, and with them four things: bars stand on cells of a 10x10 grid; cells that are lit at once are told in ascending order; the
points of a line are told from either end; and in spatial integration every path can end otherwise, shown or not. (Where it cannot, the
code draws a trial again with its answer, so that some 60 % of its probes are the same and large differences are rarer; here both stay.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..base import IGNORE

ANSWERS = 20
"""Ids of answers: 0 .. 8, but in complex span 0 red, 1 blue, 2 not symmetric, 3 symmetric, 4 + place of a line, 12 + place of a pattern."""
PAD, MEMORY, BLANK, PROBE, END = range(ANSWERS, ANSWERS + 5)
PLACE = END + 1
"""+ 0 .. 8: where an alternative stands on the screen, or which box is meant."""
ARROW = PLACE + 9
"""+ the index of its step in STEPS."""
TRAIT = ARROW + 8
"""+ 2 t + v: a bar's trait t of TRAITS has the value v, 0 or 1."""
CUE = TRAIT + 8
"""+ 0: up (0) or down (1)? + 1: left (0) or right (1)?"""
TINT = CUE + 2
"""+ 0 .. 6: reds; + 7 .. 13: blues."""
NAME = TINT + 14
"""+ the index of the task in `problems.PROBLEMS`."""
CELL = NAME + 15
"""+ row * width + column, of any grid: 10, 6, 5, 4, 3 or 2 wide."""
VOCAB_SIZE = CELL + 100

STEPS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
"""(rows down, columns right)."""
TRAITS = ("color", "orientation", "size", "gap")
MODALITIES = ("spatial-spatial", "spatial-visual", "visual-spatial", "visual-visual")
"""Of complex span: what is kept, and what disturbs."""
_ROWS = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
LINES = np.array([line[::way] for line in _ROWS for way in (1, -1)])
"""The 16 lines of three cells of a 3x3 grid, [16, 3]."""
GAPS: Mapping[int, tuple[int, ...]] = {0: (), 1: (2,), 3: (0, 2, 4), 5: (0, 1, 2, 3, 4)}
"""Which of the five frames of a gap of complex span disturb."""
POINTS, SEGMENTS, TRIES = 5, 12, 51
"""Of spatial integration: points on a side of the lattice, segments of the path, and steps that may be tried for them in all."""
CUE_RATE = 0.2

Meta = dict[str, Any]


def heading(line: np.ndarray) -> int:
    """The index in STEPS of the direction of a line on a 3x3 grid, from its first cell to its last."""
    (y, x), (to_y, to_x) = divmod(int(line[0]), 3), divmod(int(line[-1]), 3)
    return STEPS.index((int(np.sign(to_y - y)), int(np.sign(to_x - x))))


def target(width: int) -> np.ndarray:
    """Where every step leads from every cell of a square grid, [width², 8]; width² if it leads outside."""
    cells = np.arange(width**2)
    y, x = (np.stack([at + step[axis] for step in STEPS], 1) for axis, at in enumerate((cells // width, cells % width)))
    return np.where((y >= 0) & (y < width) & (x >= 0) & (x < width), y * width + x, width**2)


HEADINGS = np.array([heading(line) for line in LINES])
BOX_STEPS, LATTICE_STEPS = target(3), target(POINTS)


class Script:
    """Trials of one task and one condition under way, side by side: all have the same frames, filled differently."""

    def __init__(self, task: int, rows: int):
        self.rows = rows
        self.ids = [np.full((rows, 1), NAME + task)]
        self.targets = [np.full((rows, 1), IGNORE)]

    def frame(self, kind: int | np.ndarray, *shown: np.ndarray, answer: np.ndarray | None = None) -> None:
        """Add a frame. kind: one, or one for each row; shown: ids [rows, any]; answer: [rows], at END, or [rows, k], at the ids before."""
        first = np.broadcast_to(np.reshape(kind, (-1, 1)), (self.rows, 1))
        ids = np.concatenate([first, *shown, np.full((self.rows, 1), END)], 1)
        targets = np.full_like(ids, IGNORE)
        if answer is not None and answer.ndim == 1:
            targets[:, -1] = answer
        elif answer is not None:
            targets[:, -1 - answer.shape[1] : -1] = answer
        self.ids.append(ids)
        self.targets.append(targets)

    def rest(self, frames: int) -> None:
        """Add `frames` blank ones."""
        for _ in range(frames):
            self.frame(BLANK)


def shuffled(rng: np.random.Generator, shape: tuple[int, ...], of: int) -> np.ndarray:
    """Permutations of 0 .. of - 1, int64 [*shape, of]."""
    return rng.random((*shape, of)).argsort(-1)


def patterns(rng: np.random.Generator, rows: int, count: int, cells: int) -> np.ndarray:
    """`count` different half-dark patterns for each row, bool [rows, count, cells]."""
    dark = shuffled(rng, (rows, count), cells) < cells // 2
    while len(again := np.flatnonzero(_repeats(dark))):
        dark[again] = shuffled(rng, (len(again), count), cells) < cells // 2
    return dark


def _repeats(dark: np.ndarray) -> np.ndarray:
    numbers = np.sort(dark @ (1 << np.arange(dark.shape[-1])), 1)
    return (np.diff(numbers) == 0).any(1)


def moved(rng: np.random.Generator, dark: np.ndarray, count: np.ndarray | int) -> np.ndarray:
    """The patterns [..., cells] with `count` dark cells (one number, or one for each pattern [...]) moved to light ones."""
    keys = rng.random(dark.shape)
    most = np.asarray(count)[..., None]
    goes = np.where(dark, keys, 2).argsort(-1).argsort(-1) < most
    comes = np.where(dark, 2, keys).argsort(-1).argsort(-1) < most
    return dark ^ goes ^ comes


def lit(dark: np.ndarray) -> np.ndarray:
    """The ids of the dark cells of patterns [..., cells], ascending: [..., as many as each has]."""
    return CELL + np.nonzero(dark.reshape(-1, dark.shape[-1]))[1].reshape(*dark.shape[:-1], -1)


def at_places(shown: np.ndarray, places: np.ndarray | None = None) -> np.ndarray:
    """[rows, m, k] ids of m alternatives, each after its place ([rows, m], or 0 .. m - 1), in a row: [rows, m * (1 + k)]."""
    where = np.broadcast_to(np.arange(shown.shape[1]) if places is None else places, shown.shape[:2])
    return np.concatenate([PLACE + where[..., None], shown], 2).reshape(len(shown), -1)


def free_recall(rng: np.random.Generator, script: Script, list_length: int, set_size: int) -> Meta:
    """SFR: of `set_size` visible cells (told in the first frame), one is red in each frame: the last that the frame tells. Which were?"""
    visible = shuffled(rng, (script.rows,), 100)[:, :set_size]
    position = np.full((script.rows, 100), -1)
    np.put_along_axis(position, visible[:, :list_length], np.arange(list_length)[None], 1)
    for i in range(list_length):
        script.frame(MEMORY, *([CELL + np.sort(visible, 1)] if i == 0 else []), CELL + visible[:, i : i + 1])
    script.frame(PROBE, np.tile(CELL + np.arange(100), (script.rows, 1)), answer=(position >= 0).astype(np.int64))
    return {"position": position}


def serial_recall(rng: np.random.Generator, script: Script, list_length: int) -> Meta:
    """VSR: patterns one by one, then all at some of nine places: where is the first, the second, ..?"""
    items = patterns(rng, script.rows, list_length, 36)
    places = shuffled(rng, (script.rows,), 9)[:, :list_length]
    for i in range(list_length):
        script.frame(MEMORY, lit(items[:, i]))
    order = places.argsort(1)
    shown = at_places(np.take_along_axis(lit(items), order[..., None], 1), np.take_along_axis(places, order, 1))
    for i in range(list_length):
        script.frame(PROBE, *([shown] if i == 0 else []), answer=places[:, i])
    return {"position": np.tile(np.arange(list_length), (script.rows, 1))}


def which_of_two(rng: np.random.Generator, script: Script, item: np.ndarray, difference: np.ndarray) -> None:
    """A probe: at which place is the pattern [rows, cells], with one at the other that differs from it in `difference` [rows] cells?"""
    pair = np.stack([item, moved(rng, item, difference // 2)], 1)
    answer = rng.integers(2, size=script.rows)
    pair = np.where(answer[:, None, None] == 1, pair[:, ::-1], pair)
    script.frame(PROBE, at_places(lit(pair)), answer=answer)


def serial_recognition(rng: np.random.Generator, script: Script, list_length: int, difference: np.ndarray) -> Meta:
    """VSRec: patterns one by one, then for each, in order, the choice between it and another."""
    items = patterns(rng, script.rows, list_length, 36)
    for i in range(list_length):
        script.frame(MEMORY, lit(items[:, i]))
    for i in range(list_length):
        which_of_two(rng, script, items[:, i], difference)
    return {"position": np.tile(np.arange(list_length), (script.rows, 1))}


def item_recognition(rng: np.random.Generator, script: Script, list_length: int, retention: int, difference: np.ndarray) -> Meta:
    """VIR: patterns one by one, blank frames, then the choice between one of them and another."""
    items = patterns(rng, script.rows, list_length, 36)
    for i in range(list_length):
        script.frame(MEMORY, lit(items[:, i]))
    script.rest(retention)
    position = rng.integers(list_length, size=script.rows)
    which_of_two(rng, script, items[np.arange(script.rows), position], difference)
    return {"position": position[:, None]}


def change_detection(trait: int | None) -> Callable[..., Meta]:
    """CD: bars with four traits, blank frames, the bars again: has one changed? trait: the index of the one that may; None: any."""

    def make(rng: np.random.Generator, script: Script, set_size: int, retention: int) -> Meta:
        rows = np.arange(script.rows)
        cells = np.sort(shuffled(rng, (script.rows,), 100)[:, :set_size], 1)
        values = rng.integers(2, size=(script.rows, set_size, 4))
        changed, bar, which = (rng.integers(high, size=script.rows) for high in (2, set_size, 4))
        which = which if trait is None else np.full_like(which, trait)
        script.frame(MEMORY, _bars(cells, values))
        script.rest(retention)
        values[rows, bar, which] ^= changed
        script.frame(PROBE, _bars(cells, values), answer=changed)
        return {"trait": np.where(changed == 1, which, -1)}

    return make


def _bars(cells: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.concatenate([CELL + cells[..., None], TRAIT + 2 * np.arange(4) + values], 2).reshape(len(cells), -1)


def halves(rng: np.random.Generator, rows: int, count: int, difference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`count` cells of a 10x10 grid, int64 [rows, count], and whether their right half mirrors the left, [rows].

    A cell of the left half may come twice. Without symmetry, difference / 2 cells of the right half are others; difference is [rows].
    """
    left = 10 * rng.integers(10, size=(rows, count // 2)) + rng.integers(5, size=(rows, count // 2))
    right = rng.permuted(left + 9 - 2 * (left % 10), axis=1)
    taken = np.tile(np.arange(100) % 10 < 5, (rows, 1))
    np.put_along_axis(taken, right, True, 1)
    other = np.where(taken, 2, rng.random((rows, 100))).argsort(1)[:, : count // 2]
    symmetric = rng.integers(2, size=rows)
    wrong = np.where(symmetric == 1, 0, difference // 2)[:, None]
    return np.concatenate([left, np.where(np.arange(count // 2) < wrong, other, right)], 1), symmetric


def spatial_coordination(rng: np.random.Generator, script: Script, list_length: int, difference: np.ndarray) -> Meta:
    """SC: cells one by one: is the pattern of all of them symmetric?"""
    cells, symmetric = halves(rng, script.rows, list_length, difference)
    cells = rng.permuted(cells, axis=1)
    for i in range(list_length):
        script.frame(MEMORY, CELL + cells[:, i : i + 1])
    script.frame(PROBE, answer=symmetric)
    return {"difference": np.where(symmetric == 1, 0, difference)}


def walk(rng: np.random.Generator, path: np.ndarray, size: np.ndarray, closed: np.ndarray, tries: int = TRIES) -> np.ndarray:
    """Go on with each path [m, SEGMENTS + 1], of `size` [m] points so far, to its end, in place; False [m] where that failed.

    Steps go to uniform points that are not `closed` (bool [m, POINTS² + 1], the last of them outside; points that are visited are closed).
    As in the public code directions are tried at random, all steps of a path together within `tries`; how often is drawn here at once.
    """
    rows, left = np.arange(len(path)), np.full(len(path), tries)
    for at in range(int(size.min()), SEGMENTS + 1):
        there = LATTICE_STEPS[path[:, at - 1]]  # [m, 8]
        free = ~np.take_along_axis(closed, there, 1)
        ways = free.sum(1)
        to = there[rows, np.where(free, rng.random(free.shape), -1).argmax(1)]
        tried = np.where(ways > 0, rng.geometric(np.maximum(ways, 1) / 8), tries + 1)
        goes = at >= size
        left -= np.where(goes, tried, 0)
        path[:, at] = np.where(goes & (ways > 0), to, path[:, at])
        closed[rows, path[:, at]] = True
    return left >= 0


def drawings(rng: np.random.Generator, difference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A self-avoiding path for each row and one whose last `difference` [rows] segments end elsewhere, both int64 [rows, SEGMENTS + 1]."""
    path = np.zeros((len(difference), SEGMENTS + 1), np.int64)
    other, todo = path.copy(), np.arange(len(difference))
    while len(todo):
        rows = np.tile(todo, -(-256 // len(todo)))  # many attempts at once, of which the first good one of each row is taken
        one = np.zeros((len(rows), SEGMENTS + 1), np.int64)
        one[:, 0] = rng.integers(POINTS**2, size=len(rows))
        closed = np.zeros((len(rows), POINTS**2 + 1), bool)
        closed[:, -1] = True
        closed[np.arange(len(rows)), one[:, 0]] = True
        good = walk(rng, one, np.ones_like(rows), closed)
        rows, one, closed = rows[good], one[good], closed[good]
        if len(rows):
            two = one.copy()
            good = walk(rng, two, SEGMENTS + 1 - difference[rows], closed)
            found, first = np.unique(rows[good], return_index=True)
            path[found], other[found] = one[good][first], two[good][first]
            todo = np.setdiff1d(todo, found)
    return path, other


def spatial_integration(rng: np.random.Generator, script: Script, part: int, difference: np.ndarray) -> Meta:
    """SI: a path of 12 segments on 5x5 points (a 4x4 grid's corners), told in parts in any order: is the probe that path?"""
    rows, count = script.rows, SEGMENTS // part
    path, other = drawings(rng, difference)
    parts = path[:, np.arange(count)[:, None] * part + np.arange(part + 1)]  # [rows, count, part + 1]
    parts = np.take_along_axis(parts, shuffled(rng, (rows,), count)[..., None], 1)
    for i in range(count):
        script.frame(MEMORY, CELL + _either_way(rng, parts[:, i]))
    same = rng.integers(2, size=rows)
    script.frame(PROBE, CELL + _either_way(rng, np.where(same[:, None] == 1, path, other)), answer=same)
    return {"difference": np.where(same == 1, 0, difference)}


def _either_way(rng: np.random.Generator, line: np.ndarray) -> np.ndarray:
    """Points [rows, k] from either end: a line has no direction."""
    return np.where(rng.integers(2, size=(len(line), 1)) == 1, line[:, ::-1], line)


def memory_updating(rng: np.random.Generator, script: Script, set_size: int, updates: int) -> Meta:
    """SMU: a marker in each 3x3 box, then arrows for box after box that move it: where is it in each box, asked in any order?"""
    rows = np.arange(script.rows)
    marker = rng.integers(9, size=(script.rows, set_size))
    script.frame(MEMORY, at_places(CELL + marker[..., None]))
    for i in range(updates):
        box = i % set_size
        there = BOX_STEPS[marker[:, box]]
        arrow = np.where(there < 9, rng.random(there.shape), -1).argmax(1)
        marker[:, box] = there[rows, arrow]
        script.frame(MEMORY, np.full((script.rows, 1), PLACE + box), ARROW + arrow[:, None])
    order = shuffled(rng, (script.rows,), set_size)
    for asked in order.T:
        script.frame(PROBE, PLACE + asked[:, None], answer=marker[rows, asked])
    return {"position": np.tile(np.arange(set_size), (script.rows, 1)), "box": order}


def task_switching(cued: bool) -> Callable[..., Meta]:
    """STS: is the marker up or down, or left or right? A cue says which; or there is one cue and the question alternates.

    meta "switch" [rows, frames]: 1 where the rule is not that of the answer before, else 0; -1 of the first answer, -2 of a cue.
    """

    def make(rng: np.random.Generator, script: Script, list_length: int) -> Meta:
        rule, cue = rng.integers(2, size=script.rows), np.ones(script.rows, bool)
        switched, switch = np.full(script.rows, -1), []
        for i in range(list_length):
            if i:
                draws = rng.random(script.rows) < CUE_RATE if cued and 1 < i < list_length - 1 else np.zeros(script.rows, bool)
                switched = np.where(cue, switched, 0)
                cue = draws & ~cue
                turns = cue if cued else np.full(script.rows, i > 1)
                rule, switched = np.where(turns, 1 - rule, rule), np.where(turns, 1, switched)
            marker = rng.integers(4, size=script.rows)
            answer = np.where(rule == 0, marker // 2, marker % 2)
            shown = np.where(cue, CUE + rule, CELL + marker)[:, None]
            script.frame(np.where(cue, MEMORY, PROBE), shown, answer=np.where(cue, IGNORE, answer))
            switch.append(np.where(cue, -2, switched))
        return {"switch": np.stack(switch, 1)}

    return make


def complex_span(rng: np.random.Generator, script: Script, distractors: int, modality: str) -> Meta:
    """CS: twice, a line told cell by cell or a 4x4 pattern, and a gap with decisions; then where, of eight places, is each?

    The decisions are on symmetry (spatial) or on a colour (visual). A line is to be found by its direction alone. meta "position": the
    item that a probe asks for, -1 of a decision.
    """
    kept, disturbs = modality.split("-")
    rows = np.arange(script.rows)
    lines = rng.integers(16, size=(script.rows, 2))
    items = shuffled(rng, (script.rows, 2), 16) < 8
    for item in range(2):
        for i in range(3):
            shown = [CELL + LINES[lines[:, item], i][:, None]] if kept == "spatial" else [lit(items[:, item])] if i == 0 else []
            script.frame(MEMORY, *shown)
        for slot in range(5):
            if slot not in GAPS[distractors]:
                script.rest(1)
            elif disturbs == "visual":
                blue = rng.integers(2, size=script.rows)
                script.frame(PROBE, (TINT + 7 * blue + rng.integers(7, size=script.rows))[:, None], answer=blue)
            else:
                cells, symmetric = halves(rng, script.rows, 20, np.full(script.rows, 4))
                script.frame(PROBE, CELL + np.sort(cells, 1), answer=2 + symmetric)
    for item in range(2):
        if kept == "spatial":
            arrows = shuffled(rng, (script.rows,), 8)
            answer = (arrows == HEADINGS[lines[:, item]][:, None]).argmax(1)
            script.frame(PROBE, at_places(ARROW + arrows[..., None]), answer=4 + answer)
        else:
            answer = rng.integers(8, size=script.rows)
            choice = moved(rng, np.repeat(items[:, item : item + 1], 8, 1), 3)
            choice[rows, answer] = items[:, item]
            script.frame(PROBE, at_places(lit(choice)), answer=12 + answer)
    return {"position": np.tile([-1] * (2 * distractors) + [0, 1], (script.rows, 1))}
