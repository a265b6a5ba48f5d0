"""Linear time-invariant memories: chunk and step against the equation in float64; HiPPO, its discretisations and the Cauchy kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import assert_close, assert_gradients_close, masks, relative_error
from remanence import Span
from remanence.errors import BackendError, ShapeError, UsageError
from remanence.ops.lti import convolve, dense, diagonal, dilated, hippo

B, D = 2, 3


def modes(complex_modes: bool, count: int = 4, seed: int = 0) -> list[torch.Tensor]:
    """log_a, b, c [D, M] in float64 or complex128, some modes slow and some fast."""
    torch.manual_seed(seed)
    log_a = -torch.tensor([0.001, 0.1, 1.0, 8.0]).double()[:count] * (0.5 + torch.rand(D, count, dtype=torch.float64))
    if not complex_modes:
        return [log_a, torch.randn(D, count, dtype=torch.float64), torch.randn(D, count, dtype=torch.float64)]
    b, c = (torch.randn(D, count, dtype=torch.complex128) for _ in range(2))
    return [torch.complex(log_a, 3 * torch.randn(D, count, dtype=torch.float64)), b, c]


def system(groups: int, order: int, outputs: int | None, seed: int = 0) -> list[torch.Tensor]:
    """A stable dense A, b and (with outputs) C."""
    torch.manual_seed(seed)
    a, b = hippo.hippo("legs", order)
    dt = 0.02 + 0.1 * torch.rand(groups, dtype=torch.float64)
    a, b = hippo.discretize(a, b, dt)
    return [a, b] + ([] if outputs is None else [torch.randn(groups, outputs, order, dtype=torch.float64)])


def outcome(run, leaves: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values and gradients of a random projection of y and the last state."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    y, last = run(*leaves)
    random = torch.Generator().manual_seed(1)
    parts = [torch.view_as_real(x) if x.is_complex() else x for x in (y, last)]
    loss = sum((x * torch.randn(x.shape, generator=random, dtype=torch.float64)).sum() for x in parts)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    named = {f"leaf {i}": torch.zeros_like(leaf) if g is None else g for i, (leaf, g) in enumerate(zip(leaves, grads))}
    return dict(zip(["y", "last"], parts)) | {k: torch.view_as_real(g) if g.is_complex() else g for k, g in named.items()}


def compare(run, leaves: list[torch.Tensor], tol: float = 1e-9) -> None:
    got, want = outcome(lambda *x: run(*x, backend="auto"), leaves), outcome(lambda *x: run(*x, backend="naive"), leaves)
    for key in ("y", "last"):
        assert_close(key, got.pop(key), want.pop(key), tol)
    assert_gradients_close("lti", got, want, tol)


@st.composite
def cases(draw):
    """A length and a right-padded span."""
    length = draw(st.sampled_from([1, 2, 5, 63, 64, 65, 130]))
    valid = draw(st.none() | st.lists(st.integers(0, length), min_size=B, max_size=B))
    reset = draw(st.none() | masks(B, length) | st.sampled_from([0, length - 1]))
    if isinstance(reset, int):
        reset = torch.arange(length).expand(B, -1) == reset
    return length, Span(None if valid is None else Span.from_lengths(valid, length).valid, reset)


@settings(max_examples=25)
@given(case=cases(), complex_modes=st.booleans())
def test_diagonal_is_its_equation(case, complex_modes):
    length, span = case
    leaves = [*modes(complex_modes), torch.randn(B, length, D, dtype=torch.float64)]
    start = torch.randn(B, D, 4, dtype=leaves[0].dtype)
    compare(lambda log_a, b, c, u, x, backend: diagonal(log_a, b, c, u, x, span, backend), [*leaves, start])


@settings(max_examples=25)
@given(case=cases(), kind=st.sampled_from([(1, None), (1, 2), (D, None), (D, 2)]))
def test_dense_is_its_equation(case, kind):
    length, span = case
    a, b, *c = system(*[kind[0], 5, kind[1]])
    leaves = [a, b, torch.randn(B, length, D, dtype=torch.float64), torch.randn(B, D, 5, dtype=torch.float64), *c]
    compare(lambda a, b, u, m, c=None, backend="auto": dense(a, b, u, c, m, span, backend), leaves)


@pytest.mark.parametrize("resets", [False, True])
def test_padding_may_hold_anything(resets):
    span = Span(Span.from_lengths([0, 70], 90).valid, torch.arange(90).expand(B, -1) % 30 == 9 if resets else None)
    log_a, b, c = modes(True)
    u = torch.randn(B, 90, D, dtype=torch.float64)
    dirty = torch.where(span.valid[..., None], u, torch.nan)
    for rule, args in ((diagonal, (log_a, b, c)), (dense, hippo.discretize(*hippo.hippo("legs", 4), 0.1))):
        want, end = rule(*args, u, span=span)
        got, last = rule(*args, dirty, span=span)
        assert torch.equal(got, want) and torch.equal(last, end)
        assert not got[0].any() and not last[0].any()


def test_no_initial_state_is_zeros():
    log_a, b, c = modes(True)
    u = torch.randn(B, 70, D, dtype=torch.float64)
    for length in (1, 70):
        want, end = diagonal(log_a, b, c, u[:, :length], torch.zeros(B, D, 4, dtype=torch.complex128), backend="naive")
        for backend in ("auto", "naive"):
            got, last = diagonal(log_a, b, c, u[:, :length], backend=backend)
            assert relative_error(got, want) < 1e-12 and torch.allclose(last, end)
    a, b = hippo.discretize(*hippo.hippo("legt", 6), 0.1)
    assert_close("dense", dense(a, b, u)[0], dense(a, b, u, backend="naive")[0], 1e-10)


@pytest.mark.parametrize("complex_modes", [True, False])
def test_float32_and_bf16(complex_modes):
    """The angles of 200 tokens are many turns: they must not be taken in float32."""
    log_a, b, c = modes(complex_modes)
    u = torch.randn(B, 200, D, dtype=torch.float64)
    single = [torch.complex(x.real.float(), x.imag.float()) if x.is_complex() else x.float() for x in (log_a, b, c)]
    exact = [x.to(log_a.dtype) for x in single]
    want, _ = diagonal(*exact, u.float().double(), backend="naive")
    got, last = diagonal(*single, u.float())
    assert_close("float32", got, want.float(), 2e-6)
    assert last.dtype == single[0].dtype
    low, last = diagonal(*single, u.bfloat16())
    assert low.dtype == torch.bfloat16 and last.dtype == single[0].dtype
    a, b, c = (x.float() for x in system(1, 8, 2))
    want, _ = dense(a.double(), b.double(), u.float().double(), c.double(), backend="naive")
    assert_close("dense float32", dense(a, b, u.float(), c)[0], want.float(), 1e-5)


def test_bad_input():
    log_a, b, c = modes(True)
    with pytest.raises(ShapeError, match=r"expected \[D, M\]"):
        diagonal(log_a, b, c, torch.zeros(1, 2, D + 1))
    with pytest.raises(ShapeError, match="expected A"):
        dense(torch.eye(4), torch.ones(3), torch.zeros(1, 2, D))
    with pytest.raises(BackendError, match="triton"):
        diagonal(log_a, b, c, torch.zeros(1, 2, D), backend="triton")
    with pytest.raises(UsageError, match="measure is 'leg'"):
        hippo.hippo("leg", 4)
    with pytest.raises(UsageError, match="method is 'tustin'"):
        hippo.discretize(*hippo.hippo("legs", 4), 0.1, "tustin")
    with pytest.raises(UsageError, match="order is 5"):
        hippo.nplr_legs(5)


def test_convolve_is_causal_and_equals_the_rule():
    log_a, b, c = modes(True)
    u = torch.randn(B, 90, D, dtype=torch.float64)
    kernel = 2 * ((c * b)[..., None] * (log_a[..., None] * torch.arange(90)).exp()).sum(1).real
    assert_close("fft", convolve(u, kernel), diagonal(log_a, b, c, u, backend="naive")[0], 1e-10)


@settings(max_examples=20)
@given(reset=masks(B, 40), cut=st.integers(1, 39), gap=st.integers(1, 9), width=st.integers(1, 4))
def test_dilated_convolution(reset, cut, gap, width):
    """Cut anywhere, with resets, against the sum written out."""
    x, weight = torch.randn(B, 40, D, dtype=torch.float64), torch.randn(D, width, dtype=torch.float64)
    (first,), state = dilated(x[:, :cut], (weight,), gap, None, Span(reset=reset[:, :cut]))
    (second,), _ = dilated(x[:, cut:], (weight,), gap, state, Span(reset=reset[:, cut:]))
    document = reset.cumsum(1)
    want = torch.zeros_like(x)
    for t in range(40):
        for j in range(min(width, t // gap + 1)):
            same = (document[:, t] == document[:, t - j * gap])[:, None]
            want[:, t] += torch.where(same, weight[:, -1 - j] * x[:, t - j * gap], 0.0)
    assert_close("dilated", torch.cat([first, second], 1), want, 1e-12)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 64, 101])
def test_parity_cauchy_kernel_is_that_of_matrix_powers(length):
    """Even lengths have the frequency z = -1, where the textbook form is 0 x inf."""
    torch.manual_seed(0)
    lam, p, b, _ = hippo.nplr_legs(16)
    dt = torch.tensor([0.003, 0.02, 0.1], dtype=torch.float64)
    c = torch.randn(3, 8, dtype=torch.complex128)
    lam, p, b = (x.expand(3, -1) for x in (lam, p, b))
    abar, bbar = hippo.dplr_dense(lam, p, b, dt)
    row, m, want = 2 * torch.cat([c.real, -c.imag], -1), bbar, []
    for _ in range(length):
        want.append((row * m).sum(-1))
        m = (abar @ m[..., None])[..., 0]
    assert_close("kernel", hippo.dplr_kernel(lam, p, b, c, dt, length), torch.stack(want, -1), 1e-11)


def test_nplr_is_legs_and_its_bilinear_form():
    a, b = hippo.hippo("legs", 16)
    lam, p, low, v = hippo.nplr_legs(16)
    both, eigen, q = torch.cat([v, v.conj()], 1), torch.cat([lam, lam.conj()]), torch.cat([p, p.conj()])
    rebuilt = both @ (torch.diag(eigen) - q[:, None] * q.conj()) @ both.mH
    assert_close("A", torch.view_as_real(rebuilt), torch.view_as_real(a + 0j), 1e-12)
    assert_close("B", (both @ torch.cat([low, low.conj()])).real, b, 1e-12)
    dt = torch.tensor([0.05], dtype=torch.float64)
    abar, bbar = hippo.discretize(a, b, dt)
    x, u = torch.randn(1, 16, dtype=torch.float64), torch.randn(1, dtype=torch.float64)
    want = (abar @ x[..., None])[..., 0] + bbar * u[:, None]
    z = hippo.dplr_step(lam[None], p[None], low[None], dt, (v.mH @ x[0].to(v.dtype))[None], u)
    assert_close("step", 2 * (v @ z[0]).real, want[0], 1e-12)


@pytest.mark.parametrize("measure", hippo.MEASURES)
@pytest.mark.parametrize("method", hippo.METHODS)
def test_discretisations(measure, method):
    """Against their definitions; A is invertible here, so that zoh may be written with its inverse."""
    a, b = hippo.hippo(measure, 6, 5.0)
    abar, bbar = hippo.discretize(a, b, 0.05, method)
    one = torch.eye(6, dtype=torch.float64)
    if method == "bilinear":
        inverse = torch.linalg.inv(one - 0.025 * a)
        want = inverse @ (one + 0.025 * a), inverse @ b * 0.05
    elif method == "zoh":
        want = torch.matrix_exp(0.05 * a), torch.linalg.solve(a, (torch.matrix_exp(0.05 * a) - one) @ b)
    else:
        want = one + 0.05 * a, 0.05 * b
    assert_close("A", abar, want[0], 1e-12)
    assert_close("B", bbar, want[1], 1e-12)


@pytest.mark.parametrize("method", ["bilinear", "zoh", "euler"])
def test_parity_scipy(method):
    signal = pytest.importorskip("scipy.signal", reason="scipy is not installed")
    a, b = hippo.hippo("lmu", 8, 20.0)
    want = signal.cont2discrete((a.numpy(), b[:, None].numpy(), a.numpy(), b[:, None].numpy()), 1.0, method=method)
    abar, bbar = hippo.discretize(a, b, 1.0, method)
    assert_close("A", abar, torch.from_numpy(want[0]), 1e-10)
    assert_close("B", bbar, torch.from_numpy(want[1])[:, 0], 1e-10)


def test_legt_and_lmu_are_one_memory_in_two_scalings():
    """LMU's state is LegT's times (-1)^n / sqrt(2n + 1), up to the order of its signs."""
    (a, b), (other, pulse) = hippo.hippo("legt", 6, 3.0), hippo.hippo("lmu", 6, 3.0)
    n = torch.arange(6, dtype=torch.float64)
    scale = (2 * n + 1).sqrt() * (1 - 2 * (n % 2))
    assert_close("A", scale[:, None] * a / scale, other, 1e-12)
    assert_close("B", scale * b, pulse, 1e-12)
