"""How modules of the package are imported: late where they are slow, and under their former names too."""

import sys
from importlib.util import find_spec, module_from_spec
from threading import RLock
from types import ModuleType
from typing import Any

PACKAGE = __name__.partition(".")[0]
LOCK = RLock()


class LateModule(ModuleType):
    """A module that runs when something in it is first used.

    Unlike `importlib.util.LazyLoader`, it answers special attributes such as `__file__` without running: while torch is
    imported, it reads those of all imported modules. Threads wait for each other.
    """

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__dict__", "__all__"):
            return ModuleType.__getattribute__(self, name)
        with LOCK:
            spec = ModuleType.__getattribute__(self, "__spec__")
            if not spec.loader_state:  # else it is running, or has run
                spec.loader_state = "started"
                try:
                    spec.loader.exec_module(self)
                except BaseException:
                    spec.loader_state = None
                    raise
                self.__class__ = ModuleType
            return ModuleType.__getattribute__(self, name)


def import_late(name: str) -> ModuleType:
    """Puts a module of the package among the imported ones, without running it."""
    spec = find_spec(name)
    assert spec is not None
    module = module_from_spec(spec)
    module.__class__ = LateModule
    sys.modules[name] = module
    return module
