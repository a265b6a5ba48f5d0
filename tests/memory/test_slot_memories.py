"""Memformer, RxT, MemBART, LM2 and contextual memory reweaving against their equations in a loop over segments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence import Model
from remanence.train import replay
from segment_memories import VOCAB, build, cross_attention, ids_of, slot_attention, softmax_loop, through

S, K = 6, 3
T = 3 * S + 4


def memformer(model: Model, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    decoder, outputs = model.backbone, []
    unit = model.first is None
    M = (F.normalize(model.update.bias, dim=-1) if unit else model.first).expand(len(ids), -1, -1)
    for x in ids.split(S, 1):

        def read(layer: int, h: Tensor, M: Tensor = M) -> Tensor:
            return h + cross_attention(model.reads[layer], model.norms[layer](h), model.slot_norm(M))

        H = through(decoder, decoder.embedding(x), before=read)
        outputs.append(decoder.unembedding(H))
        if x.shape[1] == S:
            new = slot_attention(model.write, model.write_norm(M), H)
            if unit:
                moved = new + model.update.bias
                M = moved / moved.square().sum(-1, keepdim=True).sqrt()
            else:  # lucidrains/memformer's updater: torch's GRU cell with what was read as its input
                cell = torch.nn.GRUCell(M.shape[-1], M.shape[-1]).to(M)
                state = {"weight_ih": model.update.to_new.weight, "bias_ih": model.update.to_new.bias}
                state |= {"weight_hh": model.update.to_old.weight, "bias_hh": model.update.to_old.bias}
                args = (new.flatten(0, 1), M.flatten(0, 1))
                M = torch.func.functional_call(cell, state, args).view_as(M)
    return torch.cat(outputs, 1), [M]


def rxt(model: Model, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    decoder, outputs = model.backbone, []
    stm = [start.expand(len(ids), -1, -1) for start in model.start]
    for x in ids.split(S, 1):
        E = []

        def read(layer: int, h: Tensor, stm: list[Tensor] = stm) -> Tensor:
            return h + cross_attention(model.reads[layer], model.norms[layer](h), stm[layer])

        def keep(layer: int, h: Tensor, E: list[Tensor] = E) -> Tensor:
            E.append(h)
            return h

        H = through(decoder, decoder.embedding(x), before=read, after=keep)
        outputs.append(decoder.unembedding(H))
        if x.shape[1] == S:
            mean, new = sum(stm) / len(stm), []
            for l, old in enumerate(stm):
                norm = model.slot_norms[l]
                if model.mix != "none":
                    other = norm(mean if model.mix == "interlayer" else old)
                    g = model.mix_gates[l].gate.sigmoid()[:, None]
                    old = g * cross_attention(model.mixes[l], norm(old), other) + (1 - g) * old
                g = model.gates[l].gate.sigmoid()[:, None]
                new.append(g * cross_attention(model.writes[l], norm(old), model.encoded_norms[l](E[l])) + (1 - g) * old)
            stm = new
    return torch.cat(outputs, 1), stm


def membart(model: Model, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Text layer by layer over [A_l M_in | X_l]: with causal mixers that is the block on both, the prefix's outputs dropped."""
    decoder, outputs = model.backbone, []
    M = torch.zeros(len(ids), K, 16, dtype=model.bias.dtype)
    for x in ids.split(S, 1):
        start = model.norm(M + model.bias)
        h, inputs = decoder.embedding(x), []
        for l, block in enumerate(decoder.blocks):
            inputs.append(h)
            both = torch.cat([start @ model.prefixes[l].weight.T, h], 1)
            h = h + block.mixer(block.norm(both))[0][:, K:]
            h = h + block.ffn(block.ffn_norm(h))
        outputs.append(decoder.unembedding(decoder.norm(h)))
        if x.shape[1] == S:
            out = start
            for layer, X in zip(model.stream, inputs):
                out = layer.norm(out + slot_attention(layer.attention, out, X))
                out = layer.ffn_norm(out + layer.down(F.gelu(layer.up(out))))
            a = torch.sigmoid(model.gate.outer(F.gelu(model.gate.inner(out))))
            M = a * out + (1 - a) * start
    return torch.cat(outputs, 1), [M]


