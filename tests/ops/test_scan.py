"""The scan: chunk and step against the equation in float64, in values and in every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import BackendError
from remanence.ops.scan import naive, scan
from remanence.span import Span


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative RMS of the difference; absolute where b is zero."""
    scale = b.abs().square().mean().sqrt().item()
    return (a - b).abs().square().mean().sqrt().item() / (scale or 1.0)


def inputs(batch: int, length: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """log_a, b, initial, and cotangents of h and of the last h."""
    torch.manual_seed(seed)
    log_a = -torch.rand(batch, length, dim, dtype=torch.float64) * torch.tensor([0.01, 1.0, 8.0]).double()[torch.randint(3, (dim,))]
    if dtype.is_complex:
        log_a = torch.complex(log_a, 6 * torch.rand_like(log_a) - 3)
    b, initial = torch.randn(batch, length, dim, dtype=dtype), torch.randn(batch, dim, dtype=dtype)
    return [log_a.to(dtype), b, initial, torch.randn_like(b), torch.randn_like(initial)]


def value_and_gradients(run, log_a, b, initial, dh, dlast) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in (log_a, b, initial)]
    h, last = run(*leaves)
    loss = (h * dh).sum() + (last * dlast).sum()
    return [h.detach(), last.detach(), *torch.autograd.grad(loss.real if loss.is_complex() else loss, leaves)]


def by_steps(log_a, b, initial, reset=None):
    outputs, h = [], initial
    for t in range(b.shape[1]):
        part = slice(t, t + 1)
        y, h = scan(log_a[:, part], b[:, part], h, None if reset is None else Span(reset=reset[:, part]))
        outputs.append(y)
    return torch.cat(outputs, 1), h


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 200),
    dim=st.integers(1, 9),
    resets=st.sampled_from(["none", "first", "last", "both", "some"]),
    dtype=st.sampled_from([torch.float64, torch.complex128]),
    cut=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_forms_and_cuts_agree(batch, length, dim, resets, dtype, cut, seed):
    data = inputs(batch, length, dim, seed, dtype)
    reset = torch.zeros(batch, length, dtype=torch.bool)
    reset[:, 0] = resets in ("first", "both")
    reset[:, -1] |= resets in ("last", "both")
    if resets == "some":
        reset = torch.rand(batch, length) < 0.1
    at = min(max(int(cut * length), 1), length)

    def in_two(log_a, b, initial):
        first, h = scan(log_a[:, :at], b[:, :at], initial, Span(reset=reset[:, :at]))
        if at == length:
            return first, h
        second, h = scan(log_a[:, at:], b[:, at:], h, Span(reset=reset[:, at:]))
        return torch.cat([first, second], 1), h

    truth = value_and_gradients(lambda *leaves: naive(*leaves, None if resets == "none" else reset), *data)
    span = None if resets == "none" else Span(reset=reset)
    for run in (lambda *leaves: scan(*leaves, span), lambda *leaves: by_steps(*leaves, reset), in_two):
        for got, want in zip(value_and_gradients(run, *data), truth):
            assert error(got, want) <= 1e-10


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 60), seed=st.integers(0, 999))
def test_padding_leaves_the_state_alone(length, seed):
    log_a, b, initial, _, _ = inputs(3, length, 4, seed)
    sizes = torch.randint(0, length + 1, (3,))
    h, last = scan(log_a, b, initial, Span.from_lengths(sizes, length))
    for row, size in enumerate(sizes.tolist()):
        one = slice(row, row + 1)
        if size == 0:
            assert torch.equal(last[one], initial[one])
            continue
        want, end = naive(log_a[one, :size], b[one, :size], initial[one])
        assert error(last[one], end) <= 1e-10
        assert error(h[one, :size], want) <= 1e-10


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 150])
@pytest.mark.parametrize("log_a", [0.0, -torch.inf, -1000.0])
def test_extremes(length, log_a):
    """a = 1 sums, a = 0 forgets; values and gradients stay finite."""
    _, b, initial, dh, dlast = inputs(2, length, 3, 0)
    log_a = torch.full_like(b, log_a)
    h, last, dlog_a, db, dinitial = value_and_gradients(scan, log_a, b, initial, dh, dlast)
    assert error(h, initial[:, None] + b.cumsum(1) if log_a[0, 0, 0] == 0 else b) <= 1e-12
    assert torch.equal(last, h[:, -1])
    assert all(bool(grad.isfinite().all()) for grad in (dlog_a, db, dinitial))


def test_no_initial_is_zero():
    log_a, b, initial, dh, dlast = inputs(2, 50, 3, 1)
    assert error(scan(log_a, b)[0], naive(log_a, b, torch.zeros_like(initial))[0]) <= 1e-12
    assert torch.equal(scan(log_a[:, :1], b[:, :1])[1], b[:, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("length", [1, 3, 11])
def test_gradcheck_first_and_second_order(length, dtype):
    log_a, b, initial, _, _ = inputs(2, length, 2, 3, dtype)
    leaves = [x.requires_grad_() for x in (log_a, b, initial)]
    reset = torch.zeros(2, length, dtype=torch.bool)
    reset[1, length // 2] = True
    assert torch.autograd.gradcheck(lambda *x: scan(*x, Span(reset=reset)), leaves)
    assert torch.autograd.gradgradcheck(lambda *x: scan(*x, Span(reset=reset)), leaves)


@pytest.mark.parametrize(("log_type", "b_type", "out", "last"), [
    (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16, torch.float16, torch.float32),
    (torch.float64, torch.float32, torch.float32, torch.float64),
    (torch.complex64, torch.float32, torch.complex64, torch.complex64),
])  # fmt: skip
@pytest.mark.parametrize("length", [1, 20])
def test_dtypes(log_type, b_type, out, last, length):
    log_a, b, _, _, _ = inputs(1, length, 2, 0)
    h, end = scan(log_a.to(log_type), b.to(b_type))
    assert (h.dtype, end.dtype) == (out, last)


def test_float32_over_a_long_sequence():
    """A running sum of log a would lose its digits here; the chunk form has none."""
    log_a, b, initial, dh, dlast = inputs(1, 5000, 4, 0)
    log_a = log_a.clamp(min=-1.0)
    truth = value_and_gradients(naive, log_a, b, initial, dh, dlast)
    got = value_and_gradients(scan, *(x.float() for x in (log_a, b, initial, dh, dlast)))
    assert max(error(x.double(), y) for x, y in zip(got, truth)) <= 1e-5


def test_compiles_whole_and_strided_inputs_work():
    log_a, b, initial, dh, dlast = inputs(2, 30, 6, 0)
    truth = value_and_gradients(naive, log_a, b, initial, dh, dlast)
    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    flipped = [x.mT.contiguous().mT for x in (log_a, b)]
    for run in (value_and_gradients(compiled, log_a, b, initial, dh, dlast), value_and_gradients(scan, *flipped, initial, dh, dlast)):
        assert max(error(x, y) for x, y in zip(run, truth)) <= 1e-10


def test_a_backend_that_is_not_there_is_refused():
    log_a, b, _, _, _ = inputs(1, 2, 2, 0)
    with pytest.raises(BackendError, match="triton"):
        scan(log_a, b, backend="triton")
