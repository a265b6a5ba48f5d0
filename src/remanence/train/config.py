"""What a training run is: TrainConfig, its numbers, and Run, everything that a recipe returns."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..errors import BackendError, UsageError, positive, unknown
from ..files import write_text
from ..models import Model
from .optim import SCHEDULES

PRECISIONS = ("auto", "fp32", "bf16")


@dataclass
class TrainConfig:
    """The numbers of a run.

    steps: updates. lr, schedule, warmup (steps), floor (final fraction of lr), weight_decay, beta1, beta2, decay_embeddings: see
    train/optim.py. clip: largest gradient norm, 0 for none. accumulate: batches to an update. seed: of the data and of all generators.
    k2: gradients cross only the last k2 boundaries between the pieces of a batch (windows of k2 + 1 pieces, the last ends with the batch);
    -1 crosses them all, 0 none. Between batches they never cross. recompute: keep no activations of a piece but its state, run it again in
    the backward pass. replay: memory replay back-propagation (train/replay.py), whose memory does not grow with the pieces.
    precision: 'bf16' is autocast; 'auto' takes it where the GPU has it, else float32. threads: 0 leaves torch's own number.
    best, maximize: the metric of `evaluate` by which best/ is chosen. checkpoint_every, eval_every, log_every: steps; 0: only at the end.
    """

    steps: int = 1000
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 0
    floor: float = 0.1
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    decay_embeddings: bool = False
    clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    k2: int = -1
    recompute: bool = False
    replay: bool = False
    precision: str = "auto"
    device: str = "auto"
    threads: int = 0
    best: str = "loss"
    maximize: bool = False
    checkpoint_every: int = 200
    eval_every: int = 0
    log_every: int = 1

    def __post_init__(self) -> None:
        positive(steps=self.steps, accumulate=self.accumulate)
        for name in ("warmup", "seed", "threads", "checkpoint_every", "eval_every", "log_every"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be an integer >= 0.")
        if not isinstance(self.k2, int) or self.k2 < -1:
            raise UsageError(f"k2 is {self.k2!r}; it must be -1 (all boundaries) or the number of boundaries that gradients cross, >= 0.")
        if not 0 < self.lr < float("inf"):
            raise UsageError(f"lr is {self.lr}; it must be a positive number.")
        for name, high in (("floor", 1), ("weight_decay", 1e3), ("clip", 1e9), ("beta1", 0.999999), ("beta2", 0.999999)):
            if not 0 <= getattr(self, name) <= high:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be in 0..{high}.")
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        if self.recompute and self.replay:
            raise UsageError("recompute and replay are both set; replay already holds no activations but one piece's, so set one of them.")

    @property
    def torch_device(self) -> torch.device:
        """The device to train on. Raises BackendError if it was asked for and is not there, UsageError if torch has no such device."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise UsageError(f"device is {self.device!r}; it must be 'auto', 'cpu', 'cuda' or another that torch knows.") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise BackendError(f"device {self.device!r} was asked for; torch finds no CUDA device here. Use 'cpu' or 'auto'.")
        return device

    @property
    def bf16(self) -> bool:
        """Whether the run computes in bf16 autocast. Raises BackendError if that was asked for on a GPU that has no bf16."""
        on_gpu = self.torch_device.type == "cuda"
        able = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else self.precision == "bf16"
        if self.precision == "bf16" and not able:
            raise BackendError("precision 'bf16' was asked for; this GPU has no bf16. Use 'fp32' or 'auto'.")
        return able and self.precision != "fp32"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Raises UnknownName on a key that is not a field."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise unknown("training option", name, known)
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Read what `save` wrote. Raises UsageError, naming the file, if it is missing or not such JSON."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} is not a training configuration ({error}).") from error
        if not isinstance(values, dict):
            raise UsageError(f"{path} holds {type(values).__name__}; a training configuration is a JSON object.")
        return cls.from_dict(values)


@dataclass
class Run:
    """A whole run, as a recipe returns it: `run.start(out)` trains and writes the results.

    evaluate(model) -> metrics, in eval mode without gradients. loss: see `train`. finish(model, out): writes results (JSON, plots) into
    out once training is over. name: subfolder of out for the training, "" for out itself. others: runs to do after this one, into the
    same out.
    """

    model: Model
    data: Any
    config: TrainConfig
    evaluate: Callable[[Model], dict[str, float]] | None = None
    finish: Callable[[Model, Path], None] | None = None
    loss: Callable[..., Any] | None = None
    name: str = ""
    others: tuple[Run, ...] = ()

    def start(self, out: str | Path, resume: bool = True, quiet: bool = False) -> dict[str, Any]:
        """Train and finish this run and the others; returns the last metrics of each under its name, or of the only one."""
        from .loop import train

        out, ends = Path(out), {}
        for run in (self, *self.others):
            ends[run.name] = train(run.model, run.data, run.config, out / run.name, run.evaluate, run.loss, resume, quiet)
            if run.finish is not None:
                run.finish(run.model.eval(), out)
        return ends if self.others else ends[self.name]
