"""The recipe arrow-pointing: rows for every model and canvas, the same weights on a larger canvas, and going on after a stop."""

from __future__ import annotations

import json

import pytest
import torch

from remanence.errors import UnknownName, UsageError
from remanence.recipes import arrow_pointing as arrow


def test_it_runs_writes_rows_and_goes_on(tmp_path) -> None:
    arrow.recipe(fast=True, steps=1, device="cpu", memory="vit").start(tmp_path, quiet=True)
    ends = arrow.recipe(fast=True, steps=2, device="cpu", memory="vit,plstm-vis").start(tmp_path, quiet=True)
    assert {name: end["step"] for name, end in ends.items()} == {"vit": 2, "plstm-vis": 2}
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["model"], row["canvas"], row["steps"]) for row in rows] == [
        ("vit", 64, 2), ("vit", 128, 2), ("plstm-vis", 64, 2), ("plstm-vis", 128, 2),
    ]  # fmt: skip
    assert all(row["task"] == "arrow-pointing" and row["n"] == 16 and 0 <= row["accuracy"] <= 1 for row in rows)
    steps = [json.loads(line) for line in (tmp_path / "vit" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == [1, 2]  # the first was not run again
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_weights_move_to_a_larger_canvas() -> None:
    torch.manual_seed(0)
    for name in arrow.MODELS:
        model = arrow.Pictures(name).eval()
        large = model.at(128)
        assert large(torch.zeros(1, 128, 128)).shape == (1, 2)
        assert (large is model) == (name != "mamba-nd") and model.at(64) is model
        own = dict(model.named_parameters())
        for key, parameter in large.named_parameters():
            assert key == "net.positions" or torch.equal(parameter, own[key])


def test_pictures_depend_on_seed_and_canvas_only() -> None:
    images, labels = arrow.pictures(3, 4, 64)
    again, _ = arrow.pictures(3, 2, 64)
    assert images.shape == (4, 64, 64) and images.dtype == torch.float32 and torch.equal(images[:2], again) and labels.shape == (4,)
    first, second = (arrow.Batches(2).batch(0, index) for index in (0, 1))
    assert first.targets is not None and first.targets.shape == (2, 1) and not torch.equal(first.ids, second.ids)


def test_bad_flags_are_one_sentence() -> None:
    with pytest.raises(UnknownName, match="model 'resnet' is not known"):
        arrow.recipe(memory="resnet")
    with pytest.raises(UsageError, match="each model may be named once"):
        arrow.recipe(memory="vit,vit")
    with pytest.raises(UsageError, match="reads no folder"):
        arrow.recipe(data=".")
