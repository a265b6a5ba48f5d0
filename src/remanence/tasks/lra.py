"""Long Range Arena (arXiv 2011.04006): one class for a sequence of 1,000 to 16,000 symbols.

ListOps is generated as google-research/long-range-arena (lra_benchmarks/data/listops.py) generates it, and laid out as the S4 family reads
it, with the closing brackets, which the original pipeline drops. Text, retrieval, image and the pathfinders read the user's copies of
IMDB, AAN, CIFAR-10 and LRA's images. Two stand-ins are ours and not LRA: `authors`, which of two novelists wrote a passage of a shipped
novel, and `pathfinder-lite`.
A table of scores should say that plain transformers with self-pretraining reach the level of S4 (Amos et al. 2023, arXiv 2310.02980).
"""

from __future__ import annotations

import io
import pickle
import re
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..catalog import system
from ..corpus import default_haystack, training_texts
from ..errors import UsageError, positive, unknown
from .base import IGNORE, Published, TokenExample
from .symbols import Arrays, SymbolTask

SIDES = {"pathfinder": 32, "path-x": 128, "path-256": 256}
"""Side, in pixels, of the images of LRA's pathfinders: sequences of 1,024, 16,384 and 65,536."""
TASKS = ("listops", "text", "authors", "retrieval", "image", "pathfinder-lite", *SIDES)
SPLITS = ("train", "test")
PATH_SPLITS = ("train", "val", "test")
HARD = "curv_contour_length_14"
"""The folder of the pathfinder images that LRA reports: curves of 14 dashes."""
EMPTY = "pathfinder32/curv_baseline/imgs/0/sample_172.png"
"""An image of LRA's release that is a file of no bytes; every loader leaves it out."""
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
MIN, MAX, MED, SM, CLOSE, LIST_END, LIST_PAD = range(10, 17)
"""Ids of ListOps after the digits 0 .. 9: operators, the closing bracket, the end, padding."""
END, SEPARATOR, PAD = 256, 257, 258
"""Ids after bytes and pixels 0 .. 255."""
AUTHORS = ("moby_dick", "great_expectations")
"""The shipped novels that `authors` tells apart: class 0 and class 1."""
FILES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}

Folder = str | PathLike[str] | None


def laid_out(rows: list[np.ndarray], classes: np.ndarray, end: int, pad: int) -> Arrays:
    """ids and targets, int64 [n, T]: each row, the mark `end`, at which the class is the target, and padding."""
    width = 1 + max(map(len, rows))
    ids, targets = np.full((len(rows), width), pad, np.int64), np.full((len(rows), width), IGNORE, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], ids[i, len(row)], targets[i, len(row)] = row, end, classes[i]
    return ids, targets


class _TooLong(Exception):
    pass


def _uniform(rng: np.random.Generator) -> Iterator[float]:
    """Numbers in [0, 1), drawn in blocks: one at a time they would cost more than the trees."""
    while True:
        yield from rng.random(4096).tolist()


def _median(values: list[int]) -> int:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2  # truncated


_APPLY: dict[int, Callable[[list[int]], int]] = {MIN: min, MAX: max, MED: _median, SM: lambda values: sum(values) % 10}


def _tree(draw: Callable[[], float], depth: int, max_depth: int, max_args: int, out: list[int], most: int) -> int:
    """Append an operator with its arguments and bracket to `out`; returns its value. Raises _TooLong at `most` tokens."""
    operator, values = MIN, []
    start = len(out)
    out.append(operator)
    for _ in range(2 + int(draw() * (max_args - 1))):
        if depth + 1 < max_depth and draw() <= 0.25:
            values.append(_tree(draw, depth + 1, max_depth, max_args, out, most))
        else:
            values.append(int(draw() * 10))
            out.append(values[-1])
        if len(out) >= most:
            raise _TooLong
    operator = out[start] = MIN + int(draw() * 4)
    out.append(CLOSE)
    return _APPLY[operator](values)


