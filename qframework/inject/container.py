"""The only place that knows the ``dependencies`` package: it instantiates a planned graph of classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from threading import RLock
from typing import Any

from dependencies import Injector as Container
from dependencies import this, value

from qframework.inject.errors import PolicyTypeError
from qframework.inject.expressions import This, Value


def own_form(bound: Any) -> Any:
    """What a name is bound to; the ``value`` and ``this`` of ``dependencies`` in the form that is read here.

    Raises:
        PolicyTypeError: an item of a name, ``this.x[0]``.
    """
    if isinstance(bound, value):
        return Value(bound.__function__)
    if not isinstance(bound, type(this)):
        return bound
    steps = [symbol for operator, symbol in bound.__expression__ if operator == "."]
    if len(steps) < len(bound.__expression__):
        raise PolicyTypeError("this.x[...]: items can't be followed; write an @value function")
    levels = sum(step == "__parent__" for step in steps)
    return This(levels, tuple(steps[levels:]))


class Graph:
    """Classes that need each other, wired once and instantiated any number of times.

    Args:
        classes: names to be instantiated, by their constructors' argument names.
        given: further names that they need.
    """

    def __init__(self, classes: Mapping[str, type], given: Iterable[str]) -> None:
        self._values: Mapping[str, Any] = {}
        self._lock = RLock()
        readers = {name: value(self._reader(name)) for name in given}
        self._container = type("Graph", (Container,), {**readers, **classes})

    def _reader(self, name: str) -> Any:
        def read() -> Any:
            return self._values[name]

        return read

    def build(self, root: str, values: Mapping[str, Any]) -> Any:
        """Build ``root`` and all that its constructor needs.

        Args:
            root: a name of the classes.
            values: of the names that are given.
        """
        with self._lock:
            before, self._values = self._values, values
            try:
                return getattr(self._container, root)
            finally:
                self._values = before
