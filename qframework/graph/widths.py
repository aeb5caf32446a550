"""How many bits an element of something has."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qframework.proxy import QuantProxy
from qframework.quant_tensor import CodebookQuantTensor, IntQuantTensor
from qframework.quant_tensor.float_quant_tensor import MinifloatRecord


def inside_quantizers(model: nn.Module) -> set[nn.Module]:
    """Quantizers' proxies and all modules that they are made of."""
    proxies = (m for m in model.modules() if isinstance(m, QuantProxy))
    return {part for proxy in proxies for part in proxy.modules()}


@torch.no_grad()
def asked(proxy: Any, what: str) -> Any:
    """What a proxy tells, None where it depends on an input or the proxy has none, as a truncation has no scale."""
    if not hasattr(proxy, what):
        return None
    try:
        return getattr(proxy, what)()
    except RuntimeError:
        return None


def bits_of_proxy(proxy: Any) -> float:
    """Bits of an element of what a quantizer makes."""
    codebook = getattr(proxy, "codebook", None)
    if codebook is not None:
        return _bits_of_index(codebook())
    if hasattr(proxy, "mantissa_bit_width"):
        parts = ("exponent_bit_width", "mantissa_bit_width")
        return sum(_number(proxy, part) for part in parts) + bool(proxy.is_signed)
    return _number(proxy, "bit_width")


def _number(proxy: Any, what: str) -> float:
    found = asked(proxy, what)
    if found is None:  # the grid follows each input
        found = proxy.tensor_quant.msb_clamp_bit_width_impl()
    return float(proxy.explain()[what].value if found.is_meta else found)


def bits_of_tensor(x: Tensor | Any) -> float:
    """Bits of an element of a parameter, or of a quantized tensor."""
    if isinstance(x, IntQuantTensor):
        return float(x.bit_width)
    if isinstance(x, MinifloatRecord):
        return float(x.exponent_bit_width + x.mantissa_bit_width) + bool(x.signed)
    if isinstance(x, CodebookQuantTensor):
        return _bits_of_index(x.codebook)
    return float(x.element_size() * 8)


def _bits_of_index(codebook: Tensor) -> float:
    return float(math.ceil(math.log2(codebook.numel())))