def listops(
    rng: np.random.Generator, n: int, max_depth: int = 6, max_args: int = 5, min_length: int = 50, max_length: int = 200
) -> Arrays:
    """n different expressions such as [MAX 2 9 [SM 4 7 ] 0 ] -> ids and targets, int64 [n, T]; the target at the end is the value.

    A node is with probability 1/4 an operator of 2 .. max_args arguments, else, and at max_depth (the root is at 1), a digit. Kept are
    expressions of min_length < tokens < max_length. MED truncates, SM is the sum modulo 10. The defaults are a reduced setting; LRA's is
    max_depth=10, max_args=10, min_length=500, max_length=2000. Raises UsageError where too few expressions are so long.
    """
    positive(n=n, max_depth=max_depth, max_args=max_args, min_length=min_length, max_length=max_length)
    if max_depth < 2 or max_args < 2 or max_length < min_length + 2:
        raise UsageError(
            f"max_depth={max_depth}, max_args={max_args} and lengths between {min_length} and {max_length} allow no expression: there must"
            " be 2 levels, 2 arguments and a length between."
        )
    draw = _uniform(rng).__next__
    found: dict[bytes, int] = {}
    tried = 0
    while len(found) < n:
        tried += 1
        if tried > 20_000 + 2_000 * n:
            raise UsageError(
                f"of {tried - 1} expressions with max_depth={max_depth} and max_args={max_args}, {len(found)} had between {min_length} and"
                f" {max_length} tokens, of {n} wanted; give other limits."
            )
        ids: list[int] = []
        try:  # the root is an operator: a digit would be too short
            value = _tree(draw, 1, max_depth, max_args, ids, max_length - 1)
        except _TooLong:
            continue
        if len(ids) > min_length:
            found.setdefault(bytes(ids), value)
    rows = [np.frombuffer(key, np.uint8) for key in found]
    return laid_out(rows, np.array(list(found.values())), LIST_END, LIST_PAD)


def parse_listops(text: str) -> np.ndarray:
    """An expression of the official files, "( ( ( [MAX 2 ) 9 ) ] )", as ids; its parentheses are dropped. Raises UsageError on others."""
    known = {name: MIN + i for i, name in enumerate(OPERATORS)} | {"]": CLOSE, "X": CLOSE} | {str(i): i for i in range(10)}
    words = text.replace("(", " ").replace(")", " ").split()
    for word in words:
        if word not in known:
            raise unknown("word of a ListOps expression", word, known)
    return np.array([known[word] for word in words], np.int64)


def value_of(ids: np.ndarray) -> int:
    """The value of a ListOps expression, by a stack."""
    stack: list[list[int]] = [[]]
    for token in ids.tolist():
        if token < 10:
            stack[-1].append(token)
        elif token == CLOSE:
            operator, *values = stack.pop()
            stack[-1].append(
                {MIN: min, MAX: max, MED: lambda v: int(np.median(v)), SM: lambda v: int(np.sum(v) % 10)}[operator](values)
            )
        else:
            stack.append([token])
    return stack[0][0]


@lru_cache(maxsize=1)
def novels() -> tuple[bytes, bytes]:
    """The two AUTHORS."""
    return default_haystack().encode(), training_texts()[AUTHORS[1]].encode()


