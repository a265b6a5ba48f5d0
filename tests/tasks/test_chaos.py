"""The chaotic systems: conservation, bounds, the order of the integrators, an oracle that is exact, and the metric."""

from __future__ import annotations

import numpy as np
import pytest

import remanence as rm
from remanence.errors import ShapeError, UsageError
from remanence.tasks.chaos import Chaos, KSFlow, KuramotoSivashinsky, Lorenz96, LorenzFlow, valid_prediction_time

KS, L96 = rm.task("kuramoto-sivashinsky"), Lorenz96(slow=8, fast=8)
L96.settle = 80  # rows; enough here


def waves(points: int, size: float) -> np.ndarray:
    x = size * np.arange(points) / points
    return np.cos(2 * np.pi * x / size) * (1 + np.sin(2 * np.pi * x / size))


def order(errors: list[float]) -> float:
    return float(np.log2(errors[0] / errors[1]))


def test_ks_keeps_the_mean_and_its_energy_is_bounded() -> None:
    start = waves(64, 22.0) + 0.3
    path = [start]
    for _ in range(60):
        path.append(KSFlow().advance(path[-1], 20))
    states = np.stack(path)
    assert np.abs(states.mean(1) - start.mean()).max() < 1e-13
    energy = ((states - 0.3) ** 2).mean(1)
    assert np.isfinite(energy).all() and energy.max() < 6 and 0.8 < energy[20:].mean() < 2.2


def test_ks_is_of_fourth_order_in_time() -> None:
    """Past the first moments, in which the stiff waves of a smooth start settle, and with steps small enough to tell: 3.91, then 4."""
    start = KSFlow(points=16, dt=1 / 64).advance(waves(16, 22.0), 256)
    exact = KSFlow(points=16, dt=1 / 512).advance(start, 4 * 512)
    errors = [float(np.linalg.norm(KSFlow(points=16, dt=dt).advance(start, round(4 / dt)) - exact)) for dt in (1 / 32, 1 / 64)]
    assert 3.85 < order(errors) < 4.1 and errors[0] < 1e-7


def test_ks_functions_of_the_eigenvalues() -> None:
    """Where nothing cancels the circle's means are the functions themselves."""
    flow, k = KSFlow(), 2 * np.pi / 22 * np.arange(33)
    z = 0.25 * (k**2 - k**4)
    far, e = np.abs(z) > 1, np.exp(z)
    with np.errstate(all="ignore"):
        pairs = (
            (flow.to_half, (np.exp(z / 2) - 1) / z), (flow.first, (-4 - z + e * (4 - 3 * z + z**2)) / z**3),
            (flow.middle, 2 * (2 + z + e * (z - 2)) / z**3), (flow.last, (-4 - 3 * z - z**2 + e * (4 - z)) / z**3),
        )  # fmt: skip
    for got, want in pairs:
        assert np.abs(got[far] / 0.25 - want[far]).max() < 1e-14


def test_ks_does_not_depend_on_the_grid() -> None:
    coarse, fine = (KSFlow(points=n, dt=0.125).advance(waves(n, 22.0), 80) for n in (64, 128))
    assert np.abs(coarse - fine[::2]).max() < 1e-6


def test_ks_against_its_right_hand_side() -> None:
    """A small step against a difference quotient of the equation, derivatives by an explicit Fourier sum."""
    n, size, nu, u = 32, 22.0, 0.7, waves(32, 22.0)
    k = 2 * np.pi / size * np.fft.fftfreq(n, 1 / n)

    def derivative(v: np.ndarray, times: int) -> np.ndarray:
        return np.fft.ifft((1j * k) ** times * np.fft.fft(v)).real

    slope = -derivative(u, 2) - nu * derivative(u, 4) - u * derivative(u, 1)
    dt = 1e-5
    got = (KSFlow(size, n, nu, dt).advance(u, 1) - u) / dt
    assert np.abs(got - slope).max() < 1e-3 * np.abs(slope).max()


