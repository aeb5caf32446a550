"""Models that are a single layer: one node of their graph, with nothing in front of it or behind it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from qframework.graph.graph_leaves import is_leaf
from qframework.graph.torch_transformers import PLAIN
from qframework.graph.tracing import Traced, trace
from qframework.graph.weight_readers import has_own_code

BESIDE = "nothing stands in front of it or behind it that could make up for a change"
IN_FRONT = "nothing can be put in front of it; give it in a Sequential"


def is_single_layer(model: nn.Module) -> bool:
    """Whether a model is one of torch's layers or of ours, and no container of such."""
    if has_own_code(model) or (type(model) in PLAIN and not is_leaf(model)):
        return False
    return is_leaf(model) or fx.Tracer().is_leaf_module(model, "")


def traced_whole(model: nn.Module, leaves: Callable[[nn.Module], bool] = is_leaf) -> Traced | str:
    """The graph of a model down to torch's layers and ours, or why there is none; a model that is a single layer is one node of it.

    Args:
        model: any module.
        leaves: which modules aren't traced into, beside torch's.
    """
    if not is_single_layer(model):
        return trace(model, leaves=leaves, plain=PLAIN)
    graph = fx.Graph()
    args, kwargs = list[fx.Node](), dict[str, Any]()
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = parameter.default
        missing = default is parameter.empty
        node = graph.placeholder(
            name, default_value=inspect.Signature.empty if missing else default
        )
        if parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[name] = node
        else:
            args.append(node)
    graph.output(graph.create_node("call_module", "", tuple(args), kwargs, "layer"))
    return Traced(graph, {"": model}, {}, frozenset())


def told(model: nn.Module, why: str) -> str:
    """The reason why nothing is done with a model that is a single layer."""
    return f"the model is a single layer, {type(model).__name__}: {why}"


def note_single_layer(report: Any, model: nn.Module, why: str) -> None:
    """Let the report of a pass that did nothing say why, where the model is a single layer.

    Args:
        report: with ``changed`` and ``skipped``, from names of layers.
        model: that the pass was given.
        why: nothing could be done.
    """
    if is_single_layer(model) and not report.changed and not report.skipped:
        report.skipped[""] = told(model, why)
