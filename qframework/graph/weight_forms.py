"""Layers whose weight is read otherwise than by their own forward, or computed from parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx, nn

from qframework.layers import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantEmbedding,
    QuantLinear,
    QuantTransposedLinear,
)
from qframework.layers.wbiol import QuantWeightLayer
from qframework.quant_tensor import dequantize


class WeightIsQuantized(QuantWeightLayer):
    """Mixin: ``layer.weight`` is the quantized weight; the parameter is the float one."""

    if not TYPE_CHECKING:  # an attribute of the base is a property here

        @property
        def weight(self) -> Any:
            """The values of the quantized weight."""
            return dequantize(self.quant_weight())

    def tracked_parameter(self, name: str) -> Any:
        """What its quantizers are about: the float parameters."""
        return self._parameters.get(name)


class ReadQuantized(WeightIsQuantized):
    """Mixin: ``layer.weight`` is the quantized weight, for code that reads it past the layer."""


class ComputedWeight(QuantWeightLayer):
    """Mixin: ``layer.weight`` is computed from parameters, and what is computed is quantized."""

    weight_function: fx.GraphModule
    weight_reads: tuple[str, ...]

    if not TYPE_CHECKING:  # an attribute of the base is a property here

        @property
        def weight(self) -> Any:
            """The computed weight."""
            held = {**self._parameters, **self._buffers}
            return self.weight_function(*(held[name] for name in self.weight_reads))

    def _float_weight(self) -> Any:
        return self.weight


class ReadQuantLinear(ReadQuantized, QuantLinear):
    """A linear layer whose weight others read."""


class ReadQuantConv1d(ReadQuantized, QuantConv1d):
    """A convolution whose weight others read."""


class ReadQuantConv2d(ReadQuantized, QuantConv2d):
    """A convolution whose weight others read."""


class ReadQuantConv3d(ReadQuantized, QuantConv3d):
    """A convolution whose weight others read."""


class ReadQuantEmbedding(ReadQuantized, QuantEmbedding):
    """An embedding whose weight others read."""


class ReadQuantTransposedLinear(ReadQuantized, QuantTransposedLinear):
    """A linear layer, stored the other way round, whose weight others read."""


class ComputedQuantLinear(ComputedWeight, QuantLinear):
    """A linear layer with a computed weight."""


class ComputedQuantConv1d(ComputedWeight, QuantConv1d):
    """A convolution with a computed weight."""


class ComputedQuantConv2d(ComputedWeight, QuantConv2d):
    """A convolution with a computed weight."""


class ComputedQuantConv3d(ComputedWeight, QuantConv3d):
    """A convolution with a computed weight."""


_READ: dict[type[nn.Module], type[nn.Module]] = {
    QuantLinear: ReadQuantLinear,
    QuantConv1d: ReadQuantConv1d,
    QuantConv2d: ReadQuantConv2d,
    QuantConv3d: ReadQuantConv3d,
    QuantEmbedding: ReadQuantEmbedding,
    QuantTransposedLinear: ReadQuantTransposedLinear,
}
_COMPUTED: dict[type[nn.Module], type[nn.Module]] = {
    QuantLinear: ComputedQuantLinear,
    QuantConv1d: ComputedQuantConv1d,
    QuantConv2d: ComputedQuantConv2d,
    QuantConv3d: ComputedQuantConv3d,
}


def read_quantized(layer: nn.Module) -> bool:
    """Let others read the quantized weight of a layer; False where there is no such form of it."""
    form = _READ.get(type(layer))
    if form is not None:
        layer.__class__ = form
    return form is not None


def compute_weight(layer: Any, function: fx.GraphModule, reads: tuple[str, ...]) -> None:
    """Let a layer compute its weight, by a function of parameters that it holds."""
    layer.__class__ = _COMPUTED[type(layer)]
    layer.weight_function, layer.weight_reads = function, reads
    if (
        layer.weight_quant.tensor_quant is not None
    ):  # a learned scale starts from the computed weight
        layer.weight_quant.init_tensor_quant()
