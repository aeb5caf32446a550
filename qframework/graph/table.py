"""A table of text, in aligned columns, by rich or as CSV, and results that print as one."""

from __future__ import annotations

import csv
import io
import sys
from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Any

from pydantic import BaseModel


class Table:
    """Headings and rows of text.

    Args:
        title: of the table.
        headings: of the columns.
        rows: a cell for each column.
        text_columns: how many columns in front hold words; the others hold numbers, aligned to the right.
        total: whether the last row is one of totals.
    """

    def __init__(
        self,
        title: str,
        headings: list[str],
        rows: list[list[str]],
        text_columns: int = 1,
        total: bool = False,
    ) -> None:
        self.title, self.headings, self.rows = title, headings, rows
        self.text_columns, self.total = text_columns, total

    def __str__(self) -> str:
        """By rich on a terminal, where it is installed; else in aligned columns."""
        if sys.stdout.isatty() and find_spec("rich") is not None:
            from rich.console import Console

            console = Console(color_system=None)
            with console.capture() as captured:
                console.print(self)
            return captured.get().rstrip("\n")
        return self.to_text()

    def to_text(self) -> str:
        """Aligned columns, however wide they are."""
        shown = [self.headings, *self.rows]
        widths = [max(len(row[i]) for row in shown) for i in range(len(self.headings))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < self.text_columns else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in shown
        ]
        line = "-" * max(len(x) for x in lines)
        if not self.total:
            return "\n".join([lines[0], line, *lines[1:]])
        return "\n".join([lines[0], line, *lines[1:-1], line, lines[-1]])

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in self.headings[: self.text_columns]:
            table.add_column(heading, overflow="fold", min_width=6)
        for heading in self.headings[self.text_columns :]:
            table.add_column(heading, justify="right", no_wrap=heading != "scale", overflow="fold")
        for i, row in enumerate(self.rows):
            if i and row[0] and self.text_columns > 2:
                table.add_section()
            table.add_row(*row)
        return table

    def to_csv(self) -> str:
        """Comma-separated values, a line of headings first."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.headings)
        writer.writerows(self.rows)
        return text.getvalue()


class Tabled(BaseModel, ABC):
    """A result that is plain data and prints as a table."""

    @abstractmethod
    def table(self) -> Table:
        """What is printed."""

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Any:
        return self.table().__rich__()

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return self.model_dump()

    def to_json(self, **how: Any) -> str:
        """JSON; keywords as for pydantic's ``model_dump_json``."""
        return self.model_dump_json(**how)
