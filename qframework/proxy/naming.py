"""The warning of a layer whose batches were left out."""

from __future__ import annotations

from torch import nn

from qframework.core.naming import qualified_name
from qframework.core.notice import Notice

__all__ = ["LeftOutNotice", "qualified_name"]


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
