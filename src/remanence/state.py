"""State: what a memory holds, as a value.

A State is an immutable tree of tensors. A call never changes the state it was given, so keeping a reference is a fork and keeping an
old one is a rewind. It can be saved, loaded (to the same bits, never by unpickling), moved, sliced by rows and differentiated through.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import ShapeError, StateError, UsageError
from .files import tensor_digest, write_atomic

FORMAT_VERSION = 1


class Growing:
    """A tensor [B, n, ...] that grows along dim 1 and is immutable all the same: a view (shared store, length).

    Appending past the end of the store's used part writes into it (O(1) amortised); if another view already did, the part in common is
    copied, so no view ever changes. Under autograd it concatenates, because a graph may have saved the old tensor.
    """

    __slots__ = ("_store", "length")

    class _Store:
        __slots__ = ("data", "used")

        def __init__(self, data: Tensor, used: int):
            self.data, self.used = data, used

    def __init__(self, tensor: Tensor):
        self._store = Growing._Store(tensor, tensor.shape[1])
        self.length = tensor.shape[1]

    @property
    def tensor(self) -> Tensor:
        """The content, [B, length, ...]."""
        return self._store.data[:, : self.length]

    def append(self, new: Tensor) -> Growing:
        """A longer value; this one stays as it is. new [B, n, ...] of the same dtype."""
        if torch.is_grad_enabled():
            return Growing(torch.cat([self.tensor, new], 1))
        store, end = self._store, self.length + new.shape[1]
        if store.used != self.length or end > store.data.shape[1]:
            data = new.new_empty(new.shape[0], max(end, 2 * self.length, 16), *new.shape[2:])
            data[:, : self.length] = self.tensor
            store = Growing._Store(data, self.length)
        store.data[:, self.length : end] = new
        store.used = end
        view = Growing.__new__(Growing)
        view._store, view.length = store, end
        return view


class State:
    """An immutable tree of batch-first tensors. Subclasses only list their fields::

        class GatedDeltaNetState(State):
            seen: Tensor       # [B] int64, tokens read in the current document
            memory: Tensor     # [B, H, K, V] float32
            conv: Tensor       # [B, W - 1, C]

    A field is a Tensor, a Growing, a State, a tuple of these, a plain number or string, or None. `header` says which system and which
    configuration made it; a system refuses a state whose header is not its own (StateError).
    """

    fields: ClassVar[tuple[str, ...]] = ()
    _kinds: ClassVar[dict[str, type[State]]] = {}

    header: tuple[str, str]
    """(system slug, configuration digest), stamped by the module that made the state; ("", "") on parts."""

    def __init_subclass__(cls) -> None:
        own = tuple(name for name in cls.__dict__.get("__annotations__", {}) if not name.startswith("_") and name != "header")
        if taken := [name for name in own if hasattr(State, name)]:
            raise TypeError(f"{cls.__name__} has a field {taken[0]!r}, which every State has as a method or property; name it otherwise.")
        cls.fields = (*cls.fields, *own)
        State._kinds[cls.__name__] = cls

    def __init__(self, **values: Any):
        if values.keys() != set(self.fields):
            raise UsageError(f"{type(self).__name__} has the fields {', '.join(self.fields)}; got {', '.join(values)}.")
        self.__dict__.update(values, header=("", ""))

    def __setattr__(self, name: str, value: Any) -> None:
        raise StateError(f"a {type(self).__name__} is a value: {name!r} cannot be set; make a changed copy with .replace({name}=...).")

    def __delattr__(self, name: str) -> None:
        raise StateError(f"a {type(self).__name__} is a value: {name!r} cannot be deleted.")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; shares the rest."""
        new = type(self)(**{name: changes.pop(name) if name in changes else self.__dict__[name] for name in self.fields})
        if changes:
            raise UsageError(f"{type(self).__name__} has no field {', '.join(changes)}; fields: {', '.join(self.fields)}.")
        return new.stamp(*self.header)

    def stamp(self, system: str, config: str) -> Self:
        """Write the header in; for the module that has just made this state, before anyone else holds it."""
        self.__dict__["header"] = (system, config)
        return self

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """A state of the same shape with `fn` applied to every tensor."""
        return self._rebuild(lambda value: Growing(fn(value.tensor)) if isinstance(value, Growing) else fn(value))

    def _rebuild(self, leaf: Callable[[Any], Any]) -> Self:
        def walk(value: Any) -> Any:
            if isinstance(value, State):
                return value._rebuild(leaf)
            if isinstance(value, tuple):
                return tuple(walk(item) for item in value)
            return leaf(value) if isinstance(value, (Tensor, Growing)) else value

        return type(self)(**{name: walk(self.__dict__[name]) for name in self.fields}).stamp(*self.header)

    def named_tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """(dotted name, tensor) for every tensor, in field order."""

        def walk(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
            if isinstance(value, State):
                yield from value.named_tensors(name + ".")
            elif isinstance(value, tuple):
                for i, item in enumerate(value):
                    yield from walk(f"{name}.{i}", item)
            elif isinstance(value, (Tensor, Growing)):
                yield name, value.tensor if isinstance(value, Growing) else value

        for field in self.fields:
            yield from walk(prefix + field, self.__dict__[field])

    def tensors(self) -> list[Tensor]:
        """Every tensor, in field order."""
        return [tensor for _, tensor in self.named_tensors()]

    @property
    def tokens(self) -> int:
        """Tokens read in the current document; with rows of different length, of the longest row."""
        return int(self.__dict__["seen"].max()) if "seen" in self.fields else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    @property
    def batch(self) -> int:
        """Number of rows."""
        return next(self.named_tensors())[1].shape[0]

    @property
    def device(self) -> torch.device:
        return next(self.named_tensors())[1].device

    def detach(self) -> Self:
        """The same values, cut from the graph that made them."""
        return self.map(Tensor.detach)

    def clone(self) -> Self:
        """A deep copy of every tensor."""
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moved to a device; `dtype` (a real one) changes floating-point tensors only, complex ones to the complex type of its width."""

        def cast(t: Tensor) -> Tensor:
            width = dtype and (dtype.to_complex() if t.is_complex() else dtype if t.is_floating_point() else None)
            return t.to(device=device, dtype=width)

        return self.map(cast)

    def rows(self, index: Sequence[int] | Tensor) -> Self:
        """The rows named, in that order, repeats allowed. Raises StateError on a row that is not there."""
        index = torch.as_tensor(index, dtype=torch.long, device=self.device)
        if index.ndim != 1 or (index.numel() and not (-self.batch <= int(index.min()) and int(index.max()) < self.batch)):
            raise StateError(f"rows {index.tolist()} were asked of a state with {self.batch} rows; each must be in 0..{self.batch - 1}.")
        return self.map(lambda t: t[index])

    def digest(self) -> str:
        """sha256 of all content: equal digests, equal bits."""
        return tensor_digest(dict(self.named_tensors()))

    def _structure(self) -> dict[str, Any]:
        def walk(value: Any) -> Any:
            if isinstance(value, State):
                return value._structure()
            if isinstance(value, tuple):
                return {"tuple": [walk(item) for item in value]}
            if isinstance(value, (Tensor, Growing)):
                return {"tensor": "growing" if isinstance(value, Growing) else "fixed"}
            return {"value": value}

        fields = {name: walk(self.__dict__[name]) for name in self.fields}
        return {"state": type(self).__name__, "header": list(self.header), "fields": fields}

    def save(self, path: str | Path, extra: Callable[[dict[str, str]], dict[str, str]] | None = None) -> None:
        """Write a safetensors file whose header says format version, system, configuration digest, tokens seen and a digest of the content.

        extra(header) gives further items of the header, for those who keep something beside a state. Raises StateError if a tensor holds
        NaN, FileError if the file cannot be written; an existing file is replaced whole or not at all.
        """
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.named_tensors()}
        for name, tensor in tensors.items():
            if torch.isnan(tensor).any():
                raise StateError(f"the state's tensor {name!r} holds NaN; a state that cannot be continued is not saved.")
        floats = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()})
        structure = json.dumps(self._structure())
        header = {
            "format": "remanence-state",
            "version": str(FORMAT_VERSION),
            "system": self.header[0],
            "config": self.header[1],
            "tokens": str(self.tokens),
            "dtype": ",".join(floats),
            "structure": structure,
            "sha256": hashlib.sha256((tensor_digest(tensors) + structure).encode()).hexdigest(),
        }
        if extra:
            header |= extra(header)
        write_atomic(path, lambda beside: save_file(tensors, beside, metadata=header))

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> State:
        """Read a state back, to the same bits.

        Raises StateError, naming the file, if it is missing, truncated, tampered with or of another format.
        """
        path = Path(path)
        if path.is_dir():
            raise StateError(f"{path} is a directory; a state file is needed.")
        if not path.exists():
            raise StateError(f"{path} does not exist; expected a state file written by State.save.")
        try:
            with safe_open(path, framework="pt") as file:
                header = dict(file.metadata() or {})
                # cloned: safetensors maps the file, and a state must not change when someone writes into it
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        except Exception as error:
            raise StateError(f"{path} is truncated or is not a safetensors file ({error}).") from error
        if header.get("format") != "remanence-state":
            raise StateError(f"{path} is a safetensors file but not a state: its header has no format 'remanence-state'.")
        if header.get("version") != str(FORMAT_VERSION):
            raise StateError(f"{path} has state format version {header.get('version')}; this library reads version {FORMAT_VERSION}.")
        structure = header.get("structure", "")
        if hashlib.sha256((tensor_digest(tensors) + structure).encode()).hexdigest() != header.get("sha256"):
            raise StateError(f"{path} was changed after it was saved: its content does not match the digest in its header.")
        return _restore(json.loads(structure), tensors, "", str(path)).to(device)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.named_tensors())
        text = f"{type(self).__name__}({shapes})"
        return text if len(text) < 300 else f"{type(self).__name__}({len(self.tensors())} tensors, {self.nbytes} bytes)"


def _restore(node: dict[str, Any], tensors: dict[str, Tensor], prefix: str, path: str) -> State:
    kind = State._kinds.get(node["state"])
    if kind is None:
        raise StateError(f"{path} holds a {node['state']}, which no system of this version makes.")
    if set(kind.fields) != set(node["fields"]):
        raise StateError(f"{path}: {node['state']} has the fields {sorted(node['fields'])}; this version expects {sorted(kind.fields)}.")

    def walk(name: str, value: dict[str, Any]) -> Any:
        if "state" in value:
            return _restore(value, tensors, name + ".", path)
        if "tuple" in value:
            return tuple(walk(f"{name}.{i}", item) for i, item in enumerate(value["tuple"]))
        if "tensor" in value:
            return Growing(tensors[name]) if value["tensor"] == "growing" else tensors[name]
        return value["value"]

    return kind(**{name: walk(prefix + name, value) for name, value in node["fields"].items()}).stamp(*node["header"])


def select_rows(mask: Tensor, one: State, other: State) -> State:
    """Row by row: `one` where mask [B] is true, else `other`. Both have the same fields and shapes (ShapeError otherwise)."""
    chosen = []
    for (name, a), (_, b) in zip(one.named_tensors(), other.named_tensors(), strict=True):
        if a.shape != b.shape:
            raise ShapeError(f"the states' tensor {name!r} has shape {list(a.shape)} in one and {list(b.shape)} in the other.")
        chosen.append(torch.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b))
    values = iter(chosen)
    return one.map(lambda _: next(values))