def test_lorenz_slopes_from_the_equations() -> None:
    flow = LorenzFlow(slow=5, fast=3, forcing=7.0, h=0.9, b=8.0, c=6.0)
    state = np.random.default_rng(0).standard_normal(20)
    x, y = state[:5], state[5:]
    want = np.empty(20)
    for k in range(5):
        want[k] = x[k - 1] * (x[(k + 1) % 5] - x[k - 2]) - x[k] + 7.0 - 0.9 * 6 / 8 * y[3 * k : 3 * k + 3].sum()
    for j in range(15):
        want[5 + j] = 6 * 8 * y[(j + 1) % 15] * (y[j - 1] - y[(j + 2) % 15]) - 6 * y[j] + 0.9 * 6 / 8 * x[j // 3]
    assert np.allclose(flow.slopes(state), want, rtol=1e-13, atol=1e-13)


def test_lorenz_is_of_fourth_order_and_bounded() -> None:
    start = L96.settled([[0]])[0]
    exact = LorenzFlow(8, 8, dt=0.0005).advance(start, 400)
    errors = [float(np.linalg.norm(LorenzFlow(8, 8, dt=dt).advance(start, round(0.2 / dt)) - exact)) for dt in (0.005, 0.0025)]
    assert 3.6 < order(errors) < 4.6
    energy = (L96.trajectory(start, 100) ** 2).mean(1)
    assert np.isfinite(energy).all() and energy.max() < 60


@pytest.mark.parametrize("task, length, horizon", [(KS, 20, 60), (L96, 10, 30)], ids=["ks", "lorenz96"])
def test_examples(task: Chaos, length: int, horizon: int) -> None:
    two = task.sample(seed=1, n=2, length=length, horizon=horizon)
    (one,) = task.sample(seed=1, n=1, length=length, horizon=horizon)
    assert np.array_equal(one.series, two[0].series) and np.array_equal(one.future, two[0].future)  # whatever n is
    for example in two:
        assert example.series.shape == (length, task.observed) and example.future.shape == (horizon, task.observed)
        assert np.array_equal(task.oracle(example), example.future) and task.score(example, task.oracle(example))
        assert task.vpt(example, example.future) == pytest.approx(horizon * task.step * task.lyapunov)
        for known_nothing in (task.persistence(example), task.climatology(example), np.full_like(example.future, np.nan)):
            assert task.vpt(example, known_nothing) < 2 and not task.score(example, known_nothing)
        near = task.trajectory(example.start + 1e-9, horizon)[:, : task.observed]
        assert not np.array_equal(near, example.future)
    assert not np.array_equal(two[0].series, two[1].series)
    assert np.abs(task.series(1, 2, 5)).max() < 20 and task.series(1, 2, 5).shape == (2, 5, task.observed)


def test_known_constants_are_what_is_measured() -> None:
    mean, deviation = KS.climate(rows=500, n=6)
    assert abs(mean) < 1e-12 and deviation == pytest.approx(KS.deviation, rel=0.05)
    assert KS.exponent(rows=1000, n=8) == pytest.approx(KS.lyapunov, rel=0.35)  # a short run: 2,000 units of time
    mean, deviation = L96.climate(rows=60, n=4)
    assert mean == pytest.approx(L96.mean, rel=0.15) and deviation == pytest.approx(L96.deviation, rel=0.1)
    assert L96.exponent(rows=40, n=4) == pytest.approx(L96.lyapunov, rel=0.3)


def test_other_parameters_are_measured() -> None:
    task = KuramotoSivashinsky(size=12.0, points=32)
    assert task.known is None and KS.known is not None
    task.climate, task.exponent = lambda: (0.5, 2.0), lambda: 0.1  # type: ignore[method-assign]
    assert (task.mean, task.deviation, task.lyapunov) == (0.5, 2.0, 0.1)


def test_valid_prediction_time() -> None:
    future = np.zeros((10, 4))
    forecast = np.repeat(np.linspace(0, 1.8, 10)[:, None], 4, 1)  # 0.2 more every row
    assert valid_prediction_time(forecast, future, 1.0, 0.1) == pytest.approx(0.3)
    assert valid_prediction_time(forecast, future, 2.0, 0.1) == pytest.approx(0.6)
    assert valid_prediction_time(forecast, future, 1.0, 0.1, threshold=5.0) == pytest.approx(1.0)
    forecast[1, 2] = np.nan
    assert valid_prediction_time(forecast, future, 1.0, 0.1) == pytest.approx(0.1)
    with pytest.raises(ShapeError, match=r"\[9, 4\]"):
        valid_prediction_time(forecast[1:], future, 1.0, 0.1)


def test_wrong_use() -> None:
    with pytest.raises(UsageError, match="horizon is 0"):
        KS.sample(horizon=0)
    with pytest.raises(UsageError, match="size, nu and step"):
        KuramotoSivashinsky(size=0.0)
    with pytest.raises(UsageError, match="slow is 3"):
        Lorenz96(slow=3)
    with pytest.raises(rm.errors.UnknownName, match="horizn"):
        KS.sample(horizn=3)
