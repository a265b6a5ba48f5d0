"""state-collapse: a Mamba-2 read past its training length, and the fixes that need no training (arXiv 2410.07145).

A byte model trained from fresh states at 256 tokens reads an unseen book to 16k. Bits per byte by position: as it is, with the norm of its
states bounded by the largest of training, with decays made stronger, and with a sliding window by state difference. The bound and the
decay are chosen on other text. `remanence train state-collapse`; another mixer of ops.outer: `--mixers gla`.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..catalog import find
from ..corpus import default_haystack, folder_texts, training_texts
from ..inference.stuffed_mamba import clip_norm, forget_more, record, sliding_window
from ..models import Decoder, Model, ModelConfig
from ..tokenizers import ByteTokenizer
from ..train import Piece, Run, TrainConfig, environment
from ._results import Row, lines, merge_rows, plot

LENGTH, READ = 256, 16384
DIM, LAYERS, ROWS = 128, 2, 32
RETENTIONS = (0.9, 0.98, 0.995, 0.999)
"""Factors of the decay, of which the best on a validation text is taken."""


class Windows:
    """Rows of LENGTH bytes from anywhere in the texts, each from a fresh state."""

    carries = False

    def __init__(self, ids: np.ndarray, rows: int, length: int):
        self.ids, self.rows, self.length = ids, rows, length

    def batch(self, seed: int, index: int) -> Piece:
        start = np.random.default_rng([seed, index]).integers(len(self.ids) - self.length - 1, size=self.rows)
        at = torch.from_numpy(self.ids[start[:, None] + np.arange(self.length + 1)])
        return Piece(at[:, :-1], at[:, 1:])


def documents(text: str, length: int, n: int) -> torch.Tensor:
    """n stretches of `length` bytes, spread evenly over a text, [n, length]."""
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    starts = np.linspace(0, len(ids) - length, n).astype(int)
    return torch.from_numpy(np.stack([ids[start : start + length] for start in starts]))


@torch.no_grad()
def largest_norm(model: Model, ids: torch.Tensor) -> float:
    """The largest norm of a head's state after LENGTH tokens, as in training."""
    state = model(ids, logits="none").state
    norms = [t.norm(dim=(-2, -1)).max() for name, t in state.named_tensors() if name.rpartition(".")[2] == "memory"]
    return float(torch.stack(norms).max())


@torch.no_grad()
def bits(model: Model, ids: torch.Tensor, every: int, fix: str = "none", value: float | int = 0) -> list[Row]:
    """Bits per byte of every stretch of `every` tokens, read as the fix says. The window needs its document in one call."""
    around = {"decay": partial(forget_more, model, float(value)), "window": partial(sliding_window, model, int(value))}
    with around.get(fix, nullcontext)():
        if fix == "window":
            out = model(ids)
            nll = torch.nn.functional.cross_entropy(out.logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none").mean(0)
            losses = [(min(at + every, len(nll)), float(nll[at : at + every].mean())) for at in range(0, len(nll), every)]
        else:
            trace = record(model, ids, every, fix=partial(clip_norm, limit=float(value)) if fix == "norm" else None)
            losses = list(zip(trace.tokens.tolist(), trace.loss.tolist()))
    return [{"position": at, "bits_per_byte": loss / math.log(2)} for at, loss in losses]


def mean(rows: list[Row]) -> float:
    """Bits per byte of the second half, past the training length."""
    late = rows[len(rows) // 2 :]
    return sum(row["bits_per_byte"] for row in late) / len(late)


def recipe(
    out: str | Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    device: str = "auto",
    fast: bool = False,
    data: str | Path | None = None,
    memory: str | None = None,
) -> Run:
    """memory (`--mixers`): a mixer over ops.outer, default mamba2. data: a folder of .txt files to train on."""
    slug = find(memory or "mamba2", ("mixer",)).slug
    texts = folder_texts(data) if data else training_texts()
    train = "\n\n".join(texts.values())
    length, read, rows, n = (32, 128, 2, 2) if fast else (LENGTH, READ, ROWS, 4)
    ids = np.frombuffer(train[: len(train) * 9 // 10].encode(), np.uint8).astype(np.int64)
    held, unseen = documents(train[len(train) * 9 // 10 :], read // 4, n), documents(default_haystack(), read, n)
    torch.manual_seed(seed)
    spec = {"mixer": slug, "times": 1 if fast else LAYERS} | ({"head_dim": 16} if slug == "mamba2" and fast else {})
    model = Decoder(ModelConfig(vocab=ByteTokenizer().vocab_size, dim=32 if fast else DIM, layers=[spec]))
    steps = steps or (4 if fast else 1200)
    config = TrainConfig(
        steps=steps, lr=2e-3, schedule="wsd", warmup=min(100, steps // 10), weight_decay=0.1, seed=seed, device=device,
        checkpoint_every=max(1, steps // 10),
    )  # fmt: skip

    def finish(model: Model, out: Path) -> None:
        limit = largest_norm(model, documents(train, length, 8 * n))
        retention = min(RETENTIONS, key=lambda value: mean(bits(model, held, length, "decay", value)))
        fixes = {"none": 0, "norm": limit, "decay": retention, "window": length}
        meta = {"recipe": "state-collapse", "steps": steps, "trained_at": length, "environment": environment(model.device)}
        results: list[Row] = []
        for fix, value in fixes.items():
            common = {"memory": slug, "task": "state-collapse", "fix": fix, "value": value, "seed": seed}
            results += [common | row for row in bits(model, unseen, length, fix, value)]
        every = merge_rows(out / "results.json", results, slug, meta)
        curves = lines(every, lambda row: f"{row['memory']}, fix: {row['fix']}", "position", "bits_per_byte")
        plot(out / "curve.png", curves, f"position in the book, bytes (trained on {length})", "bits per byte")
        model.save(out / "model", provenance={"recipe": "state-collapse", "steps": steps, "seed": seed})

    return Run(model, Windows(ids, rows, length), config, None, finish)
