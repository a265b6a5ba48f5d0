"""Token mixers: `y, state = mixer(x, state=None, span=None)`. One file is one system; importing this package registers them all."""

from importlib import import_module
from pkgutil import iter_modules

from .base import Mixer

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")

__all__ = ["Mixer"]
