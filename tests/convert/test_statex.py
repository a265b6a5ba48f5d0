"""StateX: what each way of expanding keeps and changes, and the exact equalities that it promises."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import assert_close
from parity import assert_parity
from remanence import Decoder, Model, ModelConfig, load
from remanence.convert.statex import statex
from remanence.errors import UnknownName, UsageError
from remanence.recipes import statex as recipe

MAMBA2 = {"mixer": "mamba2", "head_dim": 8, "state_size": 4, "groups": 2}


def decoder(spec: dict, repeat: int = 3, dtype: torch.dtype = torch.float32) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab=20, dim=32, layers=[spec], repeat=repeat, ffn=1)).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def ids() -> Tensor:
    return torch.randint(20, (2, 70), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("inherit", ["merge_zero", "merge_grow"])
def test_parity_of_a_wider_mamba2_with_nothing_to_read(inherit: str) -> None:
    model = decoder(MAMBA2)
    wide = statex(model, every=2, inherit=inherit)
    assert_parity("statex", f"mamba2 before it was widened ({inherit})", wide(ids()).logits, model(ids()).logits)
    assert [block.mixer.config["state_size"] for block in wide.blocks] == [16, 4, 16]


def test_a_zero_b_and_c_stay_zero_and_a_fresh_b_learns() -> None:
    """The gradient of B goes through C and the other way round, so merge_zero's new channels never move; merge_grow's C does."""
    for inherit, moves in (("merge_zero", False), ("merge_grow", True)):
        wide = statex(decoder(MAMBA2), every=3, inherit=inherit)
        wide(ids(), targets=ids()).loss.backward()
        mixer = wide.blocks[0].mixer
        B, C = mixer.conv.weight.grad[64:].split(32)  # type: ignore[union-attr]
        new = torch.cat([part.unflatten(0, (2, -1))[:, 4:].flatten() for part in (B, C)])
        assert bool(new.any()) == moves


def test_copied_rows_read_four_times_as_much() -> None:
    """merge_copy: what is read from the state is multiplied by the factor; D x is not."""
    model = decoder({**MAMBA2, "groups": 1}, 1, torch.float64)
    wide = statex(model, inherit="merge_copy")
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    for block in (model.blocks[0], wide.blocks[0]):
        nn.init.zeros_(block.mixer.D)
        block.mixer.norm = nn.Identity()
    assert_close("y", wide.blocks[0].mixer(x)[0], 4 * model.blocks[0].mixer(x)[0], 1e-12)


def test_parity_of_a_merged_gla_masked_to_its_blocks() -> None:
    """One head whose state is kept to the blocks of the old heads, with each head's norm: the multi-head layer."""
    H, model = 4, decoder({"mixer": "gla"}, 1, torch.float64)
    old, new = model.blocks[0].mixer, statex(model, inherit="merge").blocks[0].mixer
    assert (old.heads, new.heads, new.norm.weight.shape) == (H, 1, (32,))
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    q, k, v = new.to_qkv(x).split(new.sizes, -1)
    decay = (F.logsigmoid(new.to_decay(x)) / new.gate_normalizer).exp()
    K, V = q.shape[-1], v.shape[-1]
    mask = torch.block_diag(*[torch.ones(K // H, V // H, dtype=x.dtype)] * H)
    S, reads = x.new_zeros(2, K, V), []
    for t in range(x.shape[1]):
        S = decay[:, t, :, None] * S + k[:, t, :, None] * v[:, t, None] * mask
        reads.append(torch.einsum("bk,bkv->bv", q[:, t] * (K // H) ** -0.5, S))
    o = torch.stack(reads, 1).unflatten(-1, (H, -1))
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * new.norm.weight.view(H, -1)
    y = new.out(o.flatten(2) * F.silu(new.to_gate(x)))
    assert_parity("statex", "the multi-head gla", y, old(x)[0], 1e-10)


def test_one_head_costs_nothing_and_holds_more() -> None:
    model = decoder({"mixer": "gla"})
    new = statex(model, every=2)
    weights = [sum(p.numel() for p in m.blocks[0].mixer.parameters()) for m in (model, new)]
    assert weights[1] - weights[0] == 32 - 8  # the norm's
    state, wide = model(ids()).state, new(ids()).state
    assert [b.memory.numel() / a.memory.numel() for a, b in zip(state.layers, wide.layers)] == [4, 1, 4]


def test_fresh_layers_are_fresh_and_the_others_are_copies(tmp_path) -> None:
    for spec, kept in (({"mixer": "gla"}, set()), (MAMBA2, {"D", "out.weight"})):
        model = decoder(spec)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        torch.manual_seed(3)
        new = statex(model, every=2)
        after = new.state_dict()
        for name, tensor in before.items():
            assert torch.equal(tensor, model.state_dict()[name])
            inside = name.startswith(("blocks.0.mixer", "blocks.2.mixer"))
            if not inside and not (spec["mixer"] == "gla" and name in ("blocks.0.norm.weight", "blocks.2.norm.weight")):
                assert torch.equal(after[name], tensor), name
            elif inside:
                same = after[name].shape == tensor.shape and torch.equal(after[name], tensor)
                assert same == (name.split("mixer.")[1] in kept), name
        if spec["mixer"] == "gla":
            assert torch.equal(after["blocks.0.norm.weight"], torch.ones(32))
        else:  # z, x and dt go over
            old, wide = before["blocks.0.mixer.to_zxbcdt.weight"], after["blocks.0.mixer.to_zxbcdt.weight"]
            assert torch.equal(old[:128], wide[:128]) and torch.equal(old[-8:], wide[-8:])
        new.save(tmp_path / spec["mixer"])
        assert torch.equal(load(tmp_path / spec["mixer"])(ids()).logits, new(ids()).logits)
        statex(model, every=1)(ids(), targets=ids()).loss.backward()


def test_wrong_use() -> None:
    model = decoder({"mixer": "gla", "heads": 1})
    with pytest.raises(UsageError, match="layer 1 is a gla of one head"):
        statex(model)
    with pytest.raises(UsageError, match="'merge_copy'; none of layers 1, 7, ... is of a mixer"):
        statex(model, inherit="merge_copy")
    with pytest.raises(UsageError, match="none of layers"):
        statex(decoder({"mixer": "mingru"}))
    with pytest.raises(UnknownName, match="merge_zero"):
        statex(model, inherit="merge_zeros")
    with pytest.raises(UsageError, match="every is 0"):
        statex(model, every=0)
    with pytest.raises(UsageError, match="expands the layers of a Decoder"):
        statex(Model())  # type: ignore[arg-type]


def test_the_recipe_runs_and_goes_on(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(recipe.WAYS, "mamba2", ("continue", "none"))
    run = recipe.recipe(fast=True, memory="mamba2", device="cpu", steps=2)
    ends = run.start(tmp_path, quiet=True)
    assert set(ends) == {"mamba2/pretrained", "mamba2/continue", "mamba2/none"}
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    size = {row["memory"]: row["state_bytes"] for row in rows}
    assert size["mamba2/none"] > size["mamba2/continue"] == size["mamba2/pretrained"]
    assert (tmp_path / "curve.png").exists()
    assert recipe.recipe(fast=True, memory="mamba2", device="cpu", steps=2).start(tmp_path, quiet=True) == ends
    with pytest.raises(UsageError, match="reads no folder"):
        recipe.recipe(data=tmp_path)
    with pytest.raises(UnknownName, match="mamba2"):
        recipe.recipe(memory="mamba")
