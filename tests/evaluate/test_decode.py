"""The decoding benchmark: what its rows hold."""

from __future__ import annotations

import torch

from remanence.evaluate.decode import decode, print_table


def test_rows(capsys) -> None:
    threads = torch.get_num_threads()
    rows = decode(["mingru", "gated-deltanet"], dim=16, layers=1, vocab=11, repeats=2, compiled=False)
    assert [(row["mixer"], row["form"]) for row in rows] == [("mingru", "eager"), ("gated-deltanet", "eager")]
    for row in rows:
        assert row["ratio"] == row["ms_per_token"] / row["linears_ms"] and row["linears_ms"] > 0
    assert torch.get_num_threads() == threads
    print_table(rows)
    assert "gated-deltanet" in capsys.readouterr().out
