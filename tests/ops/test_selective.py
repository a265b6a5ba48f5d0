"""The selective recurrence: chunk and step against the equation in float64, in values and in every gradient, for both decays."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence.errors import BackendError, ShapeError, UsageError
from remanence.ops.selective import naive, selective
from remanence.span import Span

CHUNK = sys.modules["remanence.ops.selective.chunk"]  # the name in the package is the function's
NAMES = ("u", "v", "w", "B", "C", "initial")
DECAYS = pytest.mark.parametrize("decay", ["exp", "complement"])


def inputs(decay: str, batch: int, length: int, channels: int, width: int, seed: int = 0) -> list[torch.Tensor]:
    """u, v, w, B, C, initial in float64, in the range that each decay is for."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *sizes: torch.randn(*sizes, generator=random, dtype=torch.float64)  # noqa: E731
    w, B, C, initial = draw(batch, length, channels), draw(batch, length, width), draw(batch, length, width), draw(batch, channels, width)
    if decay == "exp":
        return [F.softplus(draw(batch, length, channels) - 1), -draw(channels, width).exp(), w, B, C, initial]
    v = B.square()
    beta = draw(batch, length, channels).sigmoid()
    return [beta / (1 + beta * v.sum(-1, keepdim=True)), v, w, B, C, initial]


def outcome(run, data: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """y, the last h, and the gradients of a random projection of both."""
    leaves = [x.clone().requires_grad_() for x in data]
    y, last = run(*leaves)
    random = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.dtype)).sum() for x in (y, last))
    return y.detach(), last.detach(), dict(zip(NAMES, torch.autograd.grad(loss, leaves)))


def assert_same(run, data: list[torch.Tensor], reset: torch.Tensor | None, decay: str, tol: float = 1e-10, grad_tol: float = 1e-10) -> None:
    y, last, grads = outcome(lambda *leaves: naive(*leaves, reset, decay), [x.double() for x in data])
    got, end, got_grads = outcome(run, data)
    assert_close("y", got, y, tol)
    assert_close("last", end, last, tol)
    assert_gradients_close("selective", got_grads, grads, grad_tol)


def in_pieces(cuts: list[int], reset: torch.Tensor | None, decay: str):
    """The same call cut at `cuts`, the state carried."""

    def run(u, v, w, B, C, initial):
        outputs, h = [], initial
        edges = [0, *cuts, w.shape[1]]
        for a, b in zip(edges, edges[1:]):
            part = slice(a, b)
            span = None if reset is None else Span(reset=reset[:, part])
            y, h = selective(u[:, part], v if decay == "exp" else v[:, part], w[:, part], B[:, part], C[:, part], h, span, decay)
            outputs.append(y)
        return torch.cat(outputs, 1), h

    return run


@pytest.fixture(params=["by token", "two levels", "short blocks"])
def form(request, monkeypatch) -> str:
    """Every way in which a block may run, on small inputs."""
    monkeypatch.setattr(CHUNK, "WIDE", 1 << 40 if request.param == "two levels" else 1)
    if request.param == "short blocks":
        monkeypatch.setattr(CHUNK, "BLOCK", 1)
        monkeypatch.setattr(CHUNK, "SHORTEST", 7)
    return request.param


@DECAYS
@pytest.mark.parametrize("length", [2, 7, 50, 131])
@pytest.mark.parametrize("resets", ["none", "ends", "some"])
def test_chunk_is_the_equation(form: str, decay: str, length: int, resets: str) -> None:
    data = inputs(decay, 2, length, 6, 3)
    reset = None
    if resets != "none":
        reset = torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < 0.1
        reset[:, 0] = reset[:, -1] = resets == "ends"
    span = None if reset is None else Span(reset=reset)
    assert_same(lambda *leaves: selective(*leaves, span, decay), data, reset, decay)


@settings(max_examples=30, deadline=None)
@given(
    decay=st.sampled_from(["exp", "complement"]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.integers(1, 4)),
    resets=st.floats(0, 0.5),
    cut=st.sets(st.integers(1, 39), max_size=6),
    seed=st.integers(0, 99),
)
def test_any_shape_and_any_cut(decay, shape, resets, cut, seed) -> None:
    data = inputs(decay, *shape, seed)
    reset = torch.rand(shape[:2], generator=torch.Generator().manual_seed(seed)) < resets
    cuts = sorted(at for at in cut if at < shape[1])
    assert_same(in_pieces(cuts, reset, decay), data, reset, decay)
    assert_same(in_pieces(list(range(1, shape[1])), reset, decay), data, reset, decay)  # steps


@DECAYS
def test_padding_neither_decays_nor_writes(form: str, decay: str) -> None:
    sizes = [0, 1, 9, 20]
    u, v, w, B, C, initial = inputs(decay, 4, 20, 3, 2)
    span = Span.from_lengths(sizes, 20)
    broken = [x.masked_fill(~span.valid[..., None], torch.nan) for x in (u, w, B)]
    y, last = selective(broken[0], v, broken[1], broken[2], C, initial, span, decay)
    for row, size in enumerate(sizes):
        if size == 0:
            assert torch.equal(last[row], initial[row])
            continue
        one, part = slice(row, row + 1), (slice(row, row + 1), slice(0, size))
        want, end = naive(u[part], v if decay == "exp" else v[part], w[part], B[part], C[part], initial[one], None, decay)
        assert_close("y", y[part], want, 1e-12)
        assert_close("last", last[one], end, 1e-12)


