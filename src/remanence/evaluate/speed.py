"""Tokens per second of every mixer beside its peer and a floor, in one process and taking turns: only ratios survive a busy machine."""

from __future__ import annotations

import inspect
import json
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..catalog import catalog, find
from ..errors import UsageError, positive, unknown
from ..files import write_text
from ..mixers import Mixer
from ..train.environment import environment

PASSES = ("forward", "forward+backward")

Row = dict[str, Any]
Layer = Callable[[Tensor], Tensor]


def _llama(mixer: Any) -> dict[str, Layer]:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=mixer.config["dim"],
        num_attention_heads=mixer.heads,
        num_key_value_heads=mixer.kv_heads,
        head_dim=mixer.head_dim,
    )
    config._attn_implementation = "sdpa"
    layer, rope = LlamaAttention(config, 0), LlamaRotaryEmbedding(config)
    return {"LlamaAttention, sdpa": lambda x: layer(x, rope(x, torch.arange(x.shape[1])[None]), None)[0]}


def _qwen3_next(mixer: Any) -> dict[str, Layer]:
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=mixer.config["dim"],
        linear_num_key_heads=mixer.heads,
        linear_num_value_heads=mixer.heads,
        linear_key_head_dim=mixer.key_dim,
        linear_value_head_dim=mixer.value_dim,
    )
    return {"Qwen3NextGatedDeltaNet": Qwen3NextGatedDeltaNet(config, 0)}


def _mamba2(mixer: Any) -> dict[str, Layer]:
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    hyper = mixer.config
    layers = {}
    for size in (64, 256):  # its default is 256; 64 is faster on a CPU
        config = Mamba2Config(
            hidden_size=hyper["dim"],
            num_heads=mixer.heads,
            head_dim=mixer.head_dim,
            state_size=hyper["state_size"],
            expand=hyper["expand"],
            n_groups=hyper["groups"],
            chunk_size=size,
        )
        layers[f"Mamba2Mixer, chunk {size}"] = Mamba2Mixer(config, 0)
    return layers


def _recurrent_gemma(mixer: Any) -> dict[str, Layer]:
    from transformers.models.recurrent_gemma.configuration_recurrent_gemma import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    dim, heads = mixer.config["dim"], mixer.config["heads"]
    layer = RecurrentGemmaRecurrentBlock(RecurrentGemmaConfig(hidden_size=dim, lru_width=dim, num_attention_heads=heads), 0)
    for weight in layer.parameters():  # it leaves some uninitialised
        nn.init.normal_(weight, std=0.02)
    return {"RecurrentGemmaRecurrentBlock": lambda x: layer(x, torch.arange(x.shape[1])[None], None, use_cache=False)[0]}


def _mingru(mixer: Any) -> dict[str, Layer]:
    from minGRU_pytorch.minGRU import minGRU

    return {"minGRU": minGRU(mixer.config["dim"], mixer.config["expansion"])}


def _minlstm(mixer: Any) -> dict[str, Layer]:
    from minGRU_pytorch.minLSTM import minLSTM

    return {"minLSTM": minLSTM(mixer.config["dim"], mixer.config["expansion"])}


PEERS: dict[str, tuple[str, Callable[[Any], dict[str, Layer]]]] = {
    "attention": ("transformers", _llama),
    "gated-deltanet": ("transformers", _qwen3_next),
    "griffin": ("transformers", _recurrent_gemma),
    "mamba2": ("transformers", _mamba2),
    "mingru": ("minGRU-pytorch", _mingru),
    "minlstm": ("minGRU-pytorch", _minlstm),
}
"""slug -> (distribution, factory of layers of our mixer's sizes). Of several layers the fastest is the peer. All run their torch code."""


def peers(mixer: Mixer) -> tuple[str | None, dict[str, Layer]]:
    """The peer's distribution and its layers; (name, {}) if it is not installed, (None, {}) if the mixer has no peer."""
    if mixer.slug not in PEERS:
        return None, {}
    name, factory = PEERS[mixer.slug]
    try:
        return name, factory(mixer)
    except ImportError:
        return name, {}


def floor(dim: int) -> nn.Module:
    """Two linear layers, 6 dim^2 parameters, no mixing: what a perfect layer approaches."""
    return nn.Sequential(nn.Linear(dim, 3 * dim, bias=False), nn.Linear(3 * dim, dim, bias=False))


