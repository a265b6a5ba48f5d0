"""The optimiser's groups, and learning-rate schedules as plain functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from ..errors import unknown


def decay_groups(model: nn.Module, weight_decay: float, decay_embeddings: bool = False) -> list[dict]:
    """Two parameter groups: matrices, which decay, and the rest (1-D, marked `no_weight_decay`, embeddings unless asked), which do not.

    A tied tensor counts once, as an embedding if it is one. Parameters without requires_grad are left out; each group also lists `names`.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups = [{"params": [], "names": [], "weight_decay": weight_decay}, {"params": [], "names": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim < 2 or getattr(parameter, "no_weight_decay", False)
        spared = spared or (id(parameter) in embeddings and not decay_embeddings)
        groups[spared]["params"].append(parameter)
        groups[spared]["names"].append(name)
    return [group for group in groups if group["params"]]


def adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    decay_embeddings: bool = False,
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over `decay_groups`."""
    return torch.optim.AdamW(decay_groups(model, weight_decay, decay_embeddings), lr=lr, betas=betas, eps=eps)


def _warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _progress(step: int, steps: int, warmup: int) -> float:
    """0 at the end of the warm-up, 1 at the last step."""
    return min(1.0, max(0.0, (step - warmup) / max(1, steps - 1 - warmup)))


def constant(step: int, steps: int, warmup: int = 0, floor: float = 0.0) -> float:
    """1 after a linear warm-up."""
    return _warm(step, warmup)


def linear(step: int, steps: int, warmup: int = 0, floor: float = 0.0) -> float:
    """From 1 after a linear warm-up straight down to `floor` at the last step."""
    return _warm(step, warmup) * (1 - (1 - floor) * _progress(step, steps, warmup))


def cosine(step: int, steps: int, warmup: int = 0, floor: float = 0.0) -> float:
    """From 1 after a linear warm-up down to `floor` at the last step along half a cosine (arXiv 1608.03983, one period)."""
    return _warm(step, warmup) * (floor + (1 - floor) * (1 + math.cos(math.pi * _progress(step, steps, warmup))) / 2)


def wsd(step: int, steps: int, warmup: int = 0, floor: float = 0.0, tail: float = 0.2) -> float:
    """Warm up, stay at 1, and go down linearly to `floor` over the last `tail` of the steps (arXiv 2404.06395)."""
    start = max(warmup, round(steps * (1 - tail)))
    return _warm(step, warmup) * (1 - (1 - floor) * _progress(step, steps, start))


SCHEDULES: dict[str, Callable[..., float]] = {"constant": constant, "cosine": cosine, "linear": linear, "wsd": wsd}


def learning_rate(schedule: str, step: int, steps: int, lr: float, warmup: int = 0, floor: float = 0.0) -> float:
    """The rate of step 0 .. steps - 1; `floor` is the fraction of lr at which a schedule ends. Raises UnknownName if it is not known."""
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    return lr * SCHEDULES[schedule](step, steps, warmup, floor)
