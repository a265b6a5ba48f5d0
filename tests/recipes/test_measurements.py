"""Recipes that measure more than they train: what a fast run writes, and that a second one goes on from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from remanence.errors import UsageError
from remanence.recipes import newton, read_twice, state_collapse
from remanence.tasks.base import IGNORE


def written(out: Path) -> list[dict]:
    assert (out / "curve.png").stat().st_size > 1000
    return json.loads((out / "results.json").read_text())["rows"]


def test_newton(tmp_path: Path) -> None:
    ends = newton.recipe(fast=True).start(tmp_path, quiet=True)
    assert set(ends) == {"gru", "lstm"} and all(found[-1] < 1e-6 < found[0] for found in ends.values())
    rows = written(tmp_path)
    assert {row["memory"] for row in rows} == {"gru", "lstm"}
    assert all(row["speedup"] == row["loop_s"] / row["newton_s"] for row in rows if "speedup" in row)
    for wrong in ({"steps": 3}, {"memory": "rnn"}):
        with pytest.raises(UsageError):
            newton.recipe(**wrong)


def test_residuals_fall_quadratically() -> None:
    found = newton.residuals("gru", 16, 256, 0)
    assert found[5] < 1e-9 and any(later < 10 * earlier**2 and earlier < 0.1 for earlier, later in zip(found, found[1:]))


def test_reading_twice_repeats_the_input_and_asks_once() -> None:
    import numpy as np

    once = read_twice.make(np.random.default_rng(0), 3, 8, 1)
    twice = read_twice.make(np.random.default_rng(0), 3, 8, 2)
    length = once[0].shape[1]
    assert (twice[0] == np.concatenate([once[0], once[0]], 1)).all()
    assert (twice[1][:, :length] == IGNORE).all() and (twice[1][:, length:] == once[1]).all()


def test_read_twice(tmp_path: Path) -> None:
    read_twice.recipe(tmp_path, fast=True, memory="based@times=2+feature_dim=4").start(tmp_path, quiet=True)
    rows = written(tmp_path)
    assert {row["list"] for row in rows} == set(read_twice.STAGES[:2]) and all(0 <= row["accuracy"] <= 1 for row in rows)


def test_state_collapse(tmp_path: Path) -> None:
    state_collapse.recipe(tmp_path, fast=True).start(tmp_path, quiet=True)
    rows = written(tmp_path)
    assert {row["fix"] for row in rows} == {"none", "norm", "decay", "window"}
    assert all(0 < row["bits_per_byte"] < 20 for row in rows)
    first = {row["fix"]: row["bits_per_byte"] for row in rows if row["position"] == 32}
    assert first["window"] == pytest.approx(first["none"], rel=0.05)  # nothing has left the window yet


def test_documents_are_spread_over_a_text() -> None:
    ids = state_collapse.documents("abcdefghij" * 10, 20, 3)
    assert ids.shape == (3, 20) and ids.dtype == torch.int64 and ids[0, :3].tolist() == [97, 98, 99] and ids[2, -1] == ord("j")
