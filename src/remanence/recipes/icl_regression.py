"""icl-regression: which algorithm does a trained layer run on examples in its context? (arXiv 2211.15661, 2208.01066)

Each sequence tells pairs (x, w . x + noise) of a w of its own, and every x is to be answered before its y is told. Tokens are vectors, in
the published layout: (0, x_1), (y_1, 0 ... 0), (0, x_2), ..., read by a SeriesModel, a decoder whose first and last layers are linear. The
paper: transformers answer as one step of gradient descent does where they are shallow, as ridge regression does where they are deeper, and
as the Bayes predictor where they are deep and wide. The rows have, by the number of pairs told, the squared error in units of the variance
of w . x (`mse`), that of the Bayes predictor on the same sequences (`bayes`), and the model's distance to it (`from_bayes`, the paper's
SPD); `nearest` is the reference predictor that the model's answers are nearest to, over all numbers of pairs. The reference predictors
(tasks/oracles.py) have rows of their own. Claim to check: within 10 % of ridge at twice as many pairs as dimensions.

`remanence train icl-regression`; one cell: `--mixers attention@noise=0.5+depth=4`. All models have as many parameters as one of attention.

Not the published runs, for a budget of minutes: 5 dimensions for 8 or 20, 16 points for 40, 2 layers of width 64, thousands of updates for
half a million. As in 2208.01066 the first half of the training is a curriculum over the dimensions.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..domains.forecasting.model import SeriesModel, series_loss
from ..errors import RemanenceError, UsageError, positive
from ..evaluate.plots import save_figure
from ..tasks import oracles
from ..tasks.base import IGNORE
from ..tasks.icl_regression import interleave, stream
from ..train import Piece, TrainConfig, environment, train
from ._grid import MARKS, Cell, filling, parameters, parse_cells
from ._results import Row, refuse_folder, resumed

MIXERS: dict[str, tuple[dict[str, Any], ...]] = {
    "attention": ({}, {"noise": 0.5}),
    "gated-deltanet": ({}, {"noise": 0.5}),
    "mamba2": ({"state_size": 16, "head_dim": 32},),
    "flashrnn": ({"cell": "lstm", "heads": 1},),
}
OPTIONS = ("noise", "depth")
"""What a cell's setting may have beside the mixer's own."""


def pieces(x: np.ndarray, y: np.ndarray, inputs: int) -> Piece:
    """x [n, T, d <= inputs] and y [n, T, 1] as tokens [n, 2 T, inputs + 1] and targets [n, 2 T, 1, inputs + 1]: y at the x, else IGNORE."""
    x = np.pad(x, [(0, 0), (0, 0), (0, inputs - x.shape[2])])
    tokens = torch.from_numpy(interleave(x, y)).float()
    targets = torch.full_like(tokens, IGNORE)[:, :, None]
    targets[:, ::2, 0, 0] = torch.from_numpy(y[..., 0]).float()
    return Piece(tokens, targets)


class Sequences:
    """Fresh sequences for every update; the number of dimensions that are not 0 grows to `inputs` over the first half of `steps`."""

    carries = False

    def __init__(self, rows: int, points: int, inputs: int, noise: float, steps: int):
        self.rows, self.points, self.inputs, self.noise, self.steps = rows, points, inputs, noise, steps

    def dims(self, index: int) -> int:
        """Of batch `index`."""
        return min(self.inputs, 1 + 2 * self.inputs * index // self.steps)

    def batch(self, seed: int, index: int) -> Piece:
        x, y = stream(np.random.default_rng([seed, index]), self.rows, self.points, self.dims(index), self.noise)
        return pieces(x, y, self.inputs)


@torch.no_grad()
def answers(model: SeriesModel, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What a model says of every x before its y is told, float64 [n, T, 1]."""
    tokens = pieces(x, y, x.shape[2]).ids.to(next(model.parameters()))
    logits = model(tokens).logits  # [n, 2 T, 1, d + 1]
    assert isinstance(logits, Tensor)
    return logits[:, ::2, 0, :1].double().cpu().numpy()


