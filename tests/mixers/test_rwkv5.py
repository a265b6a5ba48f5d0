"""RWKV-5 and RWKV-6 time-mix against the authors' layers and kernels, as loops over tokens, heads and channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.errors import UsageError

DIM, HEADS = 32, 4


def layer(slug: str, **hyper) -> rm.Mixer:
    torch.manual_seed(0)
    mixer = rm.mixer(slug, dim=DIM, heads=HEADS, **{"layer": 2, "layers": 3} | hyper)
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return mixer


def kernel(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """The authors' kernel in our words: all [B, T, H, K] but u [H, K]; w is the decay itself. The state is value-first, as theirs."""
    state, outputs = torch.zeros(*r.shape[:1], HEADS, v.shape[-1], r.shape[-1], dtype=r.dtype), []
    for t in range(r.shape[1]):
        now = v[:, t, :, :, None] * k[:, t, :, None, :]
        outputs.append(((u[:, None] * now + state) * r[:, t, :, None, :]).sum(-1))
        state = state * w[:, t, :, None, :] + now
    return torch.stack(outputs, 1)


def shifted(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, -1))


def heads(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], HEADS, -1)


def close(mixer: nn.Module, o: Tensor, g: Tensor) -> Tensor:
    """Divide by 8, normalise each head with eps 1e-5, gate, project."""
    o = o / 8
    o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    o = o.flatten(2) * mixer.norm.weight + mixer.norm.bias
    return (o * g * g.sigmoid()) @ mixer.out.weight.T


def eagle(mixer: nn.Module, x: Tensor) -> Tensor:
    """RWKV_Tmix_x052."""
    last = shifted(x)
    mixed = [x * mu + last * (1 - mu) for mu in mixer.mix]
    r, k, v, g = (part @ to.weight.T for part, to in zip(mixed, (mixer.to_r, mixer.to_k, mixer.to_v, mixer.to_g)))
    w = torch.exp(-torch.exp(mixer.decay)).expand(*x.shape[:2], -1, -1)
    return close(mixer, kernel(heads(r), heads(k), heads(v), w, mixer.bonus), g)


def finch(mixer: nn.Module, x: Tensor) -> Tensor:
    """RWKV_Tmix_x060."""
    d = shifted(x) - x
    low = torch.tanh((x + d * mixer.mix_x) @ mixer.mix_in).chunk(5, -1)
    x_w, x_k, x_v, x_r, x_g = (x + d * (mixer.mix[n] + low[n] @ mixer.mix_out[n]) for n in range(5))
    w = mixer.decay.flatten() + torch.tanh(x_w @ mixer.decay_in) @ mixer.decay_out
    k, v, r, g = x_k @ mixer.to_k.weight.T, x_v @ mixer.to_v.weight.T, x_r @ mixer.to_r.weight.T, x_g @ mixer.to_g.weight.T
    return close(mixer, kernel(heads(r), heads(k), heads(v), heads(torch.exp(-torch.exp(w))), mixer.bonus), g)


@pytest.mark.parametrize(("slug", "theirs"), [("rwkv5", eagle), ("rwkv6", finch)])
def test_parity_with_the_authors_layer(slug: str, theirs: Callable) -> None:
    mixer = layer(slug)
    x, dy = torch.randn(2, 2, 100, DIM)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    got, want = mixer(xs[0])[0], theirs(mixer, xs[1])
    assert_parity(slug, "RWKV-LM time-mix and kernel (re-derived)", got, want)
    assert_close("gradient", *(torch.autograd.grad(y, x, dy)[0] for y, x in zip((got, want), xs)), 1e-5)


def test_without_their_low_ranks_the_two_are_one() -> None:
    """RWKV-6 starts there: its products are zero at first, and its shares are those of the token before."""
    old, new = (rm.mixer(slug, dim=DIM, heads=HEADS, layer=2, layers=3).double() for slug in ("rwkv5", "rwkv6"))
    for name in ("to_r", "to_k", "to_v", "to_g", "out"):
        getattr(new, name).load_state_dict(getattr(old, name).state_dict())
    x = torch.randn(2, 50, DIM, dtype=torch.float64)
    assert_close("y", new(x)[0], old(x)[0], 1e-6)  # the shares were rounded in float32


def test_initial_values_are_the_authors_and_depend_on_depth() -> None:
    for index in range(3):
        mixer = rm.mixer("rwkv6", dim=DIM, heads=HEADS, layer=index + 1, layers=3)
        old = rm.mixer("rwkv5", dim=DIM, heads=HEADS, layer=index + 1, layers=3)
        rise, fall = index / 2, 1 - index / 3
        for n in (0, 1, 7, 31):
            decay = -6 + 5 * (n / 31) ** (0.7 + 1.3 * rise)
            bonus = rise * (1 - n / 31) + ((n + 1) % 3 - 1) * 0.1
            assert mixer.decay.flatten()[n].item() == pytest.approx(decay, abs=1e-5) == old.decay.flatten()[n].item()
            assert mixer.bonus.flatten()[n].item() == pytest.approx(bonus, abs=1e-5) == old.bonus.flatten()[n].item()
            k, v, r = (n / 32) ** fall, (n / 32) ** fall + 0.3 * rise, (n / 32) ** (0.5 * fall)
            assert old.mix[:, n].tolist() == pytest.approx([r, k, v, r], abs=1e-5)
            assert mixer.mix[:, n].tolist() == pytest.approx([1 - k, 1 - k, 1 - v, 1 - r, 1 - r], abs=1e-5)


def test_one_layer_and_one_channel_a_head_work() -> None:
    for slug in ("rwkv5", "rwkv6"):
        mixer = rm.mixer(slug, dim=4, heads=4)
        assert mixer(torch.randn(1, 9, 4))[0].isfinite().all()


def test_wrong_use() -> None:
    for slug in ("rwkv5", "rwkv6"):
        with pytest.raises(UsageError, match="heads=5 does not divide dim=32"):
            rm.mixer(slug, dim=32, heads=5)
        with pytest.raises(UsageError, match="layer=3 of layers=2"):
            rm.mixer(slug, dim=32, layer=3, layers=2)
