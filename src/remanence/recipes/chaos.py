"""chaos: how far ahead do recurrent cells forecast a chaotic system? The cell zoo of arXiv 2410.02654 in small, and a transformer.

Each cell is a one-layer SeriesModel that learns the next row of the Kuramoto-Sivashinsky equation (ring of 22, 64 points) or of the slow
variables of a Lorenz-96 model (8, with 8 fast ones each), and then reads its own forecasts: rows {cell, system, vpt, ...}, vpt the mean
valid prediction time in Lyapunov times. `remanence train chaos`; some: `--memory gru,rhn-gate-attention`. About a minute a cell and
system on one core (the loop with attention is the slowest); a cell that has its row is not run again, one that was killed goes on inside.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..domains.forecasting.model import SeriesModel, ahead, series_loss
from ..errors import RemanenceError, UsageError, unknown
from ..evaluate.plots import save_figure
from ..tasks.chaos import Chaos, ChaosExample, KuramotoSivashinsky, Lorenz96
from ..train import Piece, TrainConfig, environment, train
from ._results import Row, named_once, refuse_folder, resumed

CELLS: Mapping[str, Mapping[str, Any]] = {
    **{
        name: {"mixer": "deconstruct", "cell": cell, **options}
        for cell in ("rnn", "gru", "lstm", "rhn")
        for name, options in (
            (cell, {}),
            (f"{cell}-gate", {"gate": "input"}),
            (f"{cell}-attention", {"attention": 8}),
            (f"{cell}-gate-attention", {"gate": "input", "attention": 8}),
        )
    },
    "transformer": {"mixer": "attention", "window": 64},
}
DEFAULT = ("rnn", "gru", "gru-gate", "lstm", "rhn", "rhn-gate", "rhn-attention", "rhn-gate-attention", "transformer")
SYSTEMS = {"kuramoto-sivashinsky": KuramotoSivashinsky, "lorenz96": functools.partial(Lorenz96, slow=8, fast=8)}


class Windows:
    """Batches of `rows` random windows of normalised series [n, N, D]; noise: standard deviation of what is added to what is read.

    The noise makes a model that reads its own forecasts return to the attractor.
    """

    carries = False

    def __init__(self, series: np.ndarray, length: int, rows: int, noise: float):
        self.series, self.length, self.rows, self.noise = torch.from_numpy(series).float(), length, rows, noise

    def batch(self, seed: int, index: int) -> Piece:
        rng = np.random.default_rng([seed, index])
        n, total, _ = self.series.shape
        which, begin = rng.integers(n, size=self.rows), rng.integers(total - self.length, size=self.rows)
        cut = torch.stack([self.series[i, at : at + self.length + 1] for i, at in zip(which.tolist(), begin.tolist())])
        values, targets = ahead(cut, 1)
        noise = torch.from_numpy(rng.standard_normal(values.shape)).float()
        return Piece(values + self.noise * noise, targets)


def forecast(model: SeriesModel, examples: list[ChaosExample], mean: float) -> np.ndarray:
    """Iterated forecasts of all examples, in the system's units: [n, H, D]. deviation is the examples' own."""
    scale = examples[0].deviation
    known = np.stack([(example.series - mean) / scale for example in examples])
    values = torch.from_numpy(known).to(next(model.parameters()))
    return model.rollout(values, len(examples[0].future)).double().cpu().numpy() * scale + mean


@torch.no_grad()
def one_step(model: SeriesModel, series: Tensor) -> float:
    """Root mean squared error of the next row, in standard deviations, after the first 16 rows of series [n, N, D]."""
    values, targets = ahead(series.to(next(model.parameters())), 1)
    return math.sqrt(float((model(values).logits - targets)[:, 16:].square().mean()))


@dataclass
class ChaosGrid:
    """Cells and systems, and how each is trained and tested; `start` runs them, like a Run's."""

    cells: list[str]
    systems: list[str]
    steps: int
    n: int = 32
    series: tuple[int, int] = (16, 600)
    length: int = 64
    rows: int = 32
    dim: int = 64
    lr: float = 3e-3
    noise: float = 0.01
    seed: int = 0
    device: str = "auto"

    def build(self, cell: str, features: int) -> SeriesModel:
        """The model of a cell; the same seed gives the same one."""
        torch.manual_seed(self.seed)
        return SeriesModel(features, self.dim, [dict(CELLS[cell])])

    @functools.cached_property
    def tasks(self) -> dict[str, Chaos]:
        return {name: SYSTEMS[name]() for name in self.systems}

    @functools.cache  # noqa: B019 (one grid, a run long)
    def data(self, name: str) -> tuple[np.ndarray, list[ChaosExample]]:
        """Normalised series to train on, and examples to test on, of a system."""
        task = self.tasks[name]
        series = (task.series(self.seed, *self.series) - task.mean) / task.deviation
        return series, task.sample(self.seed, self.n, self.length)

    def __hash__(self) -> int:
        return id(self)

    def start(self, out: str | Path, resume: bool = True, quiet: bool = False) -> dict[str, float]:
        """Run what `out` has no row of for this seed and number of steps; returns "cell/system" -> vpt."""
        path, ends = Path(out) / "results.json", {}
        for system in self.systems:
            for cell in self.cells:
                name, key = f"{cell}/{system}", {"seed": self.seed, "budget": self.steps}
                run = functools.partial(self._run, cell, system, Path(out), resume, quiet)
                ends[name] = resumed(path, name, key, lambda run=run: [run()], self._meta(), figure, resume)[0]["vpt"]
                if not quiet:
                    print(f"{name}: {ends[name]:.2f} Lyapunov times", flush=True)
        return ends

    def _meta(self) -> Row:
        return {
            "recipe": "chaos", "dim": self.dim, "length": self.length, "rows": self.rows, "lr": self.lr, "noise": self.noise,
            "series": list(self.series), "environment": environment(torch.device("cpu")),
        }  # fmt: skip

    def _run(self, cell: str, system: str, out: Path, resume: bool, quiet: bool) -> Row:
        """Train and test one cell on one system."""
        task, (series, examples) = self.tasks[system], self.data(system)
        model = self.build(cell, series.shape[2])
        config = TrainConfig(
            steps=self.steps, lr=self.lr, warmup=min(50, self.steps // 10), floor=0.01, weight_decay=0.0, seed=self.seed,
            device=self.device, precision="fp32", checkpoint_every=max(1, self.steps // 4),
        )  # fmt: skip
        began, error = time.monotonic(), ""
        try:
            train(model, Windows(series, self.length, self.rows, self.noise), config, out / system / cell, None, series_loss, resume, quiet)
        except UsageError:
            raise
        except RemanenceError as problem:  # a run that diverged is a result too
            error = str(problem)
        model.eval()
        times = [task.vpt(example, row) for example, row in zip(examples, forecast(model, examples, task.mean), strict=True)]
        truth = np.stack([np.concatenate([example.series, example.future]) for example in examples])
        row = {
            "memory": f"{cell}/{system}", "cell": cell, "system": system, "vpt": float(np.mean(times)), "median": float(np.median(times)),
            "standard_error": float(np.std(times) / math.sqrt(len(times))), "time": float(np.mean(times)) / task.lyapunov,
            "persistence": float(np.mean([task.vpt(example, task.persistence(example)) for example in examples])),
            "one_step": one_step(model, torch.from_numpy((truth - task.mean) / task.deviation)), "n": self.n, "seed": self.seed,
            "budget": self.steps, "parameters": sum(p.numel() for p in model.parameters()), "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
        return row | {"error": error} if error else row


def figure(rows: list[Row], path: Path) -> None:
    """Bars of the valid prediction time, a panel a system."""
    systems = sorted({row["system"] for row in rows})

    def draw(fig: Any) -> None:
        for axes, system in zip(fig.subplots(1, len(systems), squeeze=False)[0], systems):
            chosen = sorted((row for row in rows if row["system"] == system), key=lambda row: row["vpt"])
            axes.barh([row["cell"] for row in chosen], [row["vpt"] for row in chosen], xerr=[row["standard_error"] for row in chosen])
            axes.axvline(chosen[0]["persistence"], color="grey", linestyle=":")
            axes.set(xlabel="valid prediction time, Lyapunov times", title=system)

    save_figure(path, draw, width=5.0 * len(systems), height=1.5 + 0.25 * len(CELLS))


def recipe(
    out: str | Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    device: str = "auto",
    fast: bool = False,
    data: str | Path | None = None,
    memory: str | None = None,
) -> ChaosGrid:
    """memory: cells, separated by commas, of rnn, gru, lstm, rhn, each also with -gate, -attention, -gate-attention, and transformer."""
    refuse_folder(data, "chaos integrates its own systems")
    cells: list[str] = list(DEFAULT) if memory is None else named_once(memory, "cell")
    for name in cells:
        if name not in CELLS:
            raise unknown("cell", name, CELLS)
    small: dict[str, Any] = {"n": 2, "series": (2, 100), "length": 24, "rows": 2, "dim": 8} if fast else {}
    return ChaosGrid(cells, list(SYSTEMS), steps or (3 if fast else 600), seed=seed, device=device, **small)
