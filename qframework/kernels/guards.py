"""What parts of quantizers were like when their rules were read, and whether they still are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set, Sized
from operator import getitem, is_
from typing import Any, Literal

from torch import Tensor, nn

from qframework.core.tracked import TrackedParameters
from qframework.kernels.native.watched import can_watch, watch
from qframework.kernels.trust import (
    BASES,
    COMMON,
    GLOBAL_HOOKS,
    HOOKS,
    TORCH_CALLS,
    definition_of,
    distrust_all,
    is_code,
    own_classes,
)


def _contents(held: Any) -> Iterator[Any]:
    """What a container holds, at any depth."""
    if isinstance(held, Mapping):
        held = (*held.keys(), *held.values())
    if isinstance(held, (tuple, list, Set)):
        for inner in held:
            yield from _contents(inner)
    else:
        yield held


def _is_changeable(value: Any) -> bool:
    """Whether a container's contents can be others while it is the same object."""
    if isinstance(value, tuple):
        return any(map(_is_changeable, value))
    return isinstance(value, (list, dict, set))


class Guards:
    """What parts were like when their rules were read.

    Attributes, classes and their functions, and lengths of containers, are compared in few calls, since each call of Python
    costs more than what it asks for.
    """

    def __init__(self) -> None:
        self.parts: list[nn.Module] = []
        self.types: list[type] = []
        self.own: list[dict[str, Any]] = []
        self.containers: list[Sized] = [*GLOBAL_HOOKS, *(vars(base) for base in BASES)]  # type: ignore[list-item]
        self.namespaces: list[Any] = []
        self.names: list[str] = []
        self.values: tuple[Any, ...] = ()
        self.held: tuple[list[Any], list[str], list[Any]] = ([], [], [])
        self.lengths: tuple[int, ...] = ()
        self.changeable: list[tuple[Iterable[Any], list[Any]]] = []
        self._expected: list[Any] = []
        self._asks: Callable[[], bool] | Literal[False] | None = None
        self._seen: set[int] = set()
        self._read: set[int] = set()
        for entry in TORCH_CALLS:
            self._expect(*entry)

    def watch_place(self, namespace: dict[str, Any], name: str) -> None:
        """Remember what is somewhere, by identity: a module that is equal may hold other numbers."""
        namespaces, names, held = self.held
        namespaces.append(namespace)
        names.append(name)
        held.append(namespace[name])

    def _expect(self, namespace: Any, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            self.watch_place(namespace, name)
            return
        self.namespaces.append(namespace)
        self.names.append(name)
        self._expected.append(value)

    def watch(self, part: nn.Module) -> None:
        """Remember of which code a part is."""
        if id(part) in self._seen:
            return
        self._seen.add(id(part))
        self.parts.append(part)
        self.types.append(type(part))
        own = vars(part)
        self.own.append(own)
        self.containers.append(own)
        for name, value in own.items():
            if name in HOOKS:
                self.containers.append(value)
                self._expect(own, name, value)
            elif isinstance(value, Tensor):  # one may be deleted, and a function assigned
                self.changeable.append((own, list(_contents(own.keys()))))
        for cls in own_classes(type(part)):
            if id(cls) not in self._seen:
                self._seen.add(id(cls))
                self.containers.append(vars(cls))  # type: ignore[arg-type]
                self._expect_of(cls, True)

    def _expect_of(self, cls: type, code: bool) -> None:
        now = vars(cls)
        for name in definition_of(cls):
            if name in now and is_code(now[name]) is code:
                self._expect(now, name, now[name])

    def watch_settings(self, part: nn.Module) -> None:
        """Remember what a part holds that its rule may depend on."""
        if id(part) in self._read:
            return
        self._read.add(id(part))
        own = vars(part)
        self.containers.append(part._modules)
        if part._modules:
            self._expect(own, "_modules", part._modules)
        for name, value in part._modules.items():
            self._expect(part._modules, name, value)
        for name, value in own.items():
            if name not in COMMON and not isinstance(value, Tensor):
                self._expect(own, name, value)
                if isinstance(value, TrackedParameters):
                    self.containers.append(value.modules)
                elif _is_changeable(value):
                    self.changeable.append((value, list(_contents(value))))
        for cls in own_classes(type(part)):
            if id(cls) not in self._read:
                self._read.add(id(cls))
                self._expect_of(cls, False)

    def close(self) -> None:
        """All parts are seen."""
        self.lengths = tuple(map(len, self.containers))
        self.values = tuple(self._expected)

    def hold(self) -> bool:
        """Whether nothing has changed that matters."""
        asks = self._asks  # another thread may accept changes meanwhile
        if not self.changeable and asks and asks():  # as nearly always
            return True
        return self._are_unchanged() or (self._accept_bases() and self._are_unchanged())

    def _accept_bases(self) -> bool:
        """Take for granted what was added to torch's own classes, if it says nothing of what parts compute: a compiler adds notes."""
        first = len(GLOBAL_HOOKS)
        behind = first + len(BASES)
        now = tuple(map(len, self.containers[first:behind]))
        if now == self.lengths[first:behind] or distrust_all() is not None:
            return False
        self.lengths, self._asks = (*self.lengths[:first], *now, *self.lengths[behind:]), None
        return True

    def _are_unchanged(self) -> bool:
        if self._asks is None and can_watch():
            self._asks = self._watched()
        try:
            return (bool(self._asks and self._asks()) or self._are_equal()) and (
                not self.changeable or all(map(_is_unchanged, self.changeable))
            )
        except Exception:  # something was removed, or can't be compared with what was there
            return False

    def _watched(self) -> Callable[[], bool] | Literal[False]:
        """What is asked first, in C++; False where all has to be compared by Python."""
        namespaces, names, held = self.held
        entries = [*zip(self.namespaces, self.names, self.values, strict=True)]
        entries += zip(namespaces, names, held, strict=True)
        lengths = zip(self.containers, self.lengths, strict=True)
        return watch(entries, lengths, zip(self.parts, self.types, self.own, strict=True)) or False

    def _are_equal(self) -> bool:
        namespaces, names, held = self.held
        return (
            tuple(map(len, self.containers)) == self.lengths
            and tuple(map(getitem, self.namespaces, self.names)) == self.values
            and all(map(is_, map(getitem, namespaces, names), held))
            and list(map(type, self.parts)) == self.types
            and all(map(is_, map(vars, self.parts), self.own))
        )


def _is_unchanged(pair: tuple[Any, list[Any]]) -> bool:
    held, before = pair
    now = list(_contents(held))
    return len(now) == len(before) and all(map(is_, now, before))
