"""Settings of the process that make a CPU faster and change no result that anyone could see."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys

import torch


@functools.cache
def tune() -> None:
    """Flush denormals, and let the allocator keep what it has. For the start of a program: threads that exist already keep their mode.

    A gate that is shut and a gradient that has vanished leave numbers below 1e-38, on which a CPU is many times slower. And glibc gives
    every large tensor fresh pages and takes them back at once, so that a training step spends much of its time in page faults.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
            mallopt = ctypes.CDLL(None).mallopt
            mmap_threshold, trim_threshold = -3, -1
            mallopt(mmap_threshold, 1 << 30)
            mallopt(trim_threshold, (1 << 31) - 1)
