"""StateX: give some layers of a trained recurrent model a larger state, at no or few parameters, and train on (arXiv 2509.22630)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..catalog import system
from ..errors import UsageError, positive, unknown
from ..mixers.gla import GLA
from ..mixers.mamba2 import Mamba2
from ..models import Decoder, ModelConfig, parse_layers

INHERIT = ("none", "merge", "merge_copy", "merge_zero", "merge_grow")


def _one_head(old: GLA, inherit: str) -> dict[str, Tensor]:
    """The weights that a GLA of one head takes over from one of several: all, the norm's repeated for every head; or none."""
    if inherit == "none":
        return {}
    weights = old.state_dict()
    return weights | {"norm.weight": weights["norm.weight"].repeat(old.heads)}


def _wider(old: Mamba2, inherit: str, fresh: dict[str, Tensor], factor: int) -> dict[str, Tensor]:
    """The weights that a Mamba-2 of `factor` times the state size takes over; `fresh` are those that it has at the start.

    B and C have G groups of N rows in `to_zxbcdt` and G N channels in the convolution; in each group the new ones come after the old.
    """
    weights, (inner, size, _) = old.state_dict(), old.sizes
    channels = [inner, size, size]  # x, B, C
    parts = {"to_zxbcdt.weight": [inner, *channels, old.heads], "conv.weight": channels, "conv.bias": channels}
    for name, sizes in parts.items():
        at = len(sizes) // 2  # B's place: after z and x, or after x
        wide = [rows * factor if i in (at, at + 1) else rows for i, rows in enumerate(sizes)]
        kept, new = list(weights[name].split(sizes)), fresh[name].split(wide)
        for i in (at, at + 1):
            # a channel is zero if its convolution is; its projection must then not be, or neither would ever have a gradient
            zero = inherit == "merge_zero" or (inherit == "merge_grow" and i == at + 1 and name.startswith("conv"))
            kept[i] = _rows(kept[i], new[i], inherit, factor, old.groups, zero)
        weights[name] = torch.cat(kept)
    if inherit == "none":  # as in the authors' code: z, x, dt, D and the output stay
        weights |= {name: fresh[name] for name in ("A_log", "dt_bias", "norm.weight")}
    return weights


def _rows(old: Tensor, fresh: Tensor, inherit: str, factor: int, groups: int, zero: bool) -> Tensor:
    """The rows of B or C in one tensor, group by group: [G N, ...] -> [G N factor, ...]; zero: those added are."""
    if inherit == "none":
        return fresh
    rows = old.unflatten(0, (groups, -1))
    if inherit == "merge_copy":
        return torch.cat([rows] * factor, 1).flatten(0, 1)
    added = fresh.unflatten(0, (groups, -1))[:, rows.shape[1] :]
    return torch.cat([rows, torch.zeros_like(added) if zero else added], 1).flatten(0, 1)


@system(
    "statex",
    kind="conversion",
    paper="arXiv:2509.22630",
    year=2025,
    name="StateX (post-training state expansion)",
    state="GLA: H times its layer's; Mamba-2: `factor` times",
    parity="merge_zero and merge_grow give the old model's outputs; a merged GLA, masked to the diagonal blocks, is the multi-head one",
    claim="With too many MQAR pairs for its state, a model with one layer in four expanded recalls more after a little training.",
)
@torch.no_grad()
def statex(model: Decoder, every: int = 6, inherit: str = "none", factor: int = 4) -> Decoder:
    """A new Decoder whose layers 1, 1 + every, ... have larger states; all other weights are copies. Then train it, best on long contexts.

    A `gla` layer of H heads gets ONE head of the same projections: K V numbers of state in place of K V / H, and no new weight but the
    norm's. A `mamba2` layer gets `factor` times the state size N: more B and C. Layers of other mixers stay. inherit, what an expanded
    layer starts from:

        "none"         the default. gla: everything fresh, with its pre-norm; mamba2: B, C, A_log, dt_bias and the gated norm fresh
        "merge"        gla only: all weights as they are, the norm's repeated for every head
        "merge_copy"   mamba2 only: the old B and C rows `factor` times, which multiplies what is read from the state by `factor`
        "merge_zero"   mamba2 only: the new B and C zero. The same function, but no gradient ever reaches a zero B through a zero C
        "merge_grow"   mamba2 only, ours: the new B fresh, the new C zero by its convolution. The same function, and it can learn

    Two notes on the authors' code (thunlp/StateX): its merges draw A_log, dt_bias and the norm anew in mamba2, so that even merge_zero is
    another function there, ours keep them; and it expands every 6th of 24 GLA layers, but every Mamba-2 layer. Its LoRA ablation is left
    out. That fresh layers do better than merged ones is reported from memory. Fresh weights come from torch's generator. Raises UsageError
    if no layer can be expanded so, or one has only one head.
    """
    positive(every=every, factor=factor)
    if inherit not in INHERIT:
        raise unknown("inherit", inherit, INHERIT)
    if not isinstance(model, Decoder):
        raise UsageError(f"model is a {type(model).__name__}; statex expands the layers of a Decoder.")
    specs = parse_layers(model.config["layers"]) * model.config["repeat"]
    expanded: dict[int, GLA | Mamba2] = {}
    for index in range(0, len(specs), every):
        mixer = model.blocks[index].mixer
        if isinstance(mixer, GLA) and inherit in ("none", "merge"):
            if mixer.heads == 1:
                raise UsageError(f"layer {index + 1} is a gla of one head; its state cannot be expanded further.")
            specs[index] = specs[index] | {"heads": 1}
        elif isinstance(mixer, Mamba2) and inherit != "merge":
            specs[index] = specs[index] | {"state_size": mixer.config["state_size"] * factor}
        else:
            continue
        expanded[index] = mixer
    if not expanded:
        raise UsageError(f"inherit is {inherit!r}; none of layers 1, {1 + every}, ... is of a mixer that it expands (gla, mamba2).")
    weight = model.embedding.weight
    new = Decoder(ModelConfig(**model.config | {"layers": specs, "repeat": 1})).to(weight.device, weight.dtype).train(model.training)
    kept, started = model.state_dict(), new.state_dict()
    for index, mixer in expanded.items():
        prefix = f"blocks.{index}.mixer."
        fresh = {name.removeprefix(prefix): tensor for name, tensor in started.items() if name.startswith(prefix)}
        if isinstance(mixer, GLA):
            mapped = _one_head(mixer, inherit)
        else:
            mapped = _wider(mixer, inherit, fresh, factor)
        if not mapped:  # the pre-norm belongs to what is replaced
            kept[f"blocks.{index}.norm.weight"] = started[f"blocks.{index}.norm.weight"]
        kept |= {prefix + name: tensor for name, tensor in (fresh | mapped).items()}
    new.load_state_dict(kept)
    return new
