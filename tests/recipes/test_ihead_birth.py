"""The recipe ihead-birth: rows by update and by claim, going on after a kill to the same numbers, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from remanence.errors import UnknownName, UsageError
from remanence.recipes import ihead_birth as birth
from remanence.train import find_recipe


def results(folder: Path) -> list[dict]:
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_rows_and_going_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_recipe("ihead-birth") is birth
    monkeypatch.setattr(birth, "EVERY", 5)  # a checkpoint every 25 updates, a measurement at each
    small = birth.recipe(fast=True, steps=30, device="cpu", memory="fixed")
    ends = small.start(tmp_path / "whole", quiet=True)
    rows = results(tmp_path / "whole")
    measured, claims = [row for row in rows if "steps" in row], [row for row in rows if "claim" in row]
    assert [row["steps"] for row in measured] == list(range(31)) and len(claims) == 3 and rows == [*measured, *claims]
    assert measured[-1]["global_loss"] < measured[0]["global_loss"] and measured[-1]["bigram_kl"] < measured[0]["bigram_kl"]
    for name in ("wo1", "wk1", "wk0", "accuracy", "previous", "target", "match"):
        assert all(0 <= row[name] <= 1 for row in measured), name
    assert ends["fixed"]["accuracy"] == measured[-1]["accuracy"] and claims[0]["births"] == ends["fixed"]["births"]
    assert (tmp_path / "whole" / "curve.png").read_bytes()[:4] == b"\x89PNG"

    calls, update = [], birth.Birth._update

    def counted(self, model, velocity, batch, step):
        calls.append(step)
        if len(calls) == 28:
            raise KeyboardInterrupt
        update(self, model, velocity, batch, step)

    monkeypatch.setattr(birth.Birth, "_update", counted)
    with pytest.raises(KeyboardInterrupt):
        small.start(tmp_path / "cut", quiet=True)
    assert small.start(tmp_path / "cut", quiet=True) == ends and results(tmp_path / "cut") == rows
    assert calls == [*range(28), *range(25, 30)]  # on from the checkpoint
    assert small.start(tmp_path / "cut", quiet=True) == ends and len(calls) == 33  # nothing left to do
    small.rows = 5
    small.steps = 40
    with pytest.raises(UsageError, match="holds a run with"):
        small.start(tmp_path / "cut", quiet=True)
    (tmp_path / "cut" / "fixed.safetensors").write_bytes(b"no")
    with pytest.raises(UsageError, match="not a checkpoint that can be resumed"):
        small.start(tmp_path / "cut", quiet=True)


def test_claims_follow_the_rows() -> None:
    def row(steps: int, bigram_kl: float, wo1: float, wk1: float, wk0: float, accuracy: float) -> dict:
        return {"steps": steps, "bigram_kl": bigram_kl, "wo1": wo1, "wk1": wk1, "wk0": wk0, "accuracy": accuracy}

    rows = [row(0, 2.0, 0, 0, 0, 0), row(10, 0.9, 0.6, 0, 0, 0), row(20, 0.3, 1, 0.6, 0, 0.2), row(30, 0.2, 1, 1, 0.9, 0.95)]
    assert birth.births(rows) == {"bigrams": 10, "wo1": 10, "wk1": 20, "wk0": 30, "accuracy": 30}
    assert [claim["holds"] for claim in birth.claims(rows)] == [True, True, True]
    assert [claim["holds"] for claim in birth.claims(rows[:3])] == [False, False, False]
    late = [rows[0], row(10, 1.9, 0, 0, 0.7, 0.8), row(20, 0.5, 1, 1, 1, 0.8)]
    assert [claim["holds"] for claim in birth.claims(late)] == [False, False, False]


def test_bad_flags_are_one_sentence() -> None:
    with pytest.raises(UnknownName, match="setting 'fix' is not known"):
        birth.recipe(memory="fix")
    with pytest.raises(UsageError, match="each setting may be named once"):
        birth.recipe(memory="fixed,fixed")
    with pytest.raises(UsageError, match="reads no folder"):
        birth.recipe(data=".")
    with pytest.raises(UsageError, match="steps"):
        birth.recipe(steps=0)
