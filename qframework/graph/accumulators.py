"""The integers that a layer sums, and how many bits their sum needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qframework.graph.widths import asked
from qframework.proxy import QuantProxy
from qframework.quant_tensor import GroupwiseIntQuantTensor, IntQuantTensor
from qframework.quant_tensor.rules_linear import accumulator_bits


@dataclass(frozen=True)
class Codes:
    """A type of integers.

    Attributes:
        bit_width: a 0-dim tensor.
        signed: whether they are two's complement.
    """

    bit_width: Tensor
    signed: bool


def codes_of_role(module: nn.Module, attribute: str) -> Codes | None:
    """The integers that a quantizer of a layer makes; None where it makes none."""
    proxy: Any = module._modules.get(attribute)
    if not isinstance(proxy, QuantProxy) or not proxy.is_quant_enabled:
        return None
    if hasattr(proxy, "mantissa_bit_width") or hasattr(proxy, "codebook"):
        return None
    bits = asked(proxy, "bit_width")
    if bits is None:
        inner: Any = proxy.tensor_quant
        bits = (
            inner.msb_clamp_bit_width_impl() if hasattr(inner, "msb_clamp_bit_width_impl") else None
        )
    if bits is None or bits.is_meta:
        return None
    return Codes(bits.detach(), bool(proxy.is_signed))


def codes_of_tensor(x: Any) -> Codes | None:
    """The integers of a quantized tensor; None for others."""
    if isinstance(x, (IntQuantTensor, GroupwiseIntQuantTensor)) and not x.value.is_meta:
        return Codes(x.bit_width.detach(), bool(x.signed))
    return None


@torch.no_grad()
def accumulator_width(layer: Any, input_codes: Codes | None = None) -> int | None:
    """Bits of a layer's sums of products, and of a quantized bias added to them, in the worst case.

    Args:
        layer: a linear layer or a convolution.
        input_codes: of its input; None for those of its own input quantizer.

    Returns:
        The width that quantized tensors have behind the layer; None where input or weight aren't integers.
    """
    own = codes_of_role(layer, "input_quant")
    x, w = own or input_codes, codes_of_role(layer, "weight_quant")
    weight = getattr(layer, "weight", None)
    if x is None or w is None or weight is None or not hasattr(layer, "bias"):
        return None
    axis = int(getattr(layer, "output_channel_dim", 0)) % max(1, weight.dim())
    channels = weight.shape[axis] * (layer.groups if getattr(layer, "transposed", False) else 1)
    products = max(1, math.prod(weight.shape) // max(1, channels))
    bits = accumulator_bits(x, w, products)  # type: ignore[arg-type]
    bias = codes_of_role(layer, "bias_quant")
    if bias is not None and layer.bias is not None:
        bits = torch.maximum(bits, bias.bit_width.to(bits)) + 1
    return int(bits)


@torch.no_grad()
def bias_integers(layer: Any) -> list[int] | None:
    """The integers of a layer's quantized bias; None without one, and while the scale of its input isn't known."""
    if codes_of_role(layer, "bias_quant") is None or not hasattr(layer, "quant_bias"):
        return None
    try:
        bias = layer.quant_bias()
        return bias.int().flatten().tolist() if isinstance(bias, IntQuantTensor) else None
    except RuntimeError:
        return None
