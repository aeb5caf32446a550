"""Equalization and rotation of whole models, under one roof."""

from __future__ import annotations

from qframework.graph.activation_equalization import activation_equalization_mode
from qframework.graph.cross_layer_equalization import EqualizeGraph

__all__ = ["EqualizeGraph", "activation_equalization_mode"]
