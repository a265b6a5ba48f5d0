"""ETTh1: an electricity transformer, hour by hour for two years, as its CSV is published (Informer, arXiv 2012.07436)."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from ...errors import UsageError, positive, unknown

MONTH = 30 * 24
SPLITS = {"train": (0, 12 * MONTH), "val": (12 * MONTH, 16 * MONTH), "test": (16 * MONTH, 20 * MONTH)}
"""Rows of each split: 12, 4 and 4 months of 30 days, as in the literature; what comes after is not used."""


@dataclass(frozen=True, eq=False)
class ETTh1:
    """values float64 [N, F] as measured, names of the F columns (the last is OT, the oil temperature), date of the first row."""

    values: np.ndarray
    names: tuple[str, ...]
    begins: datetime

    @property
    def mean(self) -> np.ndarray:
        """Of the training months, [F]."""
        return self.values[slice(*SPLITS["train"])].mean(0)

    @property
    def deviation(self) -> np.ndarray:
        """Of the training months, [F]; 1 for a column that does not change."""
        std = self.values[slice(*SPLITS["train"])].std(0)
        return np.where(std > 0, std, 1.0)

    def split(self, name: str, window: int = 96) -> np.ndarray:
        """The normalised rows of 'train', 'val' or 'test': (values - mean) / deviation, both of the training months: [n, F].

        val and test begin `window` rows early, so that their first forecast is of their own first rows.
        """
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
        positive(window=window)
        begin, end = SPLITS[name]
        if window > SPLITS["train"][1]:
            raise UsageError(f"window is {window}; it must be at most the {SPLITS['train'][1]} rows of the training months.")
        begin = begin if name == "train" else begin - window
        return (self.values[begin:end] - self.mean) / self.deviation


def read_etth1(path: str | Path) -> ETTh1:
    """Read `date,HUFL,...,OT`: a row every hour of at least 20 months. Raises UsageError, naming file and line, on anything else."""
    path = Path(path)
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *lines = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}).") from error
    if len(header) < 2 or header[0] != "date":
        raise UsageError(f"{path} begins with {','.join(header)[:60]!r}; expected a header date,HUFL,...,OT.")
    need = SPLITS["test"][1]
    if len(lines) < need:
        raise UsageError(f"{path} has {len(lines)} rows; the splits of 12, 4 and 4 months need {need}.")
    values, begins = np.empty((len(lines), len(header) - 1)), None
    for i, line in enumerate(lines):
        try:
            date = datetime.fromisoformat(line[0])
            values[i] = line[1:]
        except (ValueError, IndexError) as error:
            raise UsageError(f"{path}, line {i + 2}: {error}; expected a date and {len(header) - 1} numbers.") from error
        begins = date if begins is None else begins
        if date != begins + timedelta(hours=i):
            raise UsageError(f"{path}, line {i + 2}: the date is {line[0]}; expected {begins + timedelta(hours=i)}, one row an hour.")
    if not np.isfinite(values).all():
        raise UsageError(f"{path}, line {int(np.argwhere(~np.isfinite(values))[0, 0]) + 2}: a number is not finite.")
    assert begins is not None
    return ETTh1(values, tuple(header[1:]), begins)
