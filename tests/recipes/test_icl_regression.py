"""The recipe icl-regression: layout and curriculum, reference predictors, rows, going on, equal sizes, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from remanence.errors import UnknownName, UsageError
from remanence.recipes import icl_regression as icl
from remanence.tasks.base import IGNORE
from remanence.train import find_recipe


def test_pieces_and_their_curriculum() -> None:
    data = icl.Sequences(3, 5, 4, 0.0, 80)
    assert [data.dims(index) for index in (0, 9, 10, 39, 40, 79)] == [1, 1, 2, 4, 4, 4]
    piece, again = data.batch(0, 12), data.batch(0, 12)
    assert piece.ids.shape == (3, 10, 5) and piece.targets is not None and piece.targets.shape == (3, 10, 1, 5)
    assert torch.equal(piece.ids, again.ids) and not torch.equal(piece.ids, data.batch(0, 13).ids)
    assert piece.count == 15 and torch.equal(piece.targets[:, ::2, 0, 0], piece.ids[:, 1::2, 0])  # asked at x, told after it
    assert (piece.targets[:, 1::2] == IGNORE).all() and (piece.ids[:, ::2, 3:] == 0).all() and piece.ids[:, ::2, 2].abs().min() > 0


def test_reference_predictors_and_a_model_that_cannot_look_ahead() -> None:
    x, y = icl.stream(np.random.default_rng(0), 400, 8, 2, 0.0)
    error = {name: ((said - y) ** 2).mean((0, 2)) / 2 for name, said in icl.references(x, y, 0.0).items()}
    assert set(error) == {"zero", "3 nearest", "one gradient step", "one pass of SGD", "ridge"}
    assert error["ridge"][2:].max() < 1e-6 and 0.7 < error["zero"].mean() < 1.3
    for name in ("3 nearest", "one gradient step", "one pass of SGD"):
        assert error[name][0] == error["zero"][0] and error["ridge"][7] < error[name][7] < error["zero"][7]
    noisy = icl.references(*icl.stream(np.random.default_rng(0), 400, 8, 2, 0.5), 0.5)
    assert "least squares" in noisy and not np.allclose(noisy["ridge"], noisy["least squares"])

    made = icl.recipe(fast=True, device="cpu", memory="attention@")
    model = made.build(made.cells[0]).eval()
    said = icl.answers(model, x[:4], y[:4])
    other = y[:4].copy()
    other[:, 3] += 1
    changed = icl.answers(model, x[:4], other)
    assert said.shape == (4, 8, 1) and np.allclose(said[:, :4], changed[:, :4], atol=1e-6) and not np.allclose(said[:, 4:], changed[:, 4:])


def test_rows_and_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_recipe("icl-regression") is icl
    ends = icl.recipe(fast=True, device="cpu", memory="attention@noise=0.5").start(tmp_path, quiet=True)
    ran, run = [], icl.Regression._run
    monkeypatch.setattr(icl.Regression, "_run", lambda self, cell, *rest: ran.append(cell.name) or run(self, cell, *rest))
    again = icl.recipe(fast=True, device="cpu", memory="attention@noise=0.5,gated-deltanet@").start(tmp_path, quiet=True)
    assert ran == ["gated-deltanet"] and again["attention@noise=0.5"] == ends["attention@noise=0.5"]
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    names = {row["memory"] for row in rows}
    assert {"attention@noise=0.5", "gated-deltanet", "ridge", "ridge@noise=0.5", "least squares@noise=0.5", "zero"} <= names
    for name in names:
        mine = [row for row in rows if row["memory"] == name]
        assert [row["examples"] for row in mine] == list(range(5))
        assert all(row["mse"] >= 0 and row["from_bayes"] >= 0 and row["standard_error"] > 0 for row in mine if "ridge" not in name)
    for row in (row for row in rows if row["memory"].startswith("ridge")):
        assert row["from_bayes"] == 0 and row["mse"] == row["bayes"]
    one = next(row for row in rows if row["memory"] == "attention@noise=0.5")
    assert one["nearest"] in one["distances"] and one["noise"] == 0.5 and one["budget"] == 4 and one["parameters"] > 0
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_every_default_cell_is_as_large_as_attention() -> None:
    made = icl.recipe(device="cpu")
    sizes = {cell.name: sum(p.numel() for p in made.build(cell).parameters()) for cell in made.cells}
    assert len(sizes) == 6 and max(sizes.values()) < 1.1 * min(sizes.values()), sizes


def test_bad_flags_are_one_sentence() -> None:
    with pytest.raises(UnknownName, match="attentoin"):
        icl.recipe(memory="attentoin")
    with pytest.raises(UsageError, match="noise is 'loud'; it must be a number >= 0"):
        icl.recipe(memory="attention@noise=loud")
    with pytest.raises(UsageError, match="noise is -1"):
        icl.recipe(memory="attention@noise=-1")
    with pytest.raises(UsageError, match="reads no folder"):
        icl.recipe(data=".")
