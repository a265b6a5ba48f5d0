"""What every token mixer shares: checking its input, moving padding to the right, and stamping the state it returns."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ShapeError, StateError, UsageError, positive
from ..span import Span
from ..state import State


def config_digest(slug: str, config: dict[str, Any]) -> str:
    """A short digest of a system and its hyper-parameters: what a state must share with the module that continues it."""
    return hashlib.sha256(json.dumps([slug, config], sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_state(state: State, header: tuple[str, str], batch: int, device: torch.device) -> None:
    """Raise StateError unless the state was made by the same system and configuration, for this batch and device."""
    if not isinstance(state, State):
        raise StateError(f"state is a {type(state).__name__}; it must be a State that {header[0]} returned, or None for a fresh start.")
    if state.header[0] != header[0]:
        raise StateError(f"the state was made by {state.header[0] or 'a part of a system'}; {header[0]} can only continue its own.")
    if state.header[1] != header[1]:
        raise StateError(f"the state was made by a {header[0]} of configuration {state.header[1]}; this one has configuration {header[1]}.")
    if state.batch != batch:
        raise StateError(f"the state has {state.batch} rows and the input {batch}; they must agree (state.rows repeats or picks rows).")
    if state.device.type != device.type:
        raise StateError(f"the state is on {state.device} and the input on {device}; move it with state.to(device).")


class Mixer(nn.Module):
    """A token mixer: `y, state = mixer(x, state=None, span=None)`, x and y [B, T, dim], T >= 1.

    Subclasses write `forward(x, state, span)`, where padding, if any, is on the right, and return a fresh State. Hyper-parameters are
    keyword arguments of `__init__`; integers among them are checked to be >= 1. Raises ShapeError on a wrong input and StateError on a
    state that another system, configuration or batch made.
    """

    role: ClassVar[str] = "mixer"
    slug: ClassVar[str] = "mixer"
    config: dict[str, Any]
    header: tuple[str, str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recorded(cls.__init__)  # type: ignore[method-assign]

    def __call__(self, x: Tensor, state: State | None = None, span: Span | None = None) -> tuple[Tensor, State]:
        self.check(x, state, span)
        order = None
        if span is not None and span.valid is not None:
            x = x.masked_fill(~span.valid[..., None], 0)  # whatever stood at a padded position, NaN included, must not count
            span, order = span.right_padded()
            if order is not None:
                x = x.gather(1, order[..., None].expand_as(x))
        y, new = super().__call__(x, state, span)
        if span is not None and span.valid is not None:
            y = y * span.valid[..., None].to(y.dtype)
            if order is not None:
                y = torch.zeros_like(y).scatter(1, order[..., None].expand_as(y), y)
        return y, new.stamp(*self.header)

    def check(self, x: Tensor, state: State | None, span: Span | None) -> None:
        """Raise ShapeError or StateError unless the call makes sense."""
        dim = self.config["dim"]
        if x.ndim != 3 or x.shape[-1] != dim:
            raise ShapeError(f"x has shape {list(x.shape)}; {self.slug} expects [B, T, {dim}].")
        if x.shape[1] == 0 or x.shape[0] == 0:
            raise ShapeError(f"x has shape {list(x.shape)}; an empty sequence or batch cannot be read.")
        weight = next(self.parameters())
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ShapeError(f"x is {x.dtype}; this {self.slug} computes in {weight.dtype}.")
        if x.device.type != weight.device.type:
            raise ShapeError(f"x is on {x.device}; this {self.slug} is on {weight.device}.")
        if span is not None:
            span.check(x.shape[0], x.shape[1])
        if state is not None:
            check_state(state, self.header, x.shape[0], x.device)


def _recorded(init: Any) -> Any:
    """Wrap `__init__` so that the module knows its own hyper-parameters and their digest."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self: Mixer, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            known = ", ".join(list(signature.parameters)[1:])
            raise UsageError(f"{self.slug}: {error}; it takes {known}.") from None
        bound.apply_defaults()
        if "config" not in self.__dict__:
            config = dict(list(bound.arguments.items())[1:])
            for name, value in config.items():
                if isinstance(value, int) and not isinstance(value, bool):
                    positive(**{name: value})
            self.__dict__["config"] = config
            self.__dict__["header"] = (self.slug, config_digest(self.slug, config))
        init(self, *args, **kwargs)

    return wrapped
