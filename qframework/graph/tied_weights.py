"""Weights that several modules hold."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def tied_layers(model: nn.Module, layers: Iterable[nn.Module]) -> dict[nn.Module, list[str]]:
    """For layers whose weight other modules hold as well, where.

    Args:
        model: all modules that count.
        layers: some of them.
    """
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{name}.{key}" if name else key
                places.setdefault(parameter, []).append((module, full))
    found = {}
    for layer in layers:
        weight = layer._parameters["weight"]
        assert weight is not None
        others = [name for module, name in places[weight] if module is not layer]
        if others:
            found[layer] = others
    return found
