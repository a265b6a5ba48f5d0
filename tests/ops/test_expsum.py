"""Running log-sum-exp averages: every form against the equation in float64, in values and in every gradient, and at the extremes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import assert_close, spans
from remanence import Span
from remanence.errors import BackendError, ShapeError
from remanence.ops.expsum import FLOOR, average, expsum, latents, merge, running_max

TOL = 1e-10


def inputs(length: int, seed: int, heads: int = 3, width: int = 2) -> list[torch.Tensor]:
    """score, v, log_decay, and an initial (m, den, num): what some tokens left."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    scale = torch.tensor([0.1, 3.0, 40.0]).double()[torch.randint(3, (heads,), generator=random)]
    score, v, g = normal(2, length, heads) * scale, normal(2, length, heads, width), -normal(2, length, heads).abs() * scale / 3
    return [score, v, g, normal(2, heads), normal(2, heads).abs() + 0.5, normal(2, heads, width)]


def plain(m: torch.Tensor, den: torch.Tensor, num: torch.Tensor, like: torch.Tensor) -> list[torch.Tensor]:
    """The sums on a common scale, so that results with different maxima can be compared."""
    return [(m - like).exp() * den, (m - like).exp()[..., None] * num]


def outcome(leaves: list[torch.Tensor], span: Span | None, cut: int | None = None, backend: str = "auto") -> list[torch.Tensor]:
    """(m, den, num) after every token and the last, then the gradients of a random projection of the sums to every input."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    score, v, g, *initial = leaves
    edges = [0, score.shape[1]] if cut is None else [0, cut, score.shape[1]]
    parts, held = [], tuple(initial)
    for a, b in zip(edges, edges[1:]):
        out, held = expsum(score[:, a:b], v[:, a:b], g[:, a:b], held, None if span is None else span[a:b], backend)
        parts.append(out)
    m, den, num = (torch.cat(part, 1) for part in zip(*parts))
    values = [den, num, held[1], held[2]]
    random = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=random, dtype=x.dtype)).sum() for x in values)
    leaves = [x for x in leaves if x is not initial[0]]  # m is a constant
    return [m, held[0], *values, *torch.autograd.grad(loss, leaves)]


def same(got: list[torch.Tensor], want: list[torch.Tensor], tol: float = TOL) -> None:
    names = ("m", "last m", "den", "num", "last den", "last num", "d score", "d v", "d log_decay", "d den", "d num")
    for name, one, other in zip(names, got, want, strict=True):
        assert_close(name, one.detach(), other.detach(), tol, floor=1e-6)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 60), data=st.data(), seed=st.integers(0, 999))
def test_forms_and_cuts_agree(length, data, seed):
    leaves, span = inputs(length, seed), data.draw(st.none() | spans(2, length))
    want = outcome(leaves, span, backend="naive")
    same(outcome(leaves, span), want)
    if length > 1:
        same(outcome(leaves, span, cut=data.draw(st.integers(1, length - 1))), want)


def test_token_by_token_is_the_whole():
    leaves = inputs(20, 3)
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[0, [0, 7, 19]] = True
    (m, den, num), last = expsum(*leaves[:3], tuple(leaves[3:]), Span(reset=reset))
    held = tuple(leaves[3:])
    for t in range(20):
        part = slice(t, t + 1)
        now, held = expsum(*(x[:, part] for x in leaves[:3]), held, Span(reset=reset[:, part]))
        for got, want in zip(now, (m, den, num)):
            assert_close("step", got, want[:, part], TOL)
    for got, want in zip(held, last):
        assert_close("last", got, want, TOL)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 80), span=st.data(), seed=st.integers(0, 99))
def test_running_max_is_the_largest_exponent(length, span, seed):
    score, _, g, m0, *_ = inputs(length, seed)
    where = span.draw(spans(2, length))
    reset = where.reset
    got = running_max(score.requires_grad_(), g, m0, reset)
    assert not got.requires_grad
    m, wanted = m0, []
    for t in range(length):
        m = m if reset is None else torch.where(reset[:, t, None], FLOOR, m)
        m = torch.maximum(m + g[:, t], score[:, t])
        wanted.append(m)
    assert_close("m", got, torch.stack(wanted, 1).detach(), 1e-14)


@pytest.mark.parametrize("length", [1, 2, 7, 30])
def test_parity_softmax_average(length):
    """Without decay the running average is softmax attention over the prefix, the score being that of every query."""
    score, v, *_ = inputs(length, 1)
    (_, den, num), _ = expsum(score, v)
    logits = score[:, None].expand(-1, length, -1, -1).masked_fill(~torch.ones(length, length).bool().tril()[..., None], -torch.inf)
    assert_close("average", average(den, num), torch.einsum("btsh,bshv->bthv", logits.softmax(2), v), TOL)


@pytest.mark.parametrize("length", [1, 13])
def test_one_decay_a_head_and_none(length):
    score, v, g, *initial = inputs(length, 2)
    for decay, full in ((g[0, 0], g[0, 0].expand_as(g)), (None, torch.zeros_like(g))):
        for got, want in zip(expsum(score, v, decay, tuple(initial))[0], expsum(score, v, full, tuple(initial), backend="naive")[0]):
            assert_close("sums", got, want, TOL)


def test_merge_is_the_union():
    """Two halves summed apart, merged; and with a partial result that is nothing."""
    score, v, *_ = inputs(31, 4)
    _, whole = expsum(score, v)
    _, first = expsum(score[:, :9], v[:, :9])
    _, second = expsum(score[:, 9:], v[:, 9:])
    nothing = torch.full_like(first[0], FLOOR), torch.zeros_like(first[1]), torch.zeros_like(first[2])
    for a, b in ((first, second), (second, first), (nothing, whole), (whole, nothing), (nothing, merge(first, second))):
        m, den, num = merge(a, b)
        for got, want in zip(plain(m, den, num, whole[0]), plain(*whole, whole[0])):
            assert_close("merged", got, want, TOL)
    m, den, num = merge(nothing, nothing)
    assert torch.equal(m, nothing[0]) and not den.any() and not average(den, num).any()


def test_merge_passes_the_gradient_of_a_score():
    """A single token is (score, 1, v): its score may have a gradient, and so may a log-sum-exp."""
    score, v, *_ = inputs(2, 5)
    leaf = score.clone().requires_grad_()
    one, two = ((leaf[:, t], torch.ones_like(score[:, t]), v[:, t]) for t in (0, 1))
    _, den, num = merge(one, two)
    (got,) = torch.autograd.grad(average(den, num).sum(), leaf)
    (want,) = torch.autograd.grad((leaf.softmax(1)[..., None] * v).sum(), leaf)
    assert_close("d score", got, want, TOL)


@pytest.mark.parametrize("form", ["chunk", "step", "naive"])
@pytest.mark.parametrize("case", ["nothing but padding", "starts late", "scores at 1e4", "falling by 1e4", "no decay left"])
def test_extremes_are_finite(form, case):
    """Values and gradients; what is far below the maximum is 0, and an average of nothing is 0."""
    length = 1 if form == "step" else 12
    score, v, g, *_ = (x.float().requires_grad_() for x in inputs(length, 6))
    valid, s, decay = torch.ones(2, length, dtype=torch.bool), score, g
    if case == "nothing but padding":
        valid[:] = False
    elif case == "starts late":
        valid[1, : length // 2] = False
    elif case == "scores at 1e4":
        s = score * 0 + 1e4 * torch.linspace(-1, 1, length)[:, None]
    elif case == "falling by 1e4":
        s = score * 0 - 1e4 * torch.linspace(-1, 1, length)[:, None]
    else:
        decay = g * 0 - 1e6
    (m, den, num), last = expsum(s, v, decay, None, Span(valid), "naive" if form == "naive" else "auto")
    mean = average(den, num)
    for x in (m, den, num, mean, *last, *torch.autograd.grad(mean.sum() + last[2].sum(), (score, v, g), allow_unused=True)):
        assert x is None or x.isfinite().all()
    if case == "nothing but padding":
        assert (m == FLOOR).all() and not den.any() and not mean.any()
    else:
        real = den[valid]
        assert (real >= 0.99).all() and (real <= length).all()  # a float32 near 1e4 is a multiple of 1e-3


def test_float32_over_a_long_stream():
    """The maximum is rounded at every token and stays at 30; the sums do not drift, because they are scaled by what was rounded."""
    random = torch.Generator().manual_seed(0)
    score, v = torch.randn(1, 6000, 2, generator=random), torch.randn(1, 6000, 2, 3, generator=random)
    score[:, 5] = 30.0
    g = torch.full((2,), -0.0017)
    (_, den, num), _ = expsum(score, v, g)
    (_, den64, num64), _ = expsum(score.double(), v.double(), g.double(), backend="naive")
    assert_close("average", average(den, num).double(), average(den64, num64), 1e-5)


def test_nan_is_not_hidden():
    score, v, g, *_ = inputs(9, 8)
    score[0, 4, 0] = torch.nan
    (_, den, _), _ = expsum(score, v, g)
    assert den[0, 4:, 0].isnan().all() and not den[0, :4].isnan().any() and not den[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_kept_in_float32_at_least(dtype):
    score, v, g, *_ = (x.to(dtype) for x in inputs(9, 9))
    for sums in expsum(score, v, g):
        assert {x.dtype for x in sums} == {torch.promote_types(dtype, torch.float32)}
    assert latents(score[..., None], score[..., None], v)[0].dtype == dtype


def test_bad_input_is_refused():
    score, v, g, *_ = inputs(4, 0)
    with pytest.raises(ShapeError, match="score and v have shapes"):
        expsum(score, v[:, :3])
    with pytest.raises(ShapeError, match="log_decay has shape"):
        expsum(score, v, g[:, :3])
    with pytest.raises(ShapeError, match="p, score, v have shapes"):
        latents(score, score, v)
    with pytest.raises(BackendError, match="triton"):
        expsum(score, v, backend="triton")


def mixture(length: int, seed: int) -> list[torch.Tensor]:
    """p, score, v of `latents` and an initial state with 3 latents for each of 2 heads."""
    score, _, p, m, den, _ = inputs(length, seed, heads=6)
    _, v, _, _, _, num = inputs(length, seed, heads=2, width=5)
    num = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p, score, m, den = (x.unflatten(-1, (2, 3)) for x in (p.softmax(-1), score, m, den))
    return [p, score, v, m, den, num]


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 70), data=st.data(), seed=st.integers(0, 999))
def test_latents_are_the_averages_written_out(length, data, seed):
    leaves, span = mixture(length, seed), data.draw(st.none() | spans(2, length))

    def run(backend: str) -> list[torch.Tensor]:
        own = [x.clone().requires_grad_() for x in leaves]
        o, (m, den, num) = latents(*own[:3], tuple(own[3:]), span, backend)
        random = torch.Generator().manual_seed(1)
        if span is not None and span.valid is not None:
            o = o * span.valid[..., None, None]
        loss = sum((x * torch.randn(x.shape, generator=random, dtype=x.dtype)).sum() for x in (o, den, num))
        return [o, m, den, num, *torch.autograd.grad(loss, [*own[:3], *own[4:]])]

    for name, got, want in zip(("o", "m", "den", "num", "d p", "d score", "d v", "d den", "d num"), run("auto"), run("naive"), strict=True):
        assert_close(name, got.detach(), want.detach(), TOL, floor=1e-6)


def test_compiles_whole():
    score, v, g, *initial = inputs(30, 0)
    compiled = torch.compile(expsum, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(score, v, g, tuple(initial))[0], expsum(score, v, g, tuple(initial))[0]):
        assert_close("compiled", got, want, TOL)
