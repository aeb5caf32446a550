"""Whose parameters passes may change: those that are computed or read by code stay, those that layers share are parted before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from qframework.graph.attention_projections import Projection
from qframework.graph.channel_regions import Use
from qframework.graph.conversion import CONVERSIONS
from qframework.graph.layer_view import WEIGHTED
from qframework.graph.own_forward import OwnForward
from qframework.graph.same_computation import SameComputation, same_computation
from qframework.graph.tracing import Traced
from qframework.graph.weight_writing import own_parameter

COMPUTED = "its weight is computed at each call"
READ = "code reads its parameters past it"


def has_computed(module: nn.Module) -> bool:
    """Whether a weight or bias of a layer is something else than a parameter, as behind a parametrization or pruning."""
    return any(
        name not in module._parameters and isinstance(getattr(module, name, None), Tensor)
        for name in ("weight", "bias")
    )


def readers_in_code(traced: Traced) -> set[nn.Module]:
    """The called modules of which code reads a parameter past them, or one of a part of theirs."""
    called = {m for n in traced.graph.nodes if (m := traced.called(n)) is not None}
    return {m for m in called if not traced.read.isdisjoint(m.parameters())}


def why_otherwise(module: nn.Module) -> str | None:
    """Why a layer isn't linear in its input and its weight, as those of torch are; None where it is."""
    if not isinstance(module, (*WEIGHTED, nn.Embedding)):
        return None
    own: Any = type(module).forward
    ours = own.__module__.startswith(("torch.nn.", "qframework."))
    if not isinstance(module, OwnForward) and (
        ours or isinstance(same_computation(module, CONVERSIONS), SameComputation)
    ):
        return None
    return f"a {type(module).__name__} has a forward of its own"


def why_fixed(module: nn.Module, in_code: set[nn.Module]) -> str | None:
    """Why what a called module computes with can't be changed; None where it can."""
    if not isinstance(module, nn.MultiheadAttention) and has_computed(module):
        return COMPUTED
    return READ if module in in_code else why_otherwise(module)


def fixed_among(uses: Iterable[Use], in_code: set[nn.Module]) -> dict[str, str]:
    """Names of those whose layer can't be changed, a projection's attention for it, with the reason."""
    why = {u.name: why_fixed(getattr(u.layer, "attention", u.layer), in_code) for u in uses}
    return {name: reason for name, reason in why.items() if reason is not None}


def part(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Give layers that are about to be changed parameters of their own in place of those that other modules hold too.

    Args:
        model: with the layers.
        layers: some of it; projections of attention among them share its parameters afterwards as before.
    """
    holders: dict[int, list[Any]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, name))
    layers = list(layers)
    for layer in layers:
        held: Any = layer
        names = ("weight", "bias")
        if isinstance(layer, Projection):
            held, names = layer.holder, layer.names
        for name in names:
            if len(holders.get(id(held._parameters.get(name)), ())) > 1:
                own_parameter(held, name)
    for layer in layers:
        if isinstance(layer, Projection):
            layer.refresh()
