"""Checkpoints in the layout of the reference implementations, and what the reference equations make of them, in a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import remanence as rm
from parity import assert_parity
from remanence.errors import UsageError
from remanence.memory.convert import convert_armt, convert_rmt, hyper_parameters, load_reference

transformers = pytest.importorskip("transformers", reason="the checkpoints are around models of transformers (extra 'hf')")

VOCAB, DIM, S, M, KEY = 23, 16, 6, 3, 8
LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
backbones = pytest.mark.parametrize("name", LAYERS)


def backbone(name: str, seed: int = 0) -> Any:
    options = {"vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
               "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    options |= {"intermediate_size": 24} if name == "gpt_neox" else {}
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **options)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def rmt_checkpoint(name: str, model: Any, wrapper: str = "memory_cell.") -> dict[str, Tensor]:
    """As a RecurrentWrapper saves it, with the mask that older versions of transformers keep as a buffer."""
    buffer = {"gpt2": "transformer.h.0.attn.bias", "gpt_neox": "gpt_neox.layers.0.attention.rotary_emb.inv_freq"}[name]
    inner = {f"model.{key}": tensor.clone() for key, tensor in model.state_dict().items()} | {f"model.{buffer}": torch.ones(2)}
    return {wrapper + key: tensor for key, tensor in ({"memory": torch.randn(M, DIM)} | inner).items()}


def armt_checkpoint(name: str, model: Any, wrapper: str = "memory_cell.") -> dict[str, Tensor]:
    """As an AssociativeRecurrentWrapper saves it: each layer is within one that holds W_mq, W_mk, W_mv, W_mb beside it."""
    checkpoint = {}
    for key, tensor in rmt_checkpoint(name, model, wrapper).items():
        where, found, rest = key.partition(f"{LAYERS[name]}.")
        index, _, inner = rest.partition(".")
        checkpoint[f"{where}{found}{index}.layer.{inner}" if found else key] = tensor
    for index in range(2):
        part = f"{wrapper}model.{LAYERS[name]}.{index}."
        checkpoint |= {
            part + "W_mq.weight": torch.randn(KEY, DIM),
            part + "W_mk.weight": 2 * torch.randn(KEY, DIM),  # keys so long that the 1e-5 beside their square is lost in rounding
            part + "W_mv.weight": torch.randn(DIM, DIM) / 4,
            part + "W_mb.weight": torch.randn(1, DIM) / 4,
            part + "W_mb.bias": torch.randn(1),
        }
    return checkpoint


def parts_of(name: str, model: Any) -> tuple[Callable[[Tensor], Tensor], list[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]:
    """What comes before the layers, the layers, and what comes after, as functions of [B, T, dim]."""

    def place(h: Tensor) -> Tensor:
        return torch.arange(h.shape[1])[None]

    if name == "gpt2":
        base = model.transformer
        layers = [lambda h, block=block: block(h) for block in base.h]
        return lambda h: h + base.wpe(place(h)), layers, base.ln_f
    base = model.gpt_neox
    layers = [lambda h, layer=layer: layer(h, position_embeddings=base.rotary_emb(h, place(h))) for layer in base.layers]
    return lambda h: h, layers, base.final_layer_norm


def rmt_loop(model: Any, memory: Tensor, ids: Tensor) -> Tensor:
    """The reference's cell: hidden_states[-1] at the last m positions are the next segment's memory; all of it goes through the model."""
    memory, outputs = memory.repeat(len(ids), 1, 1), []
    for x in ids.split(S, 1):
        both = torch.cat([memory, model.get_input_embeddings()(x), memory], 1)
        out = model(inputs_embeds=both, output_hidden_states=True)
        outputs.append(out.logits[:, M:-M])
        memory = out.hidden_states[-1][:, -M:]
    return torch.cat(outputs, 1)


def phi(x: Tensor) -> Tensor:
    x = torch.cat([x.relu(), (-x).relu()], -1)
    return torch.cat([x] * 3, -1) * torch.cat([x.roll(j, -1) for j in (1, 2, 3)], -1)


def armt_loop(name: str, model: Any, checkpoint: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The reference's wrapper around each layer: read, run, write; nothing is read in the first segment, and its keys are new in full."""
    enter, layers, leave = parts_of(name, model)
    memory: list[Any] = [None] * len(layers)
    outputs = []
    for x in ids.split(S, 1):
        h = enter(torch.cat([model.get_input_embeddings()(x), checkpoint["memory_cell.memory"].repeat(len(ids), 1, 1)], 1))
        for l, layer in enumerate(layers):
            wq, wk, wv, wb, bias = (
                checkpoint[f"memory_cell.model.{LAYERS[name]}.{l}.{part}"]
                for part in ("W_mq.weight", "W_mk.weight", "W_mv.weight", "W_mb.weight", "W_mb.bias")
            )
            if memory[l] is not None:
                A, z = memory[l]
                q = phi(h @ wq.T)
                h = torch.einsum("btk,bkd->btd", q, A) / (torch.einsum("bk,btk->bt", z, q)[..., None] + 1e-5) + h
            h = layer(h)
            tokens = h[:, -M:]
            k, v, strength = phi(tokens @ wk.T), tokens @ wv.T, (tokens @ wb.T + bias).sigmoid()
            new: Tensor | float = 1.0
            if memory[l] is None:
                A, z = torch.zeros(len(ids), k.shape[-1], DIM), torch.zeros(len(ids), k.shape[-1])
            else:
                A, z = memory[l]
                known = torch.einsum("bk,bmk->bm", z, k)[..., None] + 1e-5
                v = v - torch.einsum("bmk,bkd->bmd", k, A) / known
                new = (1 - known / (k.square().sum(-1, keepdim=True) + 1e-5)).clip(0, 1)
            memory[l] = A + torch.einsum("bmk,bmd,bmx->bkd", k, v, strength), z + (new * k).sum(1)
        outputs.append(model.get_output_embeddings()(leave(h))[:, :-M])
    return torch.cat(outputs, 1)