def references(x: np.ndarray, y: np.ndarray, noise: float) -> dict[str, np.ndarray]:
    """The answers [n, T, 1] of the reference predictors; "ridge", with penalty noise^2, is the posterior mean, so Bayes.

    The rate of the gradient step is that of the least expected error from N pairs, 1 / (1 + (d + 1 + noise^2) / N); that of the pass of
    SGD, which is what a delta rule does, 1 / (d + 2), the best for the first pair.
    """
    dim = x.shape[2]

    def one_step(x: np.ndarray, y: np.ndarray, query: np.ndarray) -> np.ndarray:
        return oracles.gradient_steps(x, y, query, 1 / (1 + (dim + 1 + noise**2) / max(1, x.shape[-2])))

    predictors: dict[str, oracles.Predictor] = {
        "zero": oracles.zero,
        "3 nearest": oracles.nearest,
        "one gradient step": one_step,
        "one pass of SGD": partial(oracles.sgd_pass, rate=1 / (dim + 2)),
        "ridge": partial(oracles.ridge, penalty=noise**2),
    }
    if noise:  # without it ridge is least squares
        predictors["least squares"] = oracles.least_squares
    return {name: oracles.online(predictor, x, y) for name, predictor in predictors.items()}


@dataclass(eq=False)  # equal to itself alone, so that `told` can be cached
class Regression:
    """The cells and how each is trained and tested; `start` runs them, like a Run's. inputs: dimensions of x; dim: width of the models."""

    cells: list[Cell]
    steps: int
    inputs: int = 5
    points: int = 16
    rows: int = 64
    n: int = 512
    dim: int = 64
    depth: int = 2
    lr: float = 2e-3
    seed: int = 0
    device: str = "auto"

    def noise(self, cell: Cell) -> float:
        """The standard deviation of what is added to y. Raises UsageError unless it is a number >= 0."""
        noise = cell.hyper.get("noise", 0.0)
        if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise < math.inf:
            raise UsageError(f"noise is {noise!r}; it must be a number >= 0.")
        return float(noise)

    def build(self, cell: Cell) -> SeriesModel:
        """The model of a cell, with feed-forwards as wide as makes it as large as one of attention; the same seed gives the same one."""
        depth = cell.hyper.get("depth", self.depth)
        positive(depth=depth)
        hyper = {name: value for name, value in cell.hyper.items() if name not in OPTIONS}
        wanted = parameters(self._model({"mixer": "attention", "times": depth}, 2.0))
        spec = {"mixer": cell.mixer, "times": depth, **hyper}
        return self._model(spec, filling(wanted, parameters(self._model(spec, 0.0)), depth, self.dim))

    def _model(self, spec: dict[str, Any], ffn: float) -> SeriesModel:
        torch.manual_seed(self.seed)
        return SeriesModel(self.inputs + 1, self.dim, [spec], ffn=ffn, relative=False)

    def tests(self, noise: float) -> tuple[np.ndarray, np.ndarray]:
        """x [n, points, inputs] and y [n, points, 1], the same for every cell of this noise."""
        return stream(np.random.default_rng([self.seed, round(1e6 * noise), 0x7E57]), self.n, self.points, self.inputs, noise)

    @functools.cache  # noqa: B019 (one recipe, a run long)
    def told(self, noise: float) -> dict[str, np.ndarray]:
        """The answers of the reference predictors on `tests`."""
        return references(*self.tests(noise), noise)

    def start(self, out: str | Path, resume: bool = True, quiet: bool = False) -> dict[str, Any]:
        """Run what `out` has no rows of for this seed and number of steps; returns name -> error by the number of pairs."""
        path, ends = Path(out) / "results.json", {}
        for noise in sorted({self.noise(cell) for cell in self.cells}):
            key = {"seed": self.seed, "n": self.n, "inputs": self.inputs, "points": self.points}
            for reference, said in self.told(noise).items():
                name = f"{reference}@noise={noise:g}" if noise else reference
                common = {"memory": name, "mixer": reference, "task": "icl-linreg", "noise": noise, **key}
                run = partial(self._rows, common, said, noise)
                ends[name] = _errors(resumed(path, name, key, run, self._meta(), figure, resume))
        for cell in self.cells:
            key, run = {"seed": self.seed, "budget": self.steps}, partial(self._run, cell, Path(out), resume, quiet)
            mine = resumed(path, cell.name, key, run, self._meta(), figure, resume)
            ends[cell.name] = _errors(mine)
            if not quiet:
                at = mine[min(2 * self.inputs, len(mine) - 1)]
                says = f"error {at['mse']:.4f} after {at['examples']} pairs, Bayes {at['bayes']:.4f}, nearest to {at['nearest']}"
                print(f"{cell.name}: {says}", flush=True)
        return ends

    def _meta(self) -> Row:
        return {
            "recipe": "icl-regression", "inputs": self.inputs, "points": self.points, "dim": self.dim, "depth": self.depth,
            "rows": self.rows, "lr": self.lr, "environment": environment(torch.device("cpu")),
        }  # fmt: skip

    def _rows(self, common: Row, said: np.ndarray, noise: float) -> list[Row]:
        """A row for every number of pairs told."""
        _, y = self.tests(noise)
        error, bayes = ((answer - y)[..., 0] ** 2 / self.inputs for answer in (said, self.told(noise)["ridge"]))  # [n, T]
        away = oracles.prediction_distance(said, self.told(noise)["ridge"], self.inputs)
        spread = error.std(0) / math.sqrt(self.n)
        return [
            common
            | {"examples": t, "mse": float(error[:, t].mean()), "standard_error": float(spread[t])}
            | {"bayes": float(bayes[:, t].mean()), "from_bayes": float(away[t])}
            for t in range(self.points)
        ]

    def _run(self, cell: Cell, out: Path, resume: bool, quiet: bool) -> list[Row]:
        """Train and test one cell."""
        model, noise, began, error = self.build(cell), self.noise(cell), time.monotonic(), ""
        config = TrainConfig(
            steps=self.steps, lr=self.lr, warmup=min(100, self.steps // 10), floor=0.02, weight_decay=0.0, beta2=0.98, seed=self.seed,
            device=self.device, precision="fp32", checkpoint_every=max(1, self.steps // 10),
        )  # fmt: skip
        data = Sequences(self.rows, self.points, self.inputs, noise, self.steps)
        try:
            train(model, data, config, out / cell.name.replace("@", "-").replace("=", "-"), None, series_loss, resume, quiet)
        except UsageError:
            raise
        except RemanenceError as problem:  # a run that diverged is a result too
            error = str(problem)
        x, y = self.tests(noise)
        said = answers(model.eval(), x, y)
        away = {name: oracles.prediction_distance(said, other, self.inputs).mean() for name, other in self.told(noise).items()}
        common = {
            "memory": cell.name, "mixer": cell.mixer, "setting": dict(cell.hyper), "task": "icl-linreg", "noise": noise,
            "inputs": self.inputs, "points": self.points, "n": self.n, "seed": self.seed, "budget": self.steps,
            "parameters": parameters(model), "seconds": round(time.monotonic() - began, 1),
            "nearest": min(away, key=lambda name: away[name]), "distances": {name: float(value) for name, value in away.items()},
        }  # fmt: skip
        return self._rows(common | ({"error": error} if error else {}), said, noise)


def _errors(rows: list[Row]) -> dict[int, float]:
    return {row["examples"]: row["mse"] for row in rows}


def figure(rows: list[Row], path: Path) -> None:
    """The error by the number of pairs told, a panel for each noise; models with marks, reference predictors dashed."""
    panels = sorted({row["noise"] for row in rows})

    def drawn(canvas: Any) -> None:
        for axes, noise in zip(canvas.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
            names = list(dict.fromkeys(row["memory"] for row in rows if row["noise"] == noise))
            for i, name in enumerate(names):
                mine = [row for row in rows if row["memory"] == name]
                at, error = [row["examples"] for row in mine], [max(row["mse"], 1e-4) for row in mine]
                style = {"marker": MARKS[i % len(MARKS)]} if "parameters" in mine[0] else {"ls": "--", "lw": 1.2}
                axes.plot(at, error, label=name, **style)
            axes.set(yscale="log", ylim=(1e-3, 3), xlabel="pairs told", title=f"noise {noise:g}")
            axes.legend(fontsize=7)
        canvas.axes[0].set_ylabel("squared error / variance of w . x")

    save_figure(path, drawn, width=6.0 * len(panels), height=5.0)


def recipe(
    out: str | Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    device: str = "auto",
    fast: bool = False,
    data: str | Path | None = None,
    memory: str | None = None,
) -> Regression:
    """memory (`--mixers`): cells, separated by commas; see recipes/_grid.py. A setting may have `noise` and `depth`."""
    refuse_folder(data, "icl-regression draws its own sequences")
    if steps is not None:
        positive(steps=steps)
    small: dict[str, Any] = {"inputs": 2, "points": 5, "rows": 4, "n": 16, "dim": 16} if fast else {}
    made = Regression(parse_cells(memory, MIXERS), steps or (4 if fast else 1250), seed=seed, device=device, **small)
    for cell in made.cells:
        made.noise(cell)
    return made
