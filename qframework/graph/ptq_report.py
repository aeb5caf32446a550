"""What post-training quantization did: for each layer its error, for each step what it changed."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, Field


class LayerRecord(BaseModel):
    """One layer with a quantized weight.

    Attributes:
        name: in the model.
        type: its class.
        weight_bits: of its weight.
        input_bits: of its input; None for floats.
        sqnr_nearest: of its output, in dB, on its inputs in the quantized model, with weights rounded to the nearest value.
        sqnr: the same as it is now.
        low: smallest float weight.
        high: largest one.
        clipped: share of the float weights beyond the range of the quantizer.
        seconds: that steps spent on it.
        note: why it isn't as it was meant to be, if it isn't.
    """

    name: str
    type: str
    weight_bits: float
    input_bits: float | None = None
    sqnr_nearest: float | None = None
    sqnr: float | None = None
    low: float | None = None
    high: float | None = None
    clipped: float | None = None
    seconds: float = 0.0
    note: str = ""


class StepRecord(BaseModel):
    """One step.

    Attributes:
        step: its name.
        seconds: that it took.
        changed: from names of layers to what was done.
        skipped: from names of layers to the reason.
        way: how the model was gone through, where that may differ.
        resumed: its result was read from the folder.
    """

    step: str
    seconds: float = 0.0
    changed: dict[str, str] = Field(default_factory=dict)
    skipped: dict[str, str] = Field(default_factory=dict)
    way: str = ""
    resumed: bool = False


class PTQReport(BaseModel):
    """Prints as a table.

    Attributes:
        recipe: its name.
        layers: with quantized weights, in order.
        steps: in order.
        float_layers: layers and functions that stay float, with the reason.
        sqnr: of the model's outputs against the float model, in dB; None where they are no tensors.
        seconds: all in all.
    """

    recipe: str = ""
    layers: list[LayerRecord] = Field(default_factory=list)
    steps: list[StepRecord] = Field(default_factory=list)
    float_layers: dict[str, str] = Field(default_factory=dict)
    sqnr: float | None = None
    seconds: float = 0.0

    def to_json(self) -> str:
        """As JSON; ``PTQReport.model_validate_json`` reads it."""
        return self.model_dump_json(indent=1)

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        headings = ["layer", "type", "bits", "SQNR nearest", "now", "range", "clipped", "seconds"]
        rows = [
            [
                x.name or "(the model)",
                x.type,
                f"{x.weight_bits:g}" + ("" if x.input_bits is None else f" x {x.input_bits:g}"),
                _decibels(x.sqnr_nearest),
                _decibels(x.sqnr),
                "" if x.low is None or x.high is None else f"{x.low:.2g}..{x.high:.2g}",
                "" if x.clipped is None else f"{100 * x.clipped:.2g} %",
                f"{x.seconds:.2f}",
            ]
            for x in self.layers
        ]
        return headings, rows

    def __str__(self) -> str:
        headings, rows = self._rows()
        widths = [max(len(r[i]) for r in [headings, *rows]) for i in range(len(headings))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip()
            for r in [headings, *rows]
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        for step in self.steps:
            what = f"{len(step.changed)} changed"
            if step.skipped:
                what += f", {len(step.skipped)} skipped"
            lines.append(f"{step.step}: {what}, {step.seconds:.2f} s")
            lines += [f"  {n or '(the model)'}: {why}" for n, why in step.skipped.items()]
        lines += [f"float: {n}: {why}" for n, why in self.float_layers.items()]
        lines.append(f"output: {_decibels(self.sqnr) or '?'} dB, {self.seconds:.2f} s")
        return "\n".join(lines)

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table

        headings, rows = self._rows()
        table = Table(
            title=f"{self.recipe}: {_decibels(self.sqnr)} dB, {self.seconds:.2f} s",
            box=box.SIMPLE_HEAD,
        )
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*row)
        return table

    def plot(self, axes: Any = None) -> Any:
        """A bar for each layer, nearest beside now; returns matplotlib's axes.

        Args:
            axes: to draw on; None for new ones.

        Raises:
            ImportError: matplotlib isn't installed.
        """
        if axes is None:
            axes = new_axes(len(self.layers))
        names = [x.name or "(the model)" for x in self.layers]
        places = range(len(names))
        for shift, key, label in ((-0.2, "sqnr_nearest", "nearest"), (0.2, "sqnr", "now")):
            heights = [getattr(x, key) or 0.0 for x in self.layers]
            axes.barh([p + shift for p in places], heights, height=0.4, label=label)
        axes.set_yticks(list(places), names)
        axes.invert_yaxis()
        axes.set_xlabel("SQNR of the layer's output, dB")
        axes.legend()
        return axes


def new_axes(rows: int) -> Any:
    """Axes of matplotlib, high enough for so many names."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "plot() needs matplotlib: pip install matplotlib, or qframework[examples]"
        ) from error
    return pyplot.subplots(figsize=(7, 1.5 + 0.3 * rows), layout="constrained")[1]


def _decibels(x: float | None) -> str:
    return "" if x is None or math.isnan(x) else f"{x:.1f}"


def sqnr(signal: float, noise: float) -> float:
    """Energies as a ratio in dB, at most 200."""
    if noise <= 0:
        return 200.0
    return min(10 * math.log10(max(signal, 1e-300) / noise), 200.0)
