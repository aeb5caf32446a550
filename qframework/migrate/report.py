"""What the command tells besides the changes it makes."""

from __future__ import annotations

from dataclasses import dataclass

from qframework.migrate.table import Entry

_SAID = {
    "moved": "works, with a difference",
    "later": "not here yet",
    "none": "no counterpart",
    "dropped": "not needed",
}


@dataclass(frozen=True, order=True)
class Remark:
    """A place that needs a look.

    Attributes:
        line: in the program as it was, from 1.
        name: what stands there.
        kind: how it is with that name.
        advice: what to do.
    """

    line: int
    name: str
    kind: str
    advice: str

    @classmethod
    def of(cls, line: int, name: str, entry: Entry | None) -> Remark:
        """A remark on a name of the table, or on one that the table doesn't have."""
        if entry is None:
            return cls(
                line, name, "unknown name", "see docs/migration.md for the names that are known"
            )
        return cls(line, name, _SAID[entry.kind], entry.advice)

    def __str__(self) -> str:
        return f"{self.line}: {self.name}: {self.kind}: {self.advice}"
