"""memory-table: every segment memory around the same small backbone, on the same data, for the same number of steps.

A decoder of attention learns two things in windows of 256 tokens: bytes of books, and streams of keys with their values, which are to be
known when a key comes back and may change. Each memory then goes around a copy of it (or takes its layers' place, with all weights that
fit) and reads in segments of 32 tokens, so that what is further away has to come through the memory: 4096 numbers, where its size can be
set and it learns with that (RMT: 1024, and 4096 beside it; ARMT: 33,024, and 8256 beside it). It is trained on recall and, from the start
again, on books, for the same steps on the same batches, and tested on

    assoc-retrieval    n pairs, a segment of noise, a question: by the number of pairs; and of four pairs by the length of the noise,
                       none (the question is in the next segment) to 4096 tokens
    passkey            one pair, noise of up to a million tokens, the question
    streams            unseen streams of events, twice as long: by the tokens since the key was last there
    fact-update        four keys, each written w times: the last value, and how often an older one is given
    books              bits per byte of an unseen book by the position in it, the state carried
    cost               state bytes, speed beside the bare backbone's, peak memory of a training step

`remanence report memory` trains what is missing, several at a time, and writes the table.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..catalog import find
from ..corpus import default_haystack, training_texts
from ..errors import RemanenceError, UsageError, unknown
from ..evaluate.gradients import peak_bytes
from ..evaluate.report import Section, sections_of, write_report
from ..files import write_text
from ..models import Decoder, Model, ModelConfig, load
from ..tasks import mqar
from ..tasks.base import IGNORE
from ..tasks.symbols import Arrays
from ..train import Piece, TrainConfig, environment, train
from ._grid import symbol_loss
from ._results import Row, named_once, refuse_folder

DIM, LAYERS, FFN = 128, 4, 3.5
SEGMENT, LENGTH, ROWS = 32, 256, 8
TOKENS = 1024
"""Of one update on recall."""
BYTES, KEYS, VALUES, NOISE = 256, 64, 64, 64
VOCAB = BYTES + KEYS + VALUES + NOISE
"""Bytes of text, and then the symbols of the events, in this order."""
CHANCE = 1 / VALUES
PRETRAINING, STEPS, READING = 1500, 800, 150
"""Updates of the backbone, and of each memory around it on recall and, from the start again, on books."""
PAIRS, WRITES = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8)
GAPS = {"assoc-retrieval": (256, 1024, 4096), "passkey": (1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000)}
BOUNDED, GROWING = math.inf, 16_000
"""The longest passkey stream for a state that is bounded, and for one that grows with the text."""
LONG = 64_000
"""From here on a longer stream is tried only where at least nine in ten were right, before it where half were."""
SINCE = (SEGMENT, 2 * SEGMENT, 4 * SEGMENT, 8 * SEGMENT)
EDGES = (1, 32, 128, 512, 4096)


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Tokens that mean nothing."""
    return rng.integers(VOCAB - NOISE, VOCAB, size=shape)


def _keys(rng: np.random.Generator, rows: int) -> np.ndarray:
    """All keys in random order, [rows, KEYS]."""
    return BYTES + rng.permuted(np.tile(np.arange(KEYS), (rows, 1)), axis=1)


