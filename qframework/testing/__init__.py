"""Checks that a quantizer of one's own can be put through, for pytest."""

from qframework.testing.contract import QuantizerContract

__all__ = ["QuantizerContract"]
