"""Models: what a Decoder returns, how its layers are written, and its folder on the disk, whole or refused."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import remanence as rm
from helpers import assert_close
from remanence import Decoder, Model, ModelConfig, Span
from remanence.errors import FileError, RemanenceError, UsageError
from remanence.models import parse_layers

CONFIG: dict[str, Any] = {"vocab": 11, "dim": 16, "layers": "gated-deltanet, attention", "ffn": 1.5}


def small(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(**{**CONFIG, **changes})).eval()


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(batch + length))


# What comes out


def test_logits_hidden_loss() -> None:
    model, x = small(), ids(2, 9)
    targets = x.roll(-1, 1)
    targets[0, 3:] = -100
    out = model(x, targets=targets)
    assert out.logits.shape == (2, 9, 11) and out.hidden.shape == (2, 9, 16) and out.state.tokens == 9
    assert_close("logits", out.logits, model.head(out.hidden), 1e-6)
    kept = targets != -100
    want = -out.logits.log_softmax(-1)[kept].gather(1, targets[kept][:, None]).mean()
    assert_close("loss", out.loss, want, 1e-6)
    assert model(x).loss is None
    assert_close("int32 ids", model(x.int()).logits, out.logits, 0)


def test_last_and_none() -> None:
    model, x = small(), ids(3, 9)
    whole = model(x)
    assert torch.equal(model(x, logits="last").logits, model.head(whole.hidden[:, -1:]))
    out = model(x, logits="none", targets=x)
    assert out.logits is None and out.hidden.shape == (3, 9, 16)
    assert_close("loss without logits", out.loss, model(x, targets=x).loss, 1e-6)
    for side in ("left", "right"):
        span = Span.from_lengths([9, 4, 1], 9, side)
        every = model(x, span=span).logits
        last = [8, 8, 8] if side == "left" else [8, 3, 0]
        assert_close(f"last, padded {side}", model(x, span=span, logits="last").logits[:, 0], every[range(3), last], 1e-6)


def test_state_header_is_of_kind_and_configuration() -> None:
    same, other = small(), small(ffn=2.0)
    state = small()(ids(1, 3)).state
    assert state.header == same.header != other.header and same.header[0] == "decoder"
    same(ids(1, 3), state)
    with pytest.raises(UsageError, match="configuration"):
        other(ids(1, 3), state)


# Layers as data


def test_parse_layers() -> None:
    delta, full = {"mixer": "gated-deltanet"}, {"mixer": "attention"}
    assert parse_layers("3 x gated-deltanet, 1 x attention") == [delta, delta, delta, full]
    assert parse_layers(["attention", "2 x gated-deltanet", {"mixer": "attention", "window": 4, "times": 2}]) == [
        full, delta, delta, {"mixer": "attention", "window": 4}, {"mixer": "attention", "window": 4},
    ]  # fmt: skip
    assert parse_layers(parse_layers(" 2 x  attention ")) == [full, full]


@pytest.mark.parametrize(
    "layers", ["", [], "attention;attention", "0 x attention", "x attention", "attention,", [{"window": 3}], "atention"]
)
def test_layers_that_make_no_sense(layers: Any) -> None:
    with pytest.raises(UsageError):
        ModelConfig(vocab=5, layers=layers)


def test_stack() -> None:
    model = small(layers=["gated-deltanet", {"mixer": "attention", "ffn": 0, "heads": 2}], repeat=2)
    assert [type(block.mixer).__name__ for block in model.blocks] == ["GatedDeltaNet", "Attention"] * 2
    assert [block.ffn is None for block in model.blocks] == [False, True] * 2 and model.blocks[1].mixer.heads == 2
    assert len(model(ids(1, 4)).state.layers) == 4


def test_hooks_see_and_change_every_block() -> None:
    model, seen = small(), []

    def before(index: int, h: torch.Tensor) -> torch.Tensor:
        seen.append(("before", index))
        return h

    def after(index: int, h: torch.Tensor) -> torch.Tensor:
        seen.append(("after", index))
        return h * 0 if index == 1 else h

    hidden, _ = model.encode(model.embed(ids(1, 3)), before=before, after=after)
    assert seen == [("before", 0), ("after", 0), ("before", 1), ("after", 1)] and not hidden.any()


def test_rm_model_takes_a_config_or_a_preset() -> None:
    assert isinstance(rm.model(ModelConfig(**CONFIG)), Decoder)
    with pytest.raises(UsageError, match="dim cannot be given beside it"):
        rm.model(ModelConfig(**CONFIG), dim=3)


# On the disk


@pytest.mark.parametrize("tie", [True, False])
def test_a_saved_model_comes_back_to_the_same_bits(tmp_path: Path, tie: bool) -> None:
    model, x = small(tie=tie), ids(2, 7)
    model.save(tmp_path / "m", {"seed": 0})
    again = rm.load(tmp_path / "m")
    assert type(again) is Decoder and not again.training and again.config == model.config and again.header == model.header
    assert torch.equal(again(x).logits, model(x).logits)
    assert (again.unembedding.weight is again.embedding.weight) == tie
    assert ("unembedding.weight" in load_file(tmp_path / "m" / "model.safetensors")) == (not tie)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["provenance"] == {"seed": 0}
    torch.testing.assert_close(again(x, model(x).state).logits, model(x, model(x).state).logits, rtol=0, atol=0)  # states fit as well


def test_dtype_is_kept(tmp_path: Path) -> None:
    small().bfloat16().save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert rm.load(tmp_path)(ids(1, 2)).logits.isfinite().all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small().save(tmp_path)
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    header = json.loads((folder / "config.json").read_text())
    config = changes.pop("config", {})
    header = {**header, **changes, "config": {**header["config"], **config}}
    (folder / "config.json").write_text(json.dumps(header))


def test_missing_files_are_named(folder: Path) -> None:
    with pytest.raises(UsageError, match="nowhere/config.json does not exist"):
        rm.load(folder / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="model.safetensors does not exist"):
        rm.load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "oracle"}, "kind 'oracle'; this version knows .*decoder"),
        ({"version": 99}, "version 99; this library reads"),
        ({"format": "other"}, "format 'other'"),
        ({"sha256": "0"}, "does not match the digest"),
        ({"config": {"colour": "red"}}, "colour"),
        ({"config": {"dim": 0}}, "dim is 0"),
        ({"config": {"dim": 24}}, "does not fit"),
        ({"config": {"vocab": 12}}, "does not fit"),
        ({"config": {"repeat": 2}}, "does not fit"),
        ({"config": {"layers": ["attention"]}}, "does not fit"),
        ({"config": {"layers": "no-such-mixer"}}, "no-such-mixer"),
        ({"config": {"ffn": "much"}}, "ffn"),
    ],
)
def test_a_changed_configuration_is_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit(folder, **changes)
    with pytest.raises(RemanenceError, match=words) as caught:
        rm.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '"format"', '{"format": "remanence-model"}', "\x00"])
def test_a_configuration_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UsageError, match="config.json is not a model configuration"):
        rm.load(folder)


def test_tampered_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["norm.weight"] = weights["norm.weight"] + 1e-7
    save_file(weights, path)
    with pytest.raises(UsageError, match="does not match the digest"):
        rm.load(folder)


@settings(max_examples=20)
@given(st.floats(0, 0.9999))
def test_truncated_weights_are_refused(tmp_path_factory: pytest.TempPathFactory, part: float) -> None:
    folder = tmp_path_factory.mktemp("model")
    small().save(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(UsageError, match="model.safetensors is truncated"):
        rm.load(folder)


@settings(max_examples=60)
@given(st.sampled_from(["config.json", "model.safetensors"]), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, file: str, where: float, bit: int) -> None:
    """In the weights it is found by their digest; in the configuration it may be a legal other value, but never a traceback."""
    folder = tmp_path_factory.mktemp("model")
    small().save(folder)
    data = bytearray((folder / file).read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    (folder / file).write_bytes(data)
    try:
        model = rm.load(folder)
    except RemanenceError as error:
        assert "\n" not in str(error)
        return
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small().parameters(), strict=True))


def test_a_save_that_fails_leaves_the_old_model(folder: Path) -> None:
    before = small()(ids(1, 5)).logits
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(FileError, match="what was there before is unchanged"):
            small(dim=64).save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(rm.load(folder)(ids(1, 5)).logits, before)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_is_saved_into_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; a model is saved into a folder"):
        small().save(tmp_path / "file")


def test_every_kind_of_model_can_be_built() -> None:
    assert Model._kinds["decoder"] is Decoder
    model = Model._kinds["decoder"].build({**CONFIG, "layers": [{"mixer": "attention"}]})
    assert F.softmax(model(ids(1, 2)).logits, -1).sum(-1).sub(1).abs().max() < 1e-5
