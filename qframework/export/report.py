"""What a comparison of a model with its exports found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Row(NamedTuple):
    """One tensor of a layer in one target.

    Attributes:
        target: that was compared with the model's evaluation.
        layer: qualified name; empty for the outputs of the model.
        tensor: ``"weight"``, ``"act"``, ..., ``"output"``.
        elements: that were compared.
        differing: how many of them differ.
        largest: the largest difference, in integer steps; of outputs without a grid in units of the bound on rounding errors.
        cause: why they differ; empty where none does.
        explained: whether rounding errors account for each of them.
    """

    target: str
    layer: str
    tensor: str
    elements: int
    differing: int
    largest: float
    cause: str = ""
    explained: bool = True


TIE = "ties within float32's rounding error"
WRONG = "not by rounding errors"
LATER = "rounding errors, or what follows from ties before"


@dataclass
class Report:
    """The result of a verification; printed, a table and a sentence.

    Attributes:
        rows: all that was compared, in the order of the model: parameters first, then activations, then outputs.
        apart: rows of a runtime's default settings, which count for nothing else.
        skipped: targets that were left out, and why.
        bound: which rounding errors are excused.
    """

    rows: list[Row] = field(default_factory=list)
    apart: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    bound: str = (
        "an element may differ where, in float64 and from the very inputs that it was computed from, it lies within the bound of "
        "qframework.export.bounded of a tie: (2n+8)*2^-24 of the sum of magnitudes for sums of n products"
    )

    @property
    def exact(self) -> bool:
        """Whether no element differs."""
        return all(row.differing == 0 for row in self.rows)

    @property
    def explained(self) -> bool:
        """Whether rounding errors account for each element that differs."""
        return all(row.explained for row in self.rows)

    @property
    def first(self) -> Row | None:
        """The first row that differs."""
        return next((row for row in self.rows if row.differing), None)

    @property
    def targets(self) -> list[str]:
        """What was compared."""
        return list(dict.fromkeys(row.target for row in self.rows))

    def __str__(self) -> str:
        return "\n".join([*_table(self), self._sentence()])

    __repr__ = __str__

    def _sentence(self) -> str:
        names = ", ".join(self.targets) or "nothing"
        left_out = "".join(f"; {name} skipped ({why})" for name, why in self.skipped.items())
        if not self.rows:
            return f"Nothing was compared{left_out}."
        elements = sum(r.elements for r in self.rows)
        first = self.first
        if first is None:
            return f"Exact: all {elements:,} integers are those of the evaluation in {names}{left_out}."
        differing = sum(r.differing for r in self.rows)
        where = ".".join(p for p in (first.layer, first.tensor) if p)
        if self.explained:
            verdict = "Explained: rounding errors account for all"
        else:
            wrong = next(r for r in self.rows if not r.explained)
            where = ".".join(p for p in (wrong.layer, wrong.tensor) if p)
            verdict, first = "Not the same: rounding errors do not account for all", wrong
        return (
            f"{verdict} {differing:,} of {elements:,} elements that differ, the first in {where} ({first.target}, "
            f"{first.largest:.3g} steps at most){left_out}."
        )


def _table(report: Report) -> list[str]:
    """Rows of each target: those that differ, and how many are the same."""
    head = ("target", "layer", "tensor", "elements", "differing", "largest", "cause")
    lines: list[tuple[str, ...]] = []
    for rows in (report.rows, report.apart):
        for target in dict.fromkeys(row.target for row in rows):
            mine = [r for r in rows if r.target == target]
            shown = [r for r in mine if r.differing or _is_output(r)]
            rest = [r for r in mine if r not in shown]
            if rest:
                count = f"{sum(r.elements for r in rest):,}"
                lines.append((target, f"{len(rest)} tensors", "", count, "0", "0", ""))
            lines += [_line(r) for r in shown]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip()
        for line in [head, *lines]
    ]


def _is_output(r: Row) -> bool:
    return not r.layer and r.tensor.startswith("output")


def _line(r: Row) -> tuple[str, ...]:
    numbers = (f"{r.elements:,}", f"{r.differing:,}", f"{r.largest:.3g}")
    return (r.target, r.layer, r.tensor, *numbers, r.cause)
