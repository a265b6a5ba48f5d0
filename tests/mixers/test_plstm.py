"""pLSTM on a chain: against its equation, the published table of gating matrices, and gated linear attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence import Span
from remanence.mixers.plstm import PLSTM
from remanence.ops.outer import outer


def gating(S: Tensor, T: Tensor, M: Tensor, D: Tensor) -> Tensor:
    """G[t, j]: what token t reads of token j, the product of the gates on the path between them; all [T]."""
    rows = []
    for t in range(len(S)):
        row = [M[t] * T[j + 1 : t].prod() * S[j] for j in range(t)] + [D[t]] + [torch.zeros_like(D[t])] * (len(S) - t - 1)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def random_plstm(**hyper: object) -> PLSTM:
    torch.manual_seed(0)
    mixer = rm.mixer("plstm", dim=16, heads=2, **hyper).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer  # type: ignore[return-value]


def expected(mixer: PLSTM, x: Tensor) -> Tensor:
    """y [T, dim] of one sequence x [T, dim], from the gating matrices."""
    taps = mixer.conv.weight
    padded = F.pad(x, (0, 0, taps.shape[1] - 1, 0))
    c = sum(padded[i : i + len(x)] * taps[:, i] for i in range(taps.shape[1])) + mixer.conv.bias
    q, k = mixer.to_qk(c).unflatten(-1, (2, 2, 8)).unbind(1)  # [T, H, K]
    v = mixer.to_v(x).unflatten(-1, (2, 8))
    T, S, M, D = mixer.to_gates(c).unflatten(-1, (4, 2)).unbind(1)
    G = torch.stack([gating(S[:, h].sigmoid(), T[:, h].sigmoid() ** 5, M[:, h].sigmoid(), D[:, h].sigmoid()) for h in range(2)])
    o = torch.einsum("hij,ihk,jhk,jhv->ihv", G, q, k, v) * 8**-0.5
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * mixer.norm.weight
    return o.flatten(1) @ mixer.out.weight.T + mixer.passthrough * c


def test_parity_with_the_gating_matrices() -> None:
    mixer, x = random_plstm(), torch.randn(2, 11, 16, dtype=torch.float64)
    want = torch.stack([expected(mixer, row) for row in x])
    assert_parity("plstm", "the matrix of gates' products, row by row", mixer(x)[0], want, 1e-12)
    packed = x.reshape(1, 22, 16)
    got, _ = mixer(packed, span=Span.from_cu_seqlens([0, 11, 22]))
    assert_close("packed", got.reshape_as(want), want, 1e-12)


def test_parity_with_the_published_table() -> None:
    """The doctest of the released gating_matrices: S = 1..4, T = 1/2, M = 4..1, no direct term."""
    S, M = torch.arange(1.0, 5), torch.arange(4.0, 0, -1)
    table = torch.tensor([[0.0, 0, 0, 0], [3, 0, 0, 0], [1, 4, 0, 0], [0.25, 1, 3, 0]])
    assert_parity("plstm", "the released doctest of gating matrices", gating(S, torch.full((4,), 0.5), M, torch.zeros(4)), table)
    q, k = M[None, :, None, None], S[None, :, None, None]  # the mixer's own call, with one-hot values to read the table off
    none = torch.zeros(1, 1)
    o, _ = outer(q, k, torch.eye(4)[None, :, None], torch.full((1, 4, 1), 0.5).log(), bonus=none)
    assert_parity("plstm", "the released doctest, by the op", o[0, :, 0], table)


def test_parity_with_gated_linear_attention_one_decay_late() -> None:
    """With S = T and M = D = 1 token t reads prod T_j .. T_{t-1}: the decay of gated linear attention is that of the token before."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 9, 3, 4, dtype=torch.float64) for _ in range(3))
    T = torch.rand(2, 9, 3, dtype=torch.float64)
    late = F.pad(T[:, :-1], (0, 0, 1, 0), value=1.0)
    want, _ = outer(q, k, v, late.log())
    bonus = torch.zeros(3, 4, dtype=torch.float64)
    got, _ = outer(q, k * T[..., None], v, T.log(), bonus=bonus)
    got = got + (q * k).sum(-1, keepdim=True) * v
    assert_parity("plstm", "gated linear attention with the decay one token late", got, want, 1e-12)


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(rm.errors.UsageError, match="heads=3 does not divide dim=16"):
        rm.mixer("plstm", dim=16, heads=3)
    with pytest.raises(rm.errors.ShapeError, match="empty"):
        rm.mixer("plstm", dim=16)(torch.zeros(1, 0, 16))
