"""Remanence: sequence models with memory, where the state is a value that you can hold."""

from __future__ import annotations

from typing import Any

from . import banks as _banks  # noqa: F401 (importing a package registers its systems)
from . import convert as _convert  # noqa: F401
from . import domains as _domains  # noqa: F401
from . import errors
from . import hf as _hf  # noqa: F401
from . import inference as _inference  # noqa: F401
from . import inspect as _inspect  # noqa: F401
from . import memory as _memory  # noqa: F401
from . import mixers as _mixers  # noqa: F401
from . import models as _models  # noqa: F401
from . import tasks as _tasks  # noqa: F401
from . import train as _train  # noqa: F401
from .catalog import Entry, catalog, find
from .errors import UsageError
from .mixers import Mixer
from .models import Decoder, Model, ModelConfig, Output, load
from .span import Span
from .state import State

__version__ = "0.1.0"
__all__ = [
    "Decoder", "Entry", "Mixer", "Model", "ModelConfig", "Output", "Session", "Span", "State", "catalog", "errors", "load",
    "memory", "mixer", "model", "reader", "task",
]  # fmt: skip


def reader() -> tuple[Model, Any]:
    """The model that ships with the library and its tokenizer: `rm.Session(*rm.reader())`."""
    from .session import load_reader

    return load_reader()


def __getattr__(name: str) -> Any:
    """`Session` is imported when it is first asked for: its tokenizers are not needed to build a layer."""
    if name == "Session":
        from .session import Session

        return Session
    raise AttributeError(f"module 'remanence' has no attribute {name!r}")


def mixer(slug: str, dim: int = 256, **hyper: Any) -> Mixer:
    """A token mixer of the catalog by its slug. Raises UnknownName with the nearest slugs, UsageError on a bad hyper-parameter."""
    return find(slug, ("mixer",)).builder(dim=dim, **hyper)


def model(config: ModelConfig | str, **hyper: Any) -> Model:
    """A Decoder from its ModelConfig, or a preset of the catalog by its slug (keyword arguments go to the preset)."""
    if isinstance(config, ModelConfig):
        if hyper:
            raise UsageError(f"a ModelConfig is complete; {', '.join(hyper)} cannot be given beside it.")
        return Decoder(config)
    return find(config, ("model",)).builder(**hyper)


def memory(slug: str, backbone: Model | Any, **hyper: Any) -> Model:
    """A segment or external memory around a model; itself a Model. Raises UnknownName with the nearest slugs.

    backbone: a Model, or a causal language model of transformers, which hf.CausalLM makes one of.
    """
    entry = find(slug, ("segment-memory", "external-memory"))
    if "mixer" in entry.kinds:
        raise UsageError(f"{entry.slug} is a layer and goes around no model; name it among a model's layers, or rm.mixer({entry.slug!r}).")
    if not isinstance(backbone, Model) and any(kind.__module__.split(".")[0] == "transformers" for kind in type(backbone).__mro__):
        backbone = _hf.CausalLM(backbone)
    return entry.builder(backbone, **hyper)


def task(slug: str) -> Any:
    """A benchmark of the catalog: `.sample(seed, n, length)`, `.score(example, output)`, `.published`."""
    return find(slug, ("benchmark",)).builder()
