"""A quantizer class with given overrides is resolved once; for further layers the recorded steps are taken again.

Only what depends on the layer (its shapes, dtype, device, parameters) and what functions outside of the library compute is computed
anew. Where anything comes out otherwise than it was recorded, the full resolution takes place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from qframework.inject.explanation import Row, short
from qframework.inject.expressions import Value
from qframework.inject.injector import InjectorType
from qframework.inject.policy import POLICY_NAMES, check_policy

#: What a class may bind and somebody write to later.
_CHANGING = (Tensor, np.ndarray, list)
#: How many resolutions are kept.
_LIMIT = 1024
_MISSING = object()


class Step(NamedTuple):
    """One name to compute anew for each layer.

    Attributes:
        name: of the result.
        kind: ``'provided'`` by the layer, ``'value'`` of a function, ``'alias'`` of another name, ``'make'`` of a
            class that needs nothing, ``'build'`` of one that does.
        value: the function, for its kind.
        arguments: names that it is given, or the name that it is an alias of.
        expected: the class to make, or that the function chose; None where it gave a plain value.
    """

    name: str
    kind: str
    value: Value | None = None
    arguments: tuple[str, ...] = ()
    expected: type | None = None


class _Changed(Exception):
    """Something came out otherwise than it was recorded."""


class CachedResolution:
    """The recorded resolution of one quantizer class.

    Args:
        resolver: after it has built everything.
        rows: that explain it.
    """

    def __init__(self, resolver: Any, rows: tuple[Row, ...]) -> None:
        self.steps = tuple(resolver.steps)
        self.reads_layer = resolver.reads_layer
        self.origins = resolver.origins
        varying = {step.name for step in self.steps}
        known = resolver.values()
        self.constants = {k: v for k, v in known.items() if k not in varying}
        self.graphs = dict(resolver.graphs)
        self.absent = frozenset(resolver.absent)
        constant = {k for k, v in known.items() if k not in varying or isinstance(v, type)}
        self.rows = tuple(row for row in rows if row.name in constant)
        self.varying = varying

    def values_for(self, provided: Mapping[str, Any]) -> dict[str, Any]:
        """All values for another layer.

        Raises:
            _Changed: the full resolution is needed.
        """
        values = dict(self.constants)
        for step in self.steps:
            if step.kind == "provided":
                result = provided[step.name]
            elif step.kind == "alias":
                result = values[step.arguments[0]]
            elif step.kind == "make":
                assert step.expected is not None
                result = step.expected()
            elif step.kind == "build":
                result = self.graphs[step.name].build(step.name, values)
            else:
                assert step.value is not None
                result = step.value.function(**{a: values[a] for a in step.arguments})
                if step.expected is not None or isinstance(result, type):
                    if result is not step.expected:
                        raise _Changed
                    continue
                if step.name in POLICY_NAMES:
                    result = check_policy(step.name, result)
            values[step.name] = result
        return values


class Resolved:
    """Stands for a resolver whose work is done; the names that a proxy reads.

    Args:
        cached: what was recorded.
        values: of this layer.
        overrides: the layer's keywords.
    """

    def __init__(
        self, cached: CachedResolution, values: dict[str, Any], overrides: Mapping[str, Any]
    ) -> None:
        self._cached, self._values, self.overrides = cached, values, overrides
        self.reads_layer = cached.reads_layer
        self.used: set[str] = set()

    def read(self, name: str, default: Any = _MISSING) -> Any:
        """The value of a name."""
        if name in self._values:
            return self._values[name]
        if name in self._cached.absent and default is not _MISSING:
            return default
        raise _Changed

    def check_names(self) -> None:
        """They were checked when the resolution was recorded."""

    def rows(self) -> tuple[Row, ...]:
        """A row for every name."""
        cached = self._cached
        own = [
            Row(name, short(self._values[name]), cached.origins[name])
            for name in cached.varying
            if name in cached.origins and name in self._values
        ]
        return *cached.rows, *own


_cached: OrderedDict[Any, CachedResolution] = OrderedDict()


def _key(
    injector: InjectorType, overrides: Mapping[str, Any], provided: Mapping[str, Any], prefix: str
) -> Any:
    """What a plan is found by; None where an override can't be compared."""
    if not all(_is_plain(v) for v in overrides.values()):
        return None
    own = frozenset((k, type(v), v) for k, v in overrides.items())
    given = frozenset((k, v if isinstance(v, type) else None) for k, v in provided.items())
    return injector, own, given, prefix


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str, Enum, type))


def find_cached(
    injector: InjectorType, overrides: Mapping[str, Any], provided: Mapping[str, Any], prefix: str
) -> Resolved | None:
    """The recorded resolution for another layer; None where there is none, or where it comes out otherwise."""
    cached = _cached.get(_key(injector, overrides, provided, prefix))
    if cached is None:
        return None
    try:
        return Resolved(cached, cached.values_for(provided), overrides)
    except Exception:  # the full resolution takes place, and says what is wrong
        return None


def cache(resolver: Any, rows: tuple[Row, ...]) -> None:
    """Keep the resolution of a quantizer that was built without an error.

    Args:
        resolver: that built it.
        rows: that explain it.
    """
    key = _key(resolver.injector, resolver.overrides_given, resolver.provided, resolver.prefix)
    bound = resolver.injector.__bindings__.values()
    if key is None or not resolver.cacheable or any(isinstance(b.bound, _CHANGING) for b in bound):
        return
    _cached[key] = CachedResolution(resolver, rows)
    while len(_cached) > _LIMIT:
        _cached.popitem(last=False)