def build(slug: str, dim: int, heads: int) -> Mixer:
    """A mixer at its defaults, with `heads` if it has such a thing."""
    entry = find(slug, ("mixer",))
    hyper = {"heads": heads} if "heads" in inspect.signature(entry.builder.__init__).parameters else {}
    return entry.builder(dim=dim, **hyper)


def seconds(layer: Layer, x: Tensor, backward: bool) -> float:
    """One pass; the backward one goes to the input and to every parameter."""
    x = x.detach().requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        start = time.perf_counter()
        y = layer(x)
        if backward:
            y.sum().backward()
        end = time.perf_counter()
    if isinstance(layer, nn.Module):
        layer.zero_grad(set_to_none=True)
    return end - start


def take_turns(layers: dict[str, Layer], x: Tensor, backward: bool, repeats: int) -> dict[str, float]:
    """Median tokens per second of each layer over `repeats` rounds, after one round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(repeats + 1):
        for name, layer in layers.items():
            spent = seconds(layer, x, backward)
            if turn:
                times[name].append(spent)
    return {name: x.shape[0] * x.shape[1] / statistics.median(spent) for name, spent in times.items()}


def speed(
    mixers: Sequence[str] | None = None,
    lengths: Sequence[int] = (2048,),
    dim: int = 256,
    heads: int = 4,
    batch: int = 1,
    repeats: int = 5,
    passes: Sequence[str] = PASSES,
) -> list[Row]:
    """Rows {mixer, length, pass, tokens_per_s, peer, peer_tokens_per_s, ratio_to_peer, ratio_to_floor}, fp32, for `mixers` (default: all).

    A ratio above 1 means that ours is faster. A peer that is not installed is null in numbers and says so in its name; a mixer without a
    peer has null there. Raises UnknownName on an unknown slug or pass, UsageError on a length or count that is not >= 1.
    """
    positive(dim=dim, heads=heads, batch=batch, repeats=repeats, **{f"lengths[{i}]": length for i, length in enumerate(lengths)})
    for name in passes:
        if name not in PASSES:
            raise unknown("pass", name, PASSES)
    slugs = [entry.slug for entry in catalog("mixer")] if mixers is None else list(mixers)
    if not slugs or not lengths or not passes:
        raise UsageError("mixers, lengths or passes is empty; each needs at least one item.")
    rows = []
    for ours in [build(slug, dim, heads) for slug in slugs]:
        source, theirs = peers(ours)
        layers: dict[str, Layer] = {"ours": lambda x, ours=ours: ours(x)[0], "floor": floor(dim), **theirs}
        for length in lengths:
            x = torch.randn(batch, length, dim)
            for name in passes:
                rate = take_turns(layers, x, name == "forward+backward", repeats)
                best = max(theirs, key=rate.__getitem__) if theirs else None
                rows.append(
                    {
                        "mixer": ours.slug,
                        "length": length,
                        "pass": name,
                        "tokens_per_s": rate["ours"],
                        "peer": f"{source} {best}" if best else source and f"{source} (not installed)",
                        "peer_tokens_per_s": rate[best] if best else None,
                        "ratio_to_peer": rate["ours"] / rate[best] if best else None,
                        "ratio_to_floor": rate["ours"] / rate["floor"],
                    }
                )
    return rows


def meta(**setting: Any) -> Row:
    """What the rows were measured with: the setting, the machine, the commit, the peers' versions (null where not installed)."""
    versions: dict[str, str | None] = {}
    for name in sorted({source for source, _ in PEERS.values()}):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {"setting": setting, "environment": environment(), "peers": versions}


def write_json(path: str | Path, rows: Sequence[Row], meta: Row) -> None:
    """{"rows": [...], "meta": {...}}, replaced whole or not at all. Raises FileError if it cannot be written."""
    write_text(path, json.dumps({"rows": list(rows), "meta": meta}, indent=2) + "\n")


def print_table(rows: Sequence[Row]) -> None:
    """The rows on the terminal."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    table = Table("mixer", "length", "pass", "tokens/s", "peer", "peer tokens/s", "x peer", "x floor")
    for row in rows:
        table.add_row(
            row["mixer"],
            f"{row['length']:,}",
            row["pass"],
            number(row["tokens_per_s"], ",.0f"),
            row["peer"] or "-",
            number(row["peer_tokens_per_s"], ",.0f"),
            number(row["ratio_to_peer"], ".2f"),
            number(row["ratio_to_floor"], ".2f"),
        )
    console = Console()
    if not console.is_terminal:
        console.width = 150  # a pipe has no width; the default of 80 would fold every cell
    console.print(table)
