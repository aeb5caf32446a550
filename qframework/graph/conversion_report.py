"""What a conversion did with each module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ReportEntry:
    """One module.

    Attributes:
        name: in the model.
        float_type: its class.
        quantized_type: the class that stands for it; None where it stayed as it was.
        reason: why.
        kept: it stayed as it was meant to.
    """

    name: str
    float_type: str
    quantized_type: str | None
    reason: str = ""
    kept: bool = False


@dataclass
class QuantizationReport:
    """What was replaced, what stayed float and why; prints as a table."""

    entries: list[ReportEntry] = field(default_factory=list)

    def add(
        self,
        name: str,
        module: nn.Module,
        target: type[nn.Module] | None,
        reason: str = "",
        kept: bool = False,
    ) -> None:
        """Note one module."""
        made = None if target is None else target.__name__
        self.entries.append(ReportEntry(name, type(module).__name__, made, reason, kept))

    @property
    def replaced(self) -> list[ReportEntry]:
        """Modules that another one stands for."""
        return [e for e in self.entries if e.quantized_type is not None]

    @property
    def kept(self) -> list[ReportEntry]:
        """Modules that stay float because they should."""
        return [e for e in self.entries if e.quantized_type is None and e.kept]

    @property
    def unsupported(self) -> list[ReportEntry]:
        """Modules that stay float because they have no quantized form."""
        return [e for e in self.entries if e.quantized_type is None and not e.kept]

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(
            title=f"{len(self.replaced)} replaced, {len(self.unsupported)} without a quantized form"
        )
        for heading in ("module", "float", "quantized", "why"):
            table.add_column(heading)
        for e in self.entries:
            style = None if e.quantized_type or e.kept else "bold red"
            table.add_row(
                e.name or "(the model)",
                e.float_type,
                e.quantized_type or "-",
                e.reason,
                style=style,
            )
        return table

    def __str__(self) -> str:
        return "\n".join(
            f"{e.name or '(the model)'}: {e.float_type} -> {e.quantized_type or 'float'}"
            + (f" ({e.reason})" if e.reason else "")
            for e in self.entries
        )
