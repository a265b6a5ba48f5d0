"""Writing files so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import FileError


def write_atomic(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a fresh name beside `path`, flush it to the disk, then rename it into place.

    Raises FileError (one sentence) when the disk is full or the place cannot be written; `path` is then what it was before.
    """
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path} is a directory; a file name is needed to save to.")
    if path.exists() and not path.is_file():  # renaming onto /dev/null, as root, would replace it
        raise FileError(f"{path} is a device or a pipe; a file name is needed to save to.")
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        beside = Path(name)
        write(beside)
        with open(beside, "rb") as done:
            os.fsync(done.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except Exception as error:
        if beside is not None:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
        # safetensors reports a failed write as its own error type, with the operating system's words in it
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            reason = getattr(error, "strerror", None) or str(error)
            raise FileError(f"{path} could not be written ({reason}); what was there before is unchanged.") from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomic(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes: what tells a tampered file from the one that was saved."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
