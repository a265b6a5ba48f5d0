"""LongMem: the residual telescopes to the backbone, the memory layer in a loop, and what learns."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.banks.longmem import BankAttention
from remanence.errors import UsageError

from .loops import inputs, qkv, softmax_read, turn


def backbone(layers: str = "2 x attention", dim: int = 16, vocab: int = 11) -> rm.Decoder:
    torch.manual_seed(0)
    return rm.Decoder(rm.ModelConfig(vocab=vocab, dim=dim, layers=layers, ffn=1))


def test_parity_a_side_network_that_adds_nothing_is_the_backbone() -> None:
    base = backbone("4 x attention").double()
    model, ids = rm.memory("longmem", base, window=8, memory=32), torch.randint(11, (2, 30))
    with torch.no_grad():
        for block in model.side:
            block.mixer.out.weight.zero_()
            block.ffn.down.weight.zero_()
        assert_parity("longmem", "its backbone, with a side network of zeros", model(ids).logits, base(ids).logits)


def test_parity_the_memory_layer_in_a_loop() -> None:
    torch.manual_seed(0)
    attention = rm.mixer("attention", dim=12, heads=2).double()
    mixer = BankAttention(24, attention, window=5, memory=12, chunk=3, top=6).double()
    with torch.no_grad():
        mixer.gate.normal_()
        mixer.bank.weight.normal_(std=0.3)
        x = inputs(1, 40, 24)
        q, k, v = (y[0] for y in qkv(mixer, x[..., :12], 2))
        _, bank_k, bank_v = ((x[0, :, 12:] @ part.T).unflatten(-1, (2, 6)) for part in mixer.bank.weight.chunk(3))
        out, scale = torch.zeros_like(q), 6**-0.5
        for h in range(2):
            gate = torch.sigmoid(mixer.gate[h])
            for i in range(40):
                near = range(max(0, i - 4), i + 1)
                local = softmax_read([scale * turn(q[i, h], i) @ turn(k[j, h], j) for j in near], [v[j, h] for j in near])
                can = [c for c in range(40 // 3) if 5 <= i - (3 * c + 2) < 17]
                best = sorted(can, key=lambda c: -float(q[i, h] @ bank_k[3 * c : 3 * c + 3, h].mean(0)))[:2]
                seen = [j for c in best for j in range(3 * c, 3 * c + 3)]
                recalled = softmax_read([scale * q[i, h] @ bank_k[j, h] for j in seen], [bank_v[j, h] for j in seen]) if seen else 0
                out[i, h] = gate * recalled + (1 - gate) * local
        want = out.flatten(1)[None] @ mixer.out.weight.T
        assert_parity("longmem", "the memory layer's equations, token by token", mixer(x)[0], want)


def test_only_the_side_network_learns() -> None:
    model = rm.memory("longmem", backbone("4 x attention"), window=8, memory=32)
    ids = torch.randint(11, (2, 30))
    model(ids, targets=ids).loss.backward()
    learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learns and all(name.startswith("side.") and ".bank." not in name for name in learns)
    assert any(name.endswith("gate") for name in learns)


def test_saved_and_loaded(tmp_path) -> None:
    model, ids = rm.memory("longmem", backbone("4 x attention"), window=8, memory=32).eval(), torch.randint(11, (1, 30))
    model.save(tmp_path)
    assert torch.equal(rm.load(tmp_path)(ids).logits, model(ids).logits)


def test_a_long_stream_stays_bounded_beside_a_bounded_backbone() -> None:
    base = rm.Decoder(rm.ModelConfig(vocab=11, dim=4, layers=[{"mixer": "mingru"}, {"mixer": "attention", "heads": 1}], ffn=0))
    model = rm.memory("longmem", base, layer=2, window=16, memory=60, top=4)
    state, sizes = None, []
    with torch.no_grad():
        for _ in range(6):
            state = model(torch.randint(11, (1, 500)), state).state
            sizes.append(state.side[0].nbytes)
    assert max(sizes) <= 2 * 80 * 4 * 4 * 4 + 64


def test_what_it_cannot_be_put_around() -> None:
    with pytest.raises(UsageError, match="side layer 1 is not attention"):
        rm.memory("longmem", backbone("attention, mingru"), layer=1)
    with pytest.raises(UsageError, match="reduction=3 does not divide"):
        rm.memory("longmem", backbone(), reduction=3)
    with pytest.raises(UsageError, match="layer is 9"):
        rm.memory("longmem", backbone(), layer=9)
    with pytest.raises(UsageError, match="chunk=4 does not divide top=6"):
        rm.memory("longmem", backbone(), top=6)


def test_windows_in_the_backbone_bound_the_state() -> None:
    torch.manual_seed(0)
    base = rm.Decoder(rm.ModelConfig(11, 16, [{"mixer": "attention", "window": 8, "times": 4}], ffn=1))
    model = rm.memory("longmem", base, window=8, memory=16, chunk=4, top=8).eval()
    with torch.no_grad():
        sizes = {n: model(torch.randint(11, (1, n))).state.nbytes for n in (100, 800, 1600)}
        ids = torch.randint(11, (1, 90))
        whole, first = model(ids), model(ids[:, :41])
        rest = model(ids[:, 41:], first.state)
    assert max(sizes.values()) < 1.3 * min(sizes.values()), sizes  # the bank lets go of its oldest tokens in blocks
    assert_close("after a cut", rest.logits, whole.logits[:, 41:], 1e-5)
