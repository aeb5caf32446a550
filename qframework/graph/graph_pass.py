"""What passes over a model's graph have in common: they trace it, change it in place, and report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qframework.core.snapshot import unchanged_on_error
from qframework.graph.attention_projections import why_one_whole
from qframework.graph.parameters_in_use import readers_in_code, why_fixed
from qframework.graph.single_layers import BESIDE, note_single_layer, traced_whole
from qframework.graph.torch_transformers import call_changed_parts
from qframework.graph.tracing import Traced


class NoGraphError(TypeError, RuntimeError):
    """A model whose graph isn't known."""


@dataclass
class PassReport:
    """What a pass did.

    Attributes:
        changed: from names of layers to what was done with them; the model itself has the empty name.
        skipped: from names of layers or regions to the reason.
        way: how the graph was found: ``"traced"``, or ``"recorded"`` on a sample input.
    """

    changed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    way: str = ""

    def __str__(self) -> str:
        lines = [f"{n or '(the model)'}: {what}" for n, what in self.changed.items()]
        lines += [f"{n or '(the model)'}: skipped, {why}" for n, why in self.skipped.items()]
        return "\n".join([f"graph {self.way}", *lines])


class GraphPass:
    """A pass; ``apply`` changes a model in place and returns it. After an exception the model is as it was.

    Attributes:
        report: of the last ``apply``.
    """

    #: Whether channels between layers are scaled or turned.
    scales_channels = False

    def __init__(self) -> None:
        self.report = PassReport()

    def apply(self, model: nn.Module, *example_input: Any) -> nn.Module:
        """Change a model.

        Args:
            model: any module, traced or not.
            *example_input: arguments of the model, to see its graph by where torch.fx can't trace it.

        Returns:
            The same module.

        Raises:
            NoGraphError: it can't be traced, and there is no sample input.
        """
        self.report = PassReport()
        traced = self.graph_of(model, *example_input)
        if self.scales_channels:
            note_wholes(self.report, traced)
        with unchanged_on_error(model):
            self.change(model, traced)
            call_changed_parts(model)
        note_single_layer(self.report, model, BESIDE)
        return model

    def graph_of(self, model: nn.Module, *example_input: Any) -> Traced:
        """The model's graph, traced or recorded."""
        traced, self.report.way = graph_of(model, type(self).__name__, example_input)
        return traced

    def change(self, model: nn.Module, traced: Traced) -> None:
        """For subclasses: the pass itself."""
        raise TypeError(f"{type(self).__name__} has to define change(model, traced)")


def note_wholes(report: PassReport, traced: Traced) -> None:
    """Report modules whose projections can't be got at one by one, or whose parameters can't be changed; the channels around them stay."""
    in_code = readers_in_code(traced)
    for node in traced.graph.nodes:
        module = traced.called(node)
        fixed = None if module is None else why_fixed(module, in_code)
        if fixed is not None:
            report.skipped[str(node.target)] = fixed
        elif isinstance(module, nn.RNNBase):
            kind = type(module).__name__
            report.skipped[str(node.target)] = (
                f"a {kind} of torch is one whole: what it reads and writes can't be scaled or turned"
            )
        elif isinstance(module, nn.MultiheadAttention):
            why = why_one_whole(module)
            if why is not None:
                report.skipped[str(node.target)] = f"{why}; it is taken as one whole"


def graph_of(
    model: nn.Module, who: str, example_input: tuple[Any, ...] = (), way: str | None = None
) -> tuple[Traced, str]:
    """A model's graph and how it was found.

    Args:
        model: any module.
        who: for the message.
        example_input: arguments of the model, run in evaluation mode where it can't be traced.
        way: how these are given, for the message; None for those of a pass.

    Raises:
        NoGraphError: it can't be traced, and there is no sample input.
    """
    traced = traced_whole(model)
    if not isinstance(traced, str):
        return traced, "traced"
    if not example_input:
        way = way or f"{who}(...).apply(model, example_input)"
        raise NoGraphError(
            f"{who}: {type(model).__name__} can't be traced by torch.fx ({traced}); give arguments of the model as "
            f"well, {way}, so that its graph is recorded while it runs"
        )
    from qframework.graph.recording import record

    return record(model, example_input), "recorded"
