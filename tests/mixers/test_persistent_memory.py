"""All-attention: one softmax over tokens and persistent pairs in a loop, and the layer without them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.errors import UsageError
from remanence.mixers.relative_attention import sinusoids


def layer(**hyper) -> rm.Mixer:
    torch.manual_seed(0)
    mixer = rm.mixer("persistent-memory", dim=12, heads=2, **hyper).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


@pytest.mark.parametrize("window", [None, 4])
def test_parity_with_the_equation_in_a_loop(window: int | None) -> None:
    mixer, x = layer(slots=5, window=window), torch.randn(1, 15, 12, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = ((part[0]).unflatten(-1, (2, 6)) for part in F.linear(x, mixer.to_qkv.weight).chunk(3, -1))
        table = F.linear(sinusoids(15, 12, x.device, x.dtype), mixer.to_r.weight).unflatten(-1, (2, 6))
        out = torch.zeros_like(q)
        for h in range(2):
            for i in range(15):
                seen = range(0 if window is None else max(0, i - window + 1), i + 1)
                place = [(q[i, h] + mixer.v[h]) @ table[i - j, h] for j in seen]
                logits = [(q[i, h] + mixer.u[h]) @ k[j, h] + p for j, p in zip(seen, place)]
                logits += [(q[i, h] + mixer.u[h]) @ mixer.slot_keys[h, s] * 6**0.5 for s in range(5)]
                values = torch.cat([v[seen.start : i + 1, h], mixer.slot_values[h] * 5**0.5])
                out[i, h] = (torch.stack(logits) * 6**-0.5).softmax(0) @ values
        want = out.flatten(1)[None] @ mixer.out.weight.T
        assert_parity("persistent-memory", "the all-attention layer of facebookresearch/adaptive-span, in a loop", mixer(x)[0], want)


def test_slots_that_nothing_fits_are_not_there() -> None:
    mixer, x = layer(slots=5), torch.randn(2, 15, 12, dtype=torch.float64)
    plain = rm.mixer("relative-attention", dim=12, heads=2).double()
    plain.load_state_dict({name: w for name, w in mixer.state_dict().items() if not name.startswith("slot")})
    with torch.no_grad():
        mixer.u.copy_(torch.full_like(mixer.u, 30.0))
        plain.u.copy_(mixer.u)
        mixer.slot_keys.fill_(-100.0)
        assert_close("without slots", mixer(x)[0], plain(x)[0], 1e-9)


def test_it_replaces_a_feed_forward() -> None:
    model = rm.model(rm.ModelConfig(vocab=9, dim=16, layers=[{"mixer": "persistent-memory", "slots": 8, "heads": 2, "ffn": 0}]))
    assert model.blocks[0].ffn is None and model(torch.randint(9, (1, 7))).logits.shape == (1, 7, 9)
    with pytest.raises(UsageError, match="slots is 0"):
        rm.mixer("persistent-memory", dim=16, slots=0)
