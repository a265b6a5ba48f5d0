"""What is installed, what the library will use, and why."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch

from . import ops
from .errors import RemanenceError
from .ops import backend
from .session import load_reader, shipped
from .train.environment import environment

IMPORTED_AS = {"fla-core": "fla", "mingru-pytorch": "minGRU_pytorch"}


def diagnose() -> dict[str, Any]:
    """Plain JSON data: environment, devices, rules, extras, checkpoint."""
    return {
        "environment": {name: value for name, value in environment().items() if name != "command"},
        "devices": list(_devices()),
        "rules": list(_rules()),
        "extras": list(_extras()),
        "checkpoint": _checkpoint(),
    }


def _devices() -> Iterator[dict[str, Any]]:
    yield {"name": "cpu", "what": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        yield {"name": f"cuda:{i}", "what": found.name, "memory_gb": round(found.total_memory / 2**30, 1)}
    if torch.backends.mps.is_available():
        yield {"name": "mps", "what": "Apple GPU"}


def _rules() -> Iterator[dict[str, str]]:
    """For each rule of ops/: the form that `auto` runs here for one token and for many, why, and the backends that may be named."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for module in sorted(iter_modules(ops.__path__), key=lambda module: module.name):
        if not module.ispkg:
            continue
        folder = Path(ops.__path__[0]) / module.name
        forms = {path.stem for path in folder.glob("*.py")}
        if "naive" not in forms:
            yield {"rule": module.name, "one_token": "torch", "many_tokens": "torch", "why": "it has one form, in plain PyTorch"}
            continue
        kernels: dict[str, str] = dict.fromkeys(backend.KERNELS, "") if "triton" in forms else {}  # a rule's triton.py holds both
        picked = (backend.pick("auto", length, device, kernels) for length in (1, 2))
        one, many = (name if name in forms else "torch" for name in picked)
        why = backend.obstacle("triton", device, kernels)
        why = f"not triton: {why}" if why else "calls that the kernel does not take run torch's chunk form"
        named = ["torch", "naive", *(name for name in kernels if not backend.obstacle(name, device, kernels))]
        yield {"rule": module.name, "one_token": one, "many_tokens": many, "why": why, "by_name": ", ".join(named)}


def _extras() -> Iterator[dict[str, Any]]:
    """Every optional requirement of the package, and the version that is installed or None."""
    try:
        requirements = metadata.requires("remanence") or []
    except metadata.PackageNotFoundError:
        requirements = []
    for requirement in requirements:
        found = re.match(r"([A-Za-z0-9._-]+).*extra == ['\"](\w+)['\"]", requirement)
        if found is None:
            continue
        name, extra = found.groups()
        there = find_spec(IMPORTED_AS.get(name.lower(), name.replace("-", "_"))) is not None
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = "unknown" if there else None
        yield {"extra": extra, "package": name, "version": version}


def _checkpoint() -> dict[str, Any]:
    folder = shipped()
    try:
        model, tokenizer = load_reader()
    except RemanenceError as error:
        return {"folder": str(folder), "there": False, "problem": str(error)}
    return {
        "folder": str(folder),
        "there": True,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": tokenizer.vocab_size,
    }


def show(found: dict[str, Any]) -> None:
    """Print the diagnosis as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()

    def table(title: str, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        shown = Table(title=title, title_justify="left")
        names = list(dict.fromkeys(name for row in rows for name in row))
        for name in names:
            shown.add_column(name.replace("_", " "))
        for row in rows:
            shown.add_row(*("-" if row.get(name) is None else str(row[name]) for name in names))
        console.print(shown)

    table("Environment", [{"what": name, "value": value} for name, value in found["environment"].items()])
    table("Devices", found["devices"])
    table("Rules: the form that runs", found["rules"])
    table("Optional packages", found["extras"])
    table("Shipped checkpoint", [{"what": name, "value": value} for name, value in found["checkpoint"].items()])
