"""Differential Mamba: against two layers of transformers, at lambda = 0, and its start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import remanence as rm
from parity import assert_parity

DIM = 32
HYPER = {"head_dim": 8, "state_size": 16}


def moved(module: nn.Module, by: float = 0.3) -> nn.Module:
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(by * torch.randn_like(weight))
    return module


@pytest.mark.parametrize("layer", [1, 5])
def test_parity_transformers(layer: int) -> None:
    pytest.importorskip("transformers", reason="the layers compared with are those of transformers (extra 'hf')")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    torch.manual_seed(0)
    config = Mamba2Config(hidden_size=DIM, num_heads=4, head_dim=8, state_size=16, expand=1, n_groups=1, chunk_size=32)
    theirs = [moved(Mamba2Mixer(config, 0)).eval() for _ in range(2)]
    ours = moved(rm.mixer("diff-mamba", dim=DIM, layer=layer, **HYPER), 0.1)
    with torch.no_grad():
        for mine, other in zip((ours.first, ours.second), theirs):
            for a, b in (
                (mine.to_zxbcdt.weight, other.in_proj.weight),
                (mine.conv.weight, other.conv1d.weight[:, 0]),
                (mine.conv.bias, other.conv1d.bias),
                (mine.A_log, other.A_log),
                (mine.dt_bias, other.dt_bias),
                (mine.D, other.D),
                (mine.norm.weight, other.norm.weight),
                (mine.out.weight, other.out_proj.weight),
            ):
                a.copy_(b)
        x = torch.randn(2, 90, DIM)
        l0 = 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))
        gap = theirs[0](x) - (torch.sigmoid(ours.lambda_q.sum()) + l0) * theirs[1](x)
        want = (1 - l0) * gap / (gap.square().mean(-1, keepdim=True) + 1e-5).sqrt() * ours.norm.weight
        assert_parity("diff-mamba", "two transformers Mamba2Mixer, subtracted", ours(x)[0], want)


def test_parity_lambda_zero_is_mamba2_normed() -> None:
    torch.manual_seed(0)
    ours = moved(rm.mixer("diff-mamba", dim=DIM, **HYPER))
    ours.lambda_init = 0.0
    with torch.no_grad():
        ours.lambda_q.fill_(-1e4)
        x = torch.randn(2, 40, DIM)
        assert_parity("diff-mamba", "RMSNorm(mamba2) at lambda = 0", ours(x)[0], ours.norm(ours.first(x)[0]))


def test_the_start() -> None:
    """lambda_q is small, so that the sigmoid is near 1/2 and has a gradient; deeper layers subtract more."""
    torch.manual_seed(0)
    mixers = [rm.mixer("diff-mamba", dim=256, layer=layer) for layer in (1, 2, 12)]
    assert all(abs(mixer.lambda_q.sum().sigmoid().item() - 0.5) < 0.25 for mixer in mixers)
    want = [0.2, 0.8 - 0.6 * math.exp(-0.3), 0.8 - 0.6 * math.exp(-3.3)]
    assert [mixer.lambda_init for mixer in mixers] == pytest.approx(want)
    model = rm.Decoder(rm.ModelConfig(vocab=11, dim=DIM, layers="2 x diff-mamba", ffn=0))
    assert [block.mixer.lambda_init for block in model.blocks] == [mixers[0].lambda_init, mixers[1].lambda_init]


def test_half_the_width_keeps_the_parameters() -> None:
    count = lambda slug, **hyper: sum(weight.numel() for weight in rm.mixer(slug, dim=256, state_size=64, **hyper).parameters())  # noqa: E731
    assert abs(count("diff-mamba") / count("mamba2") - 1) < 0.1


def test_bad_hyper_parameters() -> None:
    with pytest.raises(rm.errors.UsageError, match="head_dim=5 does not divide"):
        rm.mixer("diff-mamba", dim=DIM, head_dim=5)
    assert rm.mixer("diff-mamba", dim=DIM).first.head_dim == DIM  # the default, where 64 is too many
