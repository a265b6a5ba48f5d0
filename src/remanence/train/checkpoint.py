"""Checkpoints: everything that an exact resume needs, in a folder that a kill at any moment leaves loadable. Nothing is pickled."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import FileError, UsageError
from ..files import tensor_digest, write_atomic, write_text
from ..models import Model, load
from ..state import State
from .replay import set_torch_rng, torch_rng

FORMAT = 1


@dataclass
class Progress:
    """How far a run is: updates done, tokens read, seconds spent, the best value so far, and what the data remembers."""

    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0
    best: float | None = None
    data: dict[str, Any] = field(default_factory=dict)


def generators() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators."""
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch_rng()}


def set_generators(states: dict[str, Any]) -> None:
    """Put back what `generators` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    set_torch_rng(states["torch"])


def save_checkpoint(folder: Path, model: Model, optimizer: torch.optim.Optimizer, progress: Progress, carried: State | None) -> None:
    """Replace `folder` whole: config.json and model.safetensors (as Model.save), optimizer.safetensors, state.safetensors, progress.json.

    Raises FileError if it cannot be written, StateError if the carried state holds NaN; `folder` is then what it was.
    """
    tensors = _optimizer_tensors(optimizer)
    rng = generators()
    python, (_, keys, *rest) = rng["python"], rng["numpy"]
    tensors |= {f"rng.torch.{i}": state for i, state in enumerate(rng["torch"])} | {"rng.numpy": torch.from_numpy(keys.astype(np.int64))}
    header = {
        "format": "remanence-checkpoint",
        "version": FORMAT,
        "progress": asdict(progress),
        "python": [python[0], list(python[1]), python[2]],
        "numpy": rest,
        "carried": carried is not None,
        "sha256": tensor_digest(tensors),
    }

    def write(part: Path) -> None:
        model.save(part, provenance={"step": progress.step, "tokens": progress.tokens})
        write_atomic(part / "optimizer.safetensors", lambda beside: save_file(tensors, beside))
        if carried is not None:
            carried.save(part / "state.safetensors")
        write_text(part / "progress.json", json.dumps(header) + "\n")

    swap_folder(folder, write)


def load_checkpoint(folder: Path, model: Model, optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[Progress, State | None]:
    """Put the checkpoint into model, optimiser and the global generators; returns the progress and the carried state.

    Raises UsageError, naming the file, on anything missing, damaged, of another format or made by another model.
    """
    saved = load(folder)
    was, now = (json.dumps([one.kind, one.config], sort_keys=True, default=str) for one in (saved, model))
    if was != now:
        raise UsageError(f"{folder} holds a model of another configuration than the one to train; give another folder, or resume=False.")
    model.load_state_dict(saved.state_dict())
    path = folder / "progress.json"
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        if header["format"] != "remanence-checkpoint" or header["version"] != FORMAT:
            raise ValueError(f"format {header['format']!r} version {header['version']}, expected 'remanence-checkpoint' version {FORMAT}")
        tensors = load_file(folder / "optimizer.safetensors")
        if tensor_digest(tensors) != header["sha256"]:
            raise ValueError("optimizer.safetensors was changed after it was saved")
        progress = Progress(**header["progress"])
        version, words, gauss = header["python"]
        numpy_state = ("MT19937", tensors.pop("rng.numpy").numpy().astype(np.uint32), *header["numpy"])
        clocks = [tensors.pop(f"rng.torch.{i}").clone() for i in range(sum(name.startswith("rng.torch.") for name in tensors))]
        _load_optimizer(optimizer, tensors)
        carried = State.load(folder / "state.safetensors").clone().to(device) if header["carried"] else None
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{folder} is not a checkpoint that can be resumed ({type(error).__name__}: {error}).") from error
    set_generators({"python": (version, tuple(words), gauss), "numpy": numpy_state, "torch": clocks})
    return progress, carried


def _parameters(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`slot/parameter name` -> tensor, for every tensor that the optimiser keeps."""
    return {
        f"{slot}/{name}": value.detach().cpu().contiguous().clone()
        for name, parameter in _parameters(optimizer)
        for slot, value in optimizer.state[parameter].items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    for name, parameter in _parameters(optimizer):
        for key in [key for key in tensors if key.split("/", 1)[1] == name]:
            slot, value = key.split("/", 1)[0], tensors[key].clone()  # a clone, because a tensor inside a mapped file may lie unaligned
            optimizer.state[parameter][slot] = value if slot == "step" else value.to(parameter.device)  # AdamW counts steps on the CPU


def swap_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a fresh folder beside `folder`, then put it in its place. `heal` finishes what a kill interrupted."""
    heal(folder)
    part, new, old = (folder.with_name(folder.name + end) for end in (".part", ".new", ".old"))
    try:
        part.mkdir(parents=True)
        write(part)
        _flush(part)
        part.rename(new)  # from here on the new one is complete
        heal(folder)
        _flush(folder.parent)
    except OSError as error:
        raise FileError(f"{folder} could not be written ({error.strerror or error}); what was there before is unchanged.") from error
    finally:
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)


def heal(folder: Path) -> None:
    """Leave exactly one complete folder after a kill in the middle of a swap: the new one if it was complete, else the old."""
    part, new, old = (folder.with_name(folder.name + end) for end in (".part", ".new", ".old"))
    shutil.rmtree(part, ignore_errors=True)
    if new.exists():
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
    elif not folder.exists() and old.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
