"""associative-retrieval: do RMT and ARMT, given states of the same size, remember more pairs than they were trained on? (arXiv 2407.04841)

A segment holds one pair (key SEP value EOS); the last one asks for a key's value. Two layers of width 64, full back-propagation through the
segments, a curriculum of 1, 2, 3, 5 pairs; then tests with 1 to 16, all the keys there are. `remanence train associative-retrieval`.

Not the paper's protocol in three ways, each for a budget of minutes: every key of a sequence is asked for in training, on a fork of the
state (a state is a value, so one stream serves all its questions); the embedding starts at the scale of the hidden states; and the
curriculum ends at 5 pairs. It is inside the package, so that an installed library has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..catalog import find
from ..models import Decoder, Model, ModelConfig
from ..state import State
from ..tasks.assoc_retrieval import GEN, SYMBOLS, VOCAB_SIZE, batch, segment
from ..tasks.base import IGNORE
from ..train import Curriculum, Piece, Run, TrainConfig, environment
from ._results import Row, lines, merge_rows, named_once, plot, refuse_folder

DIM, LAYERS = 64, 2
KEY_SIZE = 1
SEGMENT = segment(KEY_SIZE)
STAGES = (1, 2, 3, 5)
TESTED = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
WRITE_TOKENS, ARMT_KEY_DIM, NU = 4, 8, 1


def armt_floats(dim: int, layers: int, key_dim: int, nu: int) -> int:
    """Numbers in an ARMT state: in each layer A [2 nu key_dim, dim] and z [2 nu key_dim]."""
    return layers * 2 * nu * key_dim * (dim + 1)


def rmt_tokens(floats: int, dim: int) -> int:
    """The fewest memory tokens whose m x dim numbers are at least `floats`: RMT is never the one with the smaller state."""
    return math.ceil(floats / dim)


def build(slug: str, seed: int) -> Model:
    """The model of a memory: rmt and armt with states of equal size, other segment memories and mixers with their own defaults."""
    torch.manual_seed(seed)
    entry = find(slug, ("segment-memory", "mixer"))
    if "mixer" in entry.kinds:
        return Decoder(ModelConfig(vocab=VOCAB_SIZE, dim=DIM, layers=f"{LAYERS} x {entry.slug}"))
    floats = armt_floats(DIM, LAYERS, ARMT_KEY_DIM, NU)
    hyper: dict[str, dict[str, Any]] = {
        "rmt": {"tokens": rmt_tokens(floats, DIM), "wide": True},
        "armt": {"tokens": WRITE_TOKENS, "key_dim": ARMT_KEY_DIM, "nu": NU},
    }
    backbone = Decoder(ModelConfig(vocab=VOCAB_SIZE, dim=DIM, layers=f"{LAYERS} x attention", tie=False, embedding_std=1.0))
    return entry.builder(backbone, segment=SEGMENT, **hyper.get(entry.slug, {}))


def state_bytes(model: Model) -> int:
    """Bytes of floating-point numbers that one row carries from one segment to the next."""
    with torch.no_grad():
        state = model(torch.zeros(1, SEGMENT, dtype=torch.long, device=model.device), logits="none").state
    return sum(t.numel() * t.element_size() for t in state.tensors() if t.is_floating_point())


@dataclass(frozen=True)
class Questions(Piece):
    """Segments that ask, ids [N, S], each on a fork of row rows[i] of the state: rows [N]."""

    rows: Tensor = torch.empty(0, dtype=torch.long)

    def to(self, device: torch.device | str) -> Questions:
        return replace(self, **{name: getattr(self, name).to(device) for name in ("ids", "targets", "rows")})


class Pairs:
    """Batches of the task, one segment a piece, and then every key's question; the number of pairs follows the curriculum."""

    carries = False

    def __init__(self, rows: int, curriculum: Curriculum):
        self.rows, self.curriculum = rows, curriculum

    def batch(self, seed: int, index: int) -> list[Piece]:
        pairs = self.curriculum.size(seed, index)
        ids, _ = batch(np.random.default_rng([seed, index]), self.rows, pairs, KEY_SIZE)
        told = torch.from_numpy(ids[:, :-SEGMENT])
        asked = told.reshape(-1, SEGMENT).clone()  # key SEP value EOS -> key GEN value EOS
        asked[:, KEY_SIZE] = GEN
        targets = torch.full_like(asked, IGNORE)
        targets[:, KEY_SIZE:-1] = asked[:, KEY_SIZE + 1 :]
        rows = torch.arange(self.rows).repeat_interleave(pairs)
        return [*(Piece(part) for part in told.split(SEGMENT, 1)), Questions(asked, targets, rows=rows)]

    def observe(self, metrics: dict[str, float]) -> dict[str, int]:
        pairs = self.curriculum.top
        self.curriculum.observe(metrics["accuracy"])
        return {"pairs": pairs}

    def state(self) -> dict[str, Any]:
        return self.curriculum.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.curriculum.restore(state)


