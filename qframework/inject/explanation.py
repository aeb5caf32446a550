"""Every name of a quantizer, its value and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Row:
    """One name.

    Attributes:
        name: as it would be given in a subclass or, with the layer's prefix, as a keyword.
        value: short text of the resolved value.
        origin: what bound it, and what computed it.
    """

    name: str
    value: str
    origin: str


class Rows(tuple[Row, ...]):
    """Rows that copies of a layer share."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Rows:
        return self


@dataclass(frozen=True)
class Explanation:
    """Rows for one quantizer, printed as a table; index it by name.

    Attributes:
        title: what is explained.
        rows: one for each name.
        note: what else there is to say, printed last.
    """

    title: str
    rows: tuple[Row, ...]
    note: str = ""

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, name: str) -> bool:
        return any(row.name == name for row in self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return f"{self.title}: not quantized"
        name = max(len(r.name) for r in self.rows)
        value = max(len(r.value) for r in self.rows)
        lines = [f"  {r.name:<{name}}  {r.value:<{value}}  {r.origin}".rstrip() for r in self.rows]
        return "\n".join([self.title, *lines, *([f"  {self.note}"] if self.note else [])])

    __repr__ = __str__


def short(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, Tensor):
        return (
            f"tensor{tuple(value.shape)}" if value.dim() or value.is_meta else f"{value.item():.6g}"
        )
    text = repr(value.value) if isinstance(value, Enum) else repr(value)
    return text if len(text) <= 48 else text[:45] + "..."


def rows_of(resolver: Any, values: dict[str, Any]) -> tuple[Row, ...]:
    """A row for every value that ``resolver`` knows the origin of."""
    return tuple(
        Row(k, short(v), resolver.origins[k]) for k, v in values.items() if k in resolver.origins
    )


def explain_class(cls: Any) -> Explanation:
    """Resolve all that can be resolved without a layer."""
    from qframework.inject.resolver import Resolver

    rows = []
    for name, binding in cls.__bindings__.items():
        resolver = Resolver(cls)
        try:
            resolver.read(name)
            value = short(resolver.values()[name])
        except Exception:  # whatever a @value function raises for want of a layer
            chosen = resolver.chosen.get(name)
            value = short(chosen) if isinstance(chosen, type) else "(needs a layer)"
        rows.append(Row(name, value, resolver.origins.get(name, binding.origin)))
    return Explanation(cls.__name__, tuple(sorted(rows, key=lambda r: r.name)))