def empty(slug: str, name: str, checkpoint: dict[str, Tensor]) -> rm.Model:
    """A memory of other weights than the checkpoint's."""
    return rm.memory(slug, backbone=backbone(name, seed=1), segment=S, **hyper_parameters(checkpoint)).eval()


@backbones
@torch.no_grad()
def test_parity_rmt(name: str) -> None:
    model, ids = backbone(name), torch.randint(VOCAB, (2, 3 * S + 4))
    checkpoint = rmt_checkpoint(name, model)
    assert hyper_parameters(checkpoint) == {"tokens": M}
    memory = empty("rmt", name, checkpoint)
    load_reference(memory, checkpoint)
    want = rmt_loop(model, checkpoint["memory_cell.memory"], ids)
    assert_parity("rmt", f"the reference's cell, re-derived, around transformers {type(model).__name__}", memory(ids).logits, want)


@backbones
@torch.no_grad()
def test_parity_armt(name: str) -> None:
    model, ids = backbone(name), torch.randint(VOCAB, (2, 3 * S + 4))
    checkpoint = armt_checkpoint(name, model)
    assert hyper_parameters(checkpoint) == {"tokens": M, "key_dim": KEY}
    memory = empty("armt", name, checkpoint)
    load_reference(memory, checkpoint)
    want = armt_loop(name, model, checkpoint, ids)
    assert_parity("armt", f"the reference's wrapper, re-derived, around transformers {type(model).__name__}", memory(ids).logits, want)


def test_names() -> None:
    checkpoint = armt_checkpoint("gpt_neox", backbone("gpt_neox"))
    names = set(convert_armt(checkpoint))
    assert {"prompt", "associations.0.to_q.weight", "associations.1.to_beta.bias"} <= names
    assert "backbone.hf.gpt_neox.layers.1.attention.query_key_value.weight" in names and not any(".layer." in name for name in names)
    assert {name for name in names if "associations" in name} == {
        f"associations.{l}.to_{part}" for l in (0, 1) for part in ("q.weight", "k.weight", "v.weight", "beta.weight", "beta.bias")
    }
    for wrapper in ("", "module.memory_cell."):
        assert set(convert_rmt(rmt_checkpoint("gpt2", backbone("gpt2"), wrapper))) == set(
            convert_rmt(rmt_checkpoint("gpt2", backbone("gpt2")))
        )


def test_what_does_not_fit_is_refused() -> None:
    model = backbone("gpt2")
    rmt, armt = rmt_checkpoint("gpt2", model), armt_checkpoint("gpt2", model)
    layer = "memory_cell.model.transformer.h.0."
    for convert, checkpoint, message in (
        (convert_rmt, {"weight": torch.ones(1)}, "has no 'memory'"),
        (convert_rmt, armt, "W_mq.weight; it is one of ARMT"),
        (convert_armt, rmt, "has no W_mq.weight"),
        (convert_armt, armt | {layer + "W_mb.weight": torch.ones(4, DIM)}, "has 4 rows; armt has one strength"),
        (convert_armt, armt | {layer + "act.p.weight": torch.ones(1)}, "adaptive computation time that armt does not have"),
        (convert_armt, armt | {"memory_cell.sink": torch.ones(1, DIM)}, "a sink token"),
        (convert_armt, {k: v for k, v in armt.items() if not k.startswith(layer + "W_")}, r"the layers \[1\] have a memory"),
        (convert_rmt, rmt | {"other.weight": torch.ones(1)}, "other.weight lies outside of the memory cell"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(checkpoint)
    memory = empty("armt", "gpt2", armt)
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    wpe = "memory_cell.model.transformer.wpe.weight"
    for checkpoint, message in (
        (armt | {wpe: torch.ones(35, DIM)}, "wrap_pos=True"),
        (armt | {"memory_cell.model.extra.weight": torch.ones(1)}, "backbone.hf.extra.weight of the checkpoint has no place"),
        ({k: v for k, v in armt.items() if k != wpe}, "has no backbone.hf.transformer.wpe.weight"),
    ):
        with pytest.raises(UsageError, match=message):
            load_reference(memory, checkpoint)
    assert all(torch.equal(tensor, before[name]) for name, tensor in memory.state_dict().items())
    with pytest.raises(UsageError, match="memory is of kind 'hf'"):
        load_reference(memory.backbone, rmt)
