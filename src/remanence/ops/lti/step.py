"""Linear time-invariant memories for one token."""

from __future__ import annotations

from . import naive

diagonal, dense = naive.diagonal, naive.dense
"""The equation is the fastest form of a single token; padding and resets cost one `where` each."""
