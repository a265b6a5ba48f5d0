"""Relative attention against the paper's pad-and-shift, written out here, and the laws on its cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_gradients_close, assert_states_close, cuts, pieces, spans
from remanence import Span
from remanence.mixers.relative_attention import RelativeAttention

DIM, T = 16, 40


def mixer(window: int | None = None, dtype: torch.dtype = torch.float32, heads: int = 2) -> RelativeAttention:
    """With weights large enough that positions matter."""
    made = rm.mixer("relative-attention", dim=DIM, heads=heads, window=window)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
    return made.to(dtype)  # type: ignore[return-value]


def pad_and_shift(m: RelativeAttention, h: Tensor, memory: Tensor, window: int | None = None) -> Tensor:
    """Appendix B of the paper: scores of (q + v) with R_{M+T-1}, .., R_0, a zero column on the left, a reshape, the first row dropped."""
    (batch, length, dim), total = h.shape, h.shape[1] + memory.shape[1]
    heads, width = m.u.shape
    to_q, to_k, to_v = m.to_qkv.weight.chunk(3)
    both = torch.cat([memory, h], 1)
    q = (h @ to_q.T).view(batch, length, heads, width)
    k, v = ((both @ weight.T).view(batch, total, heads, width) for weight in (to_k, to_v))
    distance = torch.arange(total - 1, -1, -1, dtype=torch.float64)
    angle = distance[:, None] / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    r = (torch.cat([angle.sin(), angle.cos()], 1).to(h.dtype) @ m.to_r.weight.T).view(total, heads, width)
    content = torch.einsum("bihd,bjhd->bhij", q + m.u, k)
    place = torch.einsum("bihd,jhd->bhij", q + m.v, r)
    place = torch.cat([place.new_zeros(batch, heads, length, 1), place], 3)
    place = place.view(batch, heads, total + 1, length)[:, :, 1:].reshape_as(content)
    seen = torch.ones(length, total).tril(total - length).bool()
    if window is not None:
        seen &= torch.ones(length, total).triu(total - length - window + 1).bool()
    weight = ((content + place) / width**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weight, v).flatten(2) @ m.out.weight.T


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("window", [None, 1, 5, 60])
@pytest.mark.parametrize("heads", [1, 4])  # heads of 16 and of 4: both ways to score a distance, for few queries and for many
def test_agrees_with_pad_and_shift(heads: int, window: int | None, dtype: torch.dtype, tol: float) -> None:
    m = mixer(window, dtype, heads)
    random = torch.randn(2, T, DIM, dtype=dtype)
    for memory in (0, 9, 35):
        grads = []
        for literal in (True, False):
            x = torch.randn(2, T, DIM, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()
            if literal:
                y = want = pad_and_shift(m, x[:, memory:], x[:, :memory], window)
            else:
                state = m(x[:, :memory])[1] if memory else None
                y, _ = m(x[:, memory:], state)
                assert_close(f"memory {memory}", y, want, tol)
            leaves = {"x": x, **dict(m.named_parameters())}
            loss = (y * random[:, memory:]).sum()
            grads.append(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())))))
        assert_gradients_close(f"memory {memory}", grads[1], grads[0], tol if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("window", [None, 6])
@given(where=cuts(T))
def test_any_cut(window: int | None, where: list[int]) -> None:
    m, x = mixer(window), torch.randn(2, T, DIM)
    with torch.no_grad():
        want, end = m(x)
        state, outputs = None, []
        for part in pieces(x, where):
            y, state = m(part, state)
            outputs.append(y)
    assert_close("outputs", torch.cat(outputs, 1), want, 1e-5)
    assert state is not None
    assert_states_close("end", state, end, 1e-5)


@pytest.mark.parametrize("window", [None, 4])
@given(span=spans(2, 14), later=spans(2, 14))
def test_padding_and_packing(window: int | None, span: Span, later: Span) -> None:
    """Two calls with spans give, document by document, what the real tokens give alone."""
    m, x = mixer(window), torch.randn(2, 28, DIM)
    whole = [torch.ones(2, 14, dtype=torch.bool) if s.valid is None else s.valid for s in (span, later)]
    marks = [torch.zeros(2, 14, dtype=torch.bool) if s.reset is None else s.reset for s in (span, later)]
    valid, reset = torch.cat(whole, 1), torch.cat(marks, 1)
    with torch.no_grad():
        a, state = m(x[:, :14], None, span)
        b, state = m(x[:, 14:], state, later)
        y = torch.cat([a, b], 1)
        assert bool((y[~valid] == 0).all())
        for row in range(2):
            real = valid[row].nonzero()[:, 0]
            starts = [i for i, t in enumerate(real.tolist()) if i == 0 or reset[row, t]]
            for start, stop in zip(starts, [*starts[1:], len(real)]):
                part = real[start:stop]
                assert_close("document", y[row : row + 1, part], m(x[row : row + 1, part])[0], 1e-5)


def test_the_cache_is_bounded_by_a_window_and_by_the_longest_document() -> None:
    near, full = mixer(4), mixer()
    with torch.no_grad():
        state = None
        for _ in range(50):
            _, state = near(torch.randn(2, 7, DIM), state)
            assert state.keys.shape[1] == 3
        state, idle = None, Span(torch.tensor([[True] * 6, [False] * 6]), torch.tensor([[True] + [False] * 5] * 2))
        _, state = full(torch.randn(2, 6, DIM))
        for _ in range(50):  # row 1 waits in mid-document while row 0 reads 50 documents
            _, state = full(torch.randn(2, 6, DIM), state, idle)
            assert state.keys.length == 6


def test_bad_arguments() -> None:
    with pytest.raises(rm.errors.UsageError, match="heads=3 does not divide dim=16"):
        rm.mixer("relative-attention", dim=16, heads=3)
    with pytest.raises(rm.errors.UsageError, match="dim=5"):
        rm.mixer("relative-attention", dim=5, heads=1)
    with pytest.raises(rm.errors.UsageError, match="window is 0"):
        rm.mixer("relative-attention", dim=16, window=0)
