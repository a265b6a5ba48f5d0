"""CCM: the recurrence is one parallel pass with block masks, as the published training has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence.mixers.attention import rotate
from segment_memories import build, ids_of

S, C, H = 4, 2, 4
SEGMENTS = 4


def parallel(model: rm.Model, ids: Tensor) -> Tensor:
    """All segments and their compression tokens at once: [c_1 C c_2 C ..]; merged keys and values replace those of each C for later blocks.

    Masks and positions as in snu-mllab/Context-Memory: a token sees its own block causally, and of earlier blocks all C (concat) or the
    mean of their keys and values (merge); the i-th C of a block is at the position after its text plus i, and does not advance the count.
    """
    decoder, batch = model.backbone, len(ids)
    blocks = ids.split(S, 1)
    h, block, comp, position = [], [], [], []
    for b, x in enumerate(blocks):
        h += [decoder.embedding(x), model.comp.expand(batch, -1, -1)]
        block += [b] * (x.shape[1] + C)
        comp += [False] * x.shape[1] + [True] * C
        position += list(range(b * S, b * S + x.shape[1] + C))
    h, block, comp, position = torch.cat(h, 1), torch.tensor(block), torch.tensor(comp), torch.tensor(position)
    index = torch.arange(len(block))
    own = (block[:, None] == block[None]) & (index[:, None] >= index[None])
    earlier = (block[:, None] > block[None]) & comp[None]
    for layer, stack in enumerate(decoder.blocks):
        lora = model.lora.weights(decoder, layer)

        def project(x: Tensor, name: str, layer=stack, lora=lora) -> Tensor:
            plain, changed = x @ layer.get_parameter(name).T, x @ lora[name].T
            return torch.where(comp[:, None], changed, plain)

        q, k, v = (part.unflatten(-1, (H, -1)) for part in project(stack.norm(h), "mixer.to_qkv.weight").chunk(3, -1))
        q, k = (rotate(part, position.expand(batch, -1), 10000.0, part.shape[-1]) for part in (q, k))
        keys, values, mask = k, v, own | earlier
        if model.mode == "merge":  # SUM tokens: for each block the running mean of the earlier blocks' C, seen by its tokens alone
            mask, means = own, []
            for b in range(1, len(blocks)):
                weights = [1 / b] * b if model.rate is None else running(model.rate, b)
                where = [(block == a) & comp for a in range(b)]
                means.append([sum(w * x[:, at] for w, at in zip(weights, where)) for x in (k, v)])
                mask = torch.cat([mask, (block == b)[:, None].expand(-1, C)], 1)
            keys = torch.cat([k, *(mean[0] for mean in means)], 1)
            values = torch.cat([v, *(mean[1] for mean in means)], 1)
        score = torch.einsum("bihd,bjhd->bhij", q, keys) / q.shape[-1] ** 0.5
        o = torch.einsum("bhij,bjhd->bihd", score.masked_fill(~mask, -torch.inf).softmax(-1), values).flatten(2)
        h = h + project(o, "mixer.out.weight")
        h = h + stack.ffn(stack.ffn_norm(h))
    return decoder.unembedding(decoder.norm(h))[:, ~comp]


def running(rate: float, count: int) -> list[float]:
    """The weights of an exponential mean that starts at its first term."""
    weights = [1.0]
    for _ in range(count - 1):
        weights = [w * (1 - rate) for w in weights] + [rate]
    return weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("mode", "rate"), [("concat", None), ("merge", None), ("merge", 0.3)])
def test_parity_the_masked_parallel_pass_is_the_recurrence(mode: str, rate: float | None, dtype: torch.dtype) -> None:
    hyper = {"segment": S, "slots": C, "rank": 2, "mode": mode, "rate": rate, "train_base": True}
    model, ids = build("ccm", "2 x attention", dtype, **hyper), ids_of(SEGMENTS * S - 1)
    out, want = model(ids), parallel(model, ids)
    wide = dtype == torch.float64
    assert_parity("ccm", "snu-mllab/Context-Memory's masks in one pass", out.logits, want, 1e-10 if wide else 1e-5)
    if wide:
        grads, named = [], dict(model.named_parameters())
        for logits in (out.logits, want):
            found = torch.autograd.grad(logits.square().sum(), list(named.values()), allow_unused=True)
            grads.append({name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found)})
        assert_gradients_close("ccm", *grads, tol=1e-9)


def test_sizes_of_the_memory() -> None:
    for mode, size in (("concat", 3 * C), ("merge", C)):
        model = build("ccm", segment=S, slots=C, mode=mode, train_base=True)
        with torch.no_grad():
            memory = model(ids_of(3 * S + 1)).state.memory
        assert (
            [x.shape for x in memory.keys] == [(2, size, 4, 4)] and memory.steps.tolist() == [3, 3] and memory.position.tolist() == [12, 12]
        )
        assert bool(memory.real.all())


def test_conditional_lora_leaves_text_alone_and_the_base_frozen() -> None:
    model, ids = build("ccm", "2 x attention", segment=S, slots=C), ids_of(S)
    with torch.no_grad():  # the first segment has nothing to read: it is the backbone's, whatever the adapters are
        assert_close("first segment", model(ids).logits, model.backbone(ids).logits, 1e-12)
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"comp", "lora"}


def test_bad_arguments() -> None:
    backbone = rm.Decoder(rm.ModelConfig(vocab=13, dim=16))
    for hyper, message in (
        ({"mode": "sum"}, "mode is 'sum'"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"slots": 0}, "slots is 0; it must be an integer >= 1"),
        ({"segment": 2, "slots": 3}, "tokens is 3 and segment 2"),
    ):
        with pytest.raises(rm.errors.UsageError, match=message):
            rm.memory("ccm", backbone=backbone, **hyper)
    with pytest.raises(rm.errors.UsageError, match="no layer of full attention"):
        rm.memory("ccm", backbone=rm.Decoder(rm.ModelConfig(vocab=13, dim=16, layers="gated-deltanet")))
