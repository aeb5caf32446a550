"""One page on a quantized model."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from torch import nn

from qframework.arguments import check_module
from qframework.graph.summary import ModelSummary, summary
from qframework.inspect.batches import Loss
from qframework.inspect.findings import Finding, findings
from qframework.inspect.interactive import parts
from qframework.inspect.page import page, table, thumbnail, tiles
from qframework.inspect.sensitivity import Sensitivity, sensitivity
from qframework.inspect.statistics import ModelStatistics, collect_statistics


class Report(BaseModel):
    """What a report says, as data.

    Attributes:
        model: name of its class.
        summary: tensors and layers.
        statistics: of each quantized tensor.
        sensitivity: of each layer; None where it was left out.
        findings: warnings with remedies.
    """

    model: str
    summary: ModelSummary
    statistics: ModelStatistics
    sensitivity: Sensitivity | None
    findings: list[Finding]

    def to_html(self) -> str:
        """The page, which needs no network.

        Raises:
            MissingExtraError: bokeh isn't installed (extra ``plot``).
        """
        script, plots = parts(self.statistics, self.sensitivity)
        numbers = self.summary
        lowest = min(self.statistics.tensors, key=lambda t: t.sqnr, default=None)
        head = tiles(
            [
                ("parameters", f"{numbers.parameters:,}"),
                ("size without scales", _bytes(numbers.size_in_bits / 8)),
                ("quantized tensors", str(len(self.statistics.tensors))),
                ("warnings", str(len(self.findings))),
                ("batches", str(self.statistics.batches)),
                ("lowest SQNR", "" if lowest is None else f"{lowest.sqnr:.1f} dB"),
                ("where", "" if lowest is None else lowest.name),
            ]
        )
        warnings = "".join(
            f'<div class="finding"><b>{escape(f.kind)}</b> {escape(f.layer)}{escape("." + f.tensor if f.tensor else "")}: '
            f'{escape(f.message)}.<br><span class="remedy">{escape(f.remedy)}.</span></div>'
            for f in self.findings
        )
        pictures = [thumbnail(t.histogram) for t in self.statistics.tensors]
        sections = [
            ("overview", "Overview", head),
            ("warnings", "Warnings", warnings or "<p>None.</p>"),
            (
                "values",
                "Values and their grid",
                "<p>Values before quantization; grey: the numbers that they are rounded to, red: the ends of the range.</p>"
                + plots.get("histograms", ""),
            ),
            (
                "tensors",
                "Quantized tensors",
                table(self.statistics.table(), pictures) + plots.get("errors", ""),
            ),
        ]
        if self.sensitivity is not None:
            text = "<p>One layer quantized at a time, the others float.</p>"
            body = text + plots.get("sensitivity", "") + table(self.sensitivity.table())
            sections.append(("sensitivity", "Sensitivity", body))
        sections.append(("summary", "Summary", table(self.summary.table())))
        lead = "What quantization does to this model, layer by layer."
        return page(f"Quantization of {self.model}", lead, sections, script)


def _bytes(size: float) -> str:
    """A size in the unit that fits."""
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"


def report(
    model: nn.Module,
    batches: Any,
    path: str | os.PathLike[str] | None = None,
    loss: Loss | None = None,
    example: tuple[Any, ...] = (),
    with_sensitivity: bool = True,
    progress: bool | None = None,
) -> Report:
    """Look at a quantized model, and write one self-contained HTML page.

    Args:
        model: quantized and calibrated; as it was afterwards.
        batches: a list or ``DataLoader`` of tensors, tuples (``model(*batch)``) or dicts (``model(**batch)``), or of what ``loss``
            takes.
        path: of the page; None for the data alone.
        loss: called with the model and a batch, gives a scalar; used for the sensitivity, and to find scales that aren't trained.
        example: arguments of the model, for multiply-accumulates and accumulator widths.
        with_sensitivity: quantize one layer at a time, too, which takes a pass for each.
        progress: show a bar; None for only on a terminal.

    Returns:
        What the page says, as data; ``to_html`` gives the page.

    Raises:
        ValueError: the model quantizes nothing, or there are no batches.
        MissingExtraError: bokeh isn't installed (extra ``plot``) and a page is asked for; an ImportError too.
    """
    check_module(model, "report")
    if path is not None:
        from qframework.inspect.plots import need

        need("bokeh", "bokeh", "report")
    if hasattr(batches, "__next__"):
        batches = list(batches)
    statistics = collect_statistics(model, batches, loss, progress=progress)
    costs = sensitivity(model, batches, loss, progress=progress) if with_sensitivity else None
    made = Report(
        model=type(model).__name__,
        summary=summary(model, *example),
        statistics=statistics,
        sensitivity=costs,
        findings=findings(model, statistics),
    )
    if path is not None:
        Path(path).write_text(made.to_html(), encoding="utf-8")
    return made
