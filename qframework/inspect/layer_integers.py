"""A layer as integers, in NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qframework.arguments import check_module
from qframework.graph.accumulators import Codes, accumulator_width, codes_of_tensor
from qframework.proxy import QuantProxy
from qframework.quant_tensor import GroupwiseIntQuantTensor, IntQuantTensor

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TensorIntegers:
    """One tensor: ``value = (integers - zero_point) * scale``.

    Attributes:
        integers: None for activations, whose values come with each input.
        scale: 0-dim, or of a shape that broadcasts to the integers.
        zero_point: in integer steps, likewise.
        shift: the whole number ``n`` with ``scale == 2**-n``; None where a scale isn't a power of two.
        bit_width: bits of an integer.
        signed: whether they are two's complement.
    """

    integers: Array | None
    scale: Array
    zero_point: Array
    shift: Array | None
    bit_width: int
    signed: bool


@dataclass(frozen=True)
class LayerIntegers:
    """The integers that a layer computes with; None for each tensor that isn't quantized.

    Attributes:
        weight: the weight.
        bias: the bias, on the scale of the accumulator where its quantizer takes it from the input.
        input: scale and zero point of the input.
        output: those of the output; of the activation in layers that are one.
        accumulator_bits: that sums of products, and a bias added to them, need in the worst case; None where input or weight aren't
            integers or the input isn't known.
        multiplier: ``input scale * weight scale / output scale = multiplier * 2**-multiplier_shift``, int64 of 31 bits, one or one a
            channel; None where one of the scales isn't known.
        multiplier_shift: whole numbers of the shape of ``multiplier``.
    """

    weight: TensorIntegers | None
    bias: TensorIntegers | None
    input: TensorIntegers | None
    output: TensorIntegers | None
    accumulator_bits: int | None
    multiplier: Array | None
    multiplier_shift: Array | None


@torch.no_grad()
def integers(layer: nn.Module, input: Any = None) -> LayerIntegers:
    """Integer weight, bias, scales, zero points, shifts and accumulator width of a layer.

    Args:
        layer: a quantized one, in the mode in which it will run.
        input: the quantized tensor that it is given, for layers whose input another layer has quantized; None for what the layer's
            own input quantizer and its last forward pass tell.

    Returns:
        NumPy arrays.

    Raises:
        ValueError: the layer isn't quantized.
        RuntimeError: the bias takes its scale from an input, and there was none yet; or a tensor that isn't integers.
    """
    check_module(layer, "integers", "layer")
    proxies = {n: m for n, m in layer._modules.items() if isinstance(m, QuantProxy)}
    if not any(p.is_quant_enabled for p in proxies.values()):
        raise ValueError(
            f"integers: {type(layer).__name__} quantizes nothing. Give a quantized layer, such as model.conv1 of a model that "
            "quantize_model made"
        )
    parts: Any = layer
    given = (
        _of_tensor(input) if isinstance(input, (IntQuantTensor, GroupwiseIntQuantTensor)) else None
    )
    own = _of_proxy(proxies, "input_quant")
    if own is not None:
        given = own
    quantized_input = input
    if own is not None and input is not None and proxies["input_quant"].is_quant_enabled:
        quantized_input = proxies["input_quant"](input)
    weight_tensor = _weight(parts, proxies, quantized_input)
    bias_tensor = _bias(parts, proxies, quantized_input, weight_tensor)
    weight, bias = _of_tensor(weight_tensor), _of_tensor(bias_tensor)
    output = _of_proxy(proxies, "output_quant") or _of_proxy(proxies, "act_quant")
    codes: Codes | None = codes_of_tensor(input)
    multiplier, shift = _multiplier(given, weight, output)
    return LayerIntegers(
        weight=weight,
        bias=bias,
        input=given,
        output=output,
        accumulator_bits=accumulator_width(layer, codes),
        multiplier=multiplier,
        multiplier_shift=shift,
    )


def _weight(layer: Any, proxies: dict[str, Any], x: Any) -> Any:
    if "weight_quant" not in proxies or not proxies["weight_quant"].is_quant_enabled:
        return None
    return (
        layer.quant_weight(x)
        if hasattr(layer, "quant_weight")
        else proxies["weight_quant"](layer.weight)
    )


def _bias(layer: Any, proxies: dict[str, Any], x: Any, weight: Any) -> Any:
    proxy = proxies.get("bias_quant")
    if proxy is None or not proxy.is_quant_enabled or layer.bias is None:
        return None
    if proxy.requires_input_scale and isinstance(x, IntQuantTensor):
        return proxy(layer.bias, x, weight)
    if proxy.requires_input_scale and _static_scale(proxies) is not None:
        scale = _static_scale(proxies)
        probe = torch.zeros((), dtype=layer.bias.dtype, device=layer.bias.device)
        return proxy(layer.bias, proxies["input_quant"](probe).set(scale=scale), weight)
    return layer.quant_bias()


def _static_scale(proxies: dict[str, Any]) -> Any:
    """The scale of the layer's own input quantizer; None without one, and where it follows the input."""
    proxy = proxies.get("input_quant")
    if proxy is None or not proxy.is_quant_enabled:
        return None
    try:
        return proxy.scale()
    except RuntimeError:
        return None


