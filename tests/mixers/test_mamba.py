"""Mamba: the layer of transformers with its weights copied, and what a fresh one starts from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import remanence as rm
from helpers import assert_close
from parity import assert_parity

DIM = 32


def test_parity_transformers() -> None:
    """Outputs, the gradient of the input, and ours fed in pieces against theirs fed whole, fp32."""
    pytest.importorskip("transformers", reason="the layer compared with is that of transformers (extra 'hf')")
    from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=DIM, state_size=16, expand=2, conv_kernel=4, time_step_rank=2)
    theirs, ours = MambaMixer(config, 0).eval(), rm.mixer("mamba", dim=DIM)
    pairs = {
        ours.to_xz.weight: theirs.in_proj.weight,
        ours.conv.weight: theirs.conv1d.weight[:, 0],
        ours.conv.bias: theirs.conv1d.bias,
        ours.to_rbc.weight: theirs.x_proj.weight,
        ours.to_dt.weight: theirs.dt_proj.weight,
        ours.to_dt.bias: theirs.dt_proj.bias,
        ours.A_log: theirs.A_log,
        ours.D: theirs.D,
        ours.out.weight: theirs.out_proj.weight,
    }
    assert_close("A_log at the start", ours.A_log, theirs.A_log, 1e-6)
    with torch.no_grad():
        for weight in theirs.parameters():  # ones and zeros hide mistakes
            weight.add_(0.3 * torch.randn_like(weight))
        for mine, other in pairs.items():
            assert mine.shape == other.shape
            mine.copy_(other)
    x, dy = torch.randn(2, 150, DIM), torch.randn(2, 150, DIM)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    got, want = ours(xs[0])[0], theirs(xs[1])
    assert_parity("mamba", "transformers MambaMixer (slow path)", got, want)
    assert_parity(
        "mamba", "transformers MambaMixer (slow path), gradient", *(torch.autograd.grad(y, x, dy)[0] for y, x in zip((got, want), xs))
    )
    head, state = ours(x[:, :70])
    token, state = ours(x[:, 70:71], state)
    assert_close("y in pieces", torch.cat([head, token, ours(x[:, 71:], state)[0]], 1), want, 1e-5)


def test_a_fresh_one() -> None:
    torch.manual_seed(0)
    mixer = rm.mixer("mamba", dim=64, state_size=4)
    dt = F.softplus(mixer.to_dt.bias)
    assert dt.min() >= 1e-4 and dt.max() <= 0.1 + 1e-6
    assert_close("A", mixer.A_log.exp(), torch.arange(1.0, 5).expand(128, 4), 1e-6)
    assert mixer.to_dt.weight.shape == (128, 4) and mixer.to_dt.weight.abs().max() <= 4**-0.5
    free = {name for name, weight in mixer.named_parameters() if getattr(weight, "no_weight_decay", False)}
    assert free == {"A_log", "D", "to_dt.bias"}


def test_the_state_is_float32_whatever_the_input() -> None:
    mixer = rm.mixer("mamba", dim=DIM, state_size=8).bfloat16()
    y, state = mixer(torch.randn(1, 9, DIM, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and state.memory.dtype == torch.float32 and state.memory.shape == (1, 64, 8)


def test_bad_hyper_parameters() -> None:
    with pytest.raises(rm.errors.UsageError, match="state_size is 0"):
        rm.mixer("mamba", dim=DIM, state_size=0)
    with pytest.raises(rm.errors.UsageError, match="it takes dim, expand"):
        rm.mixer("mamba", dim=DIM, heads=4)
