"""A sequence split into pieces that are read from zero is the whole sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence import Span
from remanence.errors import ShapeError, UsageError
from remanence.ops.delta import delta
from remanence.ops.outer import outer
from remanence.ops.scan import scan
from remanence.ops.sequence import cuts, split_delta, split_outer, split_scan, split_sequence_states

B, T, H, K, V = 2, 101, 4, 5, 6
SPANS = ("none", "padding and resets")
CASES = ("outer", "outer scalar", "outer by key", "scan", "scan complex", "delta", "delta gated")


def span_of(name: str) -> Span | None:
    if name == "none":
        return None
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, 0] = reset[1, 40] = reset[1, 100] = reset[0, 25] = True
    return Span(torch.arange(T) < torch.tensor([[70], [101]]), reset)


def case(name: str, dtype: torch.dtype):
    """rule, split rule, and the tensors they take (None among them), the state last."""
    random = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    def log(*shape: int) -> Tensor:
        return -torch.rand(*shape, generator=random, dtype=torch.float64).to(dtype)

    if name.startswith("scan"):
        log_a, b, h = log(B, T, 7), randn(B, T, 7), randn(B, 7)
        if name == "scan complex":
            log_a, b, h = torch.complex(log_a, log(B, T, 7)), torch.complex(b, randn(B, T, 7)), torch.complex(h, randn(B, 7))
        return scan, split_scan, [log_a, b, h]
    groups = 2 if name in ("outer", "outer scalar") else H
    q, k = randn(B, T, groups, K), torch.nn.functional.normalize(randn(B, T, groups, K), dim=-1)
    v, S = randn(B, T, H, V), randn(B, H, K, V)
    g = {"outer scalar": log(B, T, H), "outer by key": log(B, T, H, K), "delta gated": 0.1 * log(B, T, H)}.get(name)
    if name.startswith("outer"):
        return outer, split_outer, [q, k, v, g, S]
    return delta, split_delta, [q, k, v, g, -log(B, T, H), S]


@pytest.mark.parametrize("where", SPANS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_parity_of_a_split_sequence_with_the_whole(name: str, where: str, dtype: torch.dtype, tol: float) -> None:
    rule, split, tensors = case(name, dtype)
    span = span_of(where)
    real = slice(None) if span is None else span.valid
    for pieces in (1, 5, 200):
        for state in (tensors[-1], None):
            o, S = rule(*tensors[:-1], state, span)
            got, last = split(*tensors[:-1], state, span, pieces=pieces)
            assert_parity("linear-moe", f"the unsplit {name.split()[0]} rule, {dtype}".replace("torch.", ""), got[real], o[real], tol)
            assert_close("state", last, S, tol)
            assert got.dtype == o.dtype and last.dtype == S.dtype


@pytest.mark.parametrize("name", ["outer by key", "scan", "delta gated"])
def test_gradients(name: str) -> None:
    rule, split, tensors = case(name, torch.float64)
    grads = []
    for form, more in ((rule, {}), (split, {"pieces": 4})):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        o, S = form(*leaves, span_of("padding and resets"), **more)
        (o[1].sin().sum() + S.cos().sum()).backward()
        grads.append({str(index): leaf.grad for index, leaf in enumerate(leaves)})
    assert_gradients_close(name, grads[1], grads[0], 1e-9)


def test_states_and_cuts() -> None:
    starts, last = split_sequence_states([torch.tensor(0.5), torch.tensor(0.0), torch.tensor(2.0)], [torch.tensor(1.0)] * 3)
    assert [float(start) for start in starts] == [0.0, 1.0, 1.0] and float(last) == 3.0
    starts, _ = split_sequence_states([torch.tensor(0.5)] * 2, [torch.tensor(1.0)] * 2, torch.tensor(4.0))
    assert [float(start) for start in starts] == [4.0, 3.0]
    assert cuts(7, 3) == [slice(0, 2), slice(2, 4), slice(4, 7)] and cuts(2, 9) == [slice(0, 1), slice(1, 2)]
    with pytest.raises(ShapeError, match="2 pieces have a decay and 1 a final state"):
        split_sequence_states([torch.ones(1)] * 2, [torch.ones(1)])
    with pytest.raises(UsageError, match="pieces is 0"):
        cuts(5, 0)
