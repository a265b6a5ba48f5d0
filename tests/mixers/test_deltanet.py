"""DeltaNet: its recurrence token by token, the attention matrix it implies, and what it stores exactly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.errors import ShapeError, UsageError
from remanence.mixers.deltanet import DeltaNet, attention_matrix
from remanence.ops.delta import delta


def layer(seed: int = 0, **hyper: object) -> DeltaNet:
    """dim 32, float64, every weight moved off its initial value."""
    torch.manual_seed(seed)
    mixer = rm.mixer("deltanet", dim=32, **hyper)
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return mixer.double()


def qkv(mixer: DeltaNet, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [B, T, H, K] and b [B, T, H] from the weights, by torch's own convolution."""
    u = F.conv1d(F.pad((x @ mixer.to_qkv.weight.T).mT, (3, 0)), mixer.conv.weight[:, None], groups=96).mT
    q, k, v = u.reshape(*x.shape[:2], 3, 4, 8).unbind(2)
    if mixer.qk_norm == "l2":
        q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (F.silu(q), F.silu(k)))
    else:
        q, k = ((torch.where(part > 0, part + 1, part.exp())) for part in (q, k))
        q, k = q / q.sum(-1, keepdim=True), k / k.sum(-1, keepdim=True)
    return q * 8**-0.5, k, F.silu(v), mixer.beta_scale * torch.sigmoid(x @ mixer.to_beta.weight.T)


@pytest.mark.parametrize("hyper", [{}, {"norm": "sum"}, {"negative_eigenvalues": True}], ids=str)
def test_parity_with_the_recurrence(hyper: dict) -> None:
    mixer, x = layer(**hyper), torch.randn(2, 90, 32).double()
    q, k, v, b = qkv(mixer, x)
    S, outputs = torch.zeros(2, 4, 8, 8).double(), []
    for t in range(90):
        erase = torch.eye(8).double() - b[:, t, :, None, None] * k[:, t, :, :, None] * k[:, t, :, None]
        S = erase @ S + b[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((S.mT @ q[:, t, :, :, None])[..., 0])
    o = torch.stack(outputs, 1)
    want = (o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight).flatten(2) @ mixer.out.weight.T
    got, state = mixer(x)
    assert_parity("deltanet", "recurrence (fla delta_rule_recurrence, re-derived)", got, want, 1e-10)
    assert_close("memory", state.memory, S, 1e-10)


@pytest.mark.parametrize("norm", ["l2", "sum"])
def test_parity_with_the_attention_matrix(norm: str) -> None:
    q, k, v, b = qkv(layer(norm=norm), torch.randn(2, 90, 32).double())
    A = attention_matrix(q, k, b)
    assert A.shape == (2, 4, 90, 90) and not A.triu(1).any()
    o, _ = delta(q, k, v, None, b)
    assert_parity("deltanet", "O(T^2) attention form", torch.einsum("bhts,bshv->bthv", A, v), o, 1e-10)


def test_attention_matrix_of_a_table() -> None:
    """Orthonormal keys, b = 1, keys as queries: every token takes its own value and nothing else."""
    keys = torch.linalg.qr(torch.randn(16, 16))[0][None, :, None]
    A = attention_matrix(keys.bfloat16().float(), keys.bfloat16().float(), torch.ones(1, 16, 1))
    assert_close("A", A[0, 0], torch.eye(16), 1e-2)
    A = attention_matrix(keys[:, [0, 1, 0, 1]], keys[:, [0, 1, 0, 1]], torch.ones(1, 4, 1))
    assert_close("written again", A[0, 0], torch.eye(4), 1e-6)  # the second value of a key replaces the first
    assert attention_matrix(keys.bfloat16(), keys.bfloat16(), torch.ones(1, 16, 1).bfloat16()).dtype == torch.float32


def test_wrong_use() -> None:
    with pytest.raises(UsageError, match="heads=3 does not divide dim=32"):
        rm.mixer("deltanet", dim=32, heads=3)
    with pytest.raises(UsageError, match="norm is 'l1'"):
        rm.mixer("deltanet", dim=32, norm="l1")
    with pytest.raises(ShapeError, match="empty"):
        rm.mixer("deltanet", dim=32)(torch.zeros(1, 0, 32))
