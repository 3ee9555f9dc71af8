"""fastbn in the words of other systems: a module each, imported when it is asked for.

``import fastbn.interop.torch``, or ``import fastbn.interop`` and then ``fastbn.interop.torch``. `dir` lists what has
been imported: `help` and completion look at every name in it, and would import every system, or fail where one is not
installed.
"""

import importlib
import pkgutil
from types import ModuleType

__all__ = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; expected one of {', '.join(__all__)}")
