"""How a layer is called in the model that runs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn


def _callers() -> Iterator[object]:
    """The ``self`` of each call that is under way, the innermost first."""
    frame = sys._getframe(2)
    while frame is not None:
        yield frame.f_locals.get("self")
        frame = frame.f_back  # type: ignore[assignment]


def qualified_name(layer: nn.Module) -> str:
    """The name of ``layer`` in the outermost module that is running now, else its class.

    Looks through the callers' frames; meant for messages, which are rare.
    """
    best = ""
    for owner in _callers():
        if isinstance(owner, nn.Module) and owner is not layer:
            for name, module in owner.named_modules():
                if module is layer:
                    best = name
    kind = type(layer).__name__
    return f"{best} ({kind})" if best else kind


def where() -> str:
    """The layer and the tensor whose quantizer is running now, ``'0 (QuantLinear).weight_quant: '``; nothing outside of one.

    As :func:`qualified_name`, for messages of parts, which don't know who holds them.
    """
    for owner in _callers():
        if not isinstance(owner, nn.Module):
            continue
        layers = getattr(owner, "tracked_module_list", ())
        if layers:
            built = owner._modules.get("tensor_quant") is not None  # else whoever builds it says so
            return f"{qualified_name(layers[0])}.{owner.attribute}: " if built else ""
    return ""
