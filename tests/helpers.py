"""What tests share: comparing tensors and states, cutting sequences, and drawing spans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from remanence import Span, State

TINY = 1e-30


def rms(x: Tensor) -> float:
    """Root mean square, in float64; 0 for an empty tensor."""
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.detach().double().square().mean().sqrt().item() if x.numel() else 0.0


def relative_error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """rms(got - want) / rms(want). `floor` is the smallest rms(want) that is taken at its word."""
    wide = torch.complex128 if want.is_complex() else torch.float64
    return rms(got.detach().to(wide) - want.detach().to(wide)) / max(rms(want), floor, TINY)


def assert_close(name: str, got: Tensor, want: Tensor, tol: float, floor: float = 0.0) -> float:
    """Assert that shapes agree and the relative RMS error is <= tol (integers: equal); prints and returns the error."""
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    if want.is_complex():
        got, want = torch.view_as_real(got.resolve_conj()), torch.view_as_real(want.resolve_conj())
    if not want.is_floating_point():
        assert torch.equal(got, want), f"{name}: integers differ: {got.tolist()}, expected {want.tolist()}"
        return 0.0
    error = relative_error(got, want, floor)
    print(f"{name}: {error:.1e}")
    assert error <= tol, f"{name}: relative RMS error {error:.2e} > {tol:.0e}"  # NaN fails too
    return error


def assert_states_close(name: str, got: State, want: State, tol: float) -> None:
    """Assert that two states have the same header and the same tensors to `tol`."""
    assert got.header == want.header
    wanted = dict(want.named_tensors())
    assert [key for key, _ in got.named_tensors()] == list(wanted)
    for key, tensor in got.named_tensors():
        assert tensor.dtype == wanted[key].dtype, f"{name}: {key} is {tensor.dtype}, expected {wanted[key].dtype}"
        assert_close(f"{name}: state {key}", tensor, wanted[key], tol)


def assert_gradients_close(name: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor], tol: float) -> None:
    """Assert that gradients agree. One that is 1e-4 of the largest or less is compared on that scale: it is a sum that cancels."""
    floor = 1e-4 * max(map(rms, want.values()))
    assert got.keys() == want.keys() and floor > 0, f"{name}: every gradient is zero, or they are not of the same tensors"
    for key in want:
        assert_close(f"{name}: gradient to {key}", got[key], want[key], tol, floor)


def pieces(x: Tensor, cuts: Sequence[int]) -> Iterator[Tensor]:
    """x [B, T, ...] cut along T at `cuts`."""
    edges = [0, *cuts, x.shape[1]]
    return (x[:, a:b] for a, b in zip(edges, edges[1:]))


def cuts(length: int, most: int = 10) -> st.SearchStrategy[list[int]]:
    """Where to cut a sequence of `length` tokens: at most `most` places, close ones (pieces of 1 token) included."""
    return st.lists(st.integers(1, length - 1), unique=True, max_size=most).map(sorted)


def masks(batch: int, length: int) -> st.SearchStrategy[Tensor]:
    """A bool mask [batch, length]."""
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    return st.lists(row, min_size=batch, max_size=batch).map(lambda rows: torch.tensor(rows, dtype=torch.bool))


def spans(batch: int, length: int) -> st.SearchStrategy[Span]:
    """A span with padding anywhere (or none) and resets anywhere (or none)."""
    maybe = st.none() | masks(batch, length)
    return st.builds(Span, valid=maybe, reset=maybe)
