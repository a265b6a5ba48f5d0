"""Neural Networks and the Chomsky Hierarchy: 15 tasks of length generalisation, on three levels (arXiv 2207.02098).

A sequence is [x ; as many EMPTY tokens as the answer has], read in one pass; the answer is predicted AT the EMPTY tokens, without seeing
itself. Published protocol: one length for a batch, uniform in 1 .. 40; the score is the mean accuracy at every length from 41 to 500 (512
sequences each), and a task is solved at SOLVED. The distributions are those of google-deepmind/neural_networks_chomsky_hierarchy, edge
cases of the shortest lengths included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..catalog import system
from ..errors import UsageError, positive, unknown
from .base import IGNORE, Published, TokenExample
from .symbols import Arrays, SymbolTask, outputs_of

EMPTY, COMPUTE = 11, 12
"""Stand after the input, where the answer is predicted, and between the two if computation tokens are asked for."""
VOCAB_SIZE = 13
"""Of all tasks together: the largest alphabet has 11 symbols."""
SOLVED = 0.9
MODULUS = 5
PLUS, MINUS, TIMES, OPEN, CLOSE = range(MODULUS, MODULUS + 5)
"""Codes of the symbols of an expression; a digit is its own."""
EQUATION = "01234+-()x="
"""The alphabet of solve-equation, which has no product; an id is an index."""
END = 2
"""Ends an answer of varying length; what stands after it is 0, which is trained on but not scored."""


def even_pairs(rng: np.random.Generator, n: int, length: int) -> Arrays:
    """Is the number of 01 and 10 odd? (Is the last bit not the first?)"""
    x = rng.integers(2, size=(n, length))
    return x, x[:, :1] ^ x[:, -1:]


def parity_check(rng: np.random.Generator, n: int, length: int) -> Arrays:
    """Is the number of ones odd?"""
    x = rng.integers(2, size=(n, length))
    return x, x.sum(1, keepdims=True) % 2


def cycle_navigation(rng: np.random.Generator, n: int, length: int) -> Arrays:
    """Where on a circle of five do steps of -1, 0, +1 (symbols 0, 1, 2) lead?"""
    x = rng.integers(3, size=(n, length))
    return x, (x - 1).sum(1, keepdims=True) % MODULUS


def modular_arithmetic(rng: np.random.Generator, n: int, length: int) -> Arrays:
    """Digits and + - * between them, products first; an even length is made odd by one less."""
    x = np.empty((n, length - (length + 1) % 2), np.int64)
    x[:, ::2] = rng.integers(MODULUS, size=x[:, ::2].shape)
    x[:, 1::2] = rng.integers(PLUS, TIMES + 1, size=x[:, 1::2].shape)
    total, term = np.zeros(n, np.int64), x[:, 0]
    for at in range(1, x.shape[1], 2):
        times, digit = x[:, at] == TIMES, x[:, at + 1]
        total = np.where(times, total, total + term) % MODULUS
        term = np.where(times, term * digit, np.where(x[:, at] == PLUS, digit, -digit)) % MODULUS
    return x, (total + term)[:, None] % MODULUS


def stack_manipulation(rng: np.random.Generator, n: int, length: int) -> Arrays:
    """A stack of bits, bottom first, then POP (2), PUSH 0 (3), PUSH 1 (4): what is left, top first? POP leaves an empty stack as it is."""
    given = rng.integers(1, length, size=(n, 1)) if length > 1 else np.ones((n, 1), np.int64)
    x = np.where(np.arange(length) < given, rng.integers(2, size=(n, length)), rng.integers(2, 5, size=(n, length)))
    stack, depth, rows = np.zeros((n, length + 1), np.int64), np.zeros(n, np.int64), np.arange(n)
    for symbol in x.T:
        stack[rows, depth] = symbol % 3  # 0, 1, 3, 4 -> 0, 1, 0, 1; what a POP writes is above the top
        depth = np.where(symbol == 2, np.maximum(depth - 1, 0), depth + 1)
    below = depth[:, None] - 1 - np.arange(length + 1)
    y = np.where(below >= 0, np.take_along_axis(stack, np.maximum(below, 0), 1), 0)
    y[rows, depth] = END
    return x, y


def reverse_string(rng: np.random.Generator, n: int, length: int) -> Arrays:
    """The bits, last first."""
    x = rng.integers(2, size=(n, length))
    return x, x[:, ::-1]


def expressions(rng: np.random.Generator, n: int, length: int, operators: int) -> Arrays:
    """Expressions of exactly `length` symbols with the first `operators` of + - *, int64 [n, length], and their values mod 5, [n].

    Lengths 1 to 4 are d, -d, (d), (-d); a longer one is (left operator right), the length of left uniform in 1 .. length - 4. All parts
    of all rows are split side by side, level by level; their values are put together on the way back.
    """
    x, levels = np.empty(n * length, np.int64), []
    at, size = np.arange(n) * length, np.full(n, length)  # where each part starts, and its symbols
    while len(at):
        wide, leaf = size >= 3, size < 5
        x[at[wide]], x[(at + size - 1)[wide]] = OPEN, CLOSE
        digit, negative, place = rng.integers(MODULUS, size=leaf.sum()), size[leaf] % 2 == 0, (at + size // 2)[leaf]
        x[place], x[place[negative] - 1] = digit, MINUS
        start, inner = at[~leaf], size[~leaf]
        left, operator = rng.integers(1, inner - 3), rng.integers(operators, size=len(inner))
        middle = start + 1 + left
        x[middle] = PLUS + operator
        levels.append((leaf, np.where(negative, -digit, digit), operator))
        at, size = np.concatenate([start + 1, middle + 1]), np.concatenate([left, inner - 3 - left])
    values = np.empty(0, np.int64)
    for leaf, digit, operator in reversed(levels):
        a, b = np.split(values, 2)
        values = np.empty(len(leaf), np.int64)
        values[leaf], values[~leaf] = digit, np.choose(operator, [a + b, a - b, a * b])
        values %= MODULUS
    return x.reshape(n, length), values


def modular_arithmetic_brackets(rng: np.random.Generator, n: int, length: int) -> Arrays:
    """The value mod 5 of a nested expression."""
    x, value = expressions(rng, n, length, 3)
    return x, value[:, None]


def solve_equation(rng: np.random.Generator, n: int, length: int) -> Arrays:
    """(1+x)=3 mod 5: what is x? Sums and differences only, so there is one answer. Lengths 1 and 2 are zeros."""
    if length < 3:
        return np.zeros((n, length), np.int64), np.zeros((n, 1), np.int64)
    x, value = expressions(rng, n, length - 2, 2)
    x = np.where(x > TIMES, x - 1, x)  # without a code for the product
    after = (np.arange(length - 2) - rng.integers(length - 2, size=(n, 1))) % (length - 2)
    hidden = np.where(x < MODULUS, after, length).argmin(1, keepdims=True)  # the first digit from a uniform place on, round the end
    y = np.take_along_axis(x, hidden, 1)
    np.put_along_axis(x, hidden, EQUATION.index("x"), 1)
    return np.concatenate([x, np.full((n, 1), EQUATION.index("=")), value[:, None]], 1), y


def duplicate_string(rng: np.random.Generator, n: int, length: int) -> Arrays:
    """The bits, twice."""
    x = rng.integers(2, size=(n, length))
    return x, np.tile(x, 2)


def missing_duplicate_string(rng: np.random.Generator, n: int, length: int) -> Arrays:
    """A string of length // 2 bits told twice, one of them hidden by a 2: which? An odd length ends with a 3; length 1 is a 1."""
    if length == 1:
        return np.ones((n, 1), np.int64), np.ones((n, 1), np.int64)
    x = np.tile(rng.integers(2, size=(n, length // 2)), 2)
    hidden = rng.integers(x.shape[1], size=(n, 1))
    y = np.take_along_axis(x, hidden, 1)
    np.put_along_axis(x, hidden, 2, 1)
    return np.pad(x, ((0, 0), (0, length % 2)), constant_values=3), y


def odds_first(rng: np.random.Generator, n: int, length: int) -> Arrays:
    """The bits at positions 1, 3, 5 .., counted from 0, then those at 0, 2, 4 .. (the order of the published code)."""
    x = rng.integers(2, size=(n, length))
    return x, np.concatenate([x[:, 1::2], x[:, ::2]], 1)


def not_zero(rng: np.random.Generator, x: np.ndarray, part: np.ndarray) -> None:
    """Draw the bits `part` of each row of x anew, uniformly but for all zeros; in place. x int64, part bool, both [n, length]."""
    rows = np.arange(len(x))
    while len(rows):
        x[rows] = np.where(part[rows], rng.integers(2, size=x[rows].shape), x[rows])
        rows = rows[~(part[rows] & (x[rows] == 1)).any(1)]


def text(x: np.ndarray) -> list[str]:
    """Rows of digits as strings."""
    return [(row + ord("0")).astype(np.uint8).tobytes().decode() for row in x]


def ended(digits: Sequence[int], width: int) -> list[int]:
    """The digits, END, and zeros up to `width`. Where a length of 1 or 2 leaves no room for all digits, the last are left out."""
    kept = list(digits[: width - 1])
    return [*kept, END, *[0] * (width - 1 - len(kept))]


def binary(rng: np.random.Generator, n: int, length: int, width: int, combine: Callable[[int, int], int]) -> Arrays:
    """a 2 b, least significant bit first, lengths of a uniform in 1 .. length - 2 and neither number 0; what `combine` makes of them.

    Lengths 1 and 2 have no b, and an a of at most 2^length - 2.
    """
    if length <= 2:
        x = rng.integers(2**length - 1, size=(n, 1)) >> np.arange(length) & 1
    else:
        x, split, at = np.full((n, length), 2), rng.integers(1, length - 1, size=(n, 1)), np.arange(length)
        not_zero(rng, x, at < split)
        not_zero(rng, x, at > split)
    y = []
    for a, _, b in (row.partition("2") for row in text(x)):
        result = combine(int(a[::-1], 2), int(b[::-1] or "0", 2))
        y.append(ended([int(bit) for bit in f"{result:b}"[::-1]], width))
    return x, np.array(y)


def binary_addition(rng: np.random.Generator, n: int, length: int) -> Arrays:
    """a + b."""
    return binary(rng, n, length, length + 1, lambda a, b: a + b)


def binary_multiplication(rng: np.random.Generator, n: int, length: int) -> Arrays:
    """a * b."""
    return binary(rng, n, length, length, lambda a, b: a * b)


def compute_sqrt(rng: np.random.Generator, n: int, length: int) -> Arrays:
    """The floor of the square root of a number above 0, most significant bit first."""
    x = np.zeros((n, length), np.int64)
    not_zero(rng, x, np.ones_like(x, bool))
    width = (length + 1) // 2
    return x, np.array([[int(bit) for bit in f"{math.isqrt(int(row, 2)):b}".zfill(width)] for row in text(x)])


def bucket_sort(rng: np.random.Generator, n: int, length: int) -> Arrays:
    """Symbols 0 .. 4, sorted."""
    x = rng.integers(MODULUS, size=(n, length))
    return x, np.sort(x, 1)


def value_of(expression: str) -> int:
    """An expression's value mod 5, by recursive descent."""
    at = 0

    def total() -> int:
        nonlocal at
        value = product()
        while expression[at : at + 1] in ("+", "-"):
            sign, at = 1 if expression[at] == "+" else -1, at + 1
            value += sign * product()
        return value % MODULUS

    def product() -> int:
        nonlocal at
        value = factor()
        while expression[at : at + 1] == "*":
            at += 1
            value *= factor()
        return value

    def factor() -> int:
        nonlocal at
        symbol, at = expression[at], at + 1
        if symbol == "-":
            return -factor()
        if symbol == "(":
            value, at = total(), at + 1
            return value
        return int(symbol)

    return total()


def evaluated(x: list[int]) -> list[int]:
    """The value of an expression's symbols."""
    return [value_of("".join("01234+-*()"[symbol] for symbol in x))]


def run_stack(x: list[int]) -> list[int]:
    """What stack-manipulation asks for."""
    stack: list[int] = []
    for symbol in x:
        if symbol == 2:
            del stack[-1:]
        else:
            stack.append(symbol if symbol < 2 else symbol - 3)
    return ended(stack[::-1], len(x) + 2)[: len(x) + 1]


def solution(x: list[int]) -> list[int]:
    """The digit for which both sides of an equation agree."""
    left, equals, right = "".join(EQUATION[symbol] for symbol in x).partition("=")
    return [next((d for d in range(MODULUS) if equals and value_of(left.replace("x", str(d))) == int(right)), 0)]


def missing(x: list[int]) -> list[int]:
    """The bit that stands in the other half where one is hidden."""
    half = len(x) // 2
    return [x[(x.index(2) + half) % (2 * half)] if half else 1]


def schoolbook(x: list[int], width: int, product: bool) -> list[int]:
    """Sum or product of the numbers on both sides of the 2, bit by bit with a carry."""
    split = x.index(2) if 2 in x else len(x)
    a, b = x[:split], x[split + 1 :]
    columns = [0] * (len(a) + len(b) + 1)
    if product:
        for i, bit in enumerate(a):
            for j, other in enumerate(b):
                columns[i + j] += bit * other
    else:
        for number in (a, b):
            for i, bit in enumerate(number):
                columns[i] += bit
    for i in range(len(columns) - 1):
        columns[i + 1] += columns[i] // 2
        columns[i] %= 2
    while len(columns) > 1 and not columns[-1]:
        columns.pop()
    return ended(columns, width)


def longhand_sqrt(x: list[int]) -> list[int]:
    """The largest root, bit by bit, whose square is not above the number."""
    number, root, width = int("".join(map(str, x)), 2), 0, (len(x) + 1) // 2
    for place in reversed(range(width)):
        if (root | 1 << place) ** 2 <= number:
            root |= 1 << place
    return [root >> place & 1 for place in reversed(range(width))]


@dataclass(frozen=True)
class Problem:
    """One task of the suite. level: of the hierarchy, "regular", "dcf" (deterministic context-free) or "cs" (context-sensitive).

    symbols: ids that an answer may have, 0 .. symbols - 1. make(rng, n, length) -> x int64 [n, L] and answers [n, m]. solve(x): the
    answer by rule. ends: answers stop at END. best: the published scores in percent, of the models of MODELS.
    """

    level: str
    symbols: int
    make: Callable[[np.random.Generator, int, int], Arrays]
    solve: Callable[[list[int]], list[int]]
    best: tuple[int, ...]
    ends: bool = False


MODELS = ("RNN", "Stack-RNN", "Tape-RNN", "Transformer", "LSTM")
PROBLEMS: dict[str, Problem] = {
    "even-pairs": Problem(
        "regular", 2, even_pairs, lambda x: [sum(a != b for a, b in zip(x, x[1:])) % 2], (100, 100, 100, 96, 100)
    ),
    "modular-arithmetic": Problem("regular", 5, modular_arithmetic, evaluated, (100, 100, 100, 24, 100)),
    "parity-check": Problem("regular", 2, parity_check, lambda x: [x.count(1) % 2], (100, 100, 100, 52, 100)),
    "cycle-navigation": Problem("regular", 5, cycle_navigation, lambda x: [(x.count(2) - x.count(0)) % 5], (100, 100, 100, 62, 100)),
    "stack-manipulation": Problem("dcf", 3, stack_manipulation, run_stack, (56, 100, 100, 58, 59), ends=True),
    "reverse-string": Problem("dcf", 2, reverse_string, lambda x: x[::-1], (62, 100, 100, 62, 61)),
    "modular-arithmetic-brackets": Problem("dcf", 5, modular_arithmetic_brackets, evaluated, (41, 96, 95, 33, 59)),
    "solve-equation": Problem("dcf", 5, solve_equation, solution, (51, 56, 64, 26, 68)),
    "duplicate-string": Problem("cs", 2, duplicate_string, lambda x: x + x, (50, 53, 100, 53, 58)),
    "missing-duplicate-string": Problem("cs", 2, missing_duplicate_string, missing, (52, 55, 100, 56, 54)),
    "odds-first": Problem("cs", 2, odds_first, lambda x: x[1::2] + x[::2], (51, 52, 100, 53, 56)),
    "binary-addition": Problem(
        "cs", 3, binary_addition, lambda x: schoolbook(x, len(x) + 1, product=False), (50, 53, 100, 54, 56), ends=True
    ),
    "binary-multiplication": Problem(
        "cs", 3, binary_multiplication, lambda x: schoolbook(x, len(x), product=True), (50, 53, 59, 52, 53), ends=True
    ),
    "compute-sqrt": Problem("cs", 2, compute_sqrt, longhand_sqrt, (54, 57, 58, 52, 58)),
    "bucket-sort": Problem("cs", 5, bucket_sort, sorted, (28, 78, 71, 92, 79)),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Transduction(TokenExample):
    """An input and its answer of `task`."""

    task: str


def problem(task: str) -> Problem:
    """The entry of PROBLEMS. Raises UnknownName on another name."""
    if task not in PROBLEMS:
        raise unknown("task", task, PROBLEMS)
    return PROBLEMS[task]


def batch(rng: np.random.Generator, n: int, length: int = 40, task: str = "parity-check", compute: int = 0) -> Arrays:
    """n sequences [x ; compute * len(x) COMPUTE tokens ; m EMPTY tokens] -> ids and targets, int64 [n, T].

    len(x) is `length` (one less for modular-arithmetic of an even one) and m the length of the answers, which are the targets at the last
    m positions. Raises UsageError on a length below 1 or a compute below 0, UnknownName on another task.
    """
    positive(n=n, length=length)
    if isinstance(compute, bool) or not isinstance(compute, int) or compute < 0:
        raise UsageError(f"compute is {compute!r}; it must be an integer >= 0, computation tokens for each token of the input.")
    x, y = problem(task).make(rng, n, length)
    pause = np.full((n, compute * x.shape[1]), COMPUTE)
    ids = np.concatenate([x, pause, np.full(y.shape, EMPTY)], 1)
    targets = np.full_like(ids, IGNORE)
    targets[:, ids.shape[1] - y.shape[1] :] = y
    return ids, targets


def counted(targets: np.ndarray) -> np.ndarray:
    """The targets of `batch` that the published accuracy counts: those up to and with the END of answers that stop there, IGNORE after."""
    return np.where((targets == END).cumsum(1) - (targets == END) > 0, IGNORE, targets)


SOURCE = "arXiv:2207.02098, Table 2, rounded; as remembered, not read off again (within 2 points)"


@system("chomsky", kind="benchmark", paper="arXiv:2207.02098", year=2022, name="Neural Networks and the Chomsky Hierarchy")
class Chomsky(SymbolTask):
    """Does what was learned on short inputs hold for long ones? Which tasks it does for shows which automaton a network is."""

    batch = staticmethod(batch)
    problems = PROBLEMS
    vocab_size = VOCAB_SIZE
    chance = 1 / 2
    """Of the default task, at one position; of others see `chance_of`."""
    published = tuple(
        Published(model, f"{task}, mean over lengths 41 to 500, best run", None, float(value), SOURCE)
        for task, entry in PROBLEMS.items()
        for model, value in zip(MODELS, entry.best, strict=True)
    )

    def sample(self, seed: int = 0, n: int = 8, length: int = 40, task: str = "parity-check", compute: int = 0) -> list[Transduction]:
        """n sequences with an input of `length` symbols; see `batch`. task: a key of PROBLEMS."""
        return [Transduction(*row, task=task) for row in zip(*batch(np.random.default_rng(seed), n, length, task, compute), strict=True)]

    @staticmethod
    def chance_of(task: str) -> float:
        """Of a uniform guess at one position among the symbols that an answer of the task may have.

        The paper guesses bits in the three tasks whose answers end with a mark, which makes 50 % there instead of 33.
        """
        return 1 / problem(task).symbols

    def score(self, example: Transduction, output: Any) -> bool:
        """Is the whole answer right, up to and with its END if it has one? output: as for `accuracy`."""
        return self.accuracy(example, output) == 1

    def accuracy(self, example: Transduction, output: Any) -> float:
        """The fraction of the answer's symbols, up to and with its END if it has one, that are right: the published metric.

        output: the predicted ids, at every position [T] or at the m EMPTY tokens alone.
        """
        got, wanted = outputs_of(example, output)
        counted = int((wanted == END).argmax()) + 1 if problem(example.task).ends else len(wanted)
        return float((got == wanted)[:counted].mean())

    def oracle(self, example: Transduction) -> np.ndarray:
        """The predictions at every position [T], 0 where nothing is scored: worked out from the input by a rule of its own."""
        ids = example.ids
        answer = problem(example.task).solve(ids[ids < EMPTY].tolist())
        output = np.zeros_like(ids)
        output[len(ids) - len(answer) :] = answer
        return output
