"""The table of names: what becomes of each public name of the reference library, read from ``names.toml``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Literal

#: ``moved``: it is elsewhere. ``later``: not here so far. ``none``: no counterpart. ``dropped``: not needed.
Kind = Literal["moved", "later", "none", "dropped"]

_ROOT = "brevitas"


@dataclass(frozen=True)
class Entry:
    """What becomes of a name.

    Attributes:
        source: its full name, or a pattern with ``*``.
        kind: what happens.
        target: the full name that takes its place, None if there is none.
        advice: what to know, or what to do.
        value: the expression to read in place of a dropped name.
    """

    source: str
    kind: Kind
    target: str | None = None
    advice: str = ""
    value: str | None = None

    @property
    def name(self) -> str:
        """The last part of the name."""
        return self.source.rpartition(".")[2]

    @property
    def target_module(self) -> str:
        """Where the target is."""
        return (self.target or "").rpartition(".")[0]

    @property
    def target_name(self) -> str:
        """What it is called there."""
        return (self.target or "").rpartition(".")[2]


@dataclass(frozen=True)
class Section:
    """The names of one module.

    Attributes:
        name: of the module.
        also: modules that hold the same names.
        module: the module in its place, None if there is none.
        entries: by name.
    """

    name: str
    also: tuple[str, ...]
    module: str | None
    entries: dict[str, Entry]

    def exact(self, name: str) -> Entry | None:
        """The entry of just this name."""
        return self.entries.get(name)

    def matching(self, name: str) -> Entry | None:
        """The entry of a pattern that the name matches."""
        for pattern, entry in self.entries.items():
            if "*" in pattern and fnmatchcase(name, pattern):
                return entry
        return None


class Table:
    """All sections.

    Args:
        text: in the form of ``names.toml``.
    """

    def __init__(self, text: str) -> None:
        self.sections = [_section(name, held) for name, held in tomllib.loads(text).items()]
        self._by_module = {m: s for s in self.sections for m in (s.name, *s.also)}
        self._packages = {"brevitas.core": "qframework.core", "brevitas": "qframework"}

    def is_module(self, dotted: str) -> bool:
        """Whether the reference has a module, or a package, of this name."""
        return dotted in self._by_module or any(m.startswith(dotted + ".") for m in self._by_module)

    def module_for(self, dotted: str) -> str | None:
        """The module in place of a module; None if there is none."""
        if dotted in self._packages:
            return self._packages[dotted]
        section = self._by_module.get(dotted)
        return None if section is None else section.module

    def _sections_for(self, module: str) -> list[Section]:
        """Of a module and of the packages that hold it, from the inside."""
        found = []
        while module:
            if module in self._by_module:
                found.append(self._by_module[module])
            module = module.rpartition(".")[0]
        return found

    def find(self, dotted: str) -> Entry | None:
        """The entry of a name, by its full name; None for one that isn't known.

        A name that its module doesn't list is looked for in the modules around it, then in all of them: names
        are unique, and the files that they are in change from release to release.
        """
        entry = self.exact(dotted)
        if entry is not None:
            return entry
        module, _, name = dotted.rpartition(".")
        sections = self._sections_for(module)
        if dotted.startswith(_ROOT + "."):
            nearest_first = sorted(self.sections, key=lambda s: -_shared_parts(s.name, dotted))
            for section in nearest_first:
                found = section.exact(name)
                if found is not None and section.name.startswith(_ROOT + "."):
                    return found
        return next((e for s in sections if (e := s.matching(name)) is not None), None)

    def exact(self, dotted: str) -> Entry | None:
        """The entry of a name that its module, or a package around it, lists."""
        module, _, name = dotted.rpartition(".")
        return next(
            (e for s in self._sections_for(module) if (e := s.exact(name)) is not None), None
        )

    def names_of(self, module: str) -> dict[str, Entry]:
        """The names that a star import of a module may be meant to give."""
        section = self._by_module.get(module)
        return {} if section is None else {n: e for n, e in section.entries.items() if "*" not in n}


def _shared_parts(first: str, second: str) -> int:
    """How many parts two dotted names have in common, from the left."""
    pairs = zip(first.split("."), second.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _section(name: str, held: dict[str, object]) -> Section:
    module = held.get("module")
    entries = {}
    for known in str(held.get("same", "")).split():
        entries[known] = Entry(f"{name}.{known}", "moved", f"{module}.{known}")
    notes = _texts(held, "note")
    constants = _texts(held, "constant")
    for known, target in _texts(held, "moved").items():
        entries[known] = Entry(f"{name}.{known}", "moved", target, notes.get(known, ""))
    kinds: tuple[Kind, ...] = ("dropped", "later", "none")
    for kind in kinds:
        for known, advice in _texts(held, kind).items():
            entries[known] = Entry(
                f"{name}.{known}",
                kind,
                None,
                advice,
                constants.get(known) if kind == "dropped" else None,
            )
    also = tuple(str(held.get("also", "")).split())
    return Section(name, also, None if module is None else str(module), entries)


def _texts(held: dict[str, object], key: str) -> dict[str, str]:
    found = held.get(key, {})
    assert isinstance(found, dict)
    return found


@cache
def table() -> Table:
    """The table that comes with the package."""
    return Table(Path(__file__).with_name("names.toml").read_text(encoding="utf-8"))
