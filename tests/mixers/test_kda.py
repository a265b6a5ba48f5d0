"""Kimi Delta Attention: transformers' layer with its weights copied, the equation token by token, and its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence.errors import ShapeError, UsageError

DIM = 32


def moved(module: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return module


def test_parity_with_transformers() -> None:
    """Outputs whole and in pieces, and the gradient of the input."""
    kimi = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear", reason="needs transformers (extra 'hf')")
    config = kimi.KimiLinearConfig(hidden_size=DIM, linear_head_dim=8, linear_num_heads=4, num_hidden_layers=2)
    theirs = kimi.KimiLinearDeltaAttention(config, 0)
    with torch.no_grad():
        for weight in theirs.parameters():  # some are left uninitialised
            weight.zero_()
        theirs.o_norm.weight.fill_(1.0)
    moved(theirs)
    ours = rm.mixer("kda", dim=DIM, heads=4)
    pairs = {
        ours.to_qkv.weight: torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]),
        ours.conv.weight: theirs.conv1d.weight[:, 0],
        ours.to_beta.weight: theirs.b_proj.weight,
        ours.to_decay[0].weight: theirs.forget_gate.f_a_proj.weight,
        ours.to_decay[1].weight: theirs.forget_gate.f_b_proj.weight,
        ours.A_log: theirs.forget_gate.A_log.flatten(),
        ours.dt_bias: theirs.forget_gate.dt_bias,
        ours.to_gate[0].weight: theirs.g_a_proj.weight,
        ours.to_gate[1].weight: theirs.g_b_proj.weight,
        ours.norm.weight: theirs.o_norm.weight,
        ours.out.weight: theirs.o_proj.weight,
    }
    with torch.no_grad():
        for mine, its in pairs.items():
            assert mine.shape == its.shape
            mine.copy_(its)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x, dy = torch.randn(2, 150, DIM), torch.randn(2, 150, DIM)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    got, want = ours(xs[0])[0], theirs(xs[1])
    source = "transformers KimiLinearDeltaAttention"
    assert_parity("kda", source, got, want)
    assert_parity("kda", source + ", gradient", *(torch.autograd.grad(y, leaf, dy)[0] for y, leaf in zip((got, want), xs)))
    head, state = ours(x[:, :70])
    token, state = ours(x[:, 70:71], state)
    assert_parity("kda", source, torch.cat([head, token, ours(x[:, 71:], state)[0]], 1), want)


def test_the_memory_is_the_equation() -> None:
    """S_t = (I - b k k^T) diag(exp(g)) S_{t-1} + b k v^T with every gate taken from the weights, in float64."""
    mixer = moved(rm.mixer("kda", dim=DIM, negative_eigenvalues=True)).double()
    x = torch.randn(1, 60, DIM).double()
    with torch.no_grad():
        u = nn.functional.conv1d(nn.functional.pad((x @ mixer.to_qkv.weight.T).mT, (3, 0)), mixer.conv.weight[:, None], groups=96).mT
        _, k, v = nn.functional.silu(u).reshape(60, 3, 4, 8).unbind(1)
        k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        rate = torch.log1p(torch.exp(x @ mixer.to_decay[0].weight.T @ mixer.to_decay[1].weight.T + mixer.dt_bias)).reshape(60, 4, 8)
        keep = torch.exp(-mixer.A_log.exp()[:, None] * rate)
        b = 2 * torch.sigmoid(x @ mixer.to_beta.weight.T)[0]
        S = torch.zeros(4, 8, 8).double()
        for t in range(60):
            for h in range(4):
                erase = torch.eye(8).double() - b[t, h] * torch.outer(k[t, h], k[t, h])
                S[h] = erase @ torch.diag(keep[t, h]) @ S[h] + b[t, h] * torch.outer(k[t, h], v[t, h])
        assert_close("memory", mixer(x)[1].memory[0], S, 1e-10)


def test_one_gate_for_all_channels_is_gated_deltanet() -> None:
    """With W_f1 and W_f2 zero the decay is exp(-exp(A_log) softplus(dt_bias)): Gated DeltaNet's with W_a = 0, and so is the memory."""
    mixer, gated = rm.mixer("kda", dim=DIM).double(), rm.mixer("gated-deltanet", dim=DIM).double()
    with torch.no_grad():
        mixer.to_decay[0].weight.zero_()
        gated.to_decay.weight.zero_()
        gated.A_log.copy_(mixer.A_log)
        mixer.dt_bias.copy_(gated.dt_bias.repeat_interleave(8))
        for name in ("to_qkv", "conv", "to_beta"):
            getattr(gated, name).load_state_dict(getattr(mixer, name).state_dict())
        x = torch.randn(2, 100, DIM).double()
        assert_close("memory", mixer(x)[1].memory, gated(x)[1].memory, 1e-10)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_strong_gates_stay_exact(size: float) -> None:
    """Decays down to exp(-size) a token and channel, far past what float32 can hold: finite, and the equation's."""
    mixer = moved(rm.mixer("kda", dim=DIM))
    with torch.no_grad():
        mixer.dt_bias.copy_(torch.where(torch.arange(DIM) % 2 == 0, size, -size))

    def outcome(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {"x": x.requires_grad_(), **dict(module.named_parameters())}
        y, state = module(x)
        grads = torch.autograd.grad(y.square().sum() + state.memory.square().sum(), list(leaves.values()))
        return y, dict(zip(leaves, grads))

    x = torch.randn(2, 100, DIM)
    exact = rm.mixer("kda", dim=DIM, backend="naive").double()
    exact.load_state_dict(mixer.state_dict())
    got, grads = outcome(mixer, x.clone())
    want, exact_grads = outcome(exact, x.double())
    assert_close("y", got, want, 1e-5)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert_gradients_close("kda", grads, exact_grads, 1e-4)


def test_wrong_use() -> None:
    with pytest.raises(UsageError, match="heads=5 does not divide dim=32"):
        rm.mixer("kda", dim=32, heads=5)
    with pytest.raises(ShapeError, match="empty"):
        rm.mixer("kda", dim=32)(torch.zeros(1, 0, 32))
