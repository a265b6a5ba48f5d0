"""Which form of a rule runs: T == 1 -> step, else chunk, on the backend asked for."""

from __future__ import annotations

import torch

from ..errors import BackendError, UsageError

BACKENDS = ("auto", "torch", "naive")


def pick(backend: str, length: int) -> str:
    """The form to run: 'naive', 'step' or 'chunk'. Raises UsageError on an unknown backend, BackendError on one that cannot run here."""
    if backend == "triton":
        raise BackendError("backend 'triton' was asked for; this rule has no triton form. Use 'auto' or 'torch'.")
    if backend not in BACKENDS:
        raise UsageError(f"backend is {backend!r}; it may be {', '.join(BACKENDS)}.")
    if backend == "naive":
        return "naive"
    return "step" if length == 1 else "chunk"


def accumulate_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Recurrences accumulate in float32 at least: bf16 and fp16 are raised, float64 is kept."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.promote_types(dtype, torch.float32)
