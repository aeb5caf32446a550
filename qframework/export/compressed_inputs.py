"""The quantizer of a linear layer's input, as compressed-tensors has it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qframework.export.compressed_weights import Unsupported
from qframework.quant_tensor import (
    FloatQuantTensor,
    GroupwiseFloatQuantTensor,
    IntQuantTensor,
)


class CompressedInput(NamedTuple):
    """How an input is quantized.

    Attributes:
        arguments: what ``quantization_config`` says of it.
        tensors: of a static quantizer, by their names after the layer's.
    """

    arguments: dict[str, Any]
    tensors: dict[str, Tensor]


@torch.no_grad()
def compress_input(proxy: Any, features: int) -> CompressedInput:
    """The quantizer of an input of shape ``(..., features)``.

    Args:
        proxy: in evaluation mode.
        features: of the input.

    Raises:
        Unsupported: no scheme is the same.
    """
    if not all(c.has_statistics for c in proxy.collectors()):
        raise Unsupported(
            "its input_quant has seen no data; run batches in training mode, or calibration_mode"
        )
    place = next((t.device for t in (*proxy.parameters(), *proxy.buffers())), None)
    probe = torch.linspace(-1, 1, 2 * features, device=place).reshape(2, features)
    q = proxy(probe)
    arguments: dict[str, Any] = {"dynamic": bool(getattr(proxy, "is_dynamic", False))}
    if isinstance(q, GroupwiseFloatQuantTensor):
        return CompressedInput(arguments | _groups(q), {})
    if isinstance(q, IntQuantTensor):
        bits = float(q.bit_width)
        if bits not in (4, 8):
            raise Unsupported(f"an input of {bits:g} bits; use 8 or 4")
        shift = 0 if q.signed else 2 ** (int(bits) - 1)
        zero = q.zero_point - shift
        arguments |= {"num_bits": int(bits), "type": "int", "symmetric": not bool(zero.any())}
    elif isinstance(q, FloatQuantTensor):
        numbers = q.minifloat().float()
        widths = float(q.exponent_bit_width), float(q.mantissa_bit_width), q.largest()
        if widths != (4.0, 3.0, 448.0) or not torch.equal(
            numbers.to(torch.float8_e4m3fn).float(), numbers
        ):
            raise Unsupported("an input in minifloats that aren't FP8 E4M3 of the OCP")
        arguments |= {"num_bits": 8, "type": "float", "symmetric": True}
        zero = torch.zeros(())
    else:
        raise Unsupported(
            f"an input quantized to a {type(q).__name__}; use 8-bit integers, FP8 or MXFP4"
        )
    count = q.scale.numel()
    if count == 2 and arguments["dynamic"]:
        return CompressedInput(arguments | {"strategy": "token"}, {})
    if count != 1:
        raise Unsupported("an input with scales of channels; use one scale")
    arguments["strategy"] = "tensor"
    if arguments["dynamic"]:
        return CompressedInput(arguments, {})
    tensors = {"input_scale": q.scale.detach().float().reshape(1)}
    if not arguments["symmetric"]:
        if bool((zero != zero.round()).any()):
            raise Unsupported("a zero point of the input that isn't a whole number")
        tensors["input_zero_point"] = zero.round().to(torch.int8).reshape(1)
    return CompressedInput(arguments, tensors)


def _groups(q: GroupwiseFloatQuantTensor) -> dict[str, Any]:
    mantissa, _ = torch.frexp(q.scale_)
    widths = float(q.exponent_bit_width), float(q.mantissa_bit_width), q.group_size
    if widths != (2.0, 1.0, 32) or q.group_dim % 2 != 1 or not bool((mantissa == 0.5).all()):
        raise Unsupported(
            "an input in groups that aren't MXFP4 along its last axis; use MXFloat4e2m1Act"
        )
    return {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    }
