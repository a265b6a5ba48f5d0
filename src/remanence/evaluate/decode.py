"""What reading one token costs beside the matrix products in it: a whole small Decoder, as it is and through torch.compile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..models import Decoder, ModelConfig

Row = dict[str, Any]


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of this process's CPU time (others may use the cores) over `repeats` calls, after three that warm up."""
    times = []
    for turn in range(repeats + 3):
        start = time.process_time()
        call()
        if turn >= 3:
            times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


def decode(
    mixers: Sequence[str], dim: int = 512, layers: int = 8, vocab: int = 4096, repeats: int = 50, compiled: bool = True
) -> list[Row]:
    """Rows {mixer, form, ms_per_token, linears_ms, ratio}: one row of one token after 32, on one thread, float32.

    linears_ms is what the model's linear layers alone take on inputs of the same shape, measured in turn with the model; products with the
    state are not counted in it. form: "eager", and "compiled" (torch.compile, which needs a C++ compiler; left out where it fails).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        forms = ("eager", "compiled") if compiled else ("eager",)
        return [row for slug in mixers for form in forms for row in one(slug, form, dim, layers, vocab, repeats)]
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def one(slug: str, form: str, dim: int, layers: int, vocab: int, repeats: int) -> list[Row]:
    """The row of one mixer and form; none, with the reason printed, if it cannot be compiled."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab=vocab, dim=dim, layers=[{"mixer": slug, "times": layers}])).eval()
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    inputs = [torch.randn(1, 1, layer.in_features) for layer in linears]
    ids = torch.randint(vocab, (1, 1))
    state = model(torch.randint(vocab, (1, 32)), logits="none").state

    def read(ids: torch.Tensor, state: Any) -> Any:
        out = model(ids, state)
        return out.logits, out.state

    call = read
    if form == "compiled":
        torch._dynamo.reset()
        call = torch.compile(read, dynamic=False)
    try:
        call(ids, state)
    except Exception as error:
        print(f"{slug}, {form}: {type(error).__name__}; left out")
        return []
    turns = [
        (median_ms(lambda: call(ids, state), repeats), median_ms(lambda: [layer(x) for layer, x in zip(linears, inputs)], repeats))
        for _ in range(3)
    ]
    ours, floor = (min(times) for times in zip(*turns))
    return [{"mixer": slug, "form": form, "ms_per_token": ours, "linears_ms": floor, "ratio": ours / floor}]


def print_table(rows: Sequence[Row]) -> None:
    """The rows on the terminal."""
    table = Table("mixer", "form", "ms a token", "linear layers alone", "ratio")
    for row in rows:
        table.add_row(row["mixer"], row["form"], f"{row['ms_per_token']:.2f}", f"{row['linears_ms']:.2f}", f"{row['ratio']:.2f}")
    Console().print(table)
