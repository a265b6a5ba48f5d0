"""Checkpoints of the reference implementations of RMT and ARMT, read into this library's.

    model = rm.memory("rmt", backbone=hf_model, segment=512, **hyper_parameters(reference))
    load_reference(model, reference)

`reference` is the state dict of booydar/recurrent-memory-transformer (modeling_rmt, MemoryCell or its RecurrentWrapper) or of
RodkinIvan/associative-recurrent-memory-transformer (modeling_amt, AssociativeMemoryCell or its wrapper), around the causal language model
of transformers that `hf_model` is an instance of. Names are changed and nothing else:

    [memory_cell.]memory                        prompt                                  [m, dim]
    [memory_cell.]model.<name>                  backbone.hf.<name>
    ... model.<layers>.<l>.W_mq.weight          associations.<l>.to_q.weight            [key_dim, dim]       (ARMT)
    ... model.<layers>.<l>.W_mk.weight          associations.<l>.to_k.weight            [key_dim, dim]
    ... model.<layers>.<l>.W_mv.weight          associations.<l>.to_v.weight            [dim, dim]
    ... model.<layers>.<l>.W_mb.{weight,bias}   associations.<l>.to_beta.{weight,bias}  [1, dim], [1]
    ... model.<layers>.<l>.layer.<name>         backbone.hf.<layers>.<l>.<name>

What a state dict does not tell: the segment; `correction`; and whether the code that trained it normalised DPFP features to length one.
The code of the ARMT paper does not, as `armt` does not; branches of that repository from after the paper do, and their checkpoints must
not be read by this. The reference adds 1e-5 to z . k where it takes the correction g, and `armt` does not: g differs by at most
1e-5 / |k|^2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import UsageError
from ..models.base import Model

PARTS = {"W_mq": "to_q", "W_mk": "to_k", "W_mv": "to_v", "W_mb": "to_beta"}
BUFFERS = re.compile(r"(\.attn\.bias|\.attention\.bias|\.masked_bias|\.inv_freq)$")
"""What older versions of transformers saved beside the weights: causal masks and rotary frequencies, which newer ones make."""
EXTRAS = {"sink": "a sink token", "act": "adaptive computation time", "ln": "a norm before the memory"}


def convert_rmt(reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's RMT state dict under this library's names. Raises UsageError if it is not one."""
    inner = _cell(reference)
    if wrapped := [name for name in inner if ".W_mq." in name]:
        raise UsageError(f"the state dict has {wrapped[0]}; it is one of ARMT, not RMT.")
    return _renamed(inner)


def convert_armt(reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's ARMT state dict under this library's names. Raises UsageError if it is not one, or one with heads or gating."""
    inner = _cell(reference)
    layers = {name.removesuffix(".W_mq.weight"): int(name.split(".")[-3]) for name in inner if name.endswith(".W_mq.weight")}
    if not layers:
        raise UsageError("the state dict has no W_mq.weight; it is not one of ARMT.")
    if sorted(layers.values()) != list(range(len(layers))):
        raise UsageError(f"the layers {sorted(layers.values())} have a memory; armt has one in every layer, from 0 on.")
    converted: dict[str, Tensor] = {}
    for name, tensor in inner.items():
        wrapper = next((prefix for prefix in layers if name.startswith(prefix + ".")), None)
        if wrapper is None:
            converted[name] = tensor
            continue
        part, _, rest = name.removeprefix(wrapper + ".").partition(".")
        if part == "layer":
            converted[f"{wrapper}.{rest}"] = tensor
        elif part in PARTS:
            if part == "W_mb" and tensor.shape[0] != 1:
                raise UsageError(f"{name} has {tensor.shape[0]} rows; armt has one strength for a memory token (n_heads=1, gating=False).")
            converted[f"associations.{layers[wrapper]}.{PARTS[part]}.{rest}"] = tensor
        else:
            raise UsageError(f"{name} belongs to {EXTRAS.get(part, 'a part')} that armt does not have.")
    return _renamed(converted)


def hyper_parameters(reference: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes tell: {'tokens': m}, for ARMT 'key_dim' too; keyword arguments of `rm.memory`."""
    inner = _cell(reference)
    found: dict[str, Any] = {"tokens": inner["memory"].shape[0]}
    keys = [tensor for name, tensor in inner.items() if name.endswith(".W_mq.weight")]
    return found | ({"key_dim": keys[0].shape[0]} if keys else {})


def load_reference(memory: Model, reference: Mapping[str, Tensor]) -> None:
    """Read a reference's state dict into an `rmt` or `armt` around a causal language model of transformers.

    Raises UsageError, naming a tensor, if one is missing, of another shape, or has no place; nothing is loaded then.
    """
    if memory.kind not in ("rmt", "armt"):
        raise UsageError(f"memory is of kind {memory.kind!r}; there are references for rmt and armt.")
    converted = convert_rmt(reference) if memory.kind == "rmt" else convert_armt(reference)
    own = memory.state_dict(keep_vars=True)
    converted = {name: tensor for name, tensor in converted.items() if name in own or not BUFFERS.search(name)}
    for name, tensor in converted.items():
        if name not in own:
            raise UsageError(f"{name} of the checkpoint has no place in this {memory.kind}; is it around the model it was trained with?")
        if own[name].shape != tensor.shape:
            hint = " (wrap_pos=True gives memory tokens positions of their own, which armt does not)" if name.endswith("wpe.weight") else ""
            raise UsageError(f"{name} has shape {list(tensor.shape)} in the checkpoint and {list(own[name].shape)} here{hint}.")
    filled = {id(own[name]) for name in converted}
    if missing := [name for name, tensor in own.items() if id(tensor) not in filled]:
        raise UsageError(f"the checkpoint has no {missing[0]}, which this {memory.kind} has.")
    memory.load_state_dict(dict(converted), strict=False)


def _cell(reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of the memory cell, without what wrappers put before their names."""
    memory = next((name for name in reference if name == "memory" or name.endswith(".memory")), None)
    if memory is None:
        raise UsageError("the state dict has no 'memory'; it is not one of a recurrent memory transformer.")
    prefix = memory.removesuffix("memory")
    inner = {name.removeprefix(prefix): tensor for name, tensor in reference.items() if name.startswith(prefix)}
    if len(inner) < len(reference):
        other = next(name for name in reference if not name.startswith(prefix))
        raise UsageError(f"{other} lies outside of the memory cell ({prefix!r}); it has no place here.")
    return inner


def _renamed(cell: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    for name, tensor in cell.items():
        if name == "memory":
            converted["prompt"] = tensor
        elif name.startswith("model."):
            converted["backbone.hf." + name.removeprefix("model.")] = tensor
        elif name.startswith("associations."):
            converted[name] = tensor
        else:
            raise UsageError(f"{name} belongs to {EXTRAS.get(name.split('.')[0], 'a part')} that this library's memory does not have.")
    return converted
