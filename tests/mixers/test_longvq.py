"""LongVQ: softmax attention where keys are their codes, sums by code otherwise, and a codebook that only training code changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence import Span
from remanence.mixers.mega import Chunks


def block_of(codes: int = 5, **hyper):
    torch.manual_seed(0)
    mixer = rm.mixer("longvq", dim=6, codes=codes, order=4, chunk=4, key_dim=3, value_dim=7, **hyper).double()
    with torch.no_grad():
        mixer.codebook.normal_()
        mixer.bias.normal_()
        for linear in (mixer.to_v, mixer.to_gzrh, mixer.to_h):
            linear.weight.normal_(std=0.5)
    return mixer


def attention(ours, q, k, far_k, v):
    """One softmax a query: exact keys and a bias in its own chunk, `far_k` without a bias before it."""
    outputs = []
    for t in range(q.shape[1]):
        start = t - t % ours.chunk
        near = (q[:, t, None] * k[:, start : t + 1]).sum(-1) + ours.bias[: t - start + 1].flip(0)
        far = (q[:, t, None] * far_k[:, :start]).sum(-1)
        outputs.append(torch.einsum("bj,bje->be", torch.cat([far, near], 1).softmax(-1), v[:, : t + 1]))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("keys_are_codes", [True, False])
def test_parity_softmax_attention(keys_are_codes):
    ours = block_of()
    q, k, v = (torch.randn(2, 30, n, dtype=torch.float64) for n in (3, 3, 7))
    if keys_are_codes:
        k = ours.codebook[torch.randint(5, (2, 30))]
    at = torch.arange(30).expand(2, -1)
    got, _ = ours.attend(q, k, v, None, Chunks.of(at, 4, None))
    nearest = torch.cdist(k, ours.codebook.expand(2, -1, -1)).argmin(-1)
    source = "softmax attention where every key is its code" if keys_are_codes else "softmax attention over quantised far keys"
    assert_parity("longvq", source, got, attention(ours, q, k, k if keys_are_codes else ours.codebook[nearest], v), 1e-10)


def test_no_call_changes_the_codebook_and_training_code_does():
    ours = block_of().train()
    x = torch.randn(2, 30, 6, dtype=torch.float64)
    before = ours.codebook.clone()
    first, _ = ours(x)
    ours(x)[0].sum().backward()
    assert torch.equal(ours.codebook, before)
    loss = ours.commitment(x).item()
    for _ in range(400):
        ours.update_codebook(x)
    assert not torch.equal(ours.codebook, before) and ours.commitment(x).item() < 0.7 * loss
    assert not torch.equal(ours(x)[0], first)


def test_codes_move_to_the_means_of_their_keys():
    ours = block_of(codes=2, decay=0.0)
    x = torch.randn(1, 12, 6, dtype=torch.float64)
    valid = torch.arange(12)[None] < 9
    m, _ = ours.move(x, None, None)
    k = (F.silu(ours.to_gzrh(m)[..., 6:9]) * ours.kappa[1] + ours.mu[1])[0, :9]
    which = ours.codes(k)
    ours.update_codebook(x, span=Span(valid))
    for code in which.unique():
        assert_close(f"code {code}", ours.codebook[code], k[which == code].mean(0), 1e-6)


def test_commitment_trains_the_keys():
    ours = block_of()
    ours.commitment(torch.randn(1, 9, 6, dtype=torch.float64)).backward()
    assert ours.to_gzrh.weight.grad.abs().sum() > 0 and ours.kappa.grad[1].abs().sum() > 0 and not ours.kappa.grad[0].any()


def test_hyper_parameters():
    with pytest.raises(rm.UsageError, match="decay is 1.5"):
        rm.mixer("longvq", dim=8, decay=1.5)
