"""Quantizers as QuantizeLinear, Clip and DequantizeLinear."""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from qframework.export.constants import Constants
from qframework.export.formats import float8_of
from qframework.export.onnx_graph import Builder, integer_type, sign_steps, truncated_steps
from qframework.export.session import Call


class QCDQ:
    """Emits the nodes of quantizers.

    Args:
        opset: of the graph.
        standard: write zero points as one QuantizeLinear, which rounds before it adds them.
    """

    domain = ""

    def __init__(self, opset: int, standard: bool = False) -> None:
        self.opset, self.standard = opset, standard

    # ------------------------------------------------------------ weights and biases

    def parameter(self, builder: Builder, call: Call) -> None:
        """The value of a weight or bias, from its integers."""
        c = call.constants
        assert c.codes is not None
        if c.format == "minifloat":
            self._float8_parameter(builder, call)
            return
        low, high = min(c.low, 0), max(c.high, 0)
        kind = integer_type(c.bits, c.signed, self.opset)
        if c.bits > 8 and c.role == "bias":
            kind = "INT32"
        whole = c.whole_zero_point or (c.symmetric and low <= 0 <= high)
        codes = builder.integers(f"{c.name}.codes", c.codes, kind)
        self._dequantize(builder, call, codes, kind, whole)

    def _float8_parameter(self, builder: Builder, call: Call) -> None:
        c = call.constants
        found = float8_of(c.exponent_bits, c.minifloat)
        assert found is not None and c.codes is not None
        name, dtype = found
        raw = c.codes.to(dtype).view(torch.uint8).cpu().numpy().tobytes()
        proto = TensorProto(
            name=f"{c.name}.codes",
            data_type=getattr(TensorProto, name),
            dims=c.shape,
            raw_data=raw,
        )
        codes = builder.raw(proto.name, proto)
        self._dequantize(builder, call, codes, name, True)

    def _dequantize(self, builder: Builder, call: Call, codes: str, kind: str, whole: bool) -> None:
        """From codes of an integer type to the value of a call."""
        c, result = call.constants, builder.result(call)
        where = _where(c)
        if not whole:
            one = builder.node("DequantizeLinear", [codes, builder.number(1)], f"{call.name}.float")
            offset = builder.floats(f"{c.name}.zero_point", c.zero_point)
            steps = builder.node("Sub", [one, offset], f"{call.name}.from_zero")
            builder.node("Mul", [steps, builder.floats(f"{c.name}.scale", c.scale)], result)
            builder.finish(call)
            return
        inputs = [codes, builder.floats(f"{c.name}.scale", _vector(c, c.scale))]
        if not c.symmetric:
            shift = _vector(c, c.zero_point).round().long()
            inputs.append(builder.integers(f"{c.name}.zero_point", shift, kind))
        elif self._shows_zero(builder, c, kind):
            inputs.append(self._zero(builder, c, kind))
        builder.node("DequantizeLinear", inputs, result, **where)
        builder.finish(call)

    def _shows_zero(self, builder: Builder, c: Constants, kind: str) -> bool:
        """Whether a zero point that is 0 is written, which a node may lack.

        Where onnxruntime's optimizations reshape what a node without one gives, they quantize it again, to uint8. They do no such
        thing where quantizers alone read it, but make one pair of two that both have zero points. From opset 21 on
        they know the type, and fail where there is a zero point besides.
        """
        return kind == "INT8" and self.opset < 21 and not (c.is_parameter or builder.is_requantized)

    @staticmethod
    def _zero(builder: Builder, c: Constants, kind: str) -> str:
        """A zero for each scale."""
        zeros = torch.zeros_like(_vector(c, c.scale), dtype=torch.long)
        return (
            builder.integers(f"{c.name}.zeros", zeros, kind)
            if zeros.dim()
            else builder.integer(0, kind)
        )

    # ------------------------------------------------------------ activations

    def activation(self, builder: Builder, call: Call, x: str) -> None:
        """The value of an activation or a truncation."""
        c = call.constants
        x = builder.in_float32(call, x)
        if c.format == "minifloat":
            self._float8_activation(builder, call, x)
            return
        kind = integer_type(c.bits, c.signed, self.opset, least=8)
        whole = c.symmetric or c.whole_zero_point
        if c.truncates is not None:
            steps: str | None = truncated_steps(builder, call, x)
        elif c.format in ("binary", "ternary"):
            steps = sign_steps(builder, call, x)
        elif c.symmetric or (self.standard and whole):
            steps = None
        else:
            scale = builder.floats(f"{c.name}.scale.spread", c.scale)
            shift = builder.floats(f"{c.name}.zero_point.spread", c.zero_point)
            steps = builder.node("Div", [x, scale], f"{call.name}.divided")
            steps = builder.node("Add", [steps, shift], f"{call.name}.steps")
        if steps is None and c.bits > 8 and _clips(c, kind):
            scale = builder.floats(f"{c.name}.scale.spread", c.scale)
            steps = builder.node("Div", [x, scale], f"{call.name}.steps")
        codes = self._quantize(builder, call, x, steps, kind)
        self._dequantize(builder, call, codes, kind, whole)

    def _quantize(self, builder: Builder, call: Call, x: str, steps: str | None, kind: str) -> str:
        """The codes of ``x``, or of what is given in steps of the grid already."""
        c, name = call.constants, call.name
        clips, output = _clips(c, kind), f"{name}.codes"
        if clips and c.bits > 8:  # Clip takes no 16-bit integers
            assert steps is not None
            bounds = [builder.number(c.low), builder.number(c.high)]
            steps = builder.node("Clip", [steps, *bounds], f"{name}.clipped")
            clips = False
        first = f"{name}.unclipped" if clips else output
        if steps is not None:
            inputs, where = [steps, builder.number(1)], dict[str, Any]()
            zero = builder.integer(0, kind)
        else:
            inputs = [x, builder.floats(f"{c.name}.scale", _vector(c, c.scale))]
            where = _where(c)
            shift = _vector(c, c.zero_point).round().long()
            zero = self._zero(builder, c, kind) if c.symmetric else f"{c.name}.zero_point"
        if (steps is not None or c.symmetric) and self.opset >= 21:
            where["output_dtype"] = getattr(TensorProto, kind)
        elif steps is not None or c.symmetric:
            inputs.append(zero)
        else:
            inputs.append(builder.integers(zero, shift, kind))
        builder.node("QuantizeLinear", inputs, first, **where)
        if clips:
            bounds = [builder.integer(c.low, kind), builder.integer(c.high, kind)]
            builder.node("Clip", [first, *bounds], output)
        return output

    def _float8_activation(self, builder: Builder, call: Call, x: str) -> None:
        c = call.constants
        found = float8_of(c.exponent_bits, c.minifloat)
        assert found is not None and c.minifloat is not None
        kind, scale = found[0], builder.floats(f"{c.name}.scale", _vector(c, c.scale))
        zero, where = self._float8_zero(builder, c, kind), _where(c)
        quantized, how = [x, scale, zero], dict(where)
        if builder.kind_of(x) in ("Relu", "Clip"):
            # onnxruntime takes a float8 zero for the smallest code, and leaves such a function out
            spread = builder.floats(f"{c.name}.scale.spread", c.scale)
            steps = builder.node("Div", [x, spread], f"{call.name}.steps")
            one = builder.raw(f"qframework.{kind.lower()}.0", _float8_zeros("", kind, []))
            quantized, how = [steps, builder.number(1), one], {}
        codes = builder.node(
            "QuantizeLinear",
            quantized,
            f"{call.name}.codes",
            saturate=int(c.minifloat.saturates),
            **how,
        )
        builder.node("DequantizeLinear", [codes, scale, zero], builder.result(call), **where)
        builder.finish(call)

    @staticmethod
    def _float8_zero(builder: Builder, c: Constants, kind: str) -> str:
        name = f"{c.name}.zero_point"
        return builder.raw(name, _float8_zeros(name, kind, list(_vector(c, c.scale).shape)))


def _float8_zeros(name: str, kind: str, dims: list[int]) -> TensorProto:
    count = 1
    for n in dims:
        count *= n
    name = name or f"qframework.{kind.lower()}.0"
    data_type = getattr(TensorProto, kind)
    return TensorProto(name=name, data_type=data_type, dims=dims, raw_data=bytes(count))


def _vector(c: Constants, t: Tensor) -> Tensor:
    """A scale or zero point as DequantizeLinear takes it: a number, a vector, or one for each block."""
    if c.group_size is not None:
        return t.expand_as(c.scale).squeeze(c.group_dim + 1)
    return c.along(t)


def _where(c: Constants) -> dict[str, Any]:
    if c.group_size is not None:
        return {"axis": c.group_dim, "block_size": c.group_size}
    axes = c.axes()
    return {"axis": axes[0]} if axes else {}


def _clips(c: Constants, kind: str) -> bool:
    """Whether the integers are fewer than those of their type."""
    bits, signed = int(kind.lstrip("UINT")), not kind.startswith("U")
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return (c.low, c.high) != (low, high)
