"""The same function as transformers' layers: their weights copied into ours, outputs and the gradient of the input compared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import remanence as rm
from helpers import assert_close
from remanence.mixers.parts import l2_normalize
from remanence.ops.delta import delta

pytest.importorskip("transformers", reason="the layers compared with are those of transformers (extra 'hf')")

from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRotaryEmbedding  # noqa: E402
from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer  # noqa: E402
from transformers.models.qwen3_next import modeling_qwen3_next as qwen  # noqa: E402

TOL = 1e-5
DIM = 32


def randomize(module: nn.Module) -> nn.Module:
    """Move every weight off its initial value: ones and zeros hide mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return module


def copy(pairs: dict[nn.Parameter, Tensor]) -> None:
    """Ours <- theirs."""
    with torch.no_grad():
        for ours, theirs in pairs.items():
            assert ours.shape == theirs.shape, f"{list(ours.shape)} cannot hold {list(theirs.shape)}"
            ours.copy_(theirs)


def assert_same_layer(ours: rm.Mixer, theirs, length: int = 150) -> None:
    """Outputs and the gradient of the input, fp32; then ours fed in pieces against theirs fed whole."""
    torch.manual_seed(1)
    x, dy = torch.randn(2, length, DIM), torch.randn(2, length, DIM)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    got, want = ours(xs[0])[0], theirs(xs[1])
    assert_close("y", got, want, TOL)
    assert_close("gradient", *(torch.autograd.grad(y, x, dy)[0] for y, x in zip((got, want), xs)), TOL)
    head, state = ours(x[:, :70])
    token, state = ours(x[:, 70:71], state)
    assert_close("y in pieces", torch.cat([head, token, ours(x[:, 71:], state)[0]], 1), want, TOL)


def gated_deltanet_from_qwen3_next(ours: nn.Module, theirs: nn.Module) -> None:
    """Its projection is fused per key head: [q, k, v of the head's values, gate of the same]; and [b, a] likewise."""
    heads, K, V = ours.heads, ours.key_dim, ours.value_dim
    q, k, v, gate = theirs.in_proj_qkvz.weight.unflatten(0, (heads, -1)).split([K, K, V, V], 1)  # each [H, K or V, dim]
    b, a = theirs.in_proj_ba.weight.unflatten(0, (heads, 2)).unbind(1)  # each [H, dim]
    copy(
        {
            ours.to_qkv.weight: torch.cat([part.flatten(0, 1) for part in (q, k, v)]),
            ours.to_gate.weight: gate.flatten(0, 1),
            ours.to_beta.weight: b,
            ours.to_decay.weight: a,
            ours.conv.weight: theirs.conv1d.weight[:, 0],
            ours.A_log: theirs.A_log,
            ours.dt_bias: theirs.dt_bias,
            ours.norm.weight: theirs.norm.weight,
            ours.out.weight: theirs.out_proj.weight,
        }
    )


def mamba2_from_transformers(ours: nn.Module, theirs: nn.Module) -> None:
    copy(
        {
            ours.to_zxbcdt.weight: theirs.in_proj.weight,
            ours.conv.weight: theirs.conv1d.weight[:, 0],
            ours.conv.bias: theirs.conv1d.bias,
            ours.A_log: theirs.A_log,
            ours.dt_bias: theirs.dt_bias,
            ours.D: theirs.D,
            ours.norm.weight: theirs.norm.weight,
            ours.out.weight: theirs.out_proj.weight,
        }
    )


def attention_from_llama(ours: nn.Module, theirs: nn.Module) -> None:
    copy(
        {
            ours.to_qkv.weight: torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]),
            ours.out.weight: theirs.o_proj.weight,
        }
    )


@pytest.mark.parametrize("theirs", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
def test_gated_delta_rule(theirs: str) -> None:
    """The op alone; theirs normalises and scales, and computes in fp32."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 130, 3, width) for width in (8, 8, 6))
    g, b, S = -torch.rand(2, 130, 3), torch.rand(2, 130, 3), torch.randn(2, 3, 8, 6)
    rule = getattr(qwen, theirs)
    want, end = rule(q, k, v, g=g, beta=b, initial_state=S.clone(), output_final_state=True, use_qk_l2norm_in_kernel=True)
    got, ours = delta(l2_normalize(q) * 8**-0.5, l2_normalize(k), v, g, b, S)
    assert_close("o", got, want, TOL)
    assert_close("S", ours, end, TOL)


@pytest.mark.parametrize("value_dim", [8, 12])
def test_gated_deltanet_is_qwen3_next(value_dim: int) -> None:
    config = qwen.Qwen3NextConfig(
        hidden_size=DIM,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=value_dim,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,  # ours; the configuration's own default is 1e-6
    )
    theirs = randomize(qwen.Qwen3NextGatedDeltaNet(config, 0))
    ours = rm.mixer("gated-deltanet", dim=DIM, heads=4, key_dim=8, value_dim=value_dim)
    gated_deltanet_from_qwen3_next(ours, theirs)
    assert_same_layer(ours, theirs)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_transformers(groups: int) -> None:
    config = Mamba2Config(hidden_size=DIM, num_heads=8, head_dim=8, state_size=16, expand=2, n_groups=groups, chunk_size=64)
    theirs = randomize(Mamba2Mixer(config, 0))
    ours = rm.mixer("mamba2", dim=DIM, head_dim=8, state_size=16, groups=groups)
    mamba2_from_transformers(ours, theirs)
    assert_same_layer(ours, theirs)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_is_llama(kv_heads: int) -> None:
    config = LlamaConfig(hidden_size=DIM, num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=8, attn_implementation="sdpa")
    theirs, rope = randomize(LlamaAttention(config, 0)), LlamaRotaryEmbedding(config)
    ours = rm.mixer("attention", dim=DIM, heads=4, kv_heads=kv_heads)
    attention_from_llama(ours, theirs)
    assert_same_layer(ours, lambda x: theirs(x, rope(x, torch.arange(x.shape[1])[None]), None)[0])