def _values(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return BYTES + KEYS + rng.integers(VALUES, size=shape)


def events(rng: np.random.Generator, rows: int, count: int = LENGTH // 2, most: int = 32) -> Arrays:
    """`count` events of two tokens, a key and its value or noise -> ids and targets, int64 [rows, 2 count].

    A key comes back with the value that it had, which is a target, or now and then with a new one, which is not. Each row has 1 .. most
    keys, as often few as many, and its own shares of noise and of new values.
    """
    size = np.exp(rng.uniform(0, math.log(most + 1), rows)).astype(int)
    quiet, change = rng.uniform(0, 0.6, (rows, 1)), rng.uniform(0, 0.3, (rows, 1))
    which = (rng.random((rows, count)) * size[:, None]).astype(int)
    named, fresh = rng.random((rows, count)) >= quiet, rng.random((rows, count)) < change
    keys, drawn = np.take_along_axis(_keys(rng, rows), which, 1), _values(rng, rows, count)
    ids, targets = noise(rng, rows, count, 2), np.full((rows, count, 2), IGNORE)
    known, row = np.full((rows, most), -1), np.arange(rows)
    for e in range(count):
        k, told = which[:, e], named[:, e]
        asked = told & (known[row, k] >= 0) & ~fresh[:, e]
        value = np.where(asked, known[row, k], drawn[:, e])
        known[row[told], k[told]] = value[told]
        ids[told, e] = np.stack([keys[:, e], value], 1)[told]
        targets[asked, e, 0] = value[asked]
    return ids.reshape(rows, -1), targets.reshape(rows, -1)


def facts(rng: np.random.Generator, rows: int, keys: int, writes: int = 1, gap: int = SEGMENT) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """`keys` keys, each written `writes` times in random order -> (told, asked), the last value of the asked key, its earlier ones.

    told [rows, n]: the events, noise to the end of the segment and `gap` tokens of noise more; asked [rows, 1]: a key; answers [rows];
    earlier [rows, writes - 1].
    """
    row, count = np.arange(rows), keys * writes
    names = _keys(rng, rows)[:, :keys]
    order = rng.permuted(np.tile(np.arange(count) % keys, (rows, 1)), axis=1)
    values = _values(rng, rows, count)
    written = np.take_along_axis(names, order, 1)
    told = np.stack([written, values], 2).reshape(rows, -1)
    told = np.concatenate([told, noise(rng, rows, -told.shape[1] % SEGMENT + gap)], 1)
    asked = names[row, rng.integers(keys, size=rows)]
    history = values[written == asked[:, None]].reshape(rows, writes)
    return (told, asked[:, None]), history[:, -1], history[:, :-1]


def lessons(rng: np.random.Generator, rows: int, pairs: int, segments: int = 0) -> Arrays:
    """`pairs` pairs, noise to the end of a segment and for `segments` more, and every pair again, in another order, to be known."""
    keys, values = _keys(rng, rows)[:, :pairs], _values(rng, rows, pairs)
    order = rng.permuted(np.tile(np.arange(pairs), (rows, 1)), axis=1)
    told = np.stack([keys, values], 2).reshape(rows, -1)
    gap = noise(rng, rows, -told.shape[1] % SEGMENT + segments * SEGMENT)
    wanted = np.take_along_axis(values, order, 1)
    asked = np.stack([np.take_along_axis(keys, order, 1), wanted], 2).reshape(rows, -1)
    ids = np.concatenate([told, gap, asked], 1)
    targets = np.full_like(ids, IGNORE)
    targets[:, -2 * pairs :: 2] = wanted
    return ids, targets


class Books:
    """Windows of the shipped books but the one that is the test, at random places."""

    carries = False

    def __init__(self, rows: int, length: int = LENGTH):
        self.rows, self.length = rows, length
        self.texts = [np.frombuffer(text.encode(), np.uint8) for text in training_texts().values()]

    def batch(self, seed: int, index: int) -> Piece:
        rng = np.random.default_rng([seed, index])
        text = self.texts[rng.integers(len(self.texts))]
        starts = rng.integers(len(text) - self.length, size=self.rows)
        ids = torch.from_numpy(np.stack([text[at : at + self.length + 1] for at in starts]).astype(np.int64))
        return Piece(ids[:, :-1], ids[:, 1:].contiguous())


class Basics:
    """What the backbone learns: even batches are books, odd ones streams of events.

    The events of the first third are multi-query associative recall instead, of 2, 4, 8 and then 16 pairs, all told and then all asked. A
    fresh decoder learns that in a hundred steps, and the streams from there; from the streams alone it does not.
    """

    carries = False

    def __init__(self, rows: int, steps: int):
        self.books, self.rows, self.first = Books(rows), rows, steps // 3

    def batch(self, seed: int, index: int) -> Piece:
        if index % 2 == 0:
            return self.books.batch(seed, index)
        rng = np.random.default_rng([seed, index])
        if index >= self.first:
            return _piece(*events(rng, self.rows))
        pairs = 2 << 4 * index // self.first
        ids, targets = mqar.batch(rng, self.rows * LENGTH // (4 * pairs), pairs, 4 * pairs, KEYS + VALUES)
        return _piece(ids + BYTES, np.where(targets == IGNORE, IGNORE, targets + BYTES))


class Recall:
    """What a memory learns: `lessons`, none of whose questions the segment at hand can answer, and later one batch in four of streams.

    Over the first 60 % of the steps the most pairs of a lesson grow from 1 to 16, and the most segments of noise from none to two; from
    half of that on there are streams, of 64 or 128 tokens, at its end of 256 too.
    """

    carries = False

    def __init__(self, tokens: int, steps: int):
        self.tokens, self.ramp = tokens, 0.6 * steps

    def batch(self, seed: int, index: int) -> Piece:
        rng, progress = np.random.default_rng([seed, index]), min(1.0, index / self.ramp)
        if index % 4 == 3 and progress >= 0.5:
            length = 2 * SEGMENT << int(rng.integers(1 + int(2 * progress)))
            return _piece(*events(rng, self.tokens // length, length // 2))
        pairs, segments = 1 << int(rng.integers(1 + int(4 * progress))), int(rng.integers(1 + int(2 * progress)))
        return _piece(*lessons(rng, self.tokens // (SEGMENT * (2 + segments)), pairs, segments))


def _piece(ids: np.ndarray, targets: np.ndarray) -> Piece:
    return Piece(torch.from_numpy(ids), torch.from_numpy(targets))


def _decoder(layers: Sequence[dict[str, Any]]) -> Decoder:
    return Decoder(ModelConfig(vocab=VOCAB, dim=DIM, layers=list(layers), ffn=FFN, tie=False, embedding_std=1.0))


def graft(model: Model, backbone: Model) -> Model:
    """`model` with every parameter of `backbone` that has its name and shape."""
    own, theirs = model.state_dict(), backbone.state_dict()
    model.load_state_dict({name: theirs[name] if name in theirs and theirs[name].shape == t.shape else t for name, t in own.items()})
    return model


@dataclass(frozen=True)
class Setup:
    """How a memory meets the backbone.

    where: "around" it, or with a "window" of SEGMENT in its layers, in the place of all its "layers", of the third "layer", or "bare".
    slug: of the catalog. hyper: see there; their sizes give about 4096 numbers where they can. growing: the state grows with the text.
    """

    slug: str
    where: str = "around"
    hyper: dict[str, Any] | None = None
    growing: bool = False

    def build(self, backbone: Decoder) -> Model:
        """The model, with the backbone's weights as far as they fit."""
        hyper = dict(self.hyper or {})
        if self.where == "bare":
            return copy.deepcopy(backbone)
        if self.where == "around":
            return find(self.slug).builder(copy.deepcopy(backbone), **hyper)
        window = {"mixer": "attention", "window": SEGMENT}
        if self.where == "window":
            return find(self.slug).builder(graft(_decoder([window] * LAYERS), backbone), **hyper)
        own = {"mixer": find(self.slug, ("mixer",)).slug, **hyper}
        return graft(_decoder([own] * LAYERS if self.where == "layers" else [window, window, own, window]), backbone)


def _around(slug: str, growing: bool = False, **hyper: Any) -> Setup:
    return Setup(slug, "around", {"segment": SEGMENT, **hyper}, growing)


def _layers(slug: str, growing: bool = False, **hyper: Any) -> Setup:
    return Setup(slug, "layers", hyper, growing)


def _layer(slug: str, growing: bool = False, **hyper: Any) -> Setup:
    return Setup(slug, "layer", hyper, growing)


SETUPS: dict[str, Setup] = {
    "no memory": _around("transformer-xl", memory=0),
    "sliding window": _layers("attention", window=SEGMENT),
    "full attention": Setup("attention", "bare", growing=True),
    "gated-deltanet": _layers("gated-deltanet"),
    "transformer-xl": _around("transformer-xl", memory=8),
    "transformer-xl, 32": _around("transformer-xl", memory=32),
    "compressive-transformer": _layers("compressive-transformer", segment=SEGMENT, memory=4, compressed=4),
    "shortformer": _layers("shortformer", segment=SEGMENT),
    "lamemo": _around("lamemo", memory=8),
    "block-recurrent-transformer": _layer("block-recurrent-transformer", segment=SEGMENT, slots=32),
    "infini-attention": _layers("infini-attention", segment=SEGMENT),
    "infini-attention, delta": _layers("infini-attention", segment=SEGMENT, rule="delta"),
    "transformer-fam": _around("transformer-fam", memory=4, tokens=4),
    "chunked-fifo-rmat": _layers("chunked-fifo-rmat", segment=SEGMENT, slots=8, full=False),
    "grc-cache": _layers("grc-cache", segment=SEGMENT, slots=16),
    "rmt": _around("rmt", tokens=8),
    "rmt, 32": _around("rmt", tokens=32),
    "armt": _around("armt", tokens=8, key_dim=32, nu=1),
    "armt, narrow": _around("armt", tokens=4, key_dim=8, nu=1),
    "hmt": _around("hmt", queue=30, sensory=2),
    "rate": _around("rate", memory=4, tokens=16),
    "ccm": _around("ccm", slots=4, train_base=True),
    "uio-llms": _around("uio-llms", growing=True, slots=1, train_base=True),
    "memformer": _around("memformer", slots=32),
    "membart": _around("membart", slots=32),
    "rxt": _around("rxt", slots=8),
    "lm2": _around("lm2", slots=8),
    "memoryprompt": _around("memoryprompt", slots=2, hidden=128, train_base=True),
    "contextual-memory-reweaving": _around("contextual-memory-reweaving", buffer=32),
    "synaptic-resonance": _layers("synaptic-resonance", window=SEGMENT),
    "memorizing-transformer": _layer("memorizing-transformer", window=SEGMENT, memory=4096),
    "landmark-attention": _layers("landmark-attention", growing=True, block=SEGMENT - 1),
    "infllm": _layers("infllm", growing=True, window=SEGMENT, block=16, sinks=16, top=4),
    "extended-mind": _layers("extended-mind", growing=True, window=SEGMENT),
    "rmt-r": _around("rmt-r", tokens=4, history=8),
    "memoryllm": _around("memoryllm", tokens=2, pool=8),
    "m-plus": _around("m-plus", tokens=2, pool=8, recall=2, store=16, key_dim=8, every=2),
    "larimar-memory": _around("larimar-memory", slots=40, code=64),
    "memoria": _around("memoria", working=4, reminded_short=4, reminded_long=4, short=12, long=8),
    "streamadapter": _around("streamadapter", queries=8, train_base=True),
    "pretrained-recurrence": _around("pretrained-recurrence"),
    "rpt": Setup("rpt", "window", {"chunk": SEGMENT // 2, "window": SEGMENT}),
    "camelot": _layer("camelot", segment=SEGMENT, modes=16),
    "longmem": Setup("longmem", "window", {"window": SEGMENT, "memory": 4096}),
}
"""Name in the table -> how it is built. A name is the slug, with what tells two rows of one system apart."""


def pretrained(out: Path, steps: int, seed: int, device: str, quiet: bool = True) -> Decoder:
    """The backbone, from out/backbone where it is done; else trained there."""
    folder = out / "backbone"
    torch.manual_seed(seed)
    model = _decoder([{"mixer": "attention", "times": LAYERS}])
    train(model, Basics(2 * ROWS, steps), _config(steps, seed, device, 2e-3), folder, loss=symbol_loss, quiet=quiet)
    return load(folder / "last")  # type: ignore[return-value]


def _config(steps: int, seed: int, device: str, lr: float = 1e-3) -> TrainConfig:
    return TrainConfig(
        steps=steps, lr=lr, schedule="wsd", warmup=min(50, max(1, steps // 10)), weight_decay=0.01, beta2=0.98, seed=seed, device=device,
        checkpoint_every=max(1, steps // 4),
    )  # fmt: skip


@torch.no_grad()
def answers(model: Model, told: np.ndarray, asked: np.ndarray, piece: int = 1024, rows: int = 64) -> np.ndarray:
    """The value that the model predicts after told [n, T] and asked [n, 1], int64 [n]."""
    guesses = []
    for context, question in zip(*(torch.from_numpy(part).split(rows) for part in (told, asked)), strict=True):
        state = None
        for ids in context.split(piece, 1):
            state = model(ids.to(model.device), state, logits="none").state
        logits = model(question.to(model.device), state).logits[:, -1, BYTES + KEYS : BYTES + KEYS + VALUES]
        guesses.append(BYTES + KEYS + logits.argmax(-1).cpu())
    return torch.cat(guesses).numpy()


def recall(model: Model, n: int, seed: int, growing: bool, fast: bool) -> list[Row]:
    """Rows of assoc-retrieval, passkey and fact-update. A length is tried when at the one before enough were right."""

    def test(n: int, keys: int, writes: int = 1, gap: int = SEGMENT) -> Row:
        rng = np.random.default_rng([seed, keys, writes, gap])
        (told, asked), wanted, earlier = facts(rng, n, keys, writes, gap)
        got = answers(model, told, asked)
        stale = ((got[:, None] == earlier).any(1) & (got != wanted)).mean() if writes > 1 else 0.0
        return {"n": n, "accuracy": float((got == wanted).mean()), "stale": float(stale)}

    rows = [{"task": "assoc-retrieval", "pairs": pairs, "gap": SEGMENT} | test(n, pairs) for pairs in PAIRS]
    rows += [{"task": "assoc-retrieval", "pairs": pairs, "gap": 0} | test(n, pairs, gap=0) for pairs in PAIRS if 2 * pairs <= SEGMENT]
    rows += [{"task": "fact-update", "keys": 4, "writes": writes} | test(n, 4, writes) for writes in WRITES]
    for task, pairs in (("assoc-retrieval", 4), ("passkey", 1)):
        for gap in GAPS[task][: 1 if fast else None]:
            if gap > (GROWING if growing else BOUNDED):
                break
            rows.append({"task": task, "pairs": pairs, "gap": gap} | test(max(4, min(64, n, 262_144 // gap)), pairs, gap=gap))
            if rows[-1]["accuracy"] < (0.5 if gap < LONG else 0.9):
                break
    return rows


@torch.no_grad()
def streams(model: Model, rows: int, length: int, seed: int) -> list[Row]:
    """Accuracy in streams of events like those of the training, but longer, by the tokens since the key was last there."""
    ids, targets = events(np.random.default_rng(seed), rows, length // 2)
    logits = model(torch.from_numpy(ids).to(model.device)).logits[..., BYTES + KEYS : BYTES + KEYS + VALUES]
    right = BYTES + KEYS + logits.argmax(-1).cpu().numpy() == targets
    since = np.full(ids.shape, IGNORE)
    for row, at in zip(*np.nonzero(targets != IGNORE)):
        since[row, at] = at - np.flatnonzero(ids[row, :at] == ids[row, at])[-1]
    edges = [1, *(edge for edge in SINCE if edge < length), length]
    found = [(lo, hi, right[(lo <= since) & (since < hi)]) for lo, hi in zip(edges, edges[1:])]
    return [{"task": "streams", "from": lo, "to": hi, "n": len(own), "accuracy": float(own.mean())} for lo, hi, own in found if len(own)]


@torch.no_grad()
def books(model: Model, streams: int, length: int) -> list[Row]:
    """Bits per byte of the book that was not trained on, by position in `streams` stretches of it, and of each stretch as a whole."""
    text = np.frombuffer(default_haystack().encode(), np.uint8)
    starts = np.linspace(0, len(text) - length - 1, streams).astype(int)
    ids = torch.from_numpy(np.stack([text[at : at + length + 1] for at in starts]).astype(np.int64)).to(model.device)
    state, losses = None, []
    for at in range(0, length, 512):
        out = model(ids[:, at : min(at + 512, length)], state)
        wanted = ids[:, at + 1 : at + 1 + out.logits.shape[1]]
        losses.append(F.cross_entropy(out.logits.float().transpose(1, 2), wanted, reduction="none"))
        state = out.state
    bits = torch.cat(losses, 1).cpu() / math.log(2)  # [streams, length]
    edges = [edge for edge in EDGES if edge < length] + [length]
    rows = [{"task": "books", "from": lo, "to": hi, "bits_per_byte": finite(bits[:, lo - 1 : hi - 1])} for lo, hi in zip(edges, edges[1:])]
    everywhere = {"task": "books", "from": 1, "to": length + 1, "bits_per_byte": finite(bits), "stretches": [finite(own) for own in bits]}
    return [*rows, everywhere]


def finite(values: Tensor) -> float | None:
    """The mean; None of a model that diverged."""
    mean = float(values.mean())
    return mean if math.isfinite(mean) else None


def cost(model: Model, bare: Model, grafted: float) -> Row:
    """State bytes of one row, speed of reading beside the bare backbone's in windows, peak memory of one training step."""
    with torch.no_grad():
        ids = torch.randint(BYTES, (ROWS, 4 * LENGTH), device=model.device)
        state = model(ids[:1], logits="none").state
        seconds: dict[str, list[float]] = {"model": [], "bare": []}
        for _ in range(3):
            for name, reader in (("model", model), ("bare", bare)):
                began = time.perf_counter()
                reader(ids, logits="none")
                seconds[name].append(time.perf_counter() - began)
    fastest = {name: min(times) for name, times in seconds.items()}
    return {
        "task": "cost", "state_bytes": sum(t.numel() * t.element_size() for t in state.tensors() if t.is_floating_point()),
        "speed_to_bare": fastest["bare"] / fastest["model"], "tokens_per_s": ids.numel() / fastest["model"],
        "peak_training_mb": training_bytes(model) / 2**20, "parameters": sum(p.numel() for p in model.parameters()), "grafted": grafted,
    }  # fmt: skip


def training_bytes(model: Model) -> int:
    """The most bytes that tensors take at once in the forward and backward pass of one step, beyond the weights."""
    piece = Books(ROWS).batch(0, 0).to(model.device)
    model.train()
    peak, _ = peak_bytes(lambda: symbol_loss(model, piece, None)[0].backward(), model.device)
    model.zero_grad(set_to_none=True)
    model.eval()
    return peak


def _share(model: Model, backbone: Model) -> float:
    """The share of the model's numbers that are the backbone's."""
    known = list(backbone.parameters())
    same = sum(p.numel() for p in model.parameters() if any(p.shape == t.shape and torch.equal(p, t) for t in known))
    return same / sum(p.numel() for p in model.parameters())


def measure(name: str, out: Path, steps: int, pretraining: int, seed: int, device: str, fast: bool) -> list[Row]:
    """Train and test one memory in out/NAME; its rows."""
    backbone, folder, began = pretrained(out, pretraining, seed, device), out / folder_of(name), time.monotonic()
    reading = 2 if fast else READING
    common = {"memory": name, "slug": SETUPS[name].slug, "where": SETUPS[name].where, "seed": seed, "steps": steps, "reading": reading}
    size = 2 if fast else ROWS

    def trained(part: str, data: Any, steps: int) -> tuple[Model, Row]:
        torch.manual_seed(seed)
        model, error = SETUPS[name].build(backbone), {}
        try:
            train(model, data, _config(steps, seed, device), folder / part, loss=symbol_loss, quiet=True)
        except UsageError:
            raise
        except RemanenceError as problem:  # a run that diverged is a result too
            error = {"error": str(problem)}
        return model.eval(), error

    torch.manual_seed(seed)
    grafted = _share(SETUPS[name].build(backbone), backbone)
    model, error = trained("recall", Recall(LENGTH if fast else TOKENS, steps), steps)
    rows = recall(model, 16 if fast else 256, seed + 1, SETUPS[name].growing, fast)
    rows += streams(model, 2 if fast else 32, 64 if fast else 512, seed + 1)
    rows = [row | error for row in rows]
    model, error = trained("books", Books(size), reading)
    rows += [row | error for row in books(model, 2 if fast else 16, 256 if fast else 4096)]
    rows.append(cost(model, SETUPS["sliding window"].build(backbone).eval(), grafted) | {"seconds": round(time.monotonic() - began, 1)})
    rows = [common | row for row in rows]
    write_text(folder / "rows.json", json.dumps(rows, indent=1) + "\n")
    return rows


def folder_of(name: str) -> str:
    """A name of SETUPS as a folder and on the command line."""
    return name.replace(", ", "-").replace(" ", "-")


def _cell(name: str, threads: int, **settings: Any) -> list[Row]:
    torch.set_num_threads(threads)
    return measure(name, **settings)


@dataclass
class MemoryTable:
    """The memories to compare and their budget; `start` trains and tests those that `out` has no rows of, `jobs` at a time."""

    names: list[str]
    steps: int = STEPS
    pretraining: int = PRETRAINING
    seed: int = 0
    device: str = "auto"
    fast: bool = False
    jobs: int = 1
    name: str = "memory-table"

    def start(self, out: str | Path, resume: bool = True, quiet: bool = False) -> list[Row]:
        """All rows, in the order of `names`; each memory's are in out/NAME/rows.json as soon as they are there, all in out/results.json."""
        out = Path(out)
        say = (lambda text: None) if quiet else functools.partial(print, flush=True)
        pretrained(out, self.pretraining, self.seed, self.device, quiet)
        settings = {
            "out": out, "steps": self.steps, "pretraining": self.pretraining, "seed": self.seed, "device": self.device, "fast": self.fast,
        }  # fmt: skip
        found = {name: rows for name in self.names if resume and (rows := self._known(out, name))}
        missing = [name for name in self.names if name not in found]
        threads = max(1, torch.get_num_threads() // self.jobs)
        with ProcessPoolExecutor(self.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
            waiting = {pool.submit(_cell, name, threads, **settings): name for name in missing}
            for done in as_completed(waiting):
                found[waiting[done]] = done.result()
                say(f"{waiting[done]}: {_summary(found[waiting[done]])}")
                self._write(out, found)
        self._write(out, found)
        return [row for name in self.names for row in found[name]]

    def _known(self, out: Path, name: str) -> list[Row]:
        path = out / folder_of(name) / "rows.json"
        if not path.exists():
            return []
        rows = json.loads(path.read_text(encoding="utf-8"))
        return rows if rows and rows[0]["steps"] == self.steps and rows[0]["seed"] == self.seed else []

    def _write(self, out: Path, found: dict[str, list[Row]]) -> None:
        meta = {
            "recipe": self.name, "dim": DIM, "layers": LAYERS, "segment": SEGMENT, "length": LENGTH, "steps": self.steps,
            "reading": READING, "pretraining": self.pretraining, "rows": ROWS, "environment": environment(torch.device("cpu")),
        }  # fmt: skip
        rows = [row for name in self.names for row in found.get(name, [])]
        write_text(out / "results.json", json.dumps({"rows": rows, "meta": meta}, indent=1) + "\n")


def _pick(rows: Sequence[Row], column: str, **where: Any) -> Any:
    """The value of `column` in the row that has these values, None where there is none."""
    found = [row for row in rows if all(row.get(key) == value for key, value in where.items())]
    return found[0].get(column) if found else None


def _summary(rows: list[Row]) -> str:
    pairs = "  ".join(
        f"{row['pairs']} pairs {row['accuracy']:.0%}" for row in rows if row["task"] == "assoc-retrieval" and row["gap"] == SEGMENT
    )
    bits = whole(rows)["bits_per_byte"]
    return f"{pairs}  {'diverged on books' if bits is None else f'{bits:.3f} bits a byte'}"


ORDERINGS: tuple[tuple[str, str, str, str], ...] = (
    ("armt", "rmt", "pairs", "ARMT recalls more pairs than RMT (2407.04841)"),
    ("rmt", "transformer-xl", "bits", "RMT is at least as good as Transformer-XL at a small memory (2207.06881)"),
    ("compressive-transformer", "transformer-xl", "bits", "Compressive Transformer is at least as good as Transformer-XL (1911.05507)"),
    ("block-recurrent-transformer", "transformer-xl, 32", "bits", "Block-Recurrent Transformer is ahead of Transformer-XL (2203.07852)"),
    ("lamemo", "transformer-xl", "bits", "LaMemo is at least as good as Transformer-XL at the same memory (2204.07341)"),
    ("infini-attention, delta", "infini-attention", "pairs", "the delta rule serves Infini-attention better than the sum (2404.07143)"),
    ("rmt-r", "rmt", "pairs", "RMT with self-retrieval recalls more than RMT (2402.10790)"),
    ("memorizing-transformer", "transformer-xl, 32", "bits", "a Memorizing Transformer predicts better than Transformer-XL (2203.08913)"),
)  # fmt: skip
"""(what should be ahead, of what, in what, the published claim and its arXiv number)."""


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A sentence for each published ordering whose two memories are in `rows`: the difference, two standard errors, and what follows."""
    sentences = []
    for first, second, what, claim in ORDERINGS:
        mine, theirs = ([row for row in rows if row["memory"] == name] for name in (first, second))
        if not (mine and theirs):
            continue
        if what == "pairs":
            one, two = (np.mean([row["accuracy"] for row in recalled(own)]) for own in (mine, theirs))
            n = sum(row["n"] for row in recalled(mine))
            difference, error = one - two, 2 * math.sqrt((one * (1 - one) + two * (1 - two)) / n)
            figures = f"{one:.1%} against {two:.1%} of the pairs, mean over {', '.join(str(p) for p in PAIRS)}"
        else:
            bits = [np.array(whole(own)["stretches"], dtype=float) for own in (mine, theirs)]  # None: NaN
            if lost := [name for name, values in zip((first, second), bits) if np.isnan(values).any()]:
                sentences.append(f"{claim}: nothing to compare, {lost[0]} diverged on books.")
                continue
            gain = bits[1] - bits[0]
            difference, error = gain.mean(), 2 * gain.std(ddof=1) / math.sqrt(len(gain))
            figures = f"{bits[0].mean():.3f} against {bits[1].mean():.3f} bits a byte"
        found = "confirmed" if difference > error else "the other way round" if difference < -error else "no difference to be seen"
        sentences.append(f"{claim}: {found}. {figures} (difference {difference:+.3f}, two standard errors {error:.3f}).")
    return sentences


def whole(rows: Sequence[Row]) -> Row:
    """The row of the books that is about all positions."""
    return next(row for row in rows if "stretches" in row)


def recalled(rows: Sequence[Row]) -> list[Row]:
    """The rows of assoc-retrieval by the number of pairs."""
    return [row for row in rows if row["task"] == "assoc-retrieval" and row["gap"] == SEGMENT]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """The comparison as a head and a line for each memory, in percent unless the head says otherwise."""
    head = ["memory", "state bytes", *(f"stream {lo}" for lo in SINCE), *(f"{pairs} pair{'s' * (pairs > 1)}" for pairs in PAIRS)]
    head += ["next segment", "4k later", "passkey to", f"{WRITES[-1]} writes: last", "older", "bits a byte", f"from {EDGES[-2]} on"]
    head += ["x speed", "training MB"]
    lines = []
    for name in dict.fromkeys(row["memory"] for row in rows):
        own = [row for row in rows if row["memory"] == name]
        percent = lambda value: "" if value is None else f"{100 * value:.0f}"  # noqa: E731
        reached = [row["gap"] for row in own if row["task"] == "passkey" and row["accuracy"] >= 0.9]
        get = functools.partial(_pick, own)
        near = get("accuracy", task="assoc-retrieval", pairs=4, gap=0)
        far = get("accuracy", task="assoc-retrieval", pairs=4, gap=GAPS["assoc-retrieval"][-1])
        state, bits = get("state_bytes", task="cost"), whole(own)["bits_per_byte"]
        said = lambda value: "diverged" if value is None else f"{value:.3f}"  # noqa: E731
        late = [row["bits_per_byte"] for row in own if row["task"] == "books" and row["from"] == EDGES[-2]]
        lines.append([
            name, f"{state:,}", *(percent(get("accuracy", task="streams", **{"from": lo})) for lo in SINCE),
            *(percent(row["accuracy"]) for row in recalled(own)),
            percent(near), percent(far), f"{max(reached):,}" if reached else "-",
            percent(get("accuracy", task="fact-update", writes=WRITES[-1])), percent(get("stale", task="fact-update", writes=WRITES[-1])),
            said(bits), said(late[0]) if late else "", f"{get('speed_to_bare', task='cost'):.2f}",
            f"{get('peak_training_mb', task='cost'):.0f}",
        ])  # fmt: skip
    return [head, *lines]


def report(out: str | Path, jobs: int = 1, folder: str | Path = "runs/memory-table") -> list[Row]:
    """`remanence report memory`: train and test what `folder` has no rows of, and write the page `out` with the table and the verdicts."""
    run = recipe()
    run.jobs = jobs
    rows = run.start(folder)
    text = [line for line in (__doc__ or "").split("\n\n") if line.strip()]
    sections = [
        Section("Every memory around the same backbone", text, table(rows)),
        Section("What was published", verdicts(rows)),
        *sections_of(Path(folder) / "results.json"),
    ]
    write_report(out, "Segment and external memories compared", f"{len(table(rows)) - 1} memories, {run.steps} updates each.", sections)
    return rows


def recipe(
    out: str | Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    device: str = "auto",
    fast: bool = False,
    data: str | Path | None = None,
    memory: str | None = None,
) -> MemoryTable:
    """memory: names of SETUPS separated by commas (default: all); a name with a comma is written with a dash, as its folder is."""
    refuse_folder(data, "memory-table reads the shipped books")
    known = {folder_of(name): name for name in SETUPS}
    names = list(SETUPS) if memory is None else []
    for item in [] if memory is None else named_once(memory, "name"):
        if item not in known:
            raise unknown("memory of the table", item, known)
        names.append(known[item])
    return MemoryTable(names, steps or (2 if fast else STEPS), 2 if fast else PRETRAINING, seed, device, fast)
