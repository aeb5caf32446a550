"""Making quantized values again in the backward pass instead of saving them.

A quantizer saves its input for the backward pass, and the layer behind it would save the quantized values, too. But these are
``quantize(input)``, one pass over memory where C++ functions compute: such layers save the quantizer's input, which is saved
anyway. Quantized values know what they were made of by an attribute.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qframework.functional import IntegerGrid
from qframework.kernels.autograd import Fused, transforms_active
from qframework.kernels.integer import quantize


class Origin(NamedTuple):
    """Values before they were quantized, and what they were quantized by.

    Attributes:
        x: the values.
        scale: see :func:`~qframework.functional.fake_quantize`.
        zero_point: see :func:`~qframework.functional.fake_quantize`.
        grid: the integers.
        relu: whether ``relu(x)`` was quantized.
        node: of the graph, that made the quantized values.
    """

    x: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: IntegerGrid
    relu: bool
    node: Any

    def values(self) -> Tensor:
        """The quantized values again."""
        return quantize(self.x, self.scale, self.zero_point, self.grid, self.relu)

    def differentiable(self) -> Tensor:
        """The quantized values again, by the definition, as part of the graph that they were part of."""
        kind: type[Fused] = self.node._forward_cls
        made = kind.define(self.node, *self.node.saved_tensors[: len(kind.tensors)])
        return made[0] if isinstance(made, tuple) else made  # type: ignore[no-any-return]


def origin_of(y: Tensor) -> Origin | None:
    """What ``y`` was made of; None where that isn't known, where it was written to since, and where it doesn't count."""
    found: tuple[Any, ...] | None = y.__dict__.get("origin")
    node = y.grad_fn
    if (
        found is None
        or node is None
        or y.output_nr != 0
        or y._version != 0
        or not torch.is_grad_enabled()
        or transforms_active()
        or torch.is_autocast_enabled(y.device.type)
        or torch._C._get_tracing_state() is not None
    ):
        return None
    x, scale, zero_point, grid, relu = found
    return Origin(x, scale, zero_point, grid, relu, node)
