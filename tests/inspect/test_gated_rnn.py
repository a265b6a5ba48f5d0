"""The construction of linear attention inside a gated RNN is exact, in any pieces, and is one gradient step of in-context regression."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import assert_close
from parity import assert_parity
from remanence.errors import ShapeError
from remanence.inspect import linear_attention_to_gated_rnn
from remanence.ops.outer import outer
from remanence.tasks.icl_regression import batch, best_rate, one_step


def weights(dim: int, keys: int, values: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = ((keys, dim), (keys, dim), (values, dim), (dim, values))
    return [torch.randn(shape, dtype=dtype) * shape[1] ** -0.5 for shape in shapes]


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_parity_with_linear_attention(dtype, tol):
    w_q, w_k, w_v, w_o = weights(12, 3, 5, dtype)
    rnn, x = linear_attention_to_gated_rnn(w_q, w_k, w_v, w_o), torch.randn(2, 40, 12, dtype=dtype)
    got, state = rnn(x)
    scores = torch.einsum("bti,bsi->bts", x @ w_q.T, x @ w_k.T).tril()  # the attention form, causal
    assert_parity("gated-rnn-attention", "linear self-attention, its attention form", got, scores @ (x @ w_v.T) @ w_o.T, tol)
    q, k, v = (x @ w.T for w in (w_q, w_k, w_v))
    o, memory = outer(q[:, :, None], k[:, :, None], v[:, :, None])
    assert_close("recurrent form", got, o[:, :, 0] @ w_o.T, tol)
    assert_close("the units", state.hidden[:, :15].unflatten(1, (5, 3)).mT, memory[:, 0], tol)
    assert state.hidden.shape == (2, 5 * 3 + 3)
    assert_close("q", state.hidden[:, 15:], q[:, -1], tol)


def test_it_carries_its_state():
    w_q, w_k, w_v, _ = weights(6, 4, 6, torch.float64)
    rnn, x = linear_attention_to_gated_rnn(w_q, w_k, w_v), torch.randn(3, 20, 6, dtype=torch.float64)
    whole, _ = rnn(x)
    first, state = rnn(x[:, :7])
    second, _ = rnn(x[:, 7:], state)
    assert_close("pieces", torch.cat([first, second], 1), whole, 1e-13)


def test_it_is_one_gradient_step():
    """With q = k = x and v = rate / N y, the output at the query is the answer after one step from W = 0."""
    pairs, dim = 12, 3
    tokens, _ = batch(np.random.default_rng(0), 50, pairs, dim, dim)
    x, y = torch.eye(2 * dim, dtype=torch.float64).split(dim)
    rnn = linear_attention_to_gated_rnn(x, x, best_rate(pairs, dim) / pairs * y, y.T)
    with torch.no_grad():
        got = rnn(torch.from_numpy(tokens))[0][:, -1, dim:]
    want = one_step(tokens[:, :-1, :dim], tokens[:, :-1, dim:], tokens[:, -1, :dim])
    assert_close("one step", got, torch.from_numpy(want), 1e-13)


def test_gradients_are_finite_at_the_construction():
    rnn = linear_attention_to_gated_rnn(*weights(6, 4, 6, torch.float32)[:3])
    rnn(torch.randn(2, 9, 6))[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in rnn.parameters())


def test_shapes_are_checked():
    w_q, w_k, w_v, w_o = weights(6, 4, 5, torch.float32)
    for wrong in ((w_q[:3], w_k, w_v, w_o), (w_q, w_k, w_v, None), (w_q, w_k, w_v, w_o.T), (w_q, w_k[:, :5], w_v, w_o)):
        with pytest.raises(ShapeError, match="expected .K, dim."):
            linear_attention_to_gated_rnn(*wrong)