def authors(rng: np.random.Generator, n: int, length: int = 1024, split: str = "train") -> Arrays:
    """n passages of `length` bytes of a shipped novel -> ids and targets, int64 [n, length + 1]: 0 is Moby-Dick, 1 Great Expectations.

    Either with probability 1/2, from a uniform place of its first 90 % (train) or its last 10 % (test). Ours, not LRA's text task: names
    tell much.
    """
    positive(n=n, length=length)
    parts = [book[: len(book) * 9 // 10] if _split(split) == "train" else book[len(book) * 9 // 10 :] for book in novels()]
    if length > min(map(len, parts)):
        raise UsageError(f"length is {length}; the {split} parts of the novels have {min(map(len, parts))} bytes or more.")
    classes = rng.integers(2, size=n)
    rows = []
    for label, start in zip(classes.tolist(), rng.random(n).tolist()):
        at = int(start * (len(parts[label]) - length + 1))
        rows.append(np.frombuffer(parts[label], np.uint8, length, at))
    return laid_out(rows, classes, END, PAD)


WALL = 2
"""Pixels of the margin of a pathfinder image, which no curve enters."""
DASH, GAP, DISC = 191, 64, 255
"""Grey values: a dash, the pixel between two dashes, and a disc."""
_DISC = np.array([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)], np.int64)
TRIES = 12
"""Directions that are tried for each dash, first places for each curve, and how often a curve is tried again."""


def _near(mask: np.ndarray) -> np.ndarray:
    """A mask [n, side, side] and the eight neighbours of its pixels; the outermost ones are not looked at."""
    near = mask.copy()
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            near[:, 1:-1, 1:-1] |= mask[:, 1 + dy : mask.shape[1] - 1 + dy, 1 + dx : mask.shape[2] - 1 + dx]
    return near


def _curve(
    rng: np.random.Generator, blocked: np.ndarray, dashes: int, discs: bool, bend: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A smooth random walk for each image [n] -> pixels [n, P, 2], which of them are gaps [P], both ends [n, 2, 2], has it found room [n].

    blocked: bool [n, side, side], where it may not go. Each dash and the gap after it are three pixels straight on; each turns by a normal
    angle of deviation `bend`, more where the first tries meet something. discs: the pixels around both ends are of the curve.
    """
    n, side = blocked.shape[:2]
    rows = np.arange(n)[:, None]

    def free(pixels: np.ndarray) -> np.ndarray:  # [n, TRIES, p, 2] -> [n, TRIES]
        inside = ((pixels >= WALL) & (pixels < side - WALL)).all((2, 3))
        place = (rows[:, :, None], *np.moveaxis(pixels.clip(0, side - 1), 3, 0))
        return inside & ~(blocked[place] | own[place]).any(2)

    own = np.zeros_like(blocked)  # its own pixels, but for the newest: it does not meet itself
    starts = rng.uniform(WALL + 1, side - WALL - 1, (n, TRIES, 1, 2))
    first = np.rint(starts).astype(np.int64) + (_DISC if discs else 0)
    good = free(first)
    pick = good.argmax(1)
    alive = np.asarray(good.any(1))
    at, heading = starts[rows[:, 0], pick, 0], rng.uniform(0, 2 * np.pi, n)
    ends = [np.rint(at).astype(np.int64)]
    steps = np.arange(0, 3, 0.5)
    drawn = [first[rows[:, 0], pick]] if discs else []
    gaps = [np.zeros(len(_DISC), bool)] if discs else []
    newest = [drawn[0]] if discs else []
    for dash in range(dashes):
        last = dash == dashes - 1
        reach = steps[steps < 2] if last else steps
        turn = rng.normal(0, bend, (n, TRIES)) * (1 + np.arange(TRIES) / 2)
        angles = rng.uniform(0, 2 * np.pi, (n, TRIES)) if dash == 0 else heading[:, None] + turn
        ahead = np.stack([np.sin(angles), np.cos(angles)], 2)[:, :, None]  # [n, TRIES, 1, 2]
        pixels = np.rint(at[:, None, None] + reach[:, None] * ahead).astype(np.int64)  # [n, TRIES, p, 2]
        if last and discs:
            pixels = np.concatenate([pixels, pixels[:, :, -1:] + _DISC], 2)
        good = free(pixels)
        pick = good.argmax(1)
        alive &= good.any(1)
        chosen = pixels[rows[:, 0], pick]
        drawn.append(chosen)
        gaps.append(np.concatenate([reach >= 2, np.zeros(chosen.shape[1] - len(reach), bool)]))
        newest.append(chosen)
        if len(newest) > 1:
            old = np.zeros_like(own)
            before = newest.pop(0).clip(0, side - 1)
            old[rows, before[..., 0], before[..., 1]] = True
            own |= old
        heading = angles[rows[:, 0], pick]
        if last:
            ends.append(chosen[:, len(reach) - 1])
        at = at + 3 * ahead[rows[:, 0], pick, 0]
    return np.concatenate(drawn, 1), np.concatenate(gaps), np.stack(ends, 1), alive


def _placed(
    rng: np.random.Generator, blocked: np.ndarray, dashes: int, discs: bool, bend: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`_curve`, tried again where it found no room."""
    pixels, gaps, ends, found = _curve(rng, blocked, dashes, discs, bend)
    for _ in range(TRIES):
        failed = np.flatnonzero(~found)
        if not len(failed):
            break
        pixels[failed], _, ends[failed], found[failed] = _curve(rng, blocked[failed], dashes, discs, bend)
    return pixels, gaps, ends, found


def pathfinder_lite(
    rng: np.random.Generator, n: int, side: int = 32, dashes: int = 14, distractors: int = 6, bend: float = 0.35
) -> Arrays:
    """n images, two dashed curves, short dashed distractors, two discs -> ids and targets, int64 [n, side ** 2 + 1]; 1: same curve.

    Ours, after LRA's Pathfinder: curves of `dashes` dashes, distractors of dashes // 3; a dash takes two pixels and a dim gap one. The
    discs stand at both ends of one curve or, class 0, at an end of each. Pixels of different curves are never neighbours, so that the
    answer is exact: gaps are dim, not dark, and discs touch one curve. Images in which a curve finds no room are drawn again. Raises
    UsageError where there is hardly any room.
    """
    positive(n=n, side=side, dashes=dashes)
    if isinstance(distractors, bool) or not isinstance(distractors, int) or distractors < 0 or dashes < 3 or side < 16:
        raise UsageError(f"side={side}, dashes={dashes}, distractors={distractors!r}; it must be 16 or more, 3 or more, an integer >= 0.")
    kept: list[np.ndarray] = []
    classes: list[np.ndarray] = []
    found = tried = 0
    while found < n:
        count = max(8, 5 * (n - found) // 4)
        tried += count
        if tried > 4096 + 64 * n:
            raise UsageError(f"side={side} has hardly any room for two curves of {dashes} dashes and {distractors} distractors; give more.")
        image, taken = np.zeros((count, side, side), np.int64), np.zeros((count, side, side), bool)
        alive, rows = np.ones(count, bool), np.arange(count)[:, None]
        ends = []
        for i in range(2 + distractors):
            main = i < 2
            pixels, gaps, tips, fits = _placed(rng, _near(taken), dashes if main else dashes // 3, main, bend)
            alive &= fits
            pixels = pixels.clip(0, side - 1)
            lit = pixels[:, len(_DISC) : -len(_DISC)] if main else pixels  # the discs at its ends keep their room, drawn or not
            dim = gaps[len(_DISC) : -len(_DISC)] if main else gaps
            image[rows, lit[:, dim, 0], lit[:, dim, 1]] = GAP
            image[rows, lit[:, ~dim, 0], lit[:, ~dim, 1]] = DASH
            taken[rows, pixels[..., 0], pixels[..., 1]] = True
            ends.append(tips.clip(0, side - 1))
        label = rng.integers(2, size=count)
        both = np.stack(ends[:2], 1)  # [count, curve, end, 2]
        which = rng.integers(2, size=(count, 2))
        apart = both[rows, np.arange(2), which]  # an end of each
        same = both[rows[:, 0], rng.integers(2, size=count)]
        discs = np.where(label[:, None, None] == 1, same, apart)[:, :, None] + _DISC
        image[rows[:, :, None], discs.clip(0, side - 1)[..., 0], discs.clip(0, side - 1)[..., 1]] = DISC
        kept.append(image[alive].reshape(-1, side * side))
        classes.append(label[alive])
        found += int(alive.sum())
    return laid_out(list(np.concatenate(kept)[:n]), np.concatenate(classes)[:n], END, PAD)


def _connected(image: np.ndarray) -> bool:
    """Do the two discs of an image stand on one curve? By walking from the brightest pixels over lit neighbours."""
    lit, discs = set(zip(*np.nonzero(image))), {(int(y), int(x)) for y, x in zip(*np.nonzero(image == DISC))}
    begin = min(discs)
    seen, queue = {begin}, deque([begin])
    while queue:
        y, x = queue.popleft()
        for pixel in ((y + dy, x + dx) for dy, dx in _DISC.tolist()):
            if pixel in lit and pixel not in seen:
                seen.add(pixel)
                queue.append(pixel)
    return discs <= seen


def _split(split: str, known: tuple[str, ...] = SPLITS) -> str:
    if split not in known:
        raise UsageError(f"split is {split!r}; it may be {' or '.join(map(repr, known))}.")
    return split


def _need(task: str, data: Folder, what: str) -> Path:
    if data is None:
        hint = " The task 'authors' needs none." if task == "text" else ""
        raise UsageError(f"the task {task!r} needs data: {what}.{hint}")
    path = Path(data)
    if not path.exists():
        raise UsageError(f"{path} does not exist; it must be {what}.")
    return path


def _chosen(rng: np.random.Generator, n: int, there: int, path: Path) -> list[int]:
    """n different items, in random order; all of them again where there are fewer."""
    if not there:
        raise UsageError(f"{path} holds no example; it must hold one.")
    order = [rng.permutation(there) for _ in range(-(-n // there))]
    return np.concatenate(order)[:n].tolist()


def imdb(rng: np.random.Generator, n: int, data: Folder, length: int = 4096, split: str = "train") -> Arrays:
    """n reviews of an IMDB folder (`split`/neg/*.txt, class 0, and `split`/pos/*.txt, class 1), their first `length` bytes."""
    path = _need("text", data, "IMDB's folder (aclImdb), with train/neg, train/pos, test/neg and test/pos")
    files = [(file, label) for label, name in enumerate(("neg", "pos")) for file in sorted((path / _split(split) / name).glob("*.txt"))]
    chosen = [files[i] for i in _chosen(rng, n, len(files), path / split)]
    rows = [np.frombuffer(file.read_bytes()[:length], np.uint8) for file, _ in chosen]
    return laid_out(rows, np.array([label for _, label in chosen]), END, PAD)


def aan_pairs(rng: np.random.Generator, n: int, data: Folder, length: int = 4000) -> Arrays:
    """n pairs of papers of an AAN file (TSV: label, id, id, text, text) -> text SEPARATOR text, each of at most `length` bytes.

    LRA's own models encode the two texts one by one and classify [a, b, a * b, a - b]; split the ids at SEPARATOR for that.
    """
    path = _need("retrieval", data, "a file such as new_aan_pairs.train.tsv")
    starts = _starts(path)
    rows, labels = [], []
    for i in _chosen(rng, n, len(starts), path):
        label, *texts = _line(path, starts[i]).split("\t")
        if len(texts) != 4 or label not in ("0", "1", "0.0", "1.0"):
            raise UsageError(f"line {i + 1} of {path} is no pair; it must be 0 or 1, an id, an id, a text, a text, with tabs between.")
        first, second = (np.frombuffer(text.encode()[:length], np.uint8) for text in texts[2:])
        rows.append(np.concatenate([first, [SEPARATOR], second]))
        labels.append(int(float(label)))
    return laid_out(rows, np.array(labels), END, PAD)


def listops_file(rng: np.random.Generator, n: int, data: Folder) -> Arrays:
    """n expressions of an official ListOps file (TSV with the columns Source and Target)."""
    path = _need("listops", data, "a file such as basic_train.tsv")
    starts = _starts(path)[1:]
    rows, values = [], []
    for i in _chosen(rng, n, len(starts), path):
        source, _, target = _line(path, starts[i]).rpartition("\t")
        if not re.fullmatch(r"\d", target.strip()):
            raise UsageError(f"line {i + 2} of {path} is no expression with its value; it must be Source, a tab, and a digit.")
        rows.append(parse_listops(source))
        values.append(int(target))
    return laid_out(rows, np.array(values), LIST_END, LIST_PAD)


def _starts(path: Path) -> np.ndarray:
    """Where each line of a file begins that is not empty, in bytes: AAN's files are of gigabytes."""
    stat = path.stat()
    return _scanned(path, (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=4)
def _scanned(path: Path, _marks: tuple[int, int]) -> np.ndarray:
    starts, at = [], 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                starts.append(at)
            at += len(line)
    return np.array(starts, np.int64)


def _line(path: Path, start: int) -> str:
    with open(path, "rb") as file:
        file.seek(start)
        return file.readline().decode("utf-8", "replace").rstrip("\r\n")


class _ArraysOnly(pickle.Unpickler):
    """A pickle may run anything; CIFAR's need these names alone."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding="latin1": text.encode(encoding)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and CIFAR-10 holds arrays alone")


@lru_cache(maxsize=2)
def cifar(path: Path, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10 in grey: pixels uint8 [N, 1024] and classes int64 [N], from a folder of the python or of the binary version.

    Grey as ITU-R 601 has it, rounded as PIL does: (19595 R + 38470 G + 7471 B + 32768) >> 16.
    """
    images, classes = [], []
    for name in FILES[_split(split)]:
        plain, binary = path / name, path / f"{name}.bin"
        try:
            if plain.is_file():
                table = _ArraysOnly(io.BytesIO(plain.read_bytes()), encoding="bytes").load()
                images.append(np.asarray(table[b"data"], np.uint8).reshape(-1, 3, 1024))
                classes.append(np.asarray(table[b"labels"], np.int64))
            elif binary.is_file():
                rows = np.frombuffer(binary.read_bytes(), np.uint8).reshape(-1, 3073)
                images.append(rows[:, 1:].reshape(-1, 3, 1024))
                classes.append(rows[:, 0].astype(np.int64))
        except (KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise UsageError(f"{plain if plain.is_file() else binary} is no batch of CIFAR-10: {type(error).__name__} {error}.") from None
    if not images:
        raise UsageError(f"{path} holds none of {', '.join(FILES[split])}, with or without .bin; it must be a folder of CIFAR-10.")
    red, green, blue = np.concatenate(images).astype(np.int64).transpose(1, 0, 2)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8), np.concatenate(classes)


def cifar_images(rng: np.random.Generator, n: int, data: Folder, split: str = "train") -> Arrays:
    """n grey images of CIFAR-10, 1024 pixels 0 .. 255 row by row, and the class."""
    path = _need("image", data, "a folder with CIFAR-10's data_batch_1 .. 5 and test_batch, with or without .bin")
    images, classes = cifar(path, split)
    chosen = _chosen(rng, n, len(images), path)
    return laid_out(list(images[chosen]), classes[chosen], END, PAD)


def pathfinder_files(data: Folder, side: int = 32, split: str = "train") -> list[tuple[Path, int]]:
    """(PNG, class) of every image of a split of LRA's pathfinder, in the order in which the S4 family has it; 1: the discs are joined.

    data: LRA's folder pathfinder{side}, the folder that holds it, or one level of difficulty in it (the first two mean HARD), as
    drewlinsley/pathfinder writes it: metadata/0.npy, 1.npy ... and the PNGs that they name. A metadata file is lines of text, in LRA's
    release, or an array of strings, in newer ones: folder, file, number, class, and how it was drawn. The images in the order of the
    files' numbers and lines are permuted by torch's generator with seed 42; then come 80 % train, 10 % val, 10 % test (the rest: train).
    LRA's own split rests on the shards of a TFDS build that was not released. Raises UsageError, naming the file, on what does not parse.
    """
    what = f"LRA's folder pathfinder{side}, with {HARD}/metadata and {HARD}/imgs"
    path = _need({size: task for task, size in SIDES.items()}.get(side, "pathfinder"), data, what)
    level = next((f for f in (path, path / HARD, path / f"pathfinder{side}" / HARD) if (f / "metadata").is_dir()), None)
    files = sorted((f for f in (level / "metadata").glob("*.npy") if f.stem.isdecimal()), key=lambda f: int(f.stem)) if level else []
    if level is None or not files:
        raise UsageError(f"{path} holds no metadata/0.npy, 1.npy ...; it must be {what}.")
    marks = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    rows = _listed(level.absolute(), tuple(files), marks)
    total, part = len(rows), len(rows) // 10
    ends = {"train": slice(total - 2 * part), "val": slice(total - 2 * part, total - part), "test": slice(total - part, total)}
    order = torch.randperm(total, generator=torch.Generator().manual_seed(42))[ends[_split(split, PATH_SPLITS)]].tolist()
    return [(level / rows[i][0], rows[i][1]) for i in order]


@lru_cache(maxsize=4)
def _listed(level: Path, files: tuple[Path, ...], _marks: tuple[tuple[int, int], ...]) -> list[tuple[str, int]]:
    """(PNG below `level`, class) of every row of the metadata."""
    rows = []
    for file in files:
        for number, row in enumerate(_metadata(file), start=1):
            if len(row) < 4 or row[3] not in ("0", "1"):
                raise UsageError(f"line {number} of {file} is {' '.join(row)[:60]!r}; it must be folder, file, number and class, 0 or 1.")
            if f"{level.parent.name}/{level.name}/{row[0]}/{row[1]}" != EMPTY:
                rows.append((f"{row[0]}/{row[1]}", int(row[3])))
    return rows


def _metadata(file: Path) -> list[list[str]]:
    content = file.read_bytes()
    try:
        if content.startswith(b"\x93NUMPY"):
            table = np.load(io.BytesIO(content), allow_pickle=False).astype(str)
            if table.ndim != 2:
                raise ValueError(f"its shape is {table.shape}")
            return table.tolist()
        return [line.split() for line in content.decode("ascii").splitlines()]
    except (ValueError, EOFError, OSError) as error:
        problem = str(error).splitlines()[0]
        raise UsageError(f"{file} is no metadata of a pathfinder: {type(error).__name__} {problem}.") from None


def grey_png(path: Path, side: int) -> np.ndarray:
    """The grey values of an image, uint8 [side * side], row by row. Raises UsageError, naming it, if missing, damaged or of other size."""
    from PIL import Image  # matplotlib brings it, and only these tasks read images

    if not path.is_file():
        raise UsageError(f"{path} does not exist; the metadata name it.")
    try:
        with Image.open(path) as image:
            size = image.size
            pixels = np.asarray(image.convert("L")) if size == (side, side) else None
    except Exception as error:  # on a damaged file the decoder may raise anything
        raise UsageError(f"{path} is truncated or is no image ({type(error).__name__}).") from None
    if pixels is None:
        raise UsageError(f"{path} has {size[0]} x {size[1]} pixels; it must have {side} x {side}.")
    return pixels.reshape(-1)


def pathfinder(rng: np.random.Generator, n: int, data: Folder, side: int = 32, split: str = "train") -> Arrays:
    """n images of LRA's pathfinder, side * side pixels 0 .. 255 row by row, and the class; see `pathfinder_files`."""
    files = pathfinder_files(data, side, split)
    chosen = [files[i] for i in _chosen(rng, n, len(files), Path(data or "") / split)]
    return laid_out([grey_png(path, side) for path, _ in chosen], np.array([label for _, label in chosen]), END, PAD)


OFFICIAL = {"max_depth": 10, "max_args": 10, "min_length": 500, "max_length": 2000}
"""LRA's ListOps, for `listops(rng, n, **OFFICIAL)`."""


def batch(
    rng: np.random.Generator,
    n: int,
    task: str = "listops",
    length: int | None = None,
    split: str = "train",
    data: Folder = None,
    official: bool = False,
) -> Arrays:
    """n sequences of a task -> ids and targets, int64 [n, T]: the sequence, a mark, whose target is the class, and padding.

    listops: generated, reduced or `official`; or read from the TSV file `data`. text: the first `length` bytes (4096) of reviews in the
    IMDB folder `data`. authors: passages of `length` bytes (1024). retrieval: two texts of at most `length` bytes (4000) from the AAN file
    `data`. image: the CIFAR-10 folder `data`. pathfinder-lite: images of `length` pixels (1024), a square number. pathfinder, path-x and
    path-256: LRA's folder pathfinder32, pathfinder128 or pathfinder256, which also have the split "val". `split` does not matter where
    examples are generated or a file is given. Raises UsageError on options that the task does not take.
    """
    positive(n=n, **({} if length is None else {"length": length}))
    given = {"length": length, "data": data, "official": official or None, "split": None if split == "train" else split}
    known = {
        "listops": ("data", "official"), "text": ("length", "data", "split"), "authors": ("length", "split"),
        "retrieval": ("length", "data"), "image": ("data", "split"), "pathfinder-lite": ("length",),
        **dict.fromkeys(SIDES, ("data", "split")),
    }  # fmt: skip
    if task not in TASKS:
        raise unknown("task of lra", str(task), TASKS)
    _split(split, PATH_SPLITS if task in SIDES else SPLITS)
    for name, value in given.items():
        if value is not None and name not in known[task]:
            raise UsageError(f"{name} is {value!r}; the task {task!r} takes {' and '.join(known[task])} alone.")
    if task == "listops":
        if data is not None and official:
            raise UsageError("official=True is given with data; a file has its own setting, so give one of them.")
        return listops_file(rng, n, data) if data is not None else listops(rng, n, **(OFFICIAL if official else {}))
    if task == "text":
        return imdb(rng, n, data, length or 4096, split)
    if task == "authors":
        return authors(rng, n, length or 1024, split)
    if task == "retrieval":
        return aan_pairs(rng, n, data, length or 4000)
    if task == "image":
        return cifar_images(rng, n, data, split)
    if task in SIDES:
        return pathfinder(rng, n, data, SIDES[task], split)
    side = round((length or 1024) ** 0.5)
    if side * side != (length or 1024):
        raise UsageError(f"length is {length}; an image has a square number of pixels, such as 1024 or 4096.")
    return pathfinder_lite(rng, n, side)


_COLUMNS = ("ListOps", "Text", "Retrieval", "Image", "Pathfinder", "Path-X", "average")
_SIZES = (2048, 4096, 4000, 1024, 1024, 16_384, None)
_PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "Transformer": (36.37, 64.27, 57.46, 42.44, 71.40, None, 54.39),
    "Local attention": (15.82, 52.98, 53.39, 41.46, 66.63, None, 46.06),
    "Linformer": (35.70, 53.94, 52.27, 38.56, 76.34),
    "Reformer": (37.27, 56.10, 53.40, 38.07, 68.50),
    "BigBird": (36.05, 64.02, 59.29, 40.83, 74.87, None, 55.01),
    "Linear transformer": (16.13, 65.90, 53.09, 42.34, 75.30),
    "Performer": (18.01, 65.40, 53.82, 42.77, 77.05),
    "Longformer": (35.63, 62.85, 56.89, 42.22, 69.71),
    "S4": (59.60, 86.82, 90.90, 88.65, 94.20, 96.35, 86.09),
    "S5": (62.15, 89.31, 91.40, 88.00, 95.33, 98.58, 87.46),
    "MEGA": (63.14, 90.43, 91.25, 90.44, 96.01, 97.98, 88.21),
}
_LATER = {"S4": "arXiv:2111.00396, S4's protocol", "S5": "arXiv:2208.04933, S4's protocol", "MEGA": "arXiv:2209.10655, S4's protocol"}


@system("lra", kind="benchmark", paper="arXiv:2011.04006", year=2020, name="Long Range Arena", aliases=("long-range-arena",))
class LRA(SymbolTask):
    """What is it, all in all? One class for a long sequence: nested lists, texts, pairs of texts, images pixel by pixel.

    task: one of TASKS, the default of `sample`. Published scores are LRA's own tasks; ListOps of the original pipeline (the first eight
    models) lost the brackets of its expressions, so it does not compare with S4's.
    """

    batch = staticmethod(batch)
    published = tuple(
        Published(model, f"{column}, from memory", size, value, _LATER.get(model, "arXiv:2011.04006 table 1"))
        for model, values in _PUBLISHED.items()
        for column, size, value in zip(_COLUMNS, _SIZES, values)
        if value is not None
    )

    def __init__(self, task: str = "listops"):
        if task not in TASKS:
            raise unknown("task of lra", str(task), TASKS)
        self.task = task
        self.labels = tuple(map(str, range(10 if task in ("listops", "image") else 2)))
        self.chance = 1 / len(self.labels)
        self.vocab_size = LIST_PAD + 1 if task == "listops" else PAD + 1

    def sample(
        self,
        seed: int = 0,
        n: int = 8,
        length: int | None = None,
        task: str | None = None,
        split: str = "train",
        data: Folder = None,
        official: bool = False,
    ) -> list[TokenExample]:
        """n sequences without padding; see `batch`. task: None for the one that this benchmark was made for."""
        pairs = zip(*batch(np.random.default_rng(seed), n, task or self.task, length, split, data, official), strict=True)
        ends = ((ids, targets, int(np.flatnonzero(targets != IGNORE)[0]) + 1) for ids, targets in pairs)
        return [TokenExample(ids[:end].copy(), targets[:end].copy()) for ids, targets, end in ends]

    def oracle(self, example: TokenExample) -> np.ndarray:
        """The class, int64 [1], by rule: a stack, a search in the novels, a walk along a curve. What is read from files has no rule."""
        ids, end = example.ids[:-1], int(example.ids[-1])
        if end == LIST_END:
            return np.array([value_of(ids)])
        side = round(len(ids) ** 0.5)
        if ids.max() < 256 and side * side == len(ids) and (ids == DISC).sum() == 18 and set(ids.tolist()) <= {0, GAP, DASH, DISC}:
            return np.array([int(_connected(ids.reshape(side, side)))])
        if ids.max() < 256:
            passage = ids.astype(np.uint8).tobytes()
            for label, book in enumerate(novels()):
                if passage in book:
                    return np.array([label])
        raise UsageError("this example was read from a file; what it shows has no rule.")
