"""Checks that a quantizer or a layer of one's own can be put through, for pytest."""

from qframework.testing.contract import QuantizerContract
from qframework.testing.layer_contract import LayerContract

__all__ = ["LayerContract", "QuantizerContract"]
