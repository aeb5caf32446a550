"""How a layer is called in the model that runs it."""

from __future__ import annotations

import sys

from torch import nn

from qframework.core.notice import Notice


def qualified_name(layer: nn.Module) -> str:
    """The name of ``layer`` in the outermost module that is running now, else its class.

    Looks through the callers' frames; meant for messages, which are rare.
    """
    best = ""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner is not layer:
            for name, module in owner.named_modules():
                if module is layer:
                    best = name
        frame = frame.f_back  # type: ignore[assignment]
    kind = type(layer).__name__
    return f"{best} ({kind})" if best else kind


class LeftOutNotice(Notice):
    """The warning that batches of a layer were left out of its statistics.

    Args:
        layers: that share the quantizer.
        attribute: name of the proxy in them.
    """

    def __init__(self, layers: list[nn.Module], attribute: str) -> None:
        super().__init__()
        self.layers, self.attribute = layers, attribute

    def where(self) -> str:
        """The name of the first layer in the model that runs now, and of the proxy."""
        return f"{qualified_name(self.layers[0])}.{self.attribute}"
