"""The only place that knows the ``dependencies`` package: it instantiates a planned graph of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dependencies import Injector as Container


def instantiate(root: str, classes: Mapping[str, type], values: Mapping[str, Any]) -> Any:
    """Build ``root`` and all that its constructor needs.

    Args:
        root: a name of ``classes``.
        classes: names to be instantiated, by their constructors' argument names.
        values: names that are there already.
    """
    return getattr(type("Graph", (Container,), {**values, **classes}), root)
