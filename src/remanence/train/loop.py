"""The training loop: pieces with a carried state, truncated or replayed back-propagation through time, and exact resume."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import FileError, RemanenceError, UsageError
from ..files import write_text
from ..models import Model
from ..runtime import tune
from ..state import State
from .checkpoint import Progress, generators, heal, load_checkpoint, save_checkpoint, set_generators
from .config import TrainConfig
from .data import Piece, as_pieces
from .environment import environment
from .optim import adamw, learning_rate
from .progress import Reporter
from .replay import replay

Loss = Callable[[Model, Piece, State | None], tuple[Tensor | None, State, dict[str, Tensor]]]
"""loss(model, piece, state) -> (sum of the losses of the piece's targets, None if it has none; the state after it; metrics to average)."""

MAY_CHANGE = {"steps", "threads", "device", "checkpoint_every", "eval_every", "log_every"}
"""Options that may differ when a run is resumed."""


def token_loss(model: Model, piece: Piece, state: State | None) -> tuple[Tensor | None, State, dict[str, Tensor]]:
    """The summed cross-entropy of a piece's targets."""
    count = piece.count
    out = model(piece.ids, state, piece.span, targets=piece.targets if count else None, logits="none")
    return None if out.loss is None else out.loss * count, out.state, {}


def train(
    model: Model,
    data: Any,
    config: TrainConfig,
    out: str | Path,
    evaluate: Callable[[Model], dict[str, float]] | None = None,
    loss: Loss | None = None,
    resume: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train `model` in place; returns the last row of metrics.

    data: see train/data.py. The loss of an update is the mean over all targets of its batches. evaluate(model) -> metrics, in eval mode and
    without gradients. loss: in place of `token_loss`. quiet: no progress shown.

    Into `out` go config.json, environment.json, metrics.jsonl (a row an update: step, loss, lr, grad_norm, tokens, tokens_per_s, elapsed,
    what loss and data report; a row an evaluation: step, its metrics as eval/name) and the checkpoints last/ and best/, each a model
    folder too. resume: go on from out/last if it is there, to the same bits as a run that was never killed (same machine, same number of
    threads); else start over. Raises UsageError if the folder holds a run of another configuration, RemanenceError when the loss or the
    gradient is not finite.
    """
    tune()
    out, loss, device = Path(out), loss or token_loss, config.torch_device
    if config.threads:
        torch.set_num_threads(config.threads)
    model.to(device).train()
    optimizer = adamw(model, config.lr, config.weight_decay, (config.beta1, config.beta2), decay_embeddings=config.decay_embeddings)
    progress, carried = _begin(out, model, optimizer, config, data, device, resume)
    began, tokens_then, time_then = time.monotonic() - progress.elapsed, progress.tokens, time.monotonic()
    row: dict[str, Any] = _last_row(out)
    with Reporter(config.steps, progress.step, quiet) as reporter, open(out / "metrics.jsonl", "a", encoding="utf-8") as metrics:
        while progress.step < config.steps:
            lr = learning_rate(config.schedule, progress.step, config.steps, config.lr, config.warmup, config.floor)
            value, norm, found, tokens, carried = _update(model, data, config, optimizer, lr, loss, progress.step, carried, device)
            progress.step, progress.tokens = progress.step + 1, progress.tokens + tokens
            step, now = progress.step, time.monotonic()
            last = step == config.steps
            found = {"loss": value, **found}
            found |= (data.observe(found) or {}) if hasattr(data, "observe") else {}
            if last or _due(step, config.log_every):
                speed = (progress.tokens - tokens_then) / max(now - time_then, 1e-9)
                tokens_then, time_then = progress.tokens, now
                row = {"step": step, **found, "lr": lr, "grad_norm": norm, "tokens": progress.tokens}
                row |= {"tokens_per_s": round(speed, 1), "elapsed": round(now - began, 3)}
                _write_row(metrics, row)
                reporter.step(step, row)
            if evaluate is not None and (last or _due(step, config.eval_every)):
                measured = _evaluated(model, evaluate)
                progress.elapsed = time.monotonic() - began
                scores = {f"eval/{name}": number for name, number in measured.items()}
                _write_row(metrics, {"step": step, **scores, "elapsed": round(progress.elapsed, 3)})
                row = row | scores
                reporter.say(f"step {step}  " + "  ".join(f"{name} {number:.4g}" for name, number in measured.items()))
                if _better(measured, config, progress.best):
                    progress.best = float(measured[config.best])
                    _save(out / "best", model, optimizer, progress, carried, data)
            if last or _due(step, config.checkpoint_every):
                progress.elapsed = time.monotonic() - began
                os.fsync(metrics.fileno())
                _save(out / "last", model, optimizer, progress, carried, data)
    return row


def _update(
    model: Model,
    data: Any,
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
    lr: float,
    loss: Loss,
    step: int,
    carried: State | None,
    device: torch.device,
) -> tuple[float, float, dict[str, float], int, State | None]:
    """One update -> loss, gradient norm, metrics, tokens read, the state to carry on."""
    batches = [as_pieces(data.batch(config.seed, step * config.accumulate + i)) for i in range(config.accumulate)]
    count = sum(piece.count for pieces in batches for piece in pieces)
    if count == 0:
        raise UsageError(f"the batch of step {step} has no target (all are -100); every update needs at least one.")
    tokens = sum(piece.tokens for pieces in batches for piece in pieces)
    carries = getattr(data, "carries", False)
    value, reports = 0.0, []
    for pieces in batches:
        pieces = [piece.to(device) for piece in pieces]
        part, state, found = accumulate_gradients(model, pieces, carried if carries else None, config, loss, count)
        value, carried = value + part, state if carries else None
        reports += found
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf))
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise RemanenceError(f"the loss is {value} and the gradient norm {norm} at step {step}; try a lower lr or more warm-up.")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    lists: dict[str, list[float]] = {}
    for name, metric in (pair for report in reports for pair in report.items()):
        lists.setdefault(name, []).append(float(metric))
    return value, norm, {name: sum(values) / len(values) for name, values in lists.items()}, tokens, carried


def windows(count: int, k2: int) -> list[range]:
    """The pieces between which gradients flow: all of them for k2 = -1, else windows of k2 + 1, of which the last ends with the batch."""
    size = count if k2 < 0 else k2 + 1
    return [range(max(0, end - size), end) for end in range(count, 0, -size)][::-1]


def accumulate_gradients(
    model: Model, pieces: Sequence[Piece], state: State | None, config: TrainConfig, loss: Loss, count: int
) -> tuple[float, State, list[dict[str, Tensor]]]:
    """Forward and backward over the pieces of one batch: adds the gradient of (summed loss) / count; -> that loss, final state, metrics."""
    found: dict[int, dict[str, Tensor]] = {}

    def run(index: int, state: State | None) -> tuple[Tensor | None, State]:
        with torch.autocast(pieces[index].ids.device.type, torch.bfloat16, enabled=config.bf16):
            value, state, metrics = loss(model, pieces[index], state)
        found[index] = {name: metric.detach() for name, metric in metrics.items()}  # keyed, because a piece may be run twice
        return None if value is None else value / count, state

    values = []
    for window in windows(len(pieces), config.k2):
        if not any(pieces[index].count for index in window):
            with torch.no_grad():
                for index in window:
                    state = run(index, state)[1]
        elif config.replay:
            value, state = replay(run, window, state)
            values.append(value)
        else:
            parts = []
            for index in window:
                value, state = _recompute(run, index, state, pieces[index].ids) if config.recompute else run(index, state)
                parts += [] if value is None else [value]
            torch.stack(parts).sum().backward()
            values.append(sum(part.detach() for part in parts))
            state = state.detach()  # type: ignore[union-attr]
    assert state is not None
    return float(sum(values)), state, [found[index] for index in sorted(found)]


def _recompute(run: Callable[..., Any], index: int, state: State | None, ids: Tensor) -> tuple[Tensor | None, State]:
    """`run` under activation checkpointing. Tensors are handed over flat so that torch sees which devices' random states to keep."""
    tensors = [] if state is None else state.tensors()

    def flat(ids: Tensor, *tensors: Tensor) -> tuple[Tensor | None, State]:
        values = iter(tensors)
        return run(index, state and state.map(lambda _: next(values)))

    return checkpoint(flat, ids, *tensors, use_reentrant=False)  # type: ignore[return-value]


def _begin(
    out: Path, model: Model, optimizer: torch.optim.Optimizer, config: TrainConfig, data: Any, device: torch.device, resume: bool
) -> tuple[Progress, State | None]:
    """Resume from out/last, or start afresh; writes config.json and environment.json."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{out} cannot be made a folder ({error.strerror}).") from error
    for name in ("last", "best"):
        heal(out / name)
    progress, carried = Progress(), None
    if resume and (out / "last").exists():
        before = TrainConfig.load(out / "config.json")
        differ = [name for name, value in config.to_dict().items() if name not in MAY_CHANGE and value != getattr(before, name)]
        if differ:
            said = ", ".join(f"{name}={getattr(before, name)} (now {getattr(config, name)})" for name in differ)
            raise UsageError(f"{out} holds a run with {said}; give another folder, or resume=False to start over.")
        progress, carried = load_checkpoint(out / "last", model, optimizer, device)
        if progress.data and hasattr(data, "restore"):
            data.restore(progress.data)
    else:
        for name in ("last", "best"):
            shutil.rmtree(out / name, ignore_errors=True)
        _seed(config.seed)
    _truncate_rows(out / "metrics.jsonl", progress.step)
    config.save(out / "config.json")
    write_text(out / "environment.json", json.dumps(environment(device), indent=2) + "\n")
    return progress, carried


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _truncate_rows(path: Path, step: int) -> None:
    """Keep the rows of steps that the checkpoint has seen: those after it will be written again."""
    kept = [line for line, row in _rows(path) if row["step"] <= step] if step else []
    write_text(path, "".join(kept))


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Whole lines of a metrics file; a kill may have cut the last one."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]
    return [(line, json.loads(line)) for line in lines]


def _last_row(out: Path) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for _, new in _rows(out / "metrics.jsonl"):
        row = row | new if new["step"] == row.get("step") else new
    return row


def _write_row(file: Any, row: dict[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluated(model: Model, evaluate: Callable[[Model], dict[str, float]]) -> dict[str, float]:
    """Evaluate without a trace: mode and random state are afterwards what they were, so that evaluating more often changes no run."""
    clock, mode = generators(), model.training
    model.eval()
    with torch.no_grad():
        measured = evaluate(model)
    model.train(mode)
    set_generators(clock)
    return measured


def _better(measured: dict[str, float], config: TrainConfig, best: float | None) -> bool:
    if config.best not in measured:
        raise UsageError(f"best is {config.best!r}; evaluate returned {', '.join(measured) or 'nothing'}.")
    value = measured[config.best]
    return best is None or (value > best if config.maximize else value < best)


def _save(folder: Path, model: Model, optimizer: torch.optim.Optimizer, progress: Progress, carried: State | None, data: Any) -> None:
    progress.data = data.state() if hasattr(data, "state") else {}
    save_checkpoint(folder, model, optimizer, progress, carried)