@DECAYS
def test_float32_over_a_long_sequence(decay: str) -> None:
    """Against float64; a token is wide enough to run token by token, in several blocks."""
    data = [x.float() for x in inputs(decay, 1, 700, 256, 8)]
    assert_same(lambda *leaves: selective(*leaves, None, decay), data, None, decay, 1e-5, 1e-5)


@DECAYS
def test_no_initial_is_zero_and_dtypes(decay: str) -> None:
    u, v, w, B, C, initial = inputs(decay, 2, 20, 3, 2)
    assert_close("y", selective(u, v, w, B, C, decay=decay)[0], naive(u, v, w, B, C, torch.zeros_like(initial), None, decay)[0], 1e-12)
    for length in (1, 20):
        low = [x.bfloat16() if x.shape == v.shape and decay == "exp" else x[:, :length].bfloat16() for x in (u, v, w, B, C)]
        y, last = selective(*low, decay=decay)
        assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)


@DECAYS
def test_gradcheck_and_strides(form: str, decay: str) -> None:
    leaves = [x.requires_grad_() for x in inputs(decay, 2, 9, 3, 2)]
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[1, 4] = True
    assert torch.autograd.gradcheck(lambda *x: selective(*x, Span(reset=reset), decay), leaves)
    flipped = [x.detach().mT.contiguous().mT for x in leaves]
    assert_same(lambda *x: selective(*x, None, decay), flipped, None, decay)


def test_compiles_whole() -> None:
    data = inputs("exp", 2, 30, 4, 3)
    compiled = torch.compile(lambda *leaves: selective(*leaves), backend="aot_eager", fullgraph=True)
    assert_same(compiled, data, None, "exp")


def test_only_block_states_are_kept() -> None:
    """What autograd holds on to besides the inputs and the output is a state a block."""
    u, v, w, B, C, _ = (x.float().requires_grad_() for x in inputs("exp", 1, 1024, 256, 16))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        selective(u, v, w, B, C)
    states = 1024 * 256 * 16
    assert max(kept) == u.numel() and sum(kept) < states // 4


@DECAYS
def test_nan_stays_behind_the_token(form: str, decay: str) -> None:
    u, v, w, B, C, initial = inputs(decay, 1, 30, 3, 2)
    clean, _ = selective(u, v, w, B, C, initial, decay=decay)
    broken = u.clone()
    broken[:, 20] = torch.nan
    y, last = selective(broken, v, w, B, C, initial, decay=decay)
    assert_close("before it", y[:, :20], clean[:, :20], 1e-12)
    assert y[:, 20:].isnan().all() and last.isnan().all()


@pytest.mark.parametrize("u", [0.0, 1e4])
def test_extreme_decays(form: str, u: float) -> None:
    """u = 0 sums and a large u forgets; values and gradients stay finite."""
    _, v, w, B, C, initial = inputs("exp", 2, 40, 3, 2)
    data = [torch.full_like(w, u), v, w, B, C, initial]
    assert_same(lambda *x: selective(*x), data, None, "exp")


def test_parity_selective_scan() -> None:
    """The published reference (mamba_ssm, selective_scan_ref) in our own words: [B, E, T] layout, softplus and skip included."""
    random = torch.Generator().manual_seed(1)
    draw = lambda *sizes: torch.randn(*sizes, generator=random)  # noqa: E731
    u, delta, bias, A = draw(2, 5, 60), draw(2, 5, 60), draw(5), -draw(5, 4).exp()
    B, C, D = draw(2, 4, 60), draw(2, 4, 60), draw(5)
    dt = F.softplus(delta + bias[:, None])
    x, want = torch.zeros(2, 5, 4), []
    for t in range(60):
        x = torch.exp(dt[:, :, t, None] * A) * x + dt[:, :, t, None] * B[:, None, :, t] * u[:, :, t, None]
        want.append((x * C[:, None, :, t]).sum(-1))
    want = torch.stack(want, -1) + u * D[:, None]
    dt = dt.mT
    y, last = selective(dt, A, dt * u.mT, B.mT, C.mT)
    assert_parity("mamba", "mamba_ssm selective_scan_ref (re-derived)", (y + D * u.mT).mT, want)
    assert_close("state", last, x, 1e-5)


def test_bad_input() -> None:
    u, v, w, B, C, initial = inputs("exp", 2, 5, 3, 4)
    with pytest.raises(ShapeError, match=r"v \[B, T, N\]"):
        selective(u, v, w, B, C, decay="complement")
    with pytest.raises(ShapeError, match=r"v \[E, N\]"):
        selective(u, v.mT, w, B, C)
    with pytest.raises(ShapeError, match="T >= 1"):
        selective(*(x[:, :0] if x.ndim == 3 else x for x in (u, v, w, B, C)))
    with pytest.raises(ShapeError, match="initial"):
        selective(u, v, w, B, C, initial.mT)
    with pytest.raises(UsageError, match="'linear'; it may be 'exp' or 'complement'"):
        selective(u, v, w, B, C, decay="linear")
    with pytest.raises(BackendError, match="triton"):
        selective(u, v, w, B, C, backend="triton")
