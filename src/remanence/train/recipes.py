"""Finding recipes by their names on the command line."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from ..errors import unknown


def recipes() -> dict[str, str]:
    """Name, with dashes -> the module that holds it, for every module of `remanence.recipes`; nothing is imported but the package."""
    package = import_module("remanence.recipes")
    return {m.name.replace("_", "-"): f"{package.__name__}.{m.name}" for m in iter_modules(package.__path__) if not m.name.startswith("_")}


def find_recipe(name: str) -> ModuleType:
    """The module of a recipe, e.g. 'lm-books'; its `recipe(**flags)` returns a Run. Raises UnknownName with the nearest names."""
    known = recipes()
    key = name.replace("_", "-")
    if key not in known:
        raise unknown("recipe", name, known)
    return import_module(known[key])
