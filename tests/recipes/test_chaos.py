"""The chaos recipe: rows, resume, and refusals; its forecasts from the oracle's own numbers are valid to the end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from remanence.errors import UnknownName, UsageError
from remanence.recipes import chaos
from remanence.train import find_recipe


def test_rows_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_recipe("chaos") is chaos
    small = chaos.recipe(fast=True, device="cpu", memory="rhn-gate-attention")
    small.systems = ["lorenz96"]
    ends = small.start(tmp_path, quiet=True)
    assert set(ends) == {"rhn-gate-attention/lorenz96"}
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["cell"] == "rhn-gate-attention" and row["system"] == "lorenz96" and row["vpt"] == ends["rhn-gate-attention/lorenz96"] >= 0
    assert {"median", "standard_error", "persistence", "one_step", "time", "parameters", "seconds", "n", "budget"} <= row.keys()
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"

    small.cells.append("transformer")
    ran = []
    original = chaos.ChaosGrid._run
    monkeypatch.setattr(chaos.ChaosGrid, "_run", lambda self, cell, *rest: ran.append(cell) or original(self, cell, *rest))
    again = small.start(tmp_path, quiet=True)
    assert ran == ["transformer"] and again["rhn-gate-attention/lorenz96"] == row["vpt"]
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 2


def test_every_cell_builds_and_a_fresh_one_is_persistence() -> None:
    grid = chaos.recipe(fast=True)
    task = chaos.SYSTEMS["lorenz96"]()
    task.settle = 1
    examples = task.sample(n=2, length=4, horizon=5)
    for cell in chaos.CELLS:
        got = chaos.forecast(grid.build(cell, 8).eval(), examples, task.mean)
        want = np.stack([task.persistence(example) for example in examples])
        assert np.abs(got - want).max() < 1e-5


def test_windows_are_a_function_of_seed_and_index() -> None:
    series = np.random.default_rng(0).standard_normal((3, 20, 2))
    data = chaos.Windows(series, 7, 4, 0.0)
    one, same, other = data.batch(0, 5), data.batch(0, 5), data.batch(0, 6)
    assert one.ids.shape == (4, 7, 2) and one.targets.shape == (4, 7, 1, 2)
    assert one.ids.equal(same.ids) and not one.ids.equal(other.ids)
    assert one.ids[:, 1:].equal(one.targets[:, :-1, 0])


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean gru-gate"):
        chaos.recipe(memory="gru-gat")
    with pytest.raises(UsageError, match="named once"):
        chaos.recipe(memory="gru,gru")
    with pytest.raises(UsageError, match="reads no folder"):
        chaos.recipe(data=tmp_path)
