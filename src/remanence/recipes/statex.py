"""statex: does a trained model recall more after one of its four layers is given a larger state? (StateX, arXiv 2509.22630, on MQAR)

A small GLA and a small Mamba-2 are trained on more pairs than their states hold. Then each goes on for a fifth of the steps: as it
is ("continue"), and with one of its four layers expanded, one way after the other ("none" is the published way). `remanence train statex`;
one model: `--mixers gla`.

Not the published run, which expands 1.3B models and trains them on 10B tokens of long text. In trials of up to 1200 steps the GLA did
not get past naming any value of the sequence, so that its rows say nothing until it is trained for longer.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..convert.statex import statex
from ..errors import unknown
from ..models import Decoder, Model, ModelConfig
from ..tasks import mqar
from ..tasks.symbols import Arrays
from ..train import Curriculum, TrainConfig, environment, train
from ._grid import Generated, accuracy, draw, state_bytes, symbol_loss
from ._results import Row, lines, refuse_folder, resumed

VOCAB, DIM, EVERY = 32, 64, 4
STAGES = (2, 4, 8, 14)
LAYERS = {
    "gla": [{"mixer": "base-conv"}, {"mixer": "gla", "heads": 4, "times": 4}],  # the short convolution that a Mamba-2 has in itself
    "mamba2": [{"mixer": "mamba2", "head_dim": 16, "state_size": 4, "times": 4}],
}
WAYS = {"gla": ("continue", "none", "merge"), "mamba2": ("continue", "none", "merge_copy", "merge_zero", "merge_grow")}


def make(rng: np.random.Generator, rows: int, pairs: int) -> Arrays:
    """Rows of the shortest length that has room for that many pairs and their questions."""
    return mqar.batch(rng, rows, pairs, 4 * pairs, VOCAB)


def figure(rows: list[Row], path: Path) -> None:
    """Accuracy by the number of pairs, a line a way."""
    draw(path, lines(rows, lambda row: row["memory"], "pairs"), "pairs", "accuracy", 2 / VOCAB)


@dataclass
class Expansion:
    """The models, how long each is trained before and after, and on how many rows; `start` runs them, like a Run's."""

    mixers: tuple[str, ...]
    steps: int
    more: int
    rows: int = 16
    n: int = 512
    lr: float = 5e-3
    seed: int = 0
    device: str = "auto"

    def start(self, out: str | Path, resume: bool = True, quiet: bool = False) -> dict[str, Any]:
        """Run what `out` has no rows of for this seed and these numbers of steps; returns way -> accuracy by pairs."""
        path, ends, bases = Path(out) / "results.json", {}, {}
        for mixer in self.mixers:
            for way in ("pretrained", *WAYS[mixer]):
                name = f"{mixer}/{way}"
                key = {"seed": self.seed, "budget": [self.steps, 0 if way == "pretrained" else self.more]}

                def run(mixer: str = mixer, way: str = way) -> list[Row]:
                    began = time.monotonic()
                    if mixer not in bases:
                        bases[mixer] = self._pretrain(mixer, Path(out), resume, quiet)
                    return self._run(mixer, way, bases[mixer], began, Path(out), resume, quiet)

                mine = resumed(path, name, key, run, self._meta(), figure, resume)
                ends[name] = {row["pairs"]: row["accuracy"] for row in mine}
                if not quiet:
                    print(f"{name}: " + "  ".join(f"pairs {pairs} {value:.1%}" for pairs, value in ends[name].items()), flush=True)
        return ends

    def _meta(self) -> Row:
        return {
            "recipe": "statex", "dim": DIM, "layers": LAYERS, "every": EVERY, "vocab": VOCAB, "rows": self.rows, "lr": self.lr,
            "stages": list(STAGES), "environment": environment(torch.device("cpu")),
        }  # fmt: skip

    def _pretrain(self, mixer: str, out: Path, resume: bool, quiet: bool) -> Decoder:
        torch.manual_seed(self.seed)
        model = Decoder(ModelConfig(VOCAB, DIM, LAYERS[mixer], tie=False, embedding_std=1.0))
        curriculum = Curriculum(STAGES, advance=0.9, window=20, limit=max(1, self.steps // 4))
        self._train(model, curriculum, self.steps, "wsd", out / mixer, resume, quiet)
        return model

    def _train(self, model: Model, curriculum: Curriculum, steps: int, schedule: str, folder: Path, resume: bool, quiet: bool) -> None:
        config = TrainConfig(
            steps=steps, lr=self.lr, schedule=schedule, warmup=min(50, steps // 10), beta2=0.98, seed=self.seed, device=self.device,
            best="accuracy", maximize=True, eval_every=max(1, steps // 4), checkpoint_every=max(1, steps // 4),
        )  # fmt: skip
        train(model, Generated(make, self.rows, curriculum), config, folder, self._evaluate, symbol_loss, resume, quiet)

    def _evaluate(self, model: Model) -> dict[str, float]:
        return {"accuracy": self._test(model, STAGES[-1], self.seed + 1, max(1, self.n // 4))}

    def _test(self, model: Model, pairs: int, seed: int, n: int) -> float:
        return accuracy(model, make(np.random.default_rng([seed, pairs, 0x7E57]), n, pairs))

    def _run(self, mixer: str, way: str, base: Decoder, began: float, out: Path, resume: bool, quiet: bool) -> list[Row]:
        """Expand (or not), train on, test."""
        torch.manual_seed(self.seed + 1)
        model = base
        if way != "pretrained":
            model = copy.deepcopy(base) if way == "continue" else statex(base, every=EVERY, inherit=way)
            self._train(model, Curriculum(STAGES[-1:]), self.more, "cosine", out / f"{mixer}-{way}", resume, quiet)
        model.eval()
        common = {
            "memory": f"{mixer}/{way}", "mixer": mixer, "way": way, "task": "mqar", "seed": self.seed,
            "budget": [self.steps, 0 if way == "pretrained" else self.more], "seconds": round(time.monotonic() - began, 1),
            "parameters": sum(p.numel() for p in model.parameters()), "trained": STAGES[-1], "n": self.n,
        }  # fmt: skip
        rows = []
        for pairs in STAGES:
            score = self._test(model, pairs, self.seed + 2, self.n)
            rows.append(common | {"pairs": pairs, "state_bytes": state_bytes(model, 4 * pairs), "accuracy": score})
        return rows


def recipe(
    out: str | Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    device: str = "auto",
    fast: bool = False,
    data: str | Path | None = None,
    memory: str | None = None,
) -> Expansion:
    """memory (`--mixers`): gla, mamba2 or both, separated by a comma. steps: before the expansion; a fifth as many follow it."""
    refuse_folder(data, "statex makes its own sequences")
    mixers = tuple(LAYERS) if memory is None else tuple(name.strip() for name in memory.split(","))
    for name in mixers:
        if name not in LAYERS:
            raise unknown("mixer of statex", name, LAYERS)
    steps = steps or (5 if fast else 3000)
    return Expansion(mixers, steps, max(1, steps // 5), 4 if fast else 16, 16 if fast else 512, seed=seed, device=device)
