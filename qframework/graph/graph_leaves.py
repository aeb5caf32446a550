"""Which modules stand in a model's graph as one node."""

from __future__ import annotations

from torch import nn

from qframework.graph.attention_projections import AttentionInputChanged
from qframework.graph.function_layers import QuantizedFunctions
from qframework.graph.layer_wrappers import InputChanged, OutputChanged
from qframework.layers.base import QuantLayer

_LEAVES = (
    QuantLayer,
    QuantizedFunctions,
    InputChanged,
    OutputChanged,
    AttentionInputChanged,
    nn.MultiheadAttention,
)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module stands in a graph as one node, beside those of torch."""
    return isinstance(module, _LEAVES) or ("forward" in vars(module))
