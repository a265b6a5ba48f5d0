"""The speed benchmark: what its rows hold, and that a missing peer is said and never guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from remanence.catalog import catalog
from remanence.errors import BackendError, UsageError
from remanence.evaluate import speed as module
from remanence.evaluate.speed import meta, print_table, speed, write_json

SMALL = {"lengths": [8], "dim": 64, "heads": 2, "repeats": 1}
KEYS = {"mixer", "length", "pass", "tokens_per_s", "peer", "peer_tokens_per_s", "ratio_to_peer", "ratio_to_floor", "state_bytes"}


def test_every_mixer_has_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "PEERS", {})
    rows = speed(**SMALL)
    assert [(row["mixer"], row["pass"]) for row in rows] == [(entry.slug, name) for entry in catalog("mixer") for name in module.PASSES]
    for row in rows:
        assert row.keys() == KEYS and row["length"] == 8
        assert row["tokens_per_s"] > 0 and row["ratio_to_floor"] > 0
        assert row["peer"] is row["peer_tokens_per_s"] is row["ratio_to_peer"] is None
        assert (row["state_bytes"] is not None) == (row["pass"] in module.DECODE)
    print_table(rows)
    assert "linear-attention" in capsys.readouterr().out


@pytest.mark.parametrize("slug", sorted({entry.slug for entry in catalog("mixer")} & set(module.PEERS)))
def test_peers(slug: str) -> None:
    """Every peer runs, and the ratio is that of the two rates."""
    pytest.importorskip({"minGRU-pytorch": "minGRU_pytorch"}.get(module.PEERS[slug][0], module.PEERS[slug][0]), reason="the peer's package")
    for row in speed([slug], passes=["forward", "forward+backward"], **SMALL):
        assert row["peer"].startswith(module.PEERS[slug][0]) and "not installed" not in row["peer"]
        assert row["ratio_to_peer"] == row["tokens_per_s"] / row["peer_tokens_per_s"]


def test_a_missing_peer_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(mixer: object) -> dict:
        raise ImportError

    monkeypatch.setitem(module.PEERS, "mamba2", ("transformers", absent))
    (row,) = speed(["mamba2"], passes=["forward"], **SMALL)
    assert row["peer"] == "transformers (not installed)"
    assert row["peer_tokens_per_s"] is row["ratio_to_peer"] is None


def test_a_layer_that_is_too_slow_is_timed_once_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def slow(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return x * 1

    monkeypatch.setattr(module, "PATIENCE", 0.0)
    assert set(module.take_turns({"slow": slow}, torch.zeros(1, 4, 8), False, 5)) == {"slow"} and len(calls) == 1
    assert module.take_turns({"slow": module._up_to(3, slow)}, torch.zeros(1, 4, 8), False, 5) == {} and len(calls) == 1


def test_a_file_is_continued(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    first = module.speed_to_file(file, ["mingru"], [8], repeats=1)
    both = module.speed_to_file(file, ["mingru", "minlstm"], [8], repeats=1)
    assert both[: len(first)] == first and {row["mixer"] for row in both} == {"mingru", "minlstm"}
    assert json.loads(file.read_text())["rows"] == both
    file.write_text("[]")
    with pytest.raises(UsageError, match="not a file of speed rows"):
        module.speed_to_file(file, ["mingru"], [8])


def test_devices(tmp_path: Path) -> None:
    """A device that is not there is refused, and so are rows from another one in the file that would be continued."""
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no CUDA device here"):
            speed(["mingru"], device="cuda", **SMALL)
    other = meta()
    other["environment"]["device"] = "an accelerator"
    write_json(tmp_path / "speed.json", [], other)
    with pytest.raises(UsageError, match="holds rows from an accelerator, and this is cpu"):
        module.speed_to_file(tmp_path / "speed.json", ["mingru"], [8], repeats=1)


def test_json(tmp_path: Path) -> None:
    rows = speed(["linear-attention"], passes=["forward"], **SMALL)
    write_json(tmp_path / "speed.json", rows, meta(dim=64))
    read = json.loads((tmp_path / "speed.json").read_text())
    assert read["rows"] == rows
    assert read["meta"]["setting"] == {"dim": 64}
    assert {"cpu", "threads", "commit", "torch"} <= read["meta"]["environment"].keys()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"mixers": ["mamba3"]}, "mamba2"), ({"passes": ["backward"]}, "forward"), ({"lengths": [0]}, "lengths"), ({"mixers": []}, "empty")],
)
def test_wrong_use(wrong: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        speed(**{"mixers": ["mamba2"], **SMALL, **wrong})