def lm2(model: Model, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    decoder, outputs = model.backbone, []
    N = model.slots
    M = [
        torch.eye(16, dtype=torch.float64)[[i % 16 for i in range(N)]].to(model.blocks[0].to_q.weight).expand(len(ids), -1, -1)
    ] * model.banks
    for x in ids.split(S, 1):
        E = []

        def read(layer: int, h: Tensor, M: list[Tensor] = M, E: list[Tensor] = E) -> Tensor:
            block, bank = model.blocks[layer], M[layer % model.banks]
            E.append(h)
            score = (h @ block.to_q.weight.T) @ (bank @ block.to_k.weight.T).mT / 4.0
            found = softmax_loop(score) @ (bank @ block.to_v.weight.T)
            return h + torch.sigmoid(found @ block.to_gate.weight.T) * found

        H = through(decoder, decoder.embedding(x), before=read)
        outputs.append(decoder.unembedding(H))
        if x.shape[1] == S:
            M = list(M)
            for l, e in enumerate(E):
                block, bank = model.blocks[l], M[l % model.banks]
                score = (e @ block.to_q.weight.T) @ (bank @ block.to_k.weight.T).mT / 4.0  # [B, S, N]
                found = softmax_loop(score) @ (bank @ block.to_v.weight.T)
                pool = softmax_loop(score.mT)  # [B, N, S]
                g_in, g_f = block.update.to_input(pool @ e).sigmoid(), block.update.to_forget(pool @ found).sigmoid()
                M[l % model.banks] = g_in * torch.tanh(pool @ found) + g_f * bank
    return torch.cat(outputs, 1), M


def reweaving(model: Model, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    decoder, outputs = model.backbone, []
    places, N = sorted(model.place), model.size
    held: dict[int, Tensor] = {l: torch.zeros(len(ids), 0, 16, dtype=model.weights.dtype) for l in places}
    for x in ids.split(S, 1):
        new = {}

        def weave(layer: int, h: Tensor, held: dict[int, Tensor] = held, new: dict[int, Tensor] = new) -> Tensor:
            if layer not in places:
                return h
            new[layer] = h
            if held[layer].shape[1] == 0:
                return h
            w = softmax_loop(model.weights)
            r = sum(w[i] * cross_attention(model.reads[i], h, held[l]) for i, l in enumerate(places))
            return h + torch.sigmoid(model.gates[places.index(layer)]) * r

        outputs.append(decoder.unembedding(through(decoder, decoder.embedding(x), after=weave)))
        if x.shape[1] == S:
            held = {l: torch.cat([held[l], new[l]], 1)[:, -N:] for l in places}
    return torch.cat(outputs, 1), list(held.values())


CASES = [
    ("memformer", memformer, {"slots": K, "tau": 0.5}, "slots"),
    ("memformer", memformer, {"slots": K, "tau": 0.5, "update": "gru"}, "slots"),
    ("rxt", rxt, {"slots": K}, "slots"),
    ("rxt", rxt, {"slots": K, "mix": "self"}, "slots"),
    ("rxt", rxt, {"slots": K, "mix": "interlayer"}, "slots"),
    ("membart", membart, {"slots": K}, "slots"),
    ("lm2", lm2, {"slots": K}, "banks"),
    ("lm2", lm2, {"slots": 20, "memory_scope": "shared"}, "banks"),
    ("contextual-memory-reweaving", reweaving, {"buffer": 10, "layers": [1, 2]}, "buffers"),
    ("contextual-memory-reweaving", reweaving, {"buffer": 4, "layers": [2]}, "buffers"),
]
SOURCE = {
    "memformer": "lucidrains/memformer's slot update in a loop",
    "rxt": "RxAI-dev/rxlm's memory attention in a loop",
    "membart": "qywu/memformers' memory stream in a loop",
    "lm2": "the paper's equations in a loop",
    "contextual-memory-reweaving": "the equation in a loop",
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("slug", "loop", "hyper", "field"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_parity_with_the_equations_in_a_loop(slug: str, loop, hyper: dict, field: str, dtype: torch.dtype) -> None:
    model, ids, wide = build(slug, segment=S, dtype=dtype, **hyper), ids_of(T), dtype == torch.float64
    out, (want, held) = model(ids), loop(model, ids)
    assert_parity(slug, SOURCE[slug], out.logits, want, 1e-10 if wide else 1e-5)
    got = getattr(out.state.memory, field)
    got = [got] if isinstance(got, Tensor) else list(got)
    if slug.startswith("contextual"):
        got = [x[:, -held[0].shape[1] :] for x in got]
    for a, b in zip(got, held, strict=True):
        assert_close("memory", a, b, 1e-10 if wide else 1e-5)
    if wide:
        grads = []
        for logits, memory in ((out.logits, got), (want, held)):
            loss = logits.square().sum() + sum(m.sin().sum() for m in memory)
            named = dict(model.named_parameters())
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            grads.append({name: g for name, g in zip(named, found) if g is not None})
        assert_gradients_close(slug, grads[0], grads[1], 1e-9)


def alone(model: Model, ids: Tensor) -> Tensor:
    """The backbone on each segment by itself."""
    return torch.cat([model.backbone(x).logits for x in ids.split(S, 1)], 1)


@pytest.mark.parametrize(
    ("slug", "hyper", "silence"),
    [
        ("memformer", {"slots": K}, "reads"),
        ("rxt", {"slots": K}, "reads"),
        ("lm2", {"slots": K}, "to_v"),
        ("contextual-memory-reweaving", {"buffer": 8}, "gates"),
        ("membart", {"slots": 0}, None),
    ],
)
def test_a_silent_memory_is_the_backbone(slug: str, hyper: dict, silence: str | None) -> None:
    model, ids = build(slug, segment=S, **hyper), ids_of(T)
    with torch.no_grad():
        want = alone(model, ids)
        if silence is not None:
            assert float((model(ids).logits - want).abs().max()) > 1e-4
            for name, parameter in model.named_parameters():
                if silence in name and not name.startswith("backbone"):
                    parameter.fill_(-torch.inf if silence == "gates" else 0.0)
        assert_close(slug, model(ids).logits, want, 1e-12)


def test_at_first_the_memory_does_nothing() -> None:
    import remanence as rm

    for slug in ("memformer", "rxt"):
        model = rm.memory(slug, backbone=rm.Decoder(rm.ModelConfig(vocab=VOCAB, dim=16)), segment=S, slots=K).double()
        with torch.no_grad():
            assert_close(slug, model(ids_of(T)).logits, alone(model, ids_of(T)), 1e-12)


def test_lm2_with_shut_input_and_open_forget_gates_is_a_static_memory() -> None:
    model = build("lm2", segment=S, slots=K)
    with torch.no_grad():
        for block in model.blocks:
            block.update.to_input.bias.fill_(-1e3)
            block.update.to_forget.bias.fill_(1e3)
        start = model(ids_of(1)).state.memory
        end = model(ids_of(T)).state.memory
    for a, b in zip(end.banks, start.banks):
        assert torch.equal(a, b)


def test_parity_memformer_replay_is_full_back_propagation() -> None:
    """The paper's MRBP: the exact gradients from one segment's graph at a time."""
    model, ids = build("memformer", segment=S, slots=K), ids_of(4 * S)
    targets, grads = ids.roll(-1, 1), []

    def step(piece, state):
        out = model(piece[0], state, targets=piece[1])
        return out.loss, out.state

    pieces = list(zip(ids.split(S, 1), targets.split(S, 1)))
    for replayed in (False, True):
        model.zero_grad()
        if replayed:
            replay(step, pieces)
        else:
            state, total = None, 0.0
            for piece in pieces:
                loss, state = step(piece, state)
                total = total + loss
            total.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert_gradients_close("memory replay", grads[1], grads[0], 1e-10)
    together = [torch.cat([g.flatten() for g in found.values()]) for found in grads]
    assert_parity("memformer", "full back-propagation through time (memory replay)", together[1], together[0], 1e-10)


def test_rxt_starts_from_noise_that_is_saved_and_not_trained() -> None:
    model = build("rxt", segment=S, slots=40)
    assert "start" in model.state_dict() and "start" not in dict(model.named_parameters())
    assert 0.9 < model.start.std() < 1.1
