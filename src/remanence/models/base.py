"""A Model: token ids in, logits and a state out; saved as config.json and model.safetensors, loaded without unpickling."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ShapeError, UsageError
from ..files import tensor_digest, write_atomic, write_text
from ..mixers.base import check_state, config_digest
from ..span import Span
from ..state import State

MODEL_FORMAT = 1


@dataclass(frozen=True)
class Output:
    """logits [B, T, V] ([B, 1, V] if only the last were asked for, None if none were), the state, hidden [B, T, dim], loss or None."""

    logits: Tensor | None
    state: State
    hidden: Tensor
    loss: Tensor | None = None


class Model(nn.Module):
    """`out = model(ids, state=None, span=None)`; everything from a Decoder to a segment memory around one is a Model.

    Subclasses give `embed(ids) -> [B, T, dim]`, `encode(h, state, span) -> (hidden, state)` for right-padded input, and `head(hidden)`,
    and set `config` (plain JSON data from which `build(config)` makes the model again), `vocab`, `dim`.
    """

    kind: ClassVar[str] = "model"
    _kinds: ClassVar[dict[str, type[Model]]] = {}
    config: dict[str, Any]
    vocab: int
    dim: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            Model._kinds[cls.kind] = cls

    @classmethod
    def build(cls, config: dict[str, Any]) -> Model:
        """The model that `config` describes, with fresh weights."""
        raise NotImplementedError

    def embed(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def encode(self, h: Tensor, state: State | None, span: Span | None) -> tuple[Tensor, State]:
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    @functools.cached_property
    def header(self) -> tuple[str, str]:
        """What its states carry: (kind, configuration digest)."""
        return self.kind, config_digest(self.kind, self.config)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self,
        ids: Tensor,
        state: State | None = None,
        span: Span | None = None,
        targets: Tensor | None = None,
        logits: str = "all",
    ) -> Output:
        """ids [B, T] int64, T >= 1; targets [B, T], what to predict at each position, -100 for nothing; logits 'all', 'last' or 'none'.

        'last' are those at each row's last real token. The loss is the mean cross-entropy over the targets. Raises ShapeError on ids of
        the wrong shape, dtype or range, StateError on a state that another model, configuration or batch made.
        """
        if logits not in ("all", "last", "none"):
            raise UsageError(f"logits is {logits!r}; it may be 'all', 'last' or 'none'.")
        if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"ids have dtype {ids.dtype} and shape {list(ids.shape)}; expected int64 [B, T].")
        if ids.numel() == 0:
            raise ShapeError(f"ids have shape {list(ids.shape)}; an empty sequence or batch cannot be read.")
        if not torch.compiler.is_compiling() and not (int(ids.min()) >= 0 and int(ids.max()) < self.vocab):
            raise ShapeError(f"ids range from {int(ids.min())} to {int(ids.max())}; this model's vocabulary is 0..{self.vocab - 1}.")
        if targets is not None and targets.shape != ids.shape:
            raise ShapeError(f"targets have shape {list(targets.shape)} and ids {list(ids.shape)}; they must agree.")
        if state is not None:
            check_state(state, self.header, ids.shape[0], ids.device)
        order = None
        if span is not None:
            span.check(*ids.shape)
            span, order = span.right_padded()
            if order is not None:
                ids = ids.gather(1, order)
        hidden, new = self.encode(self.embed(ids), state, span)
        last = None
        if logits == "last":
            lengths = None if span is None else span.lengths()
            at = hidden.shape[1] - 1 if lengths is None else (lengths - 1).clamp(min=0)
            last = hidden[:, at : at + 1] if isinstance(at, int) else hidden.gather(1, at[:, None, None].expand(-1, 1, hidden.shape[2]))
        if order is not None:
            hidden = torch.zeros_like(hidden).scatter(1, order[..., None].expand_as(hidden), hidden)
        out = self.head(hidden) if logits == "all" else None if last is None else self.head(last)
        loss = None
        if targets is not None:
            wanted = targets != -100
            picked = out[wanted] if logits == "all" and out is not None else self.head(hidden[wanted])
            loss = F.cross_entropy(picked.float(), targets[wanted])
        return Output(out, new.stamp(*self.header), hidden, loss)

    def save(self, folder: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """Write config.json and model.safetensors into `folder`, each replaced whole or not at all. Raises FileError if that fails."""
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; a model is saved into a folder.")
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self._unique().items()}
        header = {
            "format": "remanence-model",
            "version": MODEL_FORMAT,
            "kind": self.kind,
            "config": self.config,
            "sha256": tensor_digest(tensors),
            "provenance": provenance or {},
        }
        metadata = {"format": "pt", "sha256": str(header["sha256"])}
        write_atomic(folder / "model.safetensors", lambda beside: save_file(tensors, beside, metadata=metadata))
        write_text(folder / "config.json", json.dumps(header, indent=2, default=str) + "\n")

    def _unique(self) -> dict[str, Tensor]:
        """Parameters and buffers, each tied tensor once."""
        seen: set[int] = set()
        unique = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                unique[name] = tensor
        return unique


def load(folder: str | Path, device: torch.device | str = "cpu") -> Model:
    """The model saved in `folder`, in eval mode. Raises UsageError, naming the file, if one is missing, truncated, changed or unknown."""
    folder = Path(folder)
    path, weights = folder / "config.json", folder / "model.safetensors"
    for file in (path, weights):
        if not file.is_file():
            raise UsageError(f"{file} does not exist; expected a folder written by Model.save (config.json and model.safetensors).")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        form, version, kind, config = header["format"], header["version"], header["kind"], header["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a model configuration ({type(error).__name__}: {error}).") from error
    if form != "remanence-model" or version != MODEL_FORMAT:
        raise UsageError(f"{path} has format {form!r} version {version}; this library reads 'remanence-model' version {MODEL_FORMAT}.")
    if kind not in Model._kinds:
        raise UsageError(f"{path} describes a model of kind {kind!r}; this version knows {', '.join(sorted(Model._kinds))}.")
    try:
        tensors = load_file(weights)
    except Exception as error:
        raise UsageError(f"{weights} is truncated or is not a safetensors file ({error}).") from error
    if tensor_digest(tensors) != header.get("sha256"):
        raise UsageError(f"{weights} does not match the digest in {path.name}: one of them was changed after they were saved.")
    model = Model._kinds[kind].build(config)
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name in own and own[name].shape != tensor.shape:
            shapes = f"{name} has shape {list(tensor.shape)}, expected {list(own[name].shape)}"
            raise UsageError(f"{weights} does not fit {path.name}: {shapes}.")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if name in model._unique()]
    if missing or unexpected:
        raise UsageError(f"{weights} does not fit {path.name}: missing {missing[:3]}, unexpected {list(unexpected)[:3]}.")
    return model.to(device).eval()
