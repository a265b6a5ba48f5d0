"""The reader of ETTh1 on a generated file: splits, normalisation on the training months alone, and what it refuses."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from remanence.domains.forecasting import read_etth1
from remanence.domains.forecasting.etth1 import SPLITS
from remanence.errors import RemanenceError, UsageError

NAMES = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
ROWS = 14_420


def table(rows: int = ROWS) -> np.ndarray:
    t = np.arange(rows)[:, None]
    return np.sin(2 * np.pi * t / 24 + np.arange(7)) * (1 + np.arange(7)) + 1e-3 * t


def write(path: Path, values: np.ndarray, header: str = "date," + ",".join(NAMES)) -> Path:
    begin = datetime(2016, 7, 1)
    lines = (f"{begin + timedelta(hours=i)}," + ",".join(f"{v!r}" for v in row) for i, row in enumerate(values.tolist()))
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("ett") / "ETTh1.csv", table())


def test_splits(path: Path) -> None:
    data, values = read_etth1(path), table()
    assert data.names == NAMES and data.begins == datetime(2016, 7, 1) and np.array_equal(data.values, values)
    assert SPLITS == {"train": (0, 8640), "val": (8640, 11520), "test": (11520, 14400)}
    train = data.split("train")
    assert train.shape == (8640, 7) and np.abs(train.mean(0)).max() < 1e-12 and np.abs(train.std(0) - 1).max() < 1e-12
    for name, window in (("val", 96), ("test", 96), ("test", 1)):
        begin, end = SPLITS[name]
        want = (values[begin - window : end] - values[:8640].mean(0)) / values[:8640].std(0)
        assert np.allclose(data.split(name, window), want, rtol=1e-12)


def test_a_column_that_does_not_change(tmp_path: Path) -> None:
    values = table()
    values[:, 2] = 5
    assert np.array_equal(read_etth1(write(tmp_path / "a.csv", values)).split("train")[:, 2], np.zeros(8640))


def test_refusals(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing.csv cannot be read"):
        read_etth1(tmp_path / "missing.csv")
    with pytest.raises(UsageError, match="has 10 rows; the splits of 12, 4 and 4 months need 14400"):
        read_etth1(write(tmp_path / "short.csv", table(10)))
    with pytest.raises(UsageError, match="begins with 'time,OT'"):
        read_etth1(write(tmp_path / "header.csv", table(10), "time,OT"))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UsageError, match="expected a header"):
        read_etth1(tmp_path / "empty.csv")
    text = path.read_text().split("\n")
    for change, message in (
        (lambda line: line.replace("2016", "x"), "line 101"),
        (lambda line: line.rsplit(",", 1)[0], "line 101"),
        (lambda line: line.rsplit(",", 1)[0] + ",nan", "line 101: a number is not finite"),
        (lambda line: "2016-07-05 04:00:00" + line[19:], "the date is 2016-07-05 04:00:00; expected 2016-07-05 03:00:00"),
    ):
        (tmp_path / "bad.csv").write_text("\n".join([*text[:100], change(text[100]), *text[101:]]))
        with pytest.raises(UsageError, match=message):
            read_etth1(tmp_path / "bad.csv")
    data = read_etth1(path)
    with pytest.raises(UsageError, match="did you mean test"):
        data.split("tset")
    with pytest.raises(RemanenceError, match="window is 0"):
        data.split("val", 0)
