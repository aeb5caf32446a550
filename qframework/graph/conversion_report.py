"""What a conversion did with each module."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True)
class FunctionEntry:
    """One place in code where a module calls a function of torch.

    Attributes:
        module: its name in the model.
        function: such as ``add`` or ``scaled_dot_product_attention``, under whatever name or operator it is called.
        place: file and line.
        quantized_type: the class that stands for it; None where it stays float.
        reason: why it does.
    """

    module: str
    function: str
    place: str
    quantized_type: str | None = None
    reason: str = ""


@dataclass
class QuantizationReport:
    """What was replaced, what stayed float and why; prints as a table.

    Attributes:
        entries: of modules.
        functions: what modules call themselves, without the calls of layers; of modules that can't be traced it is known
            after the first forward of the model, or with ``example_input``.
    """

    entries: list[ReportEntry] = field(default_factory=list)
    functions: list[FunctionEntry] = field(default_factory=list)

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

    def add_function(
        self,
        module: str,
        function: str,
        place: str,
        target: type[nn.Module] | None = None,
        reason: str = "",
    ) -> None:
        """Note a place where a function is called."""
        made = None if target is None else target.__name__
        self.functions.append(FunctionEntry(module, function, place, made, reason))

    def add_past(self, name: str, where: str) -> None:
        """Note that a layer's float weight is computed with past its quantizer."""
        for i, e in enumerate(self.entries):
            if e.name == name and e.quantized_type is not None:
                why = f"{e.reason}; " if e.reason else ""
                why += (
                    f"but its weight stays float in {where}, which computes with it past the layer"
                )
                self.entries[i] = replace(e, reason=why)

    @property
    def float_functions(self) -> list[FunctionEntry]:
        """Functions that stay float."""
        return [f for f in self.functions if f.quantized_type is None]

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
        for f in self.functions:
            where = f"{f.module or '(the model)'}, {f.place}"
            table.add_row(where, f.function, f.quantized_type or "-", f.reason)
        return table

    def __str__(self) -> str:
        lines = [
            f"{e.name or '(the model)'}: {e.float_type} -> {e.quantized_type or 'float'}"
            + (f" ({e.reason})" if e.reason else "")
            for e in self.entries
        ]
        lines += [
            f"{f.module or '(the model)'}, {f.place}: {f.function} -> {f.quantized_type or 'float'}"
            + (f" ({f.reason})" if f.reason else "")
            for f in self.functions
        ]
        return "\n".join(lines)
