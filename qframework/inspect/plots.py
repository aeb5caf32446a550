"""Plots by matplotlib, which is imported when one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qframework.inspect.statistics import TensorStatistics

_BLUE, _RED, _GREY = "#3b6ea8", "#c0504d", "#888888"


class MissingExtraError(ImportError, RuntimeError):
    """A package that an optional part needs isn't installed."""


def need(module: str, package: str, what: str, extra: str = "plot") -> Any:
    """Import a package of an extra.

    Raises:
        MissingExtraError: it isn't installed; the message says how to.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs {package}, which isn't installed: pip install 'qframework[{extra}]'"
        ) from error


def _axes(axes: Any, size: tuple[float, float]) -> Any:
    figures = need("matplotlib.figure", "matplotlib", "a plot")
    return figures.Figure(figsize=size, layout="constrained").subplots() if axes is None else axes


def plot_histogram(statistics: TensorStatistics, axes: Any = None) -> Any:
    """Values before quantization, with the grid over them.

    Args:
        statistics: of one tensor.
        axes: to draw in; new ones when None, whose ``figure`` may be saved.
    """
    axes = _axes(axes, (7, 3))
    histogram = statistics.histogram
    axes.stairs(histogram.counts, histogram.edges, fill=True, color=_BLUE, alpha=0.8)
    for value in statistics.grid or ():
        axes.axvline(value, color=_GREY, linewidth=0.4, alpha=0.6)
    for end in (statistics.lowest, statistics.highest):
        if end is not None:
            axes.axvline(end, color=_RED, linewidth=1.2)
    axes.set_title(
        f"{statistics.name}: {statistics.sqnr:.1f} dB, {statistics.clipped:.2%} clipped",
        fontsize=10,
    )
    axes.set_xlabel("value before quantization")
    axes.set_ylabel("count")
    return axes


def plot_bars(
    names: list[str], values: list[float], label: str, axes: Any = None, marked: str | None = None
) -> Any:
    """A bar for each layer.

    Args:
        names: of the layers.
        values: the lengths of the bars.
        label: of the axis.
        axes: to draw in; new ones when None, whose ``figure`` may be saved.
        marked: a layer in another colour.
    """
    axes = _axes(axes, (7, 1 + 0.25 * len(names)))
    colors = [_RED if n == marked else _BLUE for n in names]
    axes.barh(range(len(names)), values, color=colors)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    return axes
