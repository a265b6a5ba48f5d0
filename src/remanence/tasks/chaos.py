"""Chaotic systems to forecast: the Kuramoto-Sivashinsky equation and the multiscale Lorenz-96 model (as in arXiv 2410.02654)."""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from ..catalog import system
from ..errors import ShapeError, UsageError, positive
from .base import Task


@dataclass(frozen=True, eq=False)
class ChaosExample:
    """series float64 [T, D], observed; future [H, D], what follows it; one row every `step` units of time.

    start: the whole state of the system at the last row observed, for the oracle (what is not observed is in it). deviation: standard
    deviation of an observed number in the long run. lyapunov: leading exponent per unit of time.
    """

    series: np.ndarray
    future: np.ndarray
    start: np.ndarray
    step: float
    deviation: float
    lyapunov: float


def valid_prediction_time(forecast: np.ndarray, future: np.ndarray, deviation: float, time_a_row: float, threshold: float = 0.5) -> float:
    """Time until the forecast is lost: (rows before the first with NRMSE > threshold) * time_a_row; that of all rows if there is none.

    NRMSE of a row = sqrt(mean over variables of ((forecast - future) / deviation)^2). time_a_row: in Lyapunov times, step * lyapunov.
    Numbers that are not finite are lost. forecast and future [H, D]. Raises ShapeError if they differ.
    """
    forecast, future = np.asarray(forecast, float), np.asarray(future, float)
    if forecast.shape != future.shape or future.ndim != 2:
        raise ShapeError(f"the forecast has shape {list(forecast.shape)} and the future {list(future.shape)}; both must be [H, D].")
    with np.errstate(all="ignore"):
        error = np.sqrt(np.mean(((forecast - future) / deviation) ** 2, 1))
    lost = ~(error <= threshold)
    return float(lost.argmax() if lost.any() else len(lost)) * time_a_row


