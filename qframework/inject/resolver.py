"""From the names of a quantizer class to values and to a graph of modules."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from qframework.inject.cached_resolution import Step
from qframework.inject.container import Graph
from qframework.inject.errors import (
    BuildError,
    CircularDependencyError,
    MissingDependencyError,
    PolicyTypeError,
    PolicyValueError,
    QuantizerError,
    UnknownNameError,
    did_you_mean,
)
from qframework.inject.explanation import Row, rows_of, short
from qframework.inject.expressions import This, Value, arguments_of, this_levels, this_path
from qframework.inject.injector import LEGACY_NAMES, Binding, InjectorType, with_legacy_names
from qframework.inject.names import check_declared, check_overrides, is_ours
from qframework.inject.policy import POLICY_NAMES, check_policy

_MISSING = object()
#: Names through which a function sees the present state of a layer.
_FROM_LAYER = {"module", "tracked_parameter_list", "proxy_module"}


class _Planned(NamedTuple):
    """A name whose class is known and not yet built."""

    cls: type
    needs: tuple[str, ...]


class NestedInjector:
    """A nested injector in the context of the one around it; its names are read as attributes."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._resolver.read(name)

    def __contains__(self, name: str) -> bool:
        return self._resolver.find(name) is not None


class Resolver:
    """Resolves the names of one quantizer class, once.

    A name is looked up in the overrides, then in the class and its bases, then among what the layer provides.

    Args:
        injector: the quantizer class.
        overrides: names bound anew for this one use, already without the layer's prefix.
        provided: names that the layer gives: modules, shapes, dtype, device.
        subject: what the quantizer is for, in error messages: ``"QuantLinear.weight_quant"``.
        prefix: what a user writes before an override's name: ``"weight_"``.
        parent: the resolver of the enclosing injector, for ``this << 1``.
    """

    def __init__(
        self,
        injector: InjectorType,
        overrides: Mapping[str, Any] | None = None,
        provided: Mapping[str, Any] | None = None,
        subject: str = "",
        prefix: str = "",
        parent: Resolver | None = None,
    ) -> None:
        self.injector = injector
        self.overrides_given = dict(overrides or {})
        self.overrides = with_legacy_names(self.overrides_given)
        self.provided = provided or {}
        self.subject, self.prefix, self.parent = subject, prefix, parent
        self.origins: dict[str, str] = {}
        self.chosen: dict[str, Any] = {}  # what a name came down to, also where it can't be built
        self.used: set[str] = set()
        self.reads_layer = False  # whether a user's function looked at the layer
        self.absent: set[str] = set()  # names that were asked for and that nothing binds
        self.steps: list[Step] = []  # what to do again for another layer, see CachedResolution
        self.graphs: dict[str, Graph] = {}
        self.cacheable = True
        self._refused: dict[str, QuantizerError] = {}
        self._varying: set[str] = set()
        self._nodes: dict[str, Any] = {}
        self._stack: list[str] = []

    # ------------------------------------------------------------ public

    def find(self, name: str) -> Binding | None:
        """The binding of ``name``, None where there is none."""
        if name in self.overrides:
            return Binding(self.overrides[name], f"keyword {self.prefix}{name}")
        bindings = self.injector.__bindings__
        if name in bindings:
            return bindings[name]
        if name in self.provided:
            return Binding(self.provided[name], "provided by the layer")
        return None

    def read(self, name: str, default: Any = _MISSING) -> Any:
        """The resolved value of ``name``; a class is built.

        Args:
            name: any name of the quantizer.
            default: returned when nothing binds the name.

        Raises:
            MissingDependencyError: nothing binds ``name`` or a name that it needs.
            CircularDependencyError: it needs itself.
            PolicyValueError, PolicyTypeError: a value isn't allowed.
        """
        if default is not _MISSING and self.find(name) is None:
            self.used.add(name)
            self.absent.add(name)
            return default
        node = self._node(name)
        if isinstance(node, _Planned):
            node = self._build(name)
        return node

    def values(self) -> dict[str, Any]:
        """All names resolved so far, with classes still to be built as classes."""
        return {k: v.cls if isinstance(v, _Planned) else v for k, v in self._nodes.items()}

    def rows(self) -> tuple[Row, ...]:
        """A row for every name resolved so far."""
        return rows_of(self, self.values())

    def check_names(self) -> None:
        """Refuse or tell of overrides that nothing has read, and refuse names of the class that look misspelled.

        Raises:
            UnknownNameError: names the keyword and the nearest real one.
        """
        is_on = self._nodes.get("tensor_quant", _MISSING) is not None
        check_overrides(self, self._unread(), is_on)
        try:
            check_declared(self.injector, POLICY_NAMES | self.used)
        except UnknownNameError as error:
            raise UnknownNameError(self.located(str(error))) from None

    def check_spelling(self) -> None:
        """As :meth:`check_names` where nothing is built: every name that some quantizer knows will do.

        Raises:
            UnknownNameError: names the keyword and the nearest real one.
        """
        self.used.update(POLICY_NAMES | self.injector.__bindings__.keys())
        check_overrides(self, self._unread(), False)

    def _unread(self) -> list[str]:
        """Keywords, as they were given, of which nothing was read."""
        older = {LEGACY_NAMES[n] for n in self.used & LEGACY_NAMES.keys()}
        return [name for name in self.overrides_given if name not in self.used | older]

    # ------------------------------------------------------------ resolution

    def _node(self, name: str) -> Any:
        self.used.add(name)
        if name in self._nodes:
            return self._nodes[name]
        if name in self._stack:
            circle = " -> ".join([*self._stack[self._stack.index(name) :], name])
            raise CircularDependencyError(self.located(f"these names need each other: {circle}"))
        binding = self.find(name)
        if binding is None:
            raise MissingDependencyError(self.located(self._missing(name)))
        self._stack.append(name)
        try:
            self._nodes[name] = node = self._evaluate(name, *binding)
        finally:
            self._stack.pop()
        return node

    def _evaluate(self, name: str, bound: Any, origin: str) -> Any:
        expressions = []
        while isinstance(bound, (Value, This)):
            expressions.append(bound)
            if isinstance(bound, Value):
                origin = f"computed by {bound.function.__qualname__}"
                bound = self._call(bound)
            else:
                origin, bound = f"{origin}, {bound!r}", self._follow(bound)
        self.origins[name], self.chosen[name] = origin, bound
        self._record(name, expressions, bound, origin)
        if isinstance(bound, InjectorType):
            if name.endswith("_class"):
                return bound
            return NestedInjector(Resolver(bound, subject=self.subject, parent=self))
        if isinstance(bound, type) and not name.endswith("_class") and not issubclass(bound, Enum):
            return self._plan(name, bound)
        if name in POLICY_NAMES:
            shown = self.prefix + name if origin.startswith("keyword") else name
            try:
                return check_policy(name, bound)
            except (PolicyValueError, PolicyTypeError) as error:
                where = "" if origin.startswith("keyword") else f" ({origin})"
                refusal = type(error)(self.located(f"{shown}={bound!r}{where}: {error}"))
                if bound is not None:
                    raise refusal from None
                self._refused[name] = refusal  # a user's function may know what None means
        return bound

    def _record(self, name: str, expressions: list[Any], bound: Any, origin: str) -> None:
        """Note how to find the name for another layer, where it can differ there."""
        if not expressions:
            if origin == "provided by the layer":
                self._varies(Step(name, "provided"))
            elif isinstance(bound, InjectorType) and not name.endswith("_class"):
                self.cacheable = False
            return
        first = expressions[0]
        if isinstance(first, This):
            path = this_path(first)
            if this_levels(first) or len(path) != 1:
                self.cacheable = False
            elif path[0] in self._varying:
                self._varies(Step(name, "alias", None, path))
            self.cacheable = self.cacheable and len(expressions) == 1
            return
        names = tuple(a.name for a in first.arguments if a.required or self.find(a.name))
        if self._varying.isdisjoint(names) and is_ours(first.function.__module__):
            return
        self.cacheable = self.cacheable and len(expressions) == 1
        chosen = isinstance(bound, type) and not name.endswith("_class")
        if isinstance(bound, InjectorType):
            self.cacheable = False
        self._varies(Step(name, "value", first, names, bound if chosen else None))

    def _varies(self, step: Step) -> None:
        self.steps.append(step)
        self._varying.add(step.name)

    def _call(self, bound: Value) -> Any:
        arguments = {}
        for argument in bound.arguments:
            if argument.required or self.find(argument.name) is not None:
                arguments[argument.name] = self.read(argument.name)
                if is_ours(bound.function.__module__):
                    self._check_given(argument.name)
            else:
                self.used.add(argument.name)
                self.absent.add(argument.name)
        if _FROM_LAYER & arguments.keys() and not is_ours(bound.function.__module__):
            self.reads_layer = True
        try:
            return bound.function(**arguments)
        except QuantizerError as error:
            if self.subject and self.subject not in str(error):
                raise type(error)(self.located(str(error))) from error
            raise
        except Exception as error:
            given = ", ".join(f"{k}={short(v)}" for k, v in arguments.items())
            error.add_note(self.located(f"raised by {bound!r}, called with {given}"))
            if isinstance(arguments.get("module"), tuple):
                error.add_note("The quantizer is shared: module is the tuple of all its layers.")
            raise

    def _check_given(self, name: str) -> None:
        """Refuse None where something is needed."""
        if name in self._refused:
            raise self._refused[name]

    def _follow(self, expression: This) -> Any:
        resolver: Resolver = self
        for _ in range(this_levels(expression)):
            if resolver.parent is None:
                raise MissingDependencyError(
                    self.located(f"{expression!r} goes out further than there are injectors")
                )
            resolver = resolver.parent
        path = this_path(expression)
        if not path:
            raise PolicyTypeError(self.located(f"{expression!r} names nothing; write this.name"))
        found = resolver.read(path[0])
        for step in path[1:]:
            found = getattr(found, step)
        return found

    def _plan(self, name: str, cls: type) -> Any:
        arguments = arguments_of(cls)
        if arguments is None:
            self._varies(Step(name, "make", expected=cls))
            return cls()
        needs = []
        for argument in arguments:
            if not argument.required and self.find(argument.name) is None:
                self.used.add(argument.name)
                continue
            self._node(argument.name)
            self._check_given(argument.name)
            needs.append(argument.name)
        return _Planned(cls, tuple(needs))

    def _build(self, name: str) -> Any:
        classes: dict[str, type] = {}
        values: dict[str, Any] = {}
        pending = [name]
        while pending:
            current = pending.pop()
            node = self._nodes[current]
            if isinstance(node, _Planned):
                if current not in classes:
                    classes[current] = node.cls
                    pending.extend(node.needs)
            else:
                values[current] = node
        self.graphs[name] = Graph(classes, values)
        self._varies(Step(name, "build"))
        try:
            built = self.graphs[name].build(name, values)
        except QuantizerError:
            raise
        except (ValueError, TypeError, RuntimeError) as error:
            kind = next(
                k
                for k in (PolicyTypeError, PolicyValueError, BuildError)
                if isinstance(error, k.__bases__[1])
            )
            raise kind(self.located(str(error))) from error
        self._nodes[name] = built
        return built

    # ------------------------------------------------------------ messages

    def located(self, message: str) -> str:
        """A message that says which quantizer of which layer it is about."""
        where = self.injector.__name__
        return f"{self.subject} ({where}): {message}" if self.subject else f"{where}: {message}"

    def _missing(self, name: str) -> str:
        chain = " -> ".join([*self._stack, name])
        message = f"nothing binds {name!r}" + (f" (needed by {chain})" if self._stack else "")
        if name not in POLICY_NAMES:
            message += did_you_mean(name, {*self.injector.__bindings__, *self.provided})
        if self.subject:
            return f"{message}. Bind it in a subclass, or give the keyword {self.prefix}{name}"
        if self._stack:
            return f"{message}. Bind it in a subclass; what a layer provides can only be read inside a layer"
        return message
