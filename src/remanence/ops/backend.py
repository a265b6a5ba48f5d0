"""Which form of a rule runs: T == 1 -> step, else chunk or a GPU kernel, on the backend asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError, UsageError

BACKENDS = ("auto", "torch", "naive", "triton", "fla")
KERNELS = ("triton", "fla")
"""The backends that run on a GPU only: kernels of our own, and those of the package fla-core (asked for by name, never by 'auto')."""
WIDEST = 256
"""The most key channels of a head, for a kernel that must hold all of them at once."""
INSTALLED = {name: find_spec(name) is not None for name in KERNELS}
NONE: Mapping[str, str] = MappingProxyType({})


def pick(backend: str, length: int, device: torch.device | None = None, kernels: Mapping[str, str] = NONE) -> str:
    """The form to run: 'naive', 'step', 'chunk', 'triton' or 'fla'.

    kernels: of 'triton' and 'fla' those that the rule has, each with the reason why it cannot take this call ('' if it can). 'auto' takes
    triton where it can run and torch's forms elsewhere. Raises UsageError on an unknown backend, BackendError on one that cannot run here.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend is {backend!r}; it may be {', '.join(BACKENDS)}.")
    if backend == "naive":
        return "naive"
    if backend in KERNELS and (why := obstacle(backend, device, kernels)):
        raise BackendError(f"backend {backend!r} was asked for; {why}. Use 'auto' or 'torch'.")
    if length == 1:
        return "step"
    if backend == "auto" and device is not None and device.type == "cuda" and not obstacle("triton", device, kernels):
        return "triton"
    return backend if backend in KERNELS else "chunk"


def obstacle(name: str, device: torch.device | None, kernels: Mapping[str, str]) -> str:
    """Why the kernels `name` cannot run, in words; '' if they can. Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU, slowly."""
    if name not in kernels:
        return f"this rule has no {name} form"
    if device is None or (device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1"):
        return f"there is no {name} form for tensors on {'a CPU' if device is None or device.type == 'cpu' else device.type}"
    if not INSTALLED[name]:
        return f"the package {'fla-core' if name == 'fla' else name} is not installed"
    return kernels[name]


def precision(*tensors: Tensor) -> str:
    """How kernels multiply float32: 'tf32' where torch may, or where the inputs have no more bits than that; else 'ieee'."""
    short = all(x.dtype in (torch.bfloat16, torch.float16) for x in tensors)
    return "tf32" if short or torch.backends.cuda.matmul.allow_tf32 else "ieee"


def no_fla(reset: Tensor | None) -> str:
    """Why fla's kernels cannot take these resets; '' if they can."""
    return "fla takes resets in one row only (B == 1)" if reset is not None and len(reset) > 1 else ""


def fla_documents(reset: Tensor | None, initial: Tensor | None) -> tuple[Tensor | None, dict[str, Any]]:
    """The initial state and further arguments of fla's kernels for one row of documents that `reset` [1, T] starts, or for rows without.

    Its convention: one state for every document, all zero but the first, which continues `initial` unless it starts at a reset.
    """
    if reset is None:
        return initial, {}
    starts = reset[0].clone()
    fresh, starts[0] = bool(reset[0, 0]), True
    cu = torch.cat([starts.nonzero()[:, 0], starts.new_full((1,), len(starts), dtype=torch.long)])
    if initial is not None:
        rest = initial.new_zeros(len(cu) - 2, *initial.shape[1:])
        initial = torch.cat([torch.zeros_like(initial) if fresh else initial, rest])
    return initial, {"cu_seqlens": cu}


def accumulate_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Recurrences accumulate in float32 at least: bf16 and fp16 are raised, float64 is kept."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.promote_types(dtype, torch.float32)
