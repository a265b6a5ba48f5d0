"""From one trained model to another: functions that take a model and return a new one with mapped weights; the one given stays as it is.

One file is one system; importing this package registers them all.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
