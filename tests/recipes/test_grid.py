"""The grid of small decoders: cells by name, rows as they come, resume, early stop, and the recipes built on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from remanence.cli import main
from remanence.errors import RemanenceError, UnknownName, UsageError
from remanence.recipes import _grid, mqar, selective_copying, state_tracking
from remanence.recipes._grid import Cell, Generated, Grid, accuracy, parse_cells, state_bytes
from remanence.tasks.base import IGNORE
from remanence.train import Curriculum, find_recipe


def copy(rng: np.random.Generator, rows: int, size: int, shift: int = 0):
    """A task that anything learns: name the token that is read."""
    ids = rng.integers(4, size=(rows, size))
    return ids, (ids + shift) % 4


def grid(memory: str = "mingru,retnet", **changes) -> Grid:
    cells = parse_cells(memory, {})
    small = Grid(
        "copy", "copy", cells, copy, 4, (2, 4), (4, 8), "length", lambda rows, path: path.write_bytes(b""), 150, {"shift": 0},
        rows=8, n=16, dim=16, depth=1, lr=2e-2, device="cpu",
    )  # fmt: skip
    return replace(small, **changes)


def test_cells():
    known = {"gla": ({"heads": 1}, {"heads": 4}), "attention": ({},), "no-such-mixer": ({},)}
    assert [cell.name for cell in parse_cells(None, known)] == ["gla@heads=1", "gla@heads=4", "attention"]
    assert [cell.name for cell in parse_cells("attention, gla", known)] == ["attention", "gla@heads=1", "gla@heads=4"]
    assert parse_cells("mingru@form=vanilla+expansion=2.5,gla@,mamba", known) == [
        Cell("mingru", {"form": "vanilla", "expansion": 2.5}), Cell("gla"), Cell("mamba"),
    ]  # fmt: skip
    assert all(parse_cells(cell.name if cell.hyper else cell.name + "@", known) == [cell] for cell in parse_cells(None, known))
    assert parse_cells("deltanet@negative_eigenvalues=true", {})[0].hyper == {"negative_eigenvalues": True}


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("mingruu", UnknownName, "did you mean mingru"),
        ("mingru,mingru", UsageError, "named once"),
        ("mingru@form", UsageError, "slug@name=value"),
    ],
)
def test_cells_that_are_none(text, error, says):
    with pytest.raises(error, match=says):
        parse_cells(text, {})


def test_missing_slugs_of_the_defaults_are_left_out(capsys):
    assert parse_cells(None, {"no-such-mixer": ({},), "mingru": ({},)}) == [Cell("mingru")]
    assert "no-such-mixer: not in the catalog" in capsys.readouterr().out


def test_small_sizes_get_more_rows():
    data = Generated(copy, 3, Curriculum((2, 8)))
    piece = data.batch(0, 0)
    assert piece.ids.shape == (12, 2) and torch.equal(piece.ids, data.batch(0, 0).ids) and not torch.equal(piece.ids, data.batch(0, 1).ids)
    data.curriculum.stage = 1
    assert data.batch(0, 0).ids.shape == (3, 8)


def test_accuracy_counts_targets():
    model = grid("mingru").build(Cell("mingru")).eval()
    ids = np.random.default_rng(0).integers(4, size=(10, 6))
    with torch.no_grad():
        right = model(torch.from_numpy(ids)).logits.argmax(-1).numpy()
    targets = np.where(np.arange(6) < 2, right, IGNORE)
    targets[7:] = (right[7:] + 1) % 4
    assert accuracy(model, (ids, targets), rows=4) == pytest.approx(14 / 32)
    assert state_bytes(model, 5) == 4 * 24 and state_bytes(grid("attention").build(Cell("attention")), 5) == 4 * 2 * 5 * 16


def test_it_stops_when_solved_and_writes_rows(tmp_path, capsys):
    ends = grid().start(tmp_path)
    assert ends.keys() == {"mingru", "retnet"} and all(value > 0.95 for cell in ends.values() for value in cell.values())
    assert "mingru: length 4 1" in capsys.readouterr().out and (tmp_path / "curve.png").exists()
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(row["memory"], row["length"]) for row in results["rows"]] == [(m, n) for m in ("mingru", "retnet") for n in (4, 8)]
    row = results["rows"][0]
    assert row["steps"] < row["budget"] == 150 and row["state_bytes"] == 96 and row["shift"] == 0 and row["tokens"] == 4
    assert {"seconds", "parameters", "setting", "trained", "seed", "n"} <= row.keys() and "torch" in results["meta"]["environment"]


def test_done_cells_are_not_run_again_and_a_killed_one_goes_on(tmp_path, monkeypatch):
    never = {"goal": 2.0, "steps": 40}
    whole = grid(**never).start(tmp_path / "whole", quiet=True)
    calls, batch = [], Generated.batch

    def killed(self, seed, index):
        calls.append(index)
        if len(calls) == 70:  # in the second cell
            raise KeyboardInterrupt
        return batch(self, seed, index)

    monkeypatch.setattr(Generated, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        grid(**never).start(tmp_path / "cut", quiet=True)
    rows = json.loads((tmp_path / "cut" / "results.json").read_text())["rows"]
    assert {row["memory"] for row in rows} == {"mingru"}
    assert grid(**never).start(tmp_path / "cut", quiet=True) == whole
    assert calls[:40] == list(range(40)) and calls[40:70] == list(range(30)) and 0 < calls[70] <= 29 and calls[-1] == 39
    count = len(calls)
    assert grid(**never).start(tmp_path / "cut", quiet=True) == whole and len(calls) == count


def test_a_run_that_diverges_is_a_row(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        kwargs = dict(zip(("model", "data", "config", "out"), args))
        kwargs["out"].mkdir(parents=True)
        (kwargs["out"] / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
        raise RemanenceError("the loss is nan")

    monkeypatch.setattr(_grid, "train", broken)
    grid("mingru").start(tmp_path, quiet=True)
    row = json.loads((tmp_path / "results.json").read_text())["rows"][0]
    assert row["error"] == "the loss is nan" and row["steps"] == 1 and row["accuracy"] < 0.9


def test_options_go_to_the_task_and_depth_to_the_decoder(tmp_path):
    changed = grid("mingru@shift=1+depth=2")
    assert changed.chosen(changed.cells[0]) == {"shift": 1} and len(changed.build(changed.cells[0]).blocks) == 2
    arrays = changed.make(np.random.default_rng(0), 2, 3, **changed.chosen(changed.cells[0]))
    assert (arrays[1] == (arrays[0] + 1) % 4).all()


RECIPES = {
    "mqar": (mqar, "attention@,mamba2@state_size=8", "pairs"),
    "selective-copying": (selective_copying, "mingru@depth=1", "data"),
    "state-tracking": (state_tracking, "gated-deltanet@group=s3+negative_eigenvalues=true", "length"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name, tmp_path, capsys):
    module, cells, axis = RECIPES[name]
    assert find_recipe(name) is module
    assert main(["train", name, "--fast", "--steps", "3", "--mixers", cells, "--out", str(tmp_path), "--device", "cpu"]) == 0
    rows = json.loads(Path(tmp_path, "results.json").read_text())["rows"]
    assert len({row["memory"] for row in rows}) == cells.count(",") + 1 and all(row["steps"] == 3 and axis in row for row in rows)
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["train", name, "--data", "x", "--out", str(tmp_path)]) == 2
    assert "reads no folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_every_default_cell_can_be_built(name):
    recipe = RECIPES[name][0].recipe(fast=True, device="cpu")
    assert len(recipe.cells) > 4
    for cell in recipe.cells:
        recipe.build(cell)
