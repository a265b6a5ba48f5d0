"""What can go wrong, as one clear sentence each: what it was, what it got, what it may be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RemanenceError(Exception):
    """Base of every error that this library raises on purpose. The message is one sentence; the command line prints it and exits with 2."""


class UsageError(RemanenceError, ValueError):
    """An argument, a file or a configuration cannot be used as given."""


class ShapeError(UsageError):
    """A tensor has the wrong shape, dtype or device."""


class StateError(UsageError):
    """A state does not belong here: another system, another configuration, another batch, or a damaged file."""


class UnknownName(UsageError):
    """A name that is not in a register; the message suggests the nearest ones."""


class BackendError(RemanenceError, RuntimeError):
    """A backend was asked for by name and cannot run here."""


class FileError(RemanenceError, RuntimeError):
    """A file could not be written or read; nothing was left half-written."""


def unknown(what: str, got: str, known: Iterable[str]) -> UnknownName:
    """The error for a name that is not known, with the nearest names suggested."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}."
    return UnknownName(f"{what} {got!r} is not known; {hint}")


def positive(**sizes: int) -> None:
    """Check that each named size is an integer >= 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name} is {value!r}; it must be an integer >= 1.")


def divides(name: str, part: int, whole_name: str, whole: int) -> None:
    """Check that `part` divides `whole`."""
    if whole % part:
        raise UsageError(f"{name}={part} does not divide {whole_name}={whole}.")


def even_heads(heads: int, dim: int) -> None:
    """Check that `heads` divides `dim` into heads of even width, whose channels rotary positions can pair."""
    divides("heads", heads, "dim", dim)
    if dim // heads % 2:
        raise UsageError(f"heads={heads} makes dim={dim} into heads of width {dim // heads}; it must be even, for rotary positions.")
