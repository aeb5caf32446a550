"""Nodes and constants that take the place of a quantizer in an ONNX graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qframework.export.constants import Constants
from qframework.export.session import Call

#: ONNX's names of torch's floating-point types.
FLOATS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
}
#: Integer types by bits and sign, the first as wide as is needed; the opset from which on nodes take them.
INTEGERS = (
    (2, True, "INT2", 25),
    (2, False, "UINT2", 25),
    (4, True, "INT4", 21),
    (4, False, "UINT4", 21),
    (8, True, "INT8", 10),
    (8, False, "UINT8", 10),
    (16, True, "INT16", 21),
    (16, False, "UINT16", 21),
    (32, True, "INT32", 10),
)
_BITS = {name: bits for bits, _, name, _ in INTEGERS}


def integer_type(bits: int, signed: bool, opset: int, least: int = 2) -> str:
    """The narrowest integer type.

    Args:
        bits: of the integers.
        signed: of the integers.
        opset: of the graph.
        least: bits that it has at least.
    """
    for width, sign, name, since in INTEGERS:
        if width >= max(bits, least) and sign is signed and opset >= since:
            return name
    return "INT32"


def integers_proto(name: str, codes: Tensor, kind: str) -> TensorProto:
    """A constant of integers; narrow types are packed, the first in the lowest bits."""
    array = codes.detach().cpu().numpy()
    bits = _BITS[kind]
    if bits >= 8:
        return numpy_helper.from_array(array.astype(kind.lower()), name)
    per_byte = 8 // bits
    flat = (array.reshape(-1) & (2**bits - 1)).astype(np.uint8)
    flat = np.concatenate([flat, np.zeros(-flat.size % per_byte, np.uint8)])
    packed = np.zeros(flat.size // per_byte, np.uint8)
    for i in range(per_byte):
        packed |= flat[i::per_byte] << (bits * i)
    return TensorProto(
        name=name,
        data_type=getattr(TensorProto, kind),
        dims=array.shape,
        raw_data=packed.tobytes(),
    )


class Builder:
    """Collects the nodes and constants of a graph.

    Args:
        opset: of the graph.

    Attributes:
        nodes: in the order in which they run.
        constants: by name.
        domains: of nodes that aren't ONNX's own, with their versions.
        is_requantized: whether quantizers alone read what is written now.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.domains: dict[str, int] = {}
        self.is_requantized = False

    def floats(self, name: str, t: Tensor | float, dtype: torch.dtype = torch.float32) -> str:
        """A constant of floats, once for each name."""
        if name not in self.constants:
            values = torch.as_tensor(t).detach().cpu()
            if dtype is torch.bfloat16:
                raw = values.to(dtype).contiguous().view(torch.int16).numpy().tobytes()
                proto = TensorProto(
                    name=name,
                    data_type=TensorProto.BFLOAT16,
                    dims=tuple(values.shape),
                    raw_data=raw,
                )
            else:
                proto = numpy_helper.from_array(np.asarray(values.to(dtype).numpy()), name)
            self.constants[name] = proto
        return name

    def integers(self, name: str, codes: Tensor, kind: str) -> str:
        """A constant of integers, once for each name."""
        if name not in self.constants:
            self.constants[name] = integers_proto(name, codes, kind)
        return name

    def raw(self, name: str, proto: TensorProto) -> str:
        """A constant, once for each name."""
        self.constants.setdefault(name, proto)
        return name

    def number(self, value: float) -> str:
        """A float32 without axes, which all nodes share."""
        return self.floats(f"qframework.{value:g}", torch.tensor(float(value)))

    def integer(self, value: int, kind: str) -> str:
        """An integer without axes, which all nodes share."""
        return self.integers(f"qframework.{kind.lower()}.{value}", torch.tensor(value), kind)

    def node(
        self, op: str, inputs: list[str], output: str, domain: str = "", **attributes: Any
    ) -> str:
        """A node with one output, whose name it is."""
        made = helper.make_node(
            op, inputs, [output], name=f"{output}.{op}", domain=domain, **attributes
        )
        self.nodes.append(made)
        return output

    def kind_of(self, value: str) -> str:
        """The operator that computes a value; empty for inputs and constants."""
        found = (n.op_type for n in reversed(self.nodes) if value in n.output)
        return next(found, "")

    def in_float32(self, call: Call, x: str) -> str:
        """``x`` as float32."""
        if call.constants.dtype is torch.float32:
            return x
        return self.node("Cast", [x], f"{call.name}.wide", to=TensorProto.FLOAT)

    def result(self, call: Call) -> str:
        """Where a float32 result of a call goes, that :meth:`finish` makes its value."""
        return call.name if call.constants.dtype is torch.float32 else f"{call.name}.float32"

    def finish(self, call: Call) -> None:
        """Make the result of a call its value, in its dtype."""
        if call.constants.dtype is not torch.float32:
            to = FLOATS[call.constants.dtype]
            self.node("Cast", [self.result(call)], call.name, to=to)


def sign_steps(builder: Builder, call: Call, x: str) -> str:
    """The numbers -1 and 1 of binary, or -1, 0 and 1 of ternary values, in float32."""
    c, name = call.constants, call.name
    if c.format == "binary":
        positive = builder.node("GreaterOrEqual", [x, builder.number(0)], f"{name}.positive")
        return builder.node(
            "Where", [positive, builder.number(1), builder.number(-1)], f"{name}.sign"
        )
    limit = builder.floats(f"{c.name}.limit", c.threshold * c.scale)
    size = builder.node("Abs", [x], f"{name}.size")
    outside = builder.node("Greater", [size, limit], f"{name}.outside")
    sign = builder.node("Sign", [x], f"{name}.whole")
    return builder.node("Where", [outside, sign, builder.number(0)], f"{name}.sign")


_ROUNDING_NODES = {"round": "Round", "floor": "Floor", "ceil": "Ceil"}


def truncated_steps(builder: Builder, call: Call, x: str) -> str:
    """The integers of an accumulator divided and rounded, in float32, not yet clamped."""
    c, name = call.constants, call.name
    assert c.truncates is not None
    divisor, scale, zero_point, _ = c.truncates
    y = builder.node("Div", [x, builder.floats(f"{c.name}.input_scale", scale)], f"{name}.input")
    if bool(zero_point.any()):
        shift = builder.floats(f"{c.name}.input_zero_point", zero_point)
        y = builder.node("Add", [y, shift], f"{name}.shifted")
    y = builder.node("Round", [y], f"{name}.accumulator")
    y = builder.node("Div", [y, builder.floats(f"{c.name}.divisor", divisor)], f"{name}.divided")
    if c.rounding != "round":
        y = rounded_node(builder, c, y, f"{name}.rounded")
    return y


def rounded_node(builder: Builder, c: Constants, x: str, output: str) -> str:
    """``x`` rounded by the rule of a quantizer."""
    if c.rounding == "round_to_zero":
        size = builder.node(
            "Floor", [builder.node("Abs", [x], f"{output}.size")], f"{output}.floor"
        )
        return builder.node("Mul", [builder.node("Sign", [x], f"{output}.sign"), size], output)
    return builder.node(_ROUNDING_NODES[c.rounding], [x], output)
