"""RWKV-7's time mixing against its equations token by token, its initial values, and what its state can track."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.errors import ShapeError, UsageError
from remanence.mixers.rwkv7 import RWKV7


def layer(dim: int = 32, heads: int = 4, **hyper: object) -> RWKV7:
    """float64, every weight moved off its initial value."""
    torch.manual_seed(0)
    mixer = rm.mixer("rwkv7", dim=dim, heads=heads, **hyper)
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return mixer.double()


def by_the_equations(mixer: RWKV7, x: Tensor, previous: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """One document x [T, D]; S [H, V, K] value-first and written (S - (S kk)(kk a)^T) as in the authors' code. Returns y and S."""
    H, K = mixer.bonus.shape
    outputs = []
    for token in x:
        r_in, w_in, k_in, v_in, a_in, g_in = (token + mu * (previous - token) for mu in mixer.mix)
        r, k, v = mixer.to_r.weight @ r_in, mixer.to_k.weight @ k_in, mixer.to_v.weight @ v_in
        w = mixer.to_w.up.weight @ torch.tanh(mixer.to_w.down.weight @ w_in) + mixer.to_w.bias
        w = torch.exp(-torch.sigmoid(w) / math.sqrt(math.e))
        a = torch.sigmoid(mixer.to_a.up.weight @ (mixer.to_a.down.weight @ a_in) + mixer.to_a.bias)
        g = mixer.to_g.up.weight @ torch.sigmoid(mixer.to_g.down.weight @ g_in)
        kk = (k * mixer.removal).view(H, K)
        kk = kk / kk.norm(dim=-1, keepdim=True)
        k = k + k * (a - 1) * mixer.replacement
        r, w, k, v, a = (part.view(H, K) for part in (r, w, k, v, a))
        S = S * w[:, None] - (S @ kk[..., None]) * (kk * a)[:, None] + v[..., None] * k[:, None]
        y = (S @ r[..., None])[..., 0]
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-5 * K).sqrt()
        y = y.flatten() * mixer.norm.weight + mixer.norm.bias
        y = y + ((r * k * mixer.bonus).sum(1, keepdim=True) * v).flatten()
        outputs.append(mixer.out.weight @ (y * g))
        previous = token
    return torch.stack(outputs), S


@torch.no_grad()
def test_parity_with_the_equations() -> None:
    mixer, x = layer(), torch.randn(2, 80, 32).double()
    y, state = mixer(x)
    more, after = mixer(x.flip(1), state)
    for row in range(2):
        want, S = by_the_equations(mixer, x[row], torch.zeros(32).double(), torch.zeros(4, 8, 8).double())
        assert_parity("rwkv7", "equations of RWKV-LM's rwkv_v7_numpy.py, re-derived", y[row], want, 1e-10)
        assert_close("S", state.memory[row].mT, S, 1e-10)
        want, S = by_the_equations(mixer, x[row].flip(0), x[row, -1], S)
        assert_parity("rwkv7", "equations of RWKV-LM's rwkv_v7_numpy.py, re-derived", more[row], want, 1e-10)
        assert_close("S", after.memory[row].mT, S, 1e-10)


def test_initial_values() -> None:
    """Those of the authors' training code at dim 256, heads of 64, layers 1, 6 and 12 of 12."""
    for layer_number in (1, 6, 12):
        mixer = rm.mixer("rwkv7", dim=256, heads=4, layer=layer_number, layers=12)
        depth, left = (layer_number - 1) / 11, 1 - (layer_number - 1) / 12
        for n in (0, 1, 63, 64, 200, 255):
            zigzag = (n % 64 - 31.5) / 31.5
            zigzag *= abs(zigzag)
            w = -6 + 6 * (n / 255) ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag
            assert abs(mixer.to_w.bias[n].item() - w) < 1e-5
            assert abs(mixer.to_a.bias[n].item() - (-0.19 + 0.3 * zigzag + 0.4 * (n / 255 - 0.5))) < 1e-5
            assert abs(mixer.removal[n].item() - (0.71 - 0.1 * (n / 255 - 0.5))) < 1e-5
            for mu, power in zip(mixer.mix[:, n], (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):
                assert abs(mu.item() - (1 - (n / 256) ** (power * left))) < 1e-5
        assert abs(mixer.norm.weight[0].item() - (layer_number / 12) ** 0.7) < 1e-5
        assert mixer.to_w.up.in_features == 32 and mixer.to_g.up.in_features == 64  # 32 round(c sqrt(dim) / 32)
        assert not mixer.out.weight.any() and not mixer.to_w.down.weight.any()


def test_the_decoder_tells_the_depth() -> None:
    model = rm.Decoder(rm.ModelConfig(vocab=11, dim=32, layers="3 x rwkv7"))
    assert [block.mixer.config["layer"] for block in model.blocks] == [1, 2, 3]
    assert model.blocks[2].mixer.config["layers"] == 3
    out = model(torch.randint(11, (2, 9)))
    assert out.logits.isfinite().all()


def test_wrong_use() -> None:
    with pytest.raises(UsageError, match="heads=5 does not divide dim=32"):
        rm.mixer("rwkv7", dim=32, heads=5)
    with pytest.raises(UsageError, match="layer is 3 of layers=2"):
        rm.mixer("rwkv7", dim=32, layer=3, layers=2)
    with pytest.raises(ShapeError, match="empty"):
        rm.mixer("rwkv7", dim=32)(torch.zeros(1, 0, 32))
