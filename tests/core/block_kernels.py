"""A plugin for pytest, and a module to import first: nothing can import the fast forms of quantizers from here on."""

import importlib.abc
import sys
from typing import Any

BLOCKED = "qframework.kernels"


class Blocking(importlib.abc.MetaPathFinder):
    """Refuses a package and what is in it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Leaves the name to others, or raises."""
        if name == BLOCKED or name.startswith(BLOCKED + "."):
            raise ImportError(f"{name} can't be imported here")


sys.meta_path.insert(0, Blocking())
