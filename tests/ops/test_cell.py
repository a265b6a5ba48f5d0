"""The nonlinear cells: the loop with its hand-written gradient against autograd's, torch's fused LSTM, and Newton's method."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import assert_close, assert_gradients_close, cuts, pieces, spans
from remanence import Span
from remanence.errors import BackendError, ShapeError, UsageError
from remanence.mixers.pararnn import gru, lstm
from remanence.mixers.swish_rnn import swish
from remanence.ops.cell import GATES, STATES, cell
from remanence.ops.cell.fused import fused, usable
from remanence.ops.cell.newton import linear, loop, newton, solve

KINDS = sorted(GATES)
H, D = 2, 3


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(kind: str, batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Leaves in float64; the sLSTM's row 0 starts fresh."""
    leaves = {"wx": draw(seed, batch, length, H, GATES[kind], D, scale=1.5), "R": draw(seed + 1, H, D, GATES[kind], D)}
    for i, name in enumerate(STATES[kind]):
        leaves[name] = draw(seed + 2 + i, batch, H, D)
    if kind == "slstm":
        leaves["n"] = leaves["n"].abs() + 0.5
        leaves["n"][0], leaves["c"][0] = 0, 0
    if kind == "gru":
        leaves["inner"] = draw(seed + 9, H, D)
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def run(kind: str, leaves: dict[str, Tensor], span: Span | None, backend: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and final states, and the gradients of a random projection of all of them."""
    initial = tuple(leaves[name] for name in STATES[kind])
    y, final = cell(kind, leaves["wx"], leaves["R"], initial, leaves.get("inner"), span, backend)
    out = {"outputs": y, **dict(zip(STATES[kind], final, strict=True))}
    loss = sum((x * draw(30 + i, *x.shape)).sum() for i, x in enumerate(out.values()))
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)  # type: ignore[arg-type]
    return out, {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in zip(leaves.items(), grads)}


@pytest.mark.parametrize("kind", KINDS)
@given(span=st.none() | spans(3, 11))
def test_the_loop_is_the_equation(kind: str, span: Span | None) -> None:
    leaves = inputs(kind, 3, 11)
    (got, got_grads), (want, want_grads) = (run(kind, leaves, span, backend) for backend in ("auto", "naive"))
    for name in want:
        assert_close(f"{kind} {name}", got[name], want[name], 1e-12)
    assert_gradients_close(kind, got_grads, want_grads, 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_resets_at_the_first_and_the_last_token(kind: str) -> None:
    leaves = inputs(kind, 2, 7)
    reset = torch.zeros(2, 7, dtype=torch.bool)
    reset[0, 0] = reset[1, 6] = True
    y, final = cell(kind, leaves["wx"], leaves["R"], tuple(leaves[name] for name in STATES[kind]), leaves.get("inner"), Span(reset=reset))
    fresh, _ = cell(kind, leaves["wx"][:1], leaves["R"], None, leaves.get("inner"))
    assert_close("a reset at the first token", y[:1], fresh, 1e-14)
    one, last = cell(kind, leaves["wx"][1:, 6:], leaves["R"], None, leaves.get("inner"))
    assert_close("a reset at the last token", y[1:, 6:], one, 1e-14)
    for name, a, b in zip(STATES[kind], final, last, strict=True):
        assert_close(name, a[1:], b, 1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_nan_does_not_outlive_a_reset(kind: str) -> None:
    leaves = inputs(kind, 1, 5)
    dead = tuple(torch.full_like(leaves[name], torch.nan) for name in STATES[kind])
    reset = torch.tensor([[True, False, False, False, False]])
    for backend in ("auto", "naive"):
        assert cell(kind, leaves["wx"], leaves["R"], dead, None, Span(reset=reset), backend)[0].isfinite().all()
    bad = leaves["wx"].detach().clone()
    bad[0, 2] = torch.nan
    y, _ = cell(kind, bad, leaves["R"], None)
    assert y[0, :2].isfinite().all() and y[0, 2:].isnan().all()  # a NaN is seen, at and after its token


@pytest.mark.parametrize("kind", KINDS)
@given(where=cuts(20))
def test_any_cut(kind: str, where: list[int]) -> None:
    leaves = inputs(kind, 2, 20)
    whole, end = cell(kind, leaves["wx"], leaves["R"], None, leaves.get("inner"))
    state, parts = None, []
    for part in pieces(leaves["wx"], where):
        y, state = cell(kind, part, leaves["R"], state, leaves.get("inner"))
        parts.append(y)
    assert_close("y", torch.cat(parts, 1), whole, 1e-12)
    for a, b in zip(state or (), end, strict=True):
        assert_close("state", a, b, 1e-12)


def test_slstm_gates_of_any_size_stay_finite() -> None:
    """exp(i) overflows from 89 on in float32; the stabiliser keeps it out, and y is what it is in float64."""
    wx = (40 * draw(0, 2, 50, H, 4, D)).requires_grad_()
    R = draw(1, H, D, 4, D)
    (low,) = torch.autograd.grad(cell("slstm", wx.float(), R.float())[0].sum(), wx)
    (high,) = torch.autograd.grad(cell("slstm", wx, R)[0].sum(), wx)
    assert low.isfinite().all() and float(wx.detach()[..., 0, :].max()) > 89
    assert_close("y", cell("slstm", wx.float(), R.float())[0], cell("slstm", wx, R)[0], 1e-3)  # a hard gate's input is rounded at 100
    assert high.isfinite().all()


def test_bf16_is_accumulated_in_float32() -> None:
    leaves = inputs("lstm", 2, 9)
    y, final = cell("lstm", leaves["wx"].bfloat16(), leaves["R"].bfloat16())
    assert y.dtype == torch.bfloat16 and all(state.dtype == torch.float32 for state in final)


def test_the_fused_lstm_is_the_loop() -> None:
    leaves = {name: leaf.detach().float().requires_grad_() for name, leaf in inputs("lstm", 2, 40).items() if name != "wx"}
    more = {"x": draw(5, 2, 40, 7), "weight": draw(6, H * 4 * D, 7), "bias": draw(7, H * 4 * D)}
    leaves |= {name: tensor.float().requires_grad_() for name, tensor in more.items()}
    initial = leaves["y"], leaves["c"]
    results = []
    for form in ("fused", "loop"):
        if form == "fused":
            y, final = fused(leaves["x"], leaves["weight"], leaves["bias"], leaves["R"], initial)
        else:
            wx = torch.nn.functional.linear(leaves["x"], leaves["weight"], leaves["bias"]).unflatten(-1, (H, 4, D))
            y, final = cell("lstm", wx, leaves["R"], initial)
        out = torch.cat([y.flatten(), *(state.flatten() for state in final)])
        grads = torch.autograd.grad((out * draw(8, len(out)).float()).sum(), list(leaves.values()))
        results.append((out, dict(zip(leaves, grads))))
    assert_close("outputs and states", results[0][0], results[1][0], 1e-5)
    assert_gradients_close("fused", results[0][1], results[1][1], 1e-4)  # sums over all tokens, in float32
    x = leaves["x"]
    assert usable("lstm", x, None, "auto") and usable("lstm", x, Span(), "torch")
    assert not usable("gru", x, None, "auto") and not usable("lstm", x, None, "naive")
    assert not usable("lstm", x.double(), None, "auto") and not usable("lstm", x[:, :1], None, "auto")
    assert not usable("lstm", x, Span(valid=torch.ones(2, 40, dtype=torch.bool)), "auto")


def test_what_cannot_be_run_is_refused() -> None:
    wx, R = torch.zeros(1, 4, H, 4, D), torch.zeros(H, D, 4, D)
    with pytest.raises(UsageError, match="cell 'lstmm' is not known; did you mean"):
        cell("lstmm", wx, R)
    with pytest.raises(ShapeError, match="a gru expects"):
        cell("gru", wx, R)
    with pytest.raises(ShapeError, match="span.valid has shape"):
        cell("lstm", wx, R, span=Span(valid=torch.ones(1, 3, dtype=torch.bool)))
    with pytest.raises(UsageError, match="backend is 'abacus'"):
        cell("lstm", wx, R, backend="abacus")
    with pytest.raises(BackendError, match="no triton form"):
        cell("lstm", wx, R, backend="triton")
    with pytest.raises(UsageError, match="iterations is 0"):
        newton(functools.partial(gru, a=torch.zeros(3, D)), torch.zeros(1, 4, 3, D), iterations=0)


@pytest.mark.parametrize("S", [1, 2])
@pytest.mark.parametrize("length", [1, 2, 7, 30])
def test_the_block_scan_and_its_transpose(S: int, length: int) -> None:
    J, r = draw(0, 2, length, S, S, D), draw(1, 2, length, S, D)
    d, want = torch.zeros(2, S, D, dtype=torch.float64), []
    for t in range(length):
        d = torch.einsum("bijd,bjd->bid", J[:, t], d) + r[:, t]
        want.append(d)
    got = linear(J, r)
    assert_close("forward", got, torch.stack(want, 1), 1e-13)
    g = draw(2, 2, length, S, D)
    assert_close("<g, J r> = <J^T g, r>", (linear(J, g, reverse=True) * r).sum(), (g * got).sum(), 1e-12)


CELLS = {
    "gru": (gru, 1, 3, (3, D)),
    "lstm": (lstm, 2, 3, (5, D)),
    "swish": (swish, 1, 1, (2, D)),
}


@pytest.mark.parametrize("name", sorted(CELLS))
def test_slopes_are_the_derivatives(name: str) -> None:
    rule, S, G, shape = CELLS[name]
    weights, h, u = draw(0, *shape), draw(1, S, D), draw(2, G, D)
    new, J = rule(h, u, True, weights)
    full = torch.autograd.functional.jacobian(lambda h: rule(h, u, False, weights)[0], h)  # [S, D, S, D]
    assert_close("value", new, rule(h, u, False, weights)[0], 1e-15)
    assert_close("slope", J, full.diagonal(dim1=1, dim2=3), 1e-13)


@pytest.mark.parametrize("iterations", [None, 12])
@pytest.mark.parametrize("name", sorted(CELLS))
@given(resets=st.lists(st.integers(0, 39), max_size=3), sizes=st.lists(st.integers(0, 40), min_size=2, max_size=2))
def test_newton_is_the_loop(name: str, iterations: int | None, resets: list[int], sizes: list[int]) -> None:
    rule, S, G, shape = CELLS[name]
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[1, resets] = True
    span = Span(Span.from_lengths(sizes, 40).valid, reset)
    leaves = {"u": draw(0, 2, 40, G, D), "initial": draw(1, 2, S, D), "weights": draw(2, *shape)}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    results = []
    for backend in ("auto", "naive"):
        f = functools.partial(rule, **{"sharp" if name == "swish" else "a": leaves["weights"]})
        h, last = newton(f, leaves["u"], leaves["initial"], span, S, iterations, backend)
        h = h * span.valid[..., None, None]  # type: ignore[index]
        loss = (h * draw(3, *h.shape)).sum() + (last * draw(4, *last.shape)).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        grads = {key: torch.zeros_like(leaf) if grad is None else grad for (key, leaf), grad in zip(leaves.items(), grads)}
        results.append((h, last, grads))
    (h, last, grads), (want, end, want_grads) = results
    assert_close("h", h, want, 1e-11)
    assert_close("last", last, end, 1e-11)
    assert_gradients_close(name, grads, want_grads, 1e-9)


@pytest.mark.parametrize(("name", "iterations"), [("gru", 1), ("swish", 12)])
def test_newton_falls_back_to_the_loop(name: str, iterations: int) -> None:
    """One iteration is not enough, and twelve are not for the kinks of a maximum; the loop's answer comes out all the same."""
    rule, S, G, shape = CELLS[name]
    weights = draw(0, *shape) if name == "gru" else torch.tensor([[20.0], [0.0]]).double().expand(2, D)
    f = functools.partial(rule, **{"a" if name == "gru" else "sharp": weights})
    u, start = draw(1, 1, 512, G, D), torch.zeros(1, S, D).double()
    assert solve(f, u, start, most=iterations) is None
    assert_close("h", newton(f, u, iterations=iterations)[0], loop(f, u, start), 1e-12)


def test_newton_is_not_fooled_by_what_overflows() -> None:
    """Recurrent weights of 1e4, whose products of Jacobians leave the range of float32, and a NaN in the input, which stays where it is."""
    f = functools.partial(gru, a=torch.full((3, D), -1e4))
    u = draw(1, 1, 200, 3, D).float()
    assert_close("h", newton(f, u)[0], loop(f, u, torch.zeros(1, 1, D)), 1e-5)
    u[0, 9, :, 0] = torch.nan
    h, _ = newton(f, u)
    assert h[0, :9].isfinite().all() and h[0, 9:, 0, 0].isnan().all() and h[..., 1:].isfinite().all()


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_the_residual_falls_quadratically(name: str) -> None:
    """The claim: T=512, k = 1 .. 5 iterations, the residual below 1e-6 by the fourth or fifth."""
    rule, S, G, shape = CELLS[name]
    residuals: list[float] = []
    a = 2 / (5 * 64) ** 0.5 * draw(0, shape[0], 64)
    solve(functools.partial(rule, a=a), draw(1, 2, 512, G, 64), torch.zeros(2, S, 64).double(), most=6, residuals=residuals)
    print(name, [f"{r:.0e}" for r in residuals])
    assert residuals[4] < 1e-6 and residuals[5] < 1e-12
    for now, then in zip(residuals[1:5], residuals[2:]):
        assert then < max(now**2, 1e-14)
