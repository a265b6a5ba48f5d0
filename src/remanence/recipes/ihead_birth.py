"""ihead-birth: what is learned first, the bigrams or the induction head, and which of its memories? (arXiv 2306.00802)

Text from the bigrams of Moby-Dick in which five tokens have a successor of this sequence's own, read by the paper's two-layer model of
attention alone (inspect/induction.py). The paper: the global bigrams are learned first; then the memories of the head, the output matrix
(wo1), the match in layer 2 (wk1) and the token before in layer 1 (wk0), in this order; in-context accuracy is above 90 % once all three
are there. The rows have all of these by update, then a row for each of these three claims. What is said to be born at an update has there
gone half of its way from the first to the last measurement (the bigrams: their divergence from the model's predictions), and was never
born if that way is short. `remanence train ihead-birth`; only triggers that are drawn for every sequence, or that are the same in all:
`--memory random`, `--memory fixed`.

Not the paper's run, for a budget of minutes: 64 sequences of 128 tokens an update for 512 of 256, and another text. As in the paper: SGD
without a schedule (rate 0.2, momentum 0.9, weight decay 1e-4); the loss is that of all tokens, without which no bigrams are learned. As
in the public code a trigger may be its own successor in training, after which a sequence says nothing else; the measurements are on
sequences without, in which naming the token just read is never right.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import RemanenceError, UsageError, positive, unknown
from ..evaluate.plots import save_figure
from ..files import write_atomic
from ..inspect.induction import InductionModel, attention_probes, memory_probes
from ..runtime import tune
from ..tasks.trigger_bigram import VOCAB_SIZE, bigrams, draw
from ..train import TrainConfig, environment
from ._results import Row, named_once, refuse_folder, resumed

SETTINGS = {"random": False, "fixed": True}
"""Where the triggers come from: drawn from the unigrams for every sequence, or the most frequent tokens in all of them."""
MEMORIES = ("wo1", "wk1", "wk0")
SHORT = 0.25
"""A way, in the unit of what goes it, that is no birth."""
EVERY, FIRST = 10, 50
"""Updates from one measurement to the next, a fifth of that up to update FIRST."""


@torch.no_grad()
def measure(model: InductionModel, held: Sequence[Tensor], triggers: Tensor | None, bigram: Tensor) -> dict[str, float]:
    """What a model knows, on sequences `held` of `draw` and of itself: losses and divergence in nats, probes and accuracy in 0 .. 1.

    bigram_kl: the mean of KL(pi_b(. | z_t) || p) over all tokens that are no trigger. See `memory_probes` and `attention_probes`.
    """
    ids, follows, counter = held
    read = model(ids)
    log_p = read.logits.log_softmax(-1)
    loss = F.nll_loss(log_p.mT, follows, reduction="none")  # [B, T]
    free = counter == 0
    return {
        "loss": loss.mean().item(),
        "global_loss": loss[free].mean().item(),
        "in_context_loss": loss[counter >= 2].mean().item(),
        "bigram_kl": F.kl_div(log_p[free], bigram[ids[free]], reduction="batchmean").item(),
        **memory_probes(model, triggers, bigram),
        **attention_probes(read, ids, follows, counter),
    }


def births(rows: Sequence[Row]) -> dict[str, int | None]:
    """The first update at which bigrams, memories and accuracy have gone half of their way; None: never."""
    found: dict[str, int | None] = {}
    for name in ("bigram_kl", *MEMORIES, "accuracy"):
        values = [row[name] for row in rows]
        way = abs(values[-1] - values[0])
        gone = (row["steps"] for row, value in zip(rows, values, strict=True) if abs(value - values[0]) >= way / 2)
        found["bigrams" if name == "bigram_kl" else name] = next(gone) if way >= SHORT else None
    return found


def claims(rows: Sequence[Row]) -> list[Row]:
    """The paper's claims about measured rows: {"claim", "holds", "births"}. What was never born makes an order wrong."""
    born, last = births(rows), rows[-1]["accuracy"]

    def ordered(*names: str) -> bool:
        at = [born[name] for name in names]
        known = [step for step in at if step is not None]
        return len(known) == len(at) and known == sorted(known)

    said = {
        "the bigrams are learned before the head": ordered("bigrams", "accuracy") and born["bigrams"] != born["accuracy"],
        "the memories come in the order wo1, wk1, wk0": ordered(*MEMORIES),
        "in-context accuracy is above 90 % at the end": last > 0.9,
    }
    return [{"claim": claim, "holds": holds, "births": born} for claim, holds in said.items()]


