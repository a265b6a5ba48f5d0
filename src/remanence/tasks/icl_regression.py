"""In-context linear regression: pairs (x, W x) for a W of this sequence alone, then an x to be answered (arXiv 2309.01775, 2212.07677)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..catalog import system
from ..errors import positive
from .base import Task

KURTOSIS = 9 / 5
"""E[x^4] of x uniform in (-sqrt 3, sqrt 3), whose variance is 1."""


@dataclass(frozen=True, eq=False)
class RegressionExample:
    """x [N, d] and y [N, e], told; query [d], asked; target [e], its W query. float64."""

    x: np.ndarray
    y: np.ndarray
    query: np.ndarray
    target: np.ndarray


def batch(rng: np.random.Generator, n: int, pairs: int = 12, dim: int = 3, outputs: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """n sequences -> tokens float64 [n, pairs + 1, dim + outputs] and targets [n, outputs].

    A token is x beside y = W x; the last is the query beside zeros, and its target W query. x is uniform in (-sqrt 3, sqrt 3), W standard
    normal, both fresh for every sequence.
    """
    positive(n=n, pairs=pairs, dim=dim, outputs=outputs)
    x = rng.uniform(-(3**0.5), 3**0.5, (n, pairs + 1, dim))
    y = x @ rng.standard_normal((n, dim, outputs))
    target = y[:, -1].copy()
    y[:, -1] = 0
    return np.concatenate([x, y], 2), target


def best_rate(pairs: int, dim: int) -> float:
    """The step length of `one_step` with the least expected error: 1 / (1 + (kurtosis + dim - 2) / pairs)."""
    return 1 / (1 + (KURTOSIS + dim - 2) / pairs)


def one_step(x: np.ndarray, y: np.ndarray, query: np.ndarray, rate: float | None = None) -> np.ndarray:
    """The answer after one step of gradient descent on the pairs from W = 0: rate / N sum_i y_i (x_i . query).

    It is what one layer of linear attention computes. x [..., N, d], y [..., N, e], query [..., d] -> [..., e]; rate: default the best.
    """
    rate = best_rate(*x.shape[-2:]) if rate is None else rate
    weight = np.einsum("...nd,...d->...n", x, query) * rate / x.shape[-2]
    return np.einsum("...ne,...n->...e", y, weight)


def one_step_loss(pairs: int, dim: int, rate: float | None = None) -> float:
    """E (answer - target)^2 of one output after `one_step`: dim (1 - 2 r + r^2 (1 + (kurtosis + dim - 2) / pairs))."""
    rate = best_rate(pairs, dim) if rate is None else rate
    return dim * (1 - 2 * rate + rate**2 / best_rate(pairs, dim))


@system("icl-regression", kind="benchmark", paper="arXiv:2309.01775", year=2023, name="In-context regression")
class ICLRegression(Task):
    """Learn a linear map from its examples, inside the forward pass."""

    batch, one_step, one_step_loss = staticmethod(batch), staticmethod(one_step), staticmethod(one_step_loss)
    chance = 0.0
    """A number is not guessed. Per output, always answering 0 costs `dim`, one gradient step `one_step_loss`, least squares nothing."""

    def sample(self, seed: int = 0, n: int = 8, pairs: int = 12, dim: int = 3, outputs: int = 3) -> list[RegressionExample]:
        """n sequences of `pairs` examples and a query; see `batch`."""
        tokens, targets = batch(np.random.default_rng(seed), n, pairs, dim, outputs)
        return [
            RegressionExample(row[:-1, :dim], row[:-1, dim:], row[-1, :dim], target) for row, target in zip(tokens, targets, strict=True)
        ]

    def score(self, example: RegressionExample, output: np.ndarray) -> bool:
        """Is every output within 0.01 of its target? (The paper reports the squared error: `(output - target) ** 2`.)"""
        return bool((np.abs(np.asarray(output) - example.target) <= 0.01).all())

    def oracle(self, example: RegressionExample) -> np.ndarray:
        """Least squares, of least norm where there are fewer pairs than dimensions: exact if there are enough."""
        return example.query @ np.linalg.lstsq(example.x, example.y, rcond=None)[0]
