"""A bank on disk: time, peak memory and recall of its search: python benchmarks/bank.py --keys 10000000 --folder DIR --json FILE"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from remanence.banks.disk import DiskBank
from remanence.banks.search import recall
from remanence.errors import RemanenceError
from remanence.files import write_text

STEP = 100_000


def peak() -> float:
    """Peak resident memory of this process in MiB, mapped file pages included."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def measure(folder: Path, keys: int, dim: int, queries: int, top: int, dtype: str, approximate: bool) -> dict[str, Any]:
    """Fill a bank in `folder` with normal keys (the values are their first 8 numbers), then search it; memory is over the start's peak."""
    start = peak()
    with DiskBank.create(folder, dim, 8, dtype) as bank:
        began = time.perf_counter()
        for first in range(0, keys, STEP):
            rows = torch.randn(min(STEP, keys - first), dim, generator=torch.Generator().manual_seed(first))
            bank.append(rows, rows[:, :8])
        row: dict[str, Any] = {"keys": keys, "dim": dim, "dtype": dtype, "queries": queries, "top": top}
        row["append_keys_per_s"] = round(keys / (time.perf_counter() - began))
        row["bank_mib"] = round(sum(file.stat().st_size for file in folder.iterdir()) / (1 << 20), 1)
        row["append_peak_mib"] = round(peak() - start, 1)
        asked = torch.randn(queries, dim, generator=torch.Generator().manual_seed(1 << 40))
        bank.lookup(asked[:1], top)
        began = time.perf_counter()
        bank.lookup(asked[:1], top)
        row["exact_one_query_s"] = round(time.perf_counter() - began, 4)
        began = time.perf_counter()
        truth = bank.lookup(asked, top)
        row["exact_all_queries_s"] = round(time.perf_counter() - began, 4)
        row["exact_peak_mib"] = round(peak() - start, 1)
        assert torch.allclose((asked[:, None] * truth.keys).sum(-1), truth.scores, rtol=1e-2, atol=1e-2)
        if approximate:
            began = time.perf_counter()
            bank.index()
            row["index_s"] = round(time.perf_counter() - began, 1)
            bank.lookup(asked[:1], top, approximate=True)
            began = time.perf_counter()
            found = bank.lookup(asked, top, approximate=True)
            row["approximate_all_queries_s"] = round(time.perf_counter() - began, 4)
            row["recall"] = round(recall(found.index, truth.index), 4)
            row["approximate_peak_mib"] = round(peak() - start, 1)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--top", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--approximate", action="store_true", help="build and measure the graph too (the extra `knn`)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", metavar="DIR", help="where the bank is made; a temporary one by default")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.approximate and find_spec("usearch") is None:
        print("bank: --approximate needs the package usearch: pip install 'remanence[knn]'.", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            sizes = (given.keys, given.dim, given.queries, given.top, given.dtype, given.approximate)
            row = measure(Path(folder) / "bank", *sizes)
        print(json.dumps(row, indent=2))
        if given.json:
            write_text(given.json, json.dumps({"rows": [row]}, indent=2) + "\n")
    except RemanenceError as error:
        print(f"bank: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