def exact_match_loss(model: Model, piece: Piece, state: State | None) -> tuple[Tensor | None, State, dict[str, Tensor]]:
    """Summed cross-entropy of value and EOS, and the fraction of rows in which both are predicted."""
    if piece.targets is None:
        return None, model(piece.ids, state, logits="none").state, {}
    if isinstance(piece, Questions) and state is not None:
        state = state.rows(piece.rows)
    out = model(piece.ids, state)
    wanted = piece.targets != IGNORE
    loss = F.cross_entropy(out.logits[wanted].float(), piece.targets[wanted], reduction="sum")
    right = (out.logits.argmax(-1) == piece.targets) | ~wanted
    return loss, out.state, {"accuracy": right.all(1).float().mean()}


def accuracy(model: Model, pairs: int, n: int, seed: int, rows: int = 128) -> float:
    """Exact match over n sequences of `pairs` pairs, which depend on the seed only."""
    ids, targets = map(torch.from_numpy, batch(np.random.default_rng([seed, pairs, 0x7E57]), n, pairs, KEY_SIZE))
    right = 0
    with torch.no_grad():
        for part, aim in zip(ids.to(model.device).split(rows), targets.to(model.device).split(rows)):
            before = model(part[:, :-SEGMENT], logits="none").state
            guess = model(part[:, -SEGMENT:], before).logits.argmax(-1)
            right += int(((guess == aim[:, -SEGMENT:]) | (aim[:, -SEGMENT:] == IGNORE)).all(1).sum())
    return right / n


def recipe(
    out: str | Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    device: str = "auto",
    fast: bool = False,
    data: str | Path | None = None,
    memory: str | None = None,
) -> Run:
    """memory: slugs of segment memories or mixers, separated by commas; default "rmt,armt"."""
    refuse_folder(data, "associative-retrieval makes its own sequences")
    slugs = named_once(memory or "rmt,armt", "slug")
    runs = [_run(slug, seed, steps or (6 if fast else 3200), device, fast) for slug in slugs]
    runs[0].others = tuple(runs[1:])
    return runs[0]


def _run(slug: str, seed: int, steps: int, device: str, fast: bool) -> Run:
    stages, tested, n = (STAGES[:2], TESTED[:3], 16) if fast else (STAGES, TESTED, 512)
    curriculum = Curriculum(stages, advance=0.95, window=2 if fast else 50, limit=max(1, steps // len(stages)), vary=True)
    config = TrainConfig(
        steps=steps, lr=1e-3, schedule="wsd", warmup=min(100, steps // 10), weight_decay=1e-3, beta2=0.98, seed=seed, device=device,
        best="accuracy", maximize=True, eval_every=max(1, steps // 10), checkpoint_every=max(1, steps // 20),
    )  # fmt: skip
    model = build(slug, seed)
    print(f"{slug}: state of {state_bytes(model):,} bytes a row; {_accounting(slug)}")

    def evaluate(model: Model) -> dict[str, float]:
        return {"accuracy": accuracy(model, stages[-1], n // 2, seed)}

    def finish(model: Model, out: Path) -> None:
        common = {"memory": slug, "n": n, "state_bytes": state_bytes(model), "trained_pairs": stages[-1], "seed": seed}
        rows = [common | {"task": "assoc-retrieval", "pairs": pairs, "accuracy": accuracy(model, pairs, n, seed + 1)} for pairs in tested]
        meta = {"recipe": "associative-retrieval", "key_size": KEY_SIZE, "segment": SEGMENT, "steps": steps}
        meta["environment"] = environment(model.device)
        _curve(merge_rows(out / "results.json", rows, slug, meta), out / "curve.png")

    return Run(model, Pairs(8 if fast else 64, curriculum), config, evaluate, finish, exact_match_loss, name=slug)


def _accounting(slug: str) -> str:
    floats = armt_floats(DIM, LAYERS, ARMT_KEY_DIM, NU)
    tokens, width = rmt_tokens(floats, DIM), 2 * NU * ARMT_KEY_DIM
    return {
        "rmt": f"m d = {tokens} x {DIM} = {tokens * DIM} floats",
        "armt": f"L (P d + P) = {LAYERS} x ({width} x {DIM} + {width}) = {floats} floats",
    }.get(slug, "its own defaults, not matched to the others")


def _curve(rows: Sequence[Row], path: Path) -> None:
    curves = lines(rows, lambda row: f"{row['memory']} ({row['state_bytes']:,} bytes)", "pairs")

    def decorate(axes: Any) -> None:
        axes.axhline(1 / SYMBOLS, color="grey", linestyle=":", label="chance")
        axes.axvline(max(row["trained_pairs"] for row in rows), color="grey", linestyle="--", label="most pairs in training")
        axes.set_ylim(-0.03, 1.03)

    plot(path, curves, "pairs (segments)", "exact match", decorate)
