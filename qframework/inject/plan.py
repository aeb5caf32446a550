"""A quantizer class with given overrides is resolved once; for further layers the recorded steps are taken again.

Only what depends on the layer (its shapes, dtype, device, parameters) and what functions outside of the library compute is computed
anew. Where anything comes out otherwise than it was recorded, the full resolution takes place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from qframework.inject.container import Graph
from qframework.inject.explanation import Row, rows_of, short
from qframework.inject.expressions import Value
from qframework.inject.injector import InjectorType
from qframework.inject.policy import POLICY_NAMES, check_policy

#: How many plans are kept.
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


class Plan:
    """The recorded resolution of one quantizer class.

    Args:
        resolver: after it has built everything.
    """

    def __init__(self, resolver: Any) -> None:
        self.steps = tuple(resolver.steps)
        self.reads_layer = resolver.reads_layer
        self.origins = resolver.origins
        varying = {step.name for step in self.steps}
        known = resolver.values()
        self.constants = {k: v for k, v in known.items() if k not in varying}
        self.graphs = dict(resolver.graphs)
        self.absent = frozenset(resolver.absent)
        constant = {k: v for k, v in known.items() if k not in varying or isinstance(v, type)}
        self.rows = rows_of(resolver, constant)
        self.varying = varying

    def replay(self, provided: Mapping[str, Any]) -> dict[str, Any]:
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


class Replay:
    """Stands for a resolver whose work is done; the names that a proxy reads.

    Args:
        plan: what was recorded.
        values: of this layer.
        overrides: the layer's keywords.
    """

    def __init__(self, plan: Plan, values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
        self._plan, self._values, self.overrides = plan, values, overrides
        self.reads_layer = plan.reads_layer
        self.used: set[str] = set()

    def read(self, name: str, default: Any = _MISSING) -> Any:
        """The value of a name."""
        if name in self._values:
            return self._values[name]
        if name in self._plan.absent and default is not _MISSING:
            return default
        raise _Changed

    def check_names(self) -> None:
        """They were checked when the plan was made."""

    def rows(self) -> tuple[Row, ...]:
        """A row for every name."""
        plan = self._plan
        own = [
            Row(name, short(self._values[name]), plan.origins[name])
            for name in plan.varying
            if name in plan.origins and name in self._values
        ]
        return *plan.rows, *own


_plans: OrderedDict[Any, Plan] = OrderedDict()


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


def replayed(
    injector: InjectorType, overrides: Mapping[str, Any], provided: Mapping[str, Any], prefix: str
) -> Replay | None:
    """The resolution by a plan; None where there is none, or where it comes out otherwise."""
    key = _key(injector, overrides, provided, prefix)
    plan = _plans.get(key)
    if plan is None:
        return None
    try:
        return Replay(plan, plan.replay(provided), overrides)
    except Exception:  # the full resolution takes place, and says what is wrong
        return None


def remember(resolver: Any) -> None:
    """Keep the resolution of a quantizer that was built without an error."""
    key = _key(resolver.injector, resolver.overrides_given, resolver.provided, resolver.prefix)
    if key is None or not resolver.plannable:
        return
    _plans[key] = Plan(resolver)
    while len(_plans) > _LIMIT:
        _plans.popitem(last=False)


__all__ = ["Graph", "Plan", "Replay", "Step", "remember", "replayed"]
