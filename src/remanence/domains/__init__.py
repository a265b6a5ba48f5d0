"""The same memories with other inputs and heads, a package each; importing this one registers their systems."""

from importlib import import_module
from pkgutil import iter_modules

for _package in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_package}")
