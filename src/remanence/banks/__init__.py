"""External memories: banks of keys and values, their search, and the systems that read from one. Importing this package registers them.

In a stream the bank is part of the State and as immutable as the rest (`log`); `bank.KVBank` and `disk.DiskBank` are banks for serving.
"""

from importlib import import_module
from pkgutil import iter_modules

from .bank import KVBank

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")

__all__ = ["KVBank"]
