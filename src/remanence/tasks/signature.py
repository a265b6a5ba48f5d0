"""Signature regression: the signed area (2D) or volume (3D) that a random path sweeps, from its increments (arXiv 2402.19047)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from ..catalog import system
from ..errors import UsageError, positive
from .base import Task


@dataclass(frozen=True, eq=False)
class PathExample:
    """path float64 [T, d], d = level; target: its signature entry (0, 1) or (0, 1, 2) divided by `scale`, which the whole set shares."""

    path: np.ndarray
    target: float
    scale: float


def signature(path: np.ndarray) -> np.ndarray:
    """The entry S^(0, 1, ..., d - 1) of the piecewise linear path through the points [..., T, d], without a base point: [...].

        S^(0 .. d-1) = the integral over s_0 < s_1 < ... < s_{d-1} of dx^0 dx^1 ... dx^{d-1}

    By Chen's identity: after an increment dx, S^(0..k) = sum_j S^(0..j-1) dx^j ... dx^k / (k - j + 1)!.
    """
    steps = np.moveaxis(np.diff(path, axis=-2), -2, 0)  # [T - 1, ..., d]
    levels = [np.ones(path.shape[:-2]), *(np.zeros(path.shape[:-2]) for _ in range(path.shape[-1]))]
    for dx in steps:
        for top in range(len(levels) - 1, 0, -1):  # downwards, so that every level adds what was there before this increment
            product = np.ones_like(levels[0])
            for low in range(top - 1, -1, -1):
                product = product * dx[..., low]
                levels[top] = levels[top] + levels[low] * product / math.factorial(top - low)
    return levels[-1]


def batch(rng: np.random.Generator, n: int, level: int = 2, length: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """n paths float64 [n, length, level] and their entries [n]: x_n = round(N(0, 1)) summed up, both divided by their largest absolute
    value in the batch, as the published generator does with its 100,000 paths."""
    positive(n=n)
    if level not in (2, 3):
        raise UsageError(f"level is {level!r}; it may be 2 (area) or 3 (volume).")
    if length < level + 1:
        raise UsageError(f"length is {length}; a path of level {level} needs at least {level + 1} points.")
    path = np.cumsum(np.round(rng.standard_normal((n, length, level))), 1)
    path /= max(np.abs(path).max(), 1.0)
    target = signature(path)
    return path, target / max(np.abs(target).max(), 1e-300)


@system("signature", kind="benchmark", paper="arXiv:2402.19047", year=2024, name="Signature regression")
class Signature(Task):
    """An ordered product over all pairs or triples of steps: one layer of a dense linear CDE has it, a diagonal one does not."""

    batch, signature = staticmethod(batch), staticmethod(signature)
    chance = 0.0
    """A number is not guessed; see `guess_rmse` for what knowing nothing costs."""
    tolerance = 0.01

    def sample(self, seed: int = 0, n: int = 8, length: int = 100, level: int = 2) -> list[PathExample]:
        """n paths of `length` points; see `batch`. The scale of a target depends on all n."""
        path, target = batch(np.random.default_rng(seed), n, level, length)
        most = np.abs(target).argmax()
        scale = abs(float(signature(path[most])))
        return [PathExample(one, float(number), scale) for one, number in zip(path, target, strict=True)]

    def score(self, example: PathExample, output: float) -> bool:
        """Is the output within 0.01 of the target, whose range is -1 .. 1? (The papers report the RMSE.)"""
        return abs(float(output) - example.target) <= self.tolerance

    def oracle(self, example: PathExample) -> float:
        """The entry as iterated sums over increments: products at increasing indices, over m! where m of them are at the same one."""
        steps = np.diff(example.path, axis=0)
        level, total = steps.shape[1], 0.0
        for cuts in itertools.product((False, True), repeat=level - 1):  # is coordinate k + 1 at a later index than k, or at the same one?
            groups: list[list[int]] = [[0]]
            for k, later in enumerate(cuts, start=1):
                groups.append([k]) if later else groups[-1].append(k)
            sums = np.ones(len(steps))  # what the groups so far sum to at indices before this one
            for group in groups:
                here = steps[:, group].prod(1) / math.factorial(len(group)) * sums
                sums = np.concatenate([[0.0], np.cumsum(here)[:-1]])
                last = here.sum()
            total += float(last)
        return total / example.scale

    @staticmethod
    def guess_rmse(length: int, level: int) -> float:
        """The root mean square of the entry of a path of whole numbers, before any scaling: the error of always answering 0.

        With s = E[round(N(0, 1))^2] and m = length - 1 increments: s^2 (C(m, 2) + m / 4), or s^3 (C(m, 3) + C(m, 2) / 2 + m / 36).
        """
        tail = [0.5 * math.erfc((k - 0.5) / math.sqrt(2)) for k in range(1, 12)]  # P(round >= k)
        square = sum(2 * (2 * k - 1) * p for k, p in enumerate(tail, start=1))
        m = length - 1
        terms = math.comb(m, 2) + m / 4 if level == 2 else math.comb(m, 3) + math.comb(m, 2) / 2 + m / 36
        return math.sqrt(square**level * terms)
