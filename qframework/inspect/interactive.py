"""Interactive plots by bokeh, whose script goes into the page."""

from __future__ import annotations

import math
from typing import Any

from qframework.inspect.plots import need
from qframework.inspect.sensitivity import Sensitivity
from qframework.inspect.statistics import ModelStatistics, TensorStatistics

_BLUE, _RED, _GREY = "#3b6ea8", "#c0504d", "#9aa3ad"
#: Grid values that are drawn; with more, only the ends are.
_MOST_LINES = 64


def parts(statistics: ModelStatistics, costs: Sensitivity | None) -> tuple[str, dict[str, str]]:
    """The script of bokeh with all plots, for the head or the end of a page, and the HTML of each plot.

    Args:
        statistics: whose histograms are drawn, one at a time, chosen from a list.
        costs: drawn as bars; None to leave that out.

    Raises:
        MissingExtraError: bokeh isn't installed.
    """
    embed = need("bokeh.embed", "bokeh", "report")
    resources = need("bokeh.resources", "bokeh", "report")
    plots: dict[str, Any] = {}
    if statistics.tensors:
        plots["histograms"] = _histograms(statistics.tensors)
        plots["errors"] = _bars(
            [t.name for t in statistics.tensors if math.isfinite(t.sqnr)],
            [t.sqnr for t in statistics.tensors if math.isfinite(t.sqnr)],
            "SQNR in dB",
        )
    if costs is not None and costs.layers:
        plots["sensitivity"] = _bars(
            [x.layer for x in costs.layers], [x.change for x in costs.layers], "change of the loss"
        )
    if not plots:
        return "", {}
    script, divs = embed.components(plots)
    library = resources.Resources(mode="inline", components=["bokeh", "bokeh-widgets"]).render()
    return library + script, {n: f'<div class="plot">{d}</div>' for n, d in divs.items()}


def _figure(**how: Any) -> Any:
    plotting = need("bokeh.plotting", "bokeh", "report")
    figure = plotting.figure(
        sizing_mode="stretch_width",
        tools="pan,xwheel_zoom,box_zoom,reset,hover",
        output_backend="canvas",
        **how,
    )
    figure.toolbar.logo = None
    return figure


def _data(t: TensorStatistics) -> dict[str, dict[str, list[float]]]:
    """What the plot of one tensor shows."""
    edges = [float(f"{e:.5g}") for e in t.histogram.edges]
    top = max([*t.histogram.counts, 1])
    grid = t.grid if t.grid is not None and len(t.grid) <= _MOST_LINES else []
    ends = [e for e in (t.lowest, t.highest) if e is not None]
    lines = [float(f"{v:.5g}") for v in grid]
    return {
        "bars": {
            "left": edges[:-1],
            "right": edges[1:],
            "top": [float(c) for c in t.histogram.counts],
        },
        "grid": {"x": lines, "top": [float(top)] * len(lines)},
        "ends": {"x": ends, "top": [float(top)] * len(ends)},
    }


def _histograms(tensors: list[TensorStatistics]) -> Any:
    models = need("bokeh.models", "bokeh", "report")
    layouts = need("bokeh.layouts", "bokeh", "report")
    every = {t.name: _data(t) for t in tensors}
    first = every[tensors[0].name]
    sources = {k: models.ColumnDataSource(data=v) for k, v in first.items()}
    figure = _figure(height=320, x_axis_label="value before quantization", y_axis_label="count")
    figure.y_range.start = 0
    bars = figure.quad(
        left="left", right="right", top="top", bottom=0, source=sources["bars"], fill_color=_BLUE, line_color=None
    )  # fmt: skip
    grey = {"line_color": _GREY, "line_width": 1, "line_alpha": 0.6}
    figure.segment(x0="x", x1="x", y0=0, y1="top", source=sources["grid"], **grey)
    figure.segment(
        x0="x", x1="x", y0=0, y1="top", source=sources["ends"], line_color=_RED, line_width=2
    )
    figure.select_one(models.HoverTool).renderers = [bars]
    figure.select_one(models.HoverTool).tooltips = [
        ("from", "@left"), ("to", "@right"), ("count", "@top"),
    ]  # fmt: skip
    select = models.Select(
        title="Tensor", value=tensors[0].name, options=list(every), sizing_mode="stretch_width"
    )
    code = "for (const k of Object.keys(sources)) sources[k].data = every[cb_obj.value][k]"
    select.js_on_change(
        "value", models.CustomJS(args={"sources": sources, "every": every}, code=code)
    )
    return layouts.column(select, figure, sizing_mode="stretch_width")


def _bars(names: list[str], values: list[float], label: str) -> Any:
    models = need("bokeh.models", "bokeh", "report")
    height = 80 + 18 * max(3, len(names))
    figure = _figure(height=height, y_range=list(reversed(names)), x_axis_label=label)
    source = models.ColumnDataSource(data={"name": names, "value": values})
    figure.hbar(
        y="name",
        right="value",
        left=0,
        height=0.7,
        source=source,
        fill_color=_BLUE,
        line_color=None,
    )
    figure.select_one(models.HoverTool).tooltips = [("", "@name"), (label, "@value{0.000e}")]
    figure.ygrid.grid_line_color = None
    return figure
