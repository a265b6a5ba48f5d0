"""The recipe verbatim-recall: what it trains on, rows by condition and gap, going on, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from remanence.errors import UnknownName, UsageError
from remanence.models import Decoder, ModelConfig
from remanence.recipes import verbatim_recall as verbatim
from remanence.recipes._grid import Generated
from remanence.tasks.base import IGNORE
from remanence.train import find_recipe


def test_what_is_trained() -> None:
    ids, targets = verbatim.make(np.random.default_rng(1), 8, 16)
    assert ids.shape == targets.shape == (8, 16) and ids.max() < verbatim.VOCAB
    scored = targets != IGNORE
    assert len(set(scored.sum(1))) == 1 and 6 <= scored.sum(1)[0] <= 12  # 3 .. 6 words, twice
    inside = scored[:, :-1]
    assert (targets[:, :-1][inside] == ids[:, 1:][inside]).all()


def test_rows_of_conditions_and_gaps() -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(verbatim.VOCAB, 16, "1 x mingru", embedding_std=1.0)).eval()
    rows = verbatim.surprisals(model, 0, 5, 64)
    assert [row["condition"] for row in rows] == ["repeat"] * 4 + ["permute"] * 4 + ["novel"] * 4
    for at in range(0, 12, 4):
        whole, *parts = (row["sequences"] for row in rows[at : at + 4])
        assert whole == 64 == sum(parts)  # every sequence is in one gap
    assert all(row["percent_low"] <= row["surprisal_percent"] <= row["percent_high"] and len(row["by_position"]) == 5 for row in rows)
    assert rows == verbatim.surprisals(model, 0, 5, 64) and 0 <= verbatim.recalled(model, 0, 5, 64) < 0.3


def test_rows_and_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_recipe("verbatim-recall") is verbatim
    ends = verbatim.recipe(fast=True, device="cpu", memory="attention").start(tmp_path, quiet=True)
    calls, batch = [], Generated.batch
    monkeypatch.setattr(Generated, "batch", lambda self, seed, index: calls.append(index) or batch(self, seed, index))
    again = verbatim.recipe(fast=True, device="cpu", memory="attention,gated-deltanet").start(tmp_path, quiet=True)
    assert calls == [0, 1, 2, 3] and again["attention"] == ends["attention"] and set(again["gated-deltanet"]) == {3, 5}
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    everything = [row for row in rows if row["gap_from"] == 0]
    assert len(everything) == 2 * 2 * 3 and {row["condition"] for row in rows} == {"repeat", "permute", "novel"}
    for row in rows:
        assert row["steps"] == row["budget"] == 4 and row["accuracy"] == again[row["memory"]][row["words"]] and row["surprisal_percent"] > 0
    assert len({row["parameters"] for row in rows}) == 2
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_every_default_cell_is_as_large_as_attention() -> None:
    grid = verbatim.recipe(device="cpu")
    sizes = {cell.name: sum(p.numel() for p in grid.build(cell).parameters()) for cell in grid.cells}
    assert len(sizes) == 4 and max(sizes.values()) < 1.1 * min(sizes.values()), sizes


def test_bad_flags_are_one_sentence() -> None:
    with pytest.raises(UnknownName, match="atention"):
        verbatim.recipe(memory="atention")
    with pytest.raises(UsageError, match="named once"):
        verbatim.recipe(memory="attention,attention")
    with pytest.raises(UsageError, match="reads no folder"):
        verbatim.recipe(data=".")
