"""Which layers need a long memory: a few, and not the lowest (arXiv 2007.03356). A schedule of memory lengths for a Decoder."""

from __future__ import annotations

from typing import Any

from ..catalog import system
from ..errors import UsageError, positive

PLACEMENTS = ("first", "last", "interleaved")


@system(
    "sparse-lrm",
    kind="interpretability",
    paper="arXiv:2007.03356",
    year=2020,
    name="Sparse long-range memories",
    state="sum over layers of their window's",
    parity="with every layer long it is the plain stack",
    claim="Eight layers with long memory in the last two are about as good as with eight long ones; in the first two clearly worse.",
)
def lrm_schedule(
    layers: int, n: int, placement: str = "interleaved", long: int = 2304, short: int = 128, mixer: str = "relative-attention"
) -> list[dict[str, Any]]:
    """The `layers` of a ModelConfig: L = layers specs, n of them with a window of `long` tokens and the others of `short`.

    placement: where the long ones are: "first" (the lowest), "last", or "interleaved", at equal distances up to the last layer:
    layers ceil(L / n), ceil(2 L / n), .., L. mixer: anything that takes a `window`. Raises UsageError on n outside 0..L, short > long, or
    an unknown placement.
    """
    positive(layers=layers, long=long, short=short)
    if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= layers:
        raise UsageError(f"n is {n!r}; it must be an integer in 0..{layers}, how many of the layers have a long memory.")
    if short > long:
        raise UsageError(f"short is {short} and long {long}; the short memory is at most as long.")
    if placement not in PLACEMENTS:
        raise UsageError(f"placement is {placement!r}; it may be {', '.join(PLACEMENTS)}.")
    chosen = {"first": range(1, n + 1), "last": range(layers - n + 1, layers + 1)}.get(placement)
    chosen = {-(-layers * i // n) for i in range(1, n + 1)} if chosen is None else set(chosen)
    return [{"mixer": mixer, "window": long if layer in chosen else short} for layer in range(1, layers + 1)]