def _of_tensor(q: Any) -> TensorIntegers | None:
    if q is None:
        return None
    if not isinstance(q, (IntQuantTensor, GroupwiseIntQuantTensor)):
        raise RuntimeError(
            f"integers: a {type(q).__name__} isn't made of integers; minifloats and codebooks have q.codes()"
        )
    return TensorIntegers(
        integers=q.int().cpu().numpy(),
        scale=_numbers(q.scale),
        zero_point=_numbers(q.zero_point),
        shift=_shift(q.scale),
        bit_width=int(q.bit_width),
        signed=bool(q.signed),
    )


def _of_proxy(proxies: dict[str, Any], name: str) -> TensorIntegers | None:
    """What an activation quantizer tells without an input; None where it follows each one."""
    proxy = proxies.get(name)
    if proxy is None or not proxy.is_quant_enabled or hasattr(proxy, "mantissa_bit_width"):
        return None
    try:
        scale, zero, bits = proxy.scale(), proxy.zero_point(), proxy.bit_width()
    except RuntimeError:
        return None
    return TensorIntegers(
        integers=None,
        scale=_numbers(scale),
        zero_point=_numbers(zero),
        shift=_shift(scale),
        bit_width=int(bits),
        signed=bool(proxy.is_signed),
    )


def _numbers(t: Tensor) -> Array:
    found: Array = (
        t.detach().float().cpu().numpy() if t.dtype != torch.float64 else t.detach().cpu().numpy()
    )
    return found.reshape(()) if found.size == 1 else found


def _shift(scale: Tensor) -> Array | None:
    exponents = torch.log2(scale.detach().double()).round()
    if not bool((torch.exp2(exponents) == scale.detach().double()).all()):
        return None
    found: Array = (-exponents).to(torch.int64).cpu().numpy()
    return found.reshape(()) if found.size == 1 else found


def _multiplier(
    given: TensorIntegers | None, weight: TensorIntegers | None, output: TensorIntegers | None
) -> tuple[Array | None, Array | None]:
    """The rescaling of an accumulator as an integer of 31 bits and a shift."""
    if given is None or weight is None or output is None:
        return None, None
    if given.scale.size != 1 or output.scale.size != 1:
        return None, None
    factor = np.asarray(given.scale.astype(np.float64) * weight.scale / output.scale)
    fraction, exponent = np.frexp(factor)
    whole = np.rint(np.ldexp(fraction, 31)).astype(np.int64)
    return np.asarray(whole), np.asarray(31 - exponent)