class KSFlow:
    """u_t = -u_xx - nu u_xxxx - u u_x on a ring of `size`, `points` of them, by ETDRK4 in Fourier space (Kassam & Trefethen 2005).

    The linear part is exact, the product u u_x = (u^2)_x / 2 of fourth order in dt. Its functions of dt times the eigenvalues are means
    over a circle in the complex plane, where they do not cancel. State u float64 [..., points]; its spatial mean does not change.
    """

    def __init__(self, size: float = 22.0, points: int = 64, nu: float = 1.0, dt: float = 0.25):
        k = 2 * np.pi / size * np.arange(points // 2 + 1)
        linear = k**2 - nu * k**4
        circle = np.exp(1j * np.pi * (np.arange(1, 33) - 0.5) / 32)
        z = dt * linear[:, None] + circle
        phi = np.exp(z)
        self.points = points
        self.whole, self.half = np.exp(dt * linear), np.exp(dt * linear / 2)
        self.to_half = dt * ((np.exp(z / 2) - 1) / z).mean(1).real
        self.first = dt * ((-4 - z + phi * (4 - 3 * z + z**2)) / z**3).mean(1).real
        self.middle = dt * (2 * (2 + z + phi * (z - 2)) / z**3).mean(1).real
        self.last = dt * ((-4 - 3 * z - z**2 + phi * (4 - z)) / z**3).mean(1).real
        self.slope = -0.5j * k
        if points % 2 == 0:
            self.slope[-1] = 0  # the highest wave has no derivative on the grid

    def product(self, v: np.ndarray) -> np.ndarray:
        """Of -u u_x, in Fourier space."""
        return self.slope * np.fft.rfft(np.fft.irfft(v, self.points) ** 2)

    def advance(self, u: np.ndarray, steps: int) -> np.ndarray:
        """u after `steps` of dt."""
        v = np.fft.rfft(u)
        for _ in range(steps):
            here = self.product(v)
            a = self.half * v + self.to_half * here
            at_a = self.product(a)
            at_b = self.product(self.half * v + self.to_half * at_a)
            at_c = self.product(self.half * a + self.to_half * (2 * at_b - here))
            v = self.whole * v + self.first * here + self.middle * (at_a + at_b) + self.last * at_c
        return np.fft.irfft(v, self.points)


class LorenzFlow:
    """Multiscale Lorenz-96 by the classical Runge-Kutta method: K slow variables X on a ring, J fast ones Y below each, Y on one long ring.

        dX_k = X_{k-1} (X_{k+1} - X_{k-2}) - X_k + F - (h c / b) sum_j Y_jk
        dY_j = c b Y_{j+1} (Y_{j-1} - Y_{j+2}) - c Y_j + (h c / b) X_k(j)

    State float64 [..., K + K J]: X, then Y.
    """

    def __init__(
        self, slow: int = 36, fast: int = 10, forcing: float = 10.0, h: float = 1.0, b: float = 10.0, c: float = 10.0, dt: float = 0.005
    ):
        self.slow, self.fast, self.forcing, self.b, self.c, self.dt = slow, fast, forcing, b, c, dt
        self.coupling = h * c / b

    def slopes(self, state: np.ndarray) -> np.ndarray:
        """d state / dt."""
        x, y = state[..., : self.slow], state[..., self.slow :]
        ring = np.concatenate([x[..., -2:], x, x[..., :1]], -1)  # as slices of a closed ring: np.roll is several times slower
        chain = np.concatenate([y[..., -1:], y, y[..., :2]], -1)
        load = y.reshape(*y.shape[:-1], self.slow, self.fast).sum(-1)
        new = np.empty_like(state)
        new[..., : self.slow] = ring[..., 1:-2] * (ring[..., 3:] - ring[..., :-3]) - x + self.forcing - self.coupling * load
        flow = chain[..., 2:-1] * (chain[..., :-3] - chain[..., 3:])
        new[..., self.slow :] = self.c * (self.b * flow - y) + self.coupling * np.repeat(x, self.fast, -1)
        return new

    def advance(self, state: np.ndarray, steps: int) -> np.ndarray:
        """The state after `steps` of dt."""
        dt = self.dt
        for _ in range(steps):
            one = self.slopes(state)
            two = self.slopes(state + dt / 2 * one)
            three = self.slopes(state + dt / 2 * two)
            state = state + dt / 6 * (one + 2 * two + 2 * three + self.slopes(state + dt * three))
        return state


Flow = KSFlow | LorenzFlow


class Chaos(Task):
    """What both have in common. flow: the integrator; every: its steps between two rows; settle: rows until a start is forgotten."""

    flow: Flow
    every: int
    settle: int
    step: float
    observed: int
    """How many of the state's numbers are observed, from the first."""
    known: tuple[float, float, float] | None = None
    """(mean, deviation, lyapunov), as `climate` and `exponent` measured them; None: to be measured at first use."""
    horizon: int
    goal: float
    """Lyapunov times that `score` asks for."""
    chance = 0.0
    """No forecast is right by chance; `persistence` and `climatology` say what knowing nothing is worth."""
    threshold = 0.5

    @abstractmethod
    def starts(self, rng: np.random.Generator) -> np.ndarray:
        """A state to settle from."""

    def trajectory(self, start: np.ndarray, rows: int) -> np.ndarray:
        """The `rows` states after `start` [..., S]: [..., rows, S]."""
        states = []
        for _ in range(rows):
            start = self.flow.advance(start, self.every)
            states.append(start)
        return np.stack(states, -2)

    def settled(self, seeds: list[list[int]]) -> np.ndarray:
        """States on the attractor [n, S], each from a generator of its own."""
        start = np.stack([self.starts(np.random.default_rng(seed)) for seed in seeds])
        return self.flow.advance(start, self.settle * self.every)

    def series(self, seed: int, n: int, rows: int) -> np.ndarray:
        """n observed trajectories [n, rows, D] to train on; none is that of an example."""
        return self.trajectory(self.settled([[seed, i, 0x7EA1] for i in range(n)]), rows)[..., : self.observed]

    def sample(self, seed: int = 0, n: int = 8, length: int = 200, horizon: int | None = None) -> list[ChaosExample]:
        """n trajectories of `length` rows observed and `horizon` rows to forecast (None: the system's own, `horizon`)."""
        horizon = self.horizon if horizon is None else horizon
        positive(length=length, horizon=horizon)
        states = self.trajectory(self.settled([[seed, i] for i in range(n)]), length + horizon)
        seen = states[..., : self.observed]
        deviation, lyapunov = self.deviation, self.lyapunov
        return [
            ChaosExample(seen[i, :length], seen[i, length:], states[i, length - 1].copy(), self.step, deviation, lyapunov)
            for i in range(n)
        ]

    def vpt(self, example: ChaosExample, output: np.ndarray, threshold: float | None = None) -> float:
        """Valid prediction time of the forecast [H, D], in Lyapunov times."""
        limit = self.threshold if threshold is None else threshold
        return valid_prediction_time(output, example.future, example.deviation, example.step * example.lyapunov, limit)

    def score(self, example: ChaosExample, output: np.ndarray) -> bool:
        """Is the forecast [H, D] valid for `goal` Lyapunov times, or to its end if that is sooner? (`vpt` is the papers' number.)"""
        unit = example.step * example.lyapunov
        return self.vpt(example, output) >= min(self.goal, len(example.future) * unit)

    def oracle(self, example: ChaosExample) -> np.ndarray:
        """The integrator from the whole state: exact to the bit of the platform's arithmetic."""
        return self.trajectory(example.start, len(example.future))[:, : self.observed]

    @staticmethod
    def persistence(example: ChaosExample) -> np.ndarray:
        """The last row, repeated."""
        return np.repeat(example.series[-1:], len(example.future), 0)

    @staticmethod
    def climatology(example: ChaosExample) -> np.ndarray:
        """The mean of all that was observed, repeated: its NRMSE is about 1."""
        return np.full_like(example.future, example.series.mean())

    @property
    def mean(self) -> float:
        return self._constants[0]

    @property
    def deviation(self) -> float:
        return self._constants[1]

    @property
    def lyapunov(self) -> float:
        return self._constants[2]

    @functools.cached_property
    def _constants(self) -> tuple[float, float, float]:
        return self.known or (*self.climate(), self.exponent())

    def climate(self, rows: int = 2000, n: int = 8) -> tuple[float, float]:
        """Mean and standard deviation of an observed number in the long run; all variables are alike."""
        seen = self.trajectory(self.settled([[i, 0xC11] for i in range(n)]), rows)[..., : self.observed]
        return float(seen.mean()), float(seen.std())

    def exponent(self, rows: int = 4000, n: int = 8, apart: float = 1e-7) -> float:
        """The leading Lyapunov exponent: the growth of a small difference, scaled back at every row (Benettin), averaged."""
        one = self.settled([[i, 0x1AB] for i in range(n)])
        gap = np.stack([np.random.default_rng([i, 0x1AB, 1]).standard_normal(one.shape[1]) for i in range(n)])
        total, ignored = 0.0, rows // 10
        for row in range(-ignored, rows):
            gap = gap - self._neutral(gap)
            gap = apart * gap / np.linalg.norm(gap, axis=1, keepdims=True)
            both = self.flow.advance(np.stack([one, one + gap]), self.every)
            one, gap = both[0], both[1] - both[0]
            if row >= 0:
                total += float(np.log(np.linalg.norm(gap, axis=1) / apart).mean())
        return total / (rows * self.step)

    def _neutral(self, gap: np.ndarray) -> np.ndarray | float:
        """The part of a difference that is another system, not another state of this one."""
        return 0.0


@system(
    "kuramoto-sivashinsky", kind="benchmark", paper="arXiv:2410.02654", year=2024, name="Kuramoto-Sivashinsky forecasting",
    aliases=("ks",),
)  # fmt: skip
class KuramotoSivashinsky(Chaos):
    """Forecast u of the Kuramoto-Sivashinsky equation on a ring, a row every 0.25; by default the small ring of 22, 64 points.

    size=200, points=512 is the literature's large one; its deviation and Lyapunov exponent are then measured at first use (a minute).
    Those of the default are known: the exponent, measured over 80,000 units of time in 16 runs, is 0.050.
    """

    goal, horizon = 1.0, 400

    def __init__(self, size: float = 22.0, points: int = 64, nu: float = 1.0, step: float = 0.25):
        positive(points=points)
        if not (size > 0 and nu > 0 and step > 0):
            raise UsageError(f"size, nu and step are {size}, {nu} and {step}; all must be above 0.")
        self.flow, self.every, self.step, self.observed = KSFlow(size, points, nu, step), 1, step, points
        self.settle, self.size = round(250 / step), size
        if (size, points, nu, step) == (22.0, 64, 1.0, 0.25):
            self.known = 0.0, 1.185, 0.0503

    def starts(self, rng: np.random.Generator) -> np.ndarray:
        """A few long waves of random size and phase; mean 0."""
        x = 2 * np.pi * np.arange(self.observed) / self.observed
        wave = np.arange(1, 5)[:, None]
        size, phase = rng.standard_normal((4, 1)), rng.uniform(0, 2 * np.pi, (4, 1))
        return (size * np.cos(wave * x + phase)).sum(0)

    def _neutral(self, gap: np.ndarray) -> np.ndarray:
        return gap.mean(1, keepdims=True)  # the mean is conserved: it neither grows nor is on this attractor


@system("lorenz96", kind="benchmark", paper="arXiv:2410.02654", year=2024, name="Multiscale Lorenz-96 forecasting", aliases=("lorenz-96",))
class Lorenz96(Chaos):
    """Forecast the slow variables of a multiscale Lorenz-96 model, of which the fast ones are not observed; a row every 0.05.

    Parameters as is usual, K = slow = 36, J = fast = 10, F = forcing = 10, h = 1, b = c = 10; those of the paper are not certain. The
    Lyapunov exponent is that of the whole system, which the fast variables set: 9.9, so that a Lyapunov time is 0.1 or two rows, and
    forecasts of the slow ones last several.
    """

    goal, horizon = 10.0, 100

    def __init__(self, slow: int = 36, fast: int = 10, forcing: float = 10.0, h: float = 1.0, b: float = 10.0, c: float = 10.0):
        positive(slow=slow, fast=fast)
        if slow < 4:
            raise UsageError(f"slow is {slow}; the ring needs at least 4 variables.")
        self.flow, self.every, self.step, self.observed = LorenzFlow(slow, fast, forcing, h, b, c), 10, 0.05, slow
        self.settle, self.total = 200, slow * (1 + fast)
        if (forcing, h, b, c) == (10.0, 1.0, 10.0, 10.0):
            self.known = {(36, 10): (2.557, 3.537, 9.87), (8, 8): (2.616, 3.716, 8.81)}.get((slow, fast))

    def starts(self, rng: np.random.Generator) -> np.ndarray:
        """Small numbers, the slow ones around the forcing's rest."""
        state = 0.1 * rng.standard_normal(self.total)
        state[: self.observed] += 3 + rng.standard_normal(self.observed)
        return state
