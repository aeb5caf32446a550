"""One quantized weight in the layouts of compressed-tensors: packed integers, int8, float8, and groups of 4-bit floats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qframework.export.bits import pack, packed_size
from qframework.functional import upcast
from qframework.quant_tensor import (
    FloatQuantTensor,
    GroupwiseFloatQuantTensor,
    GroupwiseIntQuantTensor,
    IntQuantTensor,
)

#: The positive numbers of E2M1, by their codes.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: Neighbours of a global scale that are tried.
_NEIGHBOURS = 16


class Unsupported(Exception):
    """A weight that none of the layouts holds; the message says why, and what would do."""


class CompressedWeight(NamedTuple):
    """A weight as a file has it.

    Attributes:
        format: name of the layout.
        arguments: what ``quantization_config`` says of the weight.
        tensors: by their names after the layer's.
    """

    format: str
    arguments: dict[str, Any]
    tensors: dict[str, Tensor]


@torch.no_grad()
def compress_weight(q: Any, with_int8_input: bool) -> CompressedWeight:
    """A quantized weight of a linear layer in the layout for its format.

    Args:
        q: of shape ``(out_features, in_features)``.
        with_int8_input: whether the input is quantized to 8-bit integers, so that weights of 8 bits are kept as int8.

    Raises:
        Unsupported: no layout holds it exactly.
    """
    if isinstance(q, (IntQuantTensor, GroupwiseIntQuantTensor)):
        return _integers(q, with_int8_input)
    if isinstance(q, FloatQuantTensor):
        return _float8(q)
    if isinstance(q, GroupwiseFloatQuantTensor):
        return _float4_groups(q)
    raise Unsupported(f"a {type(q).__name__} has no layout; use integers, FP8, MXFP4 or NVFP4")


# ------------------------------------------------------------ integers


def _integers(q: Any, with_int8_input: bool) -> CompressedWeight:
    bits = max(2, int(torch.ceil(q.bit_width)))  # a sign alone takes two
    if bits > 8:
        raise Unsupported(f"integers of {bits} bits; use 2 to 8")
    scale, zero, arguments = _parameters(q)
    half = 1 << (bits - 1)
    shift = 0 if q.signed else half
    codes = q.int().to(torch.int64) - shift
    moved = upcast(zero) - shift
    if bool((codes < -half).any() | (codes >= half).any()):
        raise Unsupported(f"integers beyond {bits} bits")
    arguments |= {"num_bits": bits, "type": "int", "symmetric": not bool(moved.any())}
    spread = arguments.get("group_size", 1)
    _check(q, (codes - _columns(moved, spread)) * _columns(scale, spread))
    if not arguments["symmetric"] and bool((moved != moved.round()).any()):
        raise Unsupported("a zero point that isn't a whole number; use quantize_zero_point=True")
    if not arguments["symmetric"] and bool((moved < -half).any() | (moved >= half).any()):
        raise Unsupported(f"a zero point that isn't an integer of {bits} bits")
    if bits == 8 and with_int8_input and arguments["strategy"] != "group":
        tensors = {"weight": codes.to(torch.int8), "weight_scale": scale}
        if not arguments["symmetric"]:
            tensors["weight_zero_point"] = moved.to(torch.int8)
        return CompressedWeight("int-quantized", arguments, tensors)
    tensors = {
        "weight_packed": _packed_rows(codes + half, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.shape),
    }
    if not arguments["symmetric"]:
        rows = (moved.to(torch.int64) + half).t()
        tensors["weight_zero_point"] = _packed_rows(rows, bits).t()
    return CompressedWeight("pack-quantized", arguments, tensors)


def _parameters(q: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Scale and zero point of shape ``(out_features, groups)``, and how they are spread."""
    rows, columns = q.value.shape
    if isinstance(q, (GroupwiseIntQuantTensor, GroupwiseFloatQuantTensor)):
        if q.group_dim % 2 != 1:
            raise Unsupported("groups along the output features; use group_dim=1")
        if columns % q.group_size:
            raise Unsupported(f"groups of {q.group_size} don't divide {columns} input features")
        shape = (rows, columns // q.group_size)
        zero = q.zero_point_.expand(q.scale_.shape) if q.zero_point_.numel() > 1 else q.zero_point_
        zero = zero.reshape(shape) if zero.numel() > 1 else zero.reshape(1, 1).expand(shape)
        return (
            upcast(q.scale_).reshape(shape),
            upcast(zero),
            {"strategy": "group", "group_size": q.group_size},
        )
    scale, zero = upcast(q.scale), upcast(q.zero_point)
    for number in (scale, zero):
        if number.numel() not in (1, rows) or (number.numel() > 1 and number.shape != (rows, 1)):
            raise Unsupported(
                f"scales of shape {tuple(number.shape)}; use one, or one for each output feature"
            )
    return (
        scale.reshape(-1, 1).expand(rows, 1),
        zero.reshape(-1, 1).expand(rows, 1),
        {"strategy": "channel"},
    )


def _columns(number: Tensor, size: int) -> Tensor:
    return number if number.shape[1] == 1 else number.repeat_interleave(size, 1)


def _packed_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes from 0, each row packed without gaps into int32 words, the lowest bit first."""
    rows, columns = codes.shape
    filled = torch.nn.functional.pad(codes, (0, -columns % 32))
    packed = pack(filled, bits).view(torch.int32).reshape(rows, -1)
    return packed[:, : -(-packed_size(columns, bits) // 4)]


def _check(q: Any, value: Tensor, dtype: torch.dtype | None = None) -> None:
    """Refuse a layout that doesn't give the values of the weight again, bit for bit."""
    if not torch.equal(value.to(dtype or q.value.dtype), q.value.to(dtype or q.value.dtype)):
        raise Unsupported(
            "its values aren't (integer - zero point) * scale as this layout computes them"
        )


# ------------------------------------------------------------ floats


def _float8(q: FloatQuantTensor) -> CompressedWeight:
    numbers = q.minifloat().float()
    codes = numbers.to(torch.float8_e4m3fn)
    if not torch.equal(codes.float(), numbers):
        raise Unsupported(
            "minifloats that aren't FP8 E4M3 of the OCP; use Fp8e4m3OCPWeightPerChannelFloat or MXFloat4e2m1Weight"
        )
    scale, _, arguments = _parameters(q)
    _check(q, codes.float() * scale)
    if q.scale.numel() == 1:
        scale, arguments = scale[0], {"strategy": "tensor"}
    arguments |= {"num_bits": 8, "type": "float", "symmetric": True}
    return CompressedWeight("float-quantized", arguments, {"weight": codes, "weight_scale": scale})


def _float4_groups(q: GroupwiseFloatQuantTensor) -> CompressedWeight:
    numbers = q.minifloat().float()
    levels = torch.tensor(_E2M1, device=numbers.device)
    index = torch.bucketize(numbers.abs(), levels)
    if not torch.equal(levels[index.clamp_max(7)], numbers.abs()):
        raise Unsupported(
            "groups of minifloats that aren't E2M1; use MXFloat4e2m1Weight or NVFloat4Weight"
        )
    scale, _, arguments = _parameters(q)
    index = index + 8 * (numbers < 0)
    if index.shape[1] % 2:
        raise Unsupported("an odd number of input features")
    tensors = {"weight_packed": pack(index, 4).reshape(index.shape[0], -1)}
    arguments |= {"num_bits": 4, "type": "float", "symmetric": True}
    mantissa, exponent = torch.frexp(scale)
    if q.group_size == 32 and bool((mantissa == 0.5).all()):
        tensors["weight_scale"] = (exponent + 126).to(torch.uint8)
        _check(q, numbers * _columns(scale, 32))
        return CompressedWeight(
            "mxfp4-pack-quantized", arguments | {"scale_dtype": "torch.uint8"}, tensors
        )
    if q.group_size == 16:
        local, whole = _two_levels(scale)
        tensors["weight_scale"] = local
        tensors["weight_global_scale"] = _global_scale(q, numbers, local.float(), whole)
        arguments |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
        return CompressedWeight("nvfp4-pack-quantized", arguments, tensors)
    raise Unsupported(
        f"4-bit floats in groups of {q.group_size}; use MXFloat4e2m1Weight (32, powers of two) or NVFloat4Weight (16)"
    )


def _two_levels(scale: Tensor) -> tuple[Tensor, Tensor]:
    """The scales of groups in E4M3, and the one of the tensor, whose products they are."""
    start = scale.max().reshape(1) / 448
    for whole in _near(start):
        local = (scale / whole).to(torch.float8_e4m3fn)
        if torch.equal(local.float() * whole, scale):
            return local, whole
    raise Unsupported(
        "scales of groups of 16 that aren't E4M3 times one number; use NVFloat4Weight"
    )


def _global_scale(q: Any, numbers: Tensor, local: Tensor, whole: Tensor) -> Tensor:
    """What readers divide the scales of groups by, so that in bfloat16 they get the values of the weight."""
    wanted = q.value.to(torch.bfloat16)
    for divisor in _near(1 / whole):
        value = numbers * _columns(local / divisor, q.group_size)
        if torch.equal(value.to(torch.bfloat16), wanted):
            return divisor
    raise Unsupported("a scale that isn't the same in bfloat16 once it is divided by")


def _near(start: Tensor) -> Iterator[Tensor]:
    """A positive float32 number and its neighbours, the nearest first."""
    bits = start.float().view(torch.int32)
    for distance in range(_NEIGHBOURS):
        for sign in (1, -1) if distance else (1,):
            yield (bits + sign * distance).view(torch.float32)