@dataclass
class Birth:
    """The settings and how the model is trained in each; `start` runs them, like a Run's."""

    settings: list[str]
    steps: int
    rows: int = 64
    length: int = 128
    dim: int = 128
    triggers: int = 5
    held: int = 128
    lr: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0
    device: str = "auto"

    def start(self, out: str | Path, resume: bool = True, quiet: bool = False) -> dict[str, Any]:
        """Run the settings that `out` has no rows of for this seed and number of steps; returns setting -> births and accuracy."""
        ends: dict[str, Any] = {}
        for name in self.settings:
            key, run = {"seed": self.seed, "budget": self.steps}, functools.partial(self._run, name, Path(out), resume, quiet)
            mine = resumed(Path(out) / "results.json", f"{name} triggers", key, run, self._meta(), figure, resume)
            measured = [row for row in mine if "steps" in row]
            ends[name] = {"births": births(measured), "accuracy": measured[-1]["accuracy"]}
            if not quiet:
                for row in mine[len(measured) :]:
                    print(f"{name} triggers: {row['claim']}: {'seen' if row['holds'] else 'not seen'}, {row['births']}", flush=True)
        return ends

    def _meta(self) -> Row:
        return {"recipe": "ihead-birth", **self._numbers(), "held": self.held, "environment": environment(torch.device("cpu"))}

    def _numbers(self) -> Row:
        """What a checkpoint must have in common with the run that goes on from it."""
        names = ("rows", "length", "dim", "triggers", "lr", "momentum", "weight_decay", "seed")
        return {name: getattr(self, name) for name in names}

    def _batch(self, fixed: bool, n: int, *key: int, repeats: bool = True) -> list[Tensor]:
        arrays = draw(np.random.default_rng([self.seed, *key]), n, self.length, self.triggers, fixed, repeats)
        device = TrainConfig(device=self.device).torch_device
        return [torch.from_numpy(array).to(device) for array in arrays]

    def _run(self, name: str, out: Path, resume: bool, quiet: bool) -> list[Row]:
        """Train and measure in one setting; goes on from its checkpoint, to the same numbers as a run that was never killed."""
        tune()
        fixed, path, known = SETTINGS[name], out / f"{name}.safetensors", bigrams()
        torch.manual_seed(self.seed)
        model = InductionModel(VOCAB_SIZE, self.dim, self.length, ffn=True)
        velocity = {key: torch.zeros_like(p) for key, p in model.named_parameters() if p.requires_grad}
        done, rows = restore(path, model, velocity, self._numbers()) if resume and path.exists() else (0, [])
        rows = [row for row in rows if row["steps"] <= self.steps]
        held = self._batch(fixed, self.held, 1, 0, repeats=False)
        model.to(held[0].device)
        velocity = {key: value.to(held[0].device) for key, value in velocity.items()}
        asked = torch.from_numpy(np.argsort(-known.unigram, kind="stable")[: self.triggers].copy()).to(held[0].device) if fixed else None
        bigram = torch.from_numpy(known.bigram).float().to(held[0].device)
        common = {"memory": f"{name} triggers", "task": "ihead-birth", "seed": self.seed, "budget": self.steps}
        began = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
        for step in range(done, self.steps + 1):
            if step == self.steps or step % (EVERY // 5 if step < FIRST else EVERY) == 0:
                found = measure(model, held, asked, bigram)
                rows = [row for row in rows if row["steps"] != step]  # a longer run measures the last update of a shorter one again
                rows.append({"steps": step, **found, "seconds": round(time.monotonic() - began, 1)})
                if not quiet and step % (10 * EVERY) == 0:
                    print(f"{name} triggers, {step}: " + "  ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)
            if step == self.steps or (step > done and step % (5 * EVERY) == 0):
                save(path, model, velocity, self._numbers(), step, rows)
            if step < self.steps:
                self._update(model, velocity, self._batch(fixed, self.rows, 0, step), step)
        return [common | row for row in [*rows, *claims(rows)]]

    def _update(self, model: InductionModel, velocity: Mapping[str, Tensor], batch: Sequence[Tensor], step: int) -> None:
        """v <- momentum v + gradient + weight_decay w, w <- w - lr v."""
        ids, follows, _ = batch
        loss = F.cross_entropy(model(ids).logits.mT, follows)
        if not math.isfinite(loss.item()):
            raise RemanenceError(f"the loss is {loss.item()} at step {step}; try a lower rate.")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for (name, p), slope in zip(trained.items(), torch.autograd.grad(loss, list(trained.values())), strict=True):
                velocity[name].mul_(self.momentum).add_(slope + self.weight_decay * p)
                p.sub_(self.lr * velocity[name])


def save(path: Path, model: InductionModel, velocity: Mapping[str, Tensor], numbers: Row, step: int, rows: Sequence[Row]) -> None:
    """Write the checkpoint, whole or not at all."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"velocity.{name}": tensor for name, tensor in velocity.items()}
    header = {"numbers": json.dumps(numbers), "step": str(step), "rows": json.dumps(rows)}
    write_atomic(path, lambda beside: save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, beside, header))


def restore(path: Path, model: InductionModel, velocity: Mapping[str, Tensor], numbers: Row) -> tuple[int, list[Row]]:
    """Put a checkpoint into model and velocity; -> updates done and what was measured up to then. Raises UsageError if it does not fit."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata()
            before, step, rows = json.loads(header["numbers"]), int(header["step"]), json.loads(header["rows"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except Exception as error:
        raise UsageError(f"{path} is not a checkpoint that can be resumed ({type(error).__name__}: {error}).") from error
    if before != numbers:
        raise UsageError(f"{path} holds a run with {before} (now {numbers}); give another folder, or resume=False to start over.")
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")})
    for name, value in velocity.items():
        value.copy_(tensors[f"velocity.{name}"])
    return step, rows


def figure(rows: list[Row], path: Path) -> None:
    """Accuracy, memories and the bigrams' divergence (as a fraction of its start) by update, a panel a setting."""
    settings = list(dict.fromkeys(row["memory"] for row in rows))

    def drawn(canvas: Any) -> None:
        for axes, name in zip(canvas.subplots(1, len(settings), squeeze=False, sharey=True)[0], settings, strict=True):
            mine = sorted((row for row in rows if row["memory"] == name and "steps" in row), key=lambda row: row["steps"])
            at, start = [1 + row["steps"] for row in mine], mine[0]["bigram_kl"]
            axes.plot(at, [row["bigram_kl"] / start for row in mine], color="grey", ls="--", label="divergence from the bigrams")
            axes.plot(at, [row["accuracy"] for row in mine], color="black", lw=2.5, label="in-context accuracy")
            for memory in MEMORIES:
                axes.plot(at, [row[memory] for row in mine], label=memory)
            axes.set(xscale="log", xlabel="1 + updates", ylim=(-0.03, 1.1), title=name)
        handles, labels = canvas.axes[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)

    save_figure(path, drawn, width=max(7.0, 5.0 * len(settings)))


def recipe(
    out: str | Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    device: str = "auto",
    fast: bool = False,
    data: str | Path | None = None,
    memory: str | None = None,
) -> Birth:
    """memory: "random", "fixed" or both (default), separated by a comma: where the triggers come from."""
    refuse_folder(data, "ihead-birth draws its text from the bigrams of a shipped book")
    names = named_once(memory or ",".join(SETTINGS), "setting")
    for name in names:
        if name not in SETTINGS:
            raise unknown("setting", name, SETTINGS)
    if steps is not None:
        positive(steps=steps)
    small: dict[str, Any] = {"rows": 4, "length": 32, "dim": 16, "held": 8} if fast else {}
    return Birth(names, steps or (6 if fast else 1000), seed=seed, device=device, **small)
