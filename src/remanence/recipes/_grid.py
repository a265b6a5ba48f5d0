"""What the synthetic recipes share: small decoders, mixer by setting, each trained until it solves the task or its steps are over.

A cell is one decoder. `--mixers gla,mamba2@state_size=16` picks cells: a slug stands for all settings that the recipe has for it, and
slug@name=value+name=value (slug@ for the defaults) for that one. Rows are written after every cell; a run that was killed goes on inside
its cell, and cells that are done are not run again.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import find
from ..errors import RemanenceError, UnknownName, UsageError
from ..evaluate.plots import save_figure
from ..models import Decoder, Model, ModelConfig
from ..state import State
from ..tasks.base import IGNORE
from ..tasks.symbols import Arrays
from ..train import Curriculum, Piece, TrainConfig, environment, train
from ._results import Row, refuse_folder, resumed

Make = Callable[..., Arrays]
"""make(rng, rows, size, **options) -> ids and targets; `size` is what the curriculum grows and the tests vary: pairs, or tokens."""


@dataclass(frozen=True)
class Cell:
    """A mixer with its setting; the name is what `--mixers` takes and what a row calls "memory"."""

    mixer: str
    hyper: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        hyper = "+".join(f"{key}={json.dumps(value)}" for key, value in self.hyper.items()).replace('"', "")
        return f"{self.mixer}@{hyper}" if hyper else self.mixer


def parse_cells(text: str | None, known: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Cell]:
    """The cells that `--mixers` names; None: all of `known` (slug -> settings) whose mixers are in the catalog.

    Raises UnknownName on a slug that is not, UsageError on a setting that cannot be read or a cell named twice.
    """
    cells: list[Cell] = []
    for item in known if text is None else text.split(","):
        slug, _, hyper = item.strip().partition("@")
        try:
            entry = find(slug, ("mixer",))
        except UnknownName:
            if text is not None:
                raise
            print(f"{slug}: not in the catalog, left out")
            continue
        if "@" in item:
            cells.append(Cell(entry.slug, dict(_setting(item, pair) for pair in hyper.split("+") if hyper)))
        else:
            cells += [Cell(entry.slug, setting) for setting in known.get(slug, known.get(entry.slug, ({},)))]
    names = [cell.name for cell in cells]
    if len(set(names)) != len(names):
        raise UsageError(f"mixers is {text!r}; each cell may be named once.")
    return cells


def _setting(item: str, pair: str) -> tuple[str, Any]:
    name, equals, value = pair.partition("=")
    if not (name and equals and value):
        raise UsageError(f"mixers has {item.strip()!r}; a setting is written slug@name=value+name=value.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a word


class Generated:
    """Batches of a task, each from a generator of its own; the size follows the curriculum.

    rows: at the largest size; a smaller one has more rows, in proportion, so that every batch has about the same number of targets.
    """

    carries = False

    def __init__(self, make: Make, rows: int, curriculum: Curriculum):
        self.make, self.rows, self.curriculum = make, rows, curriculum

    def batch(self, seed: int, index: int) -> Piece:
        size = self.curriculum.size(seed, index)
        rows = self.rows * self.curriculum.stages[-1] // size
        ids, targets = self.make(np.random.default_rng([seed, index]), rows, size)
        return Piece(torch.from_numpy(ids), torch.from_numpy(targets))

    def observe(self, metrics: dict[str, float]) -> dict[str, int]:
        size = self.curriculum.top
        self.curriculum.observe(metrics["accuracy"])
        return {"size": size}

    def state(self) -> dict[str, Any]:
        return self.curriculum.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.curriculum.restore(state)


def symbol_loss(model: Model, piece: Piece, state: State | None) -> tuple[Tensor, State, dict[str, Tensor]]:
    """Summed cross-entropy, and the fraction of scored positions that are right."""
    assert piece.targets is not None
    wanted = piece.targets != IGNORE
    out = model(piece.ids, state, piece.span, logits="none")
    logits, targets = model.head(out.hidden[wanted]), piece.targets[wanted]  # the head is run where something is scored only
    loss = F.cross_entropy(logits.float(), targets, reduction="sum")
    return loss, out.state, {"accuracy": (logits.detach().argmax(-1) == targets).float().mean()}


def parameters(model: nn.Module) -> int:
    """How many numbers a model learns or was given as parameters."""
    return sum(p.numel() for p in model.parameters())


def filling(wanted: int, bare: int, depth: int, dim: int) -> float:
    """The `ffn` with which `depth` layers bring a model from `bare` parameters to about `wanted`; 0, none at all, if it is that large."""
    hidden = (wanted - bare - depth * dim) // (3 * dim * depth)
    return (hidden + 0.5) / dim if hidden > 0 else 0.0


@torch.no_grad()
def accuracy(model: Model, arrays: Arrays, rows: int = 64) -> float:
    """The fraction of scored positions that are right."""
    right, total = 0.0, 0
    for ids, targets in zip(*(torch.from_numpy(array).to(model.device).split(rows) for array in arrays), strict=True):
        piece = Piece(ids, targets)
        right += float(symbol_loss(model, piece, None)[2]["accuracy"]) * piece.count
        total += piece.count
    return right / total


@torch.no_grad()
def state_bytes(model: Model, length: int) -> int:
    """Bytes of real or complex numbers in the state of one row after `length` tokens."""
    state = model(torch.zeros(1, length, dtype=torch.long, device=model.device), logits="none").state
    return sum(t.numel() * t.element_size() for t in state.tensors() if t.is_floating_point() or t.is_complex())


class Solved(Exception):
    """The goal is reached; unwinds `train`, whose last checkpoint stays."""


@dataclass
class Grid:
    """A recipe's cells and how each is trained and tested; `start` runs them, like a Run's.

    make: see `Make`. stages: sizes of the curriculum; a stage ends at 90 % or after `patience` of the steps. vary: each batch draws its
    size from 1 .. the stage's. tested: sizes to test, each on `n` sequences. axis: what a size is, as a column of the rows. options: names
    that a cell's setting may have beside the mixer's, with their defaults, which go to `make`; "depth", the number of layers, is always
    one. goal: accuracy that ends a cell's training, at the size `stop_at` (0: the last stage's), on other sequences than the tests'.
    figure(rows, path) draws. rows: see `Generated`. vocab, dim, depth, ffn, embedding_std: of the decoders.
    """

    name: str
    task: str
    cells: list[Cell]
    make: Make
    vocab: int
    stages: Sequence[int]
    tested: Sequence[int]
    axis: str
    figure: Callable[[list[Row], Path], None]
    steps: int
    options: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 32
    n: int = 512
    dim: int = 64
    depth: int = 2
    ffn: float = 2.0
    embedding_std: float = 1.0
    lr: float = 2e-3
    weight_decay: float = 0.01
    goal: float = 0.99
    stop_at: int = 0
    vary: bool = False
    patience: float = 0.25
    seed: int = 0
    device: str = "auto"

    def chosen(self, cell: Cell) -> dict[str, Any]:
        """The task's options of a cell."""
        return {name: cell.hyper.get(name, default) for name, default in self.options.items()}

    def build(self, cell: Cell) -> Decoder:
        """The decoder of a cell; the same seed gives the same one."""
        torch.manual_seed(self.seed)
        config = ModelConfig(self.vocab, self.dim, self.layers(cell), ffn=self.ffn, tie=False, embedding_std=self.embedding_std)
        return Decoder(config)

    def layers(self, cell: Cell) -> list[dict[str, Any]]:
        """What a cell's decoder consists of: its mixer, as often as the decoder is deep."""
        hyper = {name: value for name, value in cell.hyper.items() if name not in self.options and name != "depth"}
        return [{"mixer": cell.mixer, "times": cell.hyper.get("depth", self.depth), **hyper}]

    def examples(self, cell: Cell, size: int, seed: int, n: int) -> Arrays:
        """n sequences to test on, which depend on seed, size and the task's options only."""
        return self.make(np.random.default_rng([seed, size, 0x7E57]), n, size, **self.chosen(cell))

    def test(self, model: Model, cell: Cell, size: int, seed: int, n: int) -> tuple[float, int]:
        """Accuracy on n `examples`, and their length."""
        arrays = self.examples(cell, size, seed, n)
        return accuracy(model, arrays), arrays[0].shape[1]

    def start(self, out: str | Path, resume: bool = True, quiet: bool = False) -> dict[str, Any]:
        """Run the cells that `out` has no rows of for this seed and number of steps; returns cell -> accuracy by size."""
        path, ends = Path(out) / "results.json", {}
        for cell in self.cells:
            key = {"seed": self.seed, "budget": self.steps}
            run = functools.partial(self._run, cell, Path(out), resume, quiet)
            mine = resumed(path, cell.name, key, run, self._meta(), self.figure, resume)
            ends[cell.name] = {row[self.axis]: row["accuracy"] for row in mine}
            if not quiet:
                print(
                    f"{cell.name}: " + "  ".join(f"{self.axis} {size} {value:.1%}" for size, value in ends[cell.name].items()), flush=True
                )
        return ends

    def _meta(self) -> Row:
        return {
            "recipe": self.name, "dim": self.dim, "depth": self.depth, "vocab": self.vocab, "rows": self.rows, "lr": self.lr,
            "stages": list(self.stages), "goal": self.goal, "stop_at": self.stop_at or self.stages[-1],
            "environment": environment(torch.device("cpu")),
        }  # fmt: skip

    def _run(self, cell: Cell, out: Path, resume: bool, quiet: bool) -> list[Row]:
        """Train and test one cell."""
        model = self.build(cell)
        every = max(1, min(50, self.steps // 8))
        config = TrainConfig(
            steps=self.steps, lr=self.lr, schedule="wsd", warmup=min(50, self.steps // 10), weight_decay=self.weight_decay, beta2=0.98,
            seed=self.seed, device=self.device, best="accuracy", maximize=True, eval_every=every, checkpoint_every=4 * every,
        )  # fmt: skip
        limit = max(1, int(self.steps * self.patience))
        curriculum = Curriculum(self.stages, advance=0.9, window=min(20, every), limit=limit, vary=self.vary)
        folder, began = out / cell.name.replace("@", "-").replace("=", "-"), time.monotonic()

        def evaluate(model: Model) -> dict[str, float]:
            score = self.test(model, cell, self.stop_at or self.stages[-1], self.seed + 1, max(1, self.n // 4))[0]
            if score >= self.goal:
                raise Solved
            return {"accuracy": score}

        error = ""
        try:
            data = Generated(partial(self.make, **self.chosen(cell)), self.rows, curriculum)
            train(model, data, config, folder, evaluate, symbol_loss, resume, quiet)
        except Solved:
            pass
        except UsageError:
            raise
        except RemanenceError as problem:  # a run that diverged is a result too
            error = str(problem)
        steps = sum(1 for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if '"loss"' in line)
        model.eval()
        common = {
            "memory": cell.name, "mixer": cell.mixer, "setting": dict(cell.hyper), "task": self.task, **self.chosen(cell),
            "seed": self.seed, "budget": self.steps, "steps": steps, "seconds": round(time.monotonic() - began, 1),
            "parameters": parameters(model), "trained": self.stages[-1], "n": self.n,
        }  # fmt: skip
        rows = []
        for size in self.tested:
            score, length = self.test(model, cell, size, self.seed + 2, self.n)
            rows.append(common | {self.axis: size, "tokens": length, "state_bytes": state_bytes(model, length), "accuracy": score})
        return [row | {"error": error} for row in rows] if error else rows


def grid_recipe(grid: Callable[..., Grid], known: Mapping[str, Sequence[Mapping[str, Any]]], why: str) -> Callable[..., Grid]:
    """The `recipe` of a module that trains a grid: grid(cells, steps, fast, seed=, device=) of the cells `--mixers` picks of `known`.

    why: what it does instead of reading a folder, for the refusal of one.
    """

    def recipe(
        out: str | Path | None = None,
        seed: int = 0,
        steps: int | None = None,
        device: str = "auto",
        fast: bool = False,
        data: str | Path | None = None,
        memory: str | None = None,
    ) -> Grid:
        """memory (`--mixers`): cells, separated by commas; see recipes/_grid.py."""
        refuse_folder(data, why)
        return grid(parse_cells(memory, known), steps, fast, seed=seed, device=device)

    return recipe


MARKS = "osD^vP*X<>dph"


def draw(
    path: Path,
    curves: Mapping[str, list[tuple[float, float]]],
    x: str,
    y: str,
    chance: float,
    log: bool = True,
    points: Mapping[str, list[tuple[float, float]]] | None = None,
) -> None:
    """A PNG with one line a curve, every one with its own mark, single points in grey, and the legend beside it."""

    def figure(fig: Any) -> None:
        axes = fig.subplots()
        for name, dots in (points or {}).items():
            if dots:
                axes.scatter(*zip(*dots), color="lightgrey", zorder=0, label=name)
        for i, (name, line) in enumerate(curves.items()):
            axes.plot(*zip(*sorted(line)), marker=MARKS[i % len(MARKS)], linestyle="-" if i < 10 else "--", label=name)
        axes.axhline(chance, color="grey", linestyle=":", label="chance")
        axes.set(xscale="log" if log else "linear", xlabel=x, ylabel=y, ylim=(-0.03, 1.03))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    save_figure(path, figure, width=8.0)
