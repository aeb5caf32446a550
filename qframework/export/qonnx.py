"""Quantizers as the nodes of QONNX."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qframework.export.constants import Constants
from qframework.export.onnx_graph import Builder, sign_steps
from qframework.export.session import Call

#: Our names of roundings, as QONNX has them.
ROUNDINGS = {"round": "ROUND", "floor": "FLOOR", "ceil": "CEIL", "round_to_zero": "DOWN"}


class QONNX:
    """Emits the nodes of quantizers: Quant, BipolarQuant, Trunc and FloatQuant."""

    domain = "qonnx.custom_op.general"

    def parameter(self, builder: Builder, call: Call) -> None:
        """The dequantized values of a weight or bias, and their Quant."""
        c = call.constants
        assert c.codes is not None
        scale = c.spread(c.scale)
        value = c.codes.to(scale.dtype) * scale
        if c.format != "minifloat":
            value = c.dequantized(c.codes.to(scale.dtype))
        x = builder.floats(f"{c.name}.value", value.float())
        self._quantize(builder, call, x)

    def activation(self, builder: Builder, call: Call, x: str) -> None:
        """The Quant or Trunc of an activation."""
        c = call.constants
        x = builder.in_float32(call, x)
        if c.truncates is not None:
            self._truncate(builder, call, x)
            return
        if c.format == "ternary":  # Quant has no dead zone
            steps = sign_steps(builder, call, x)
            scale = builder.floats(f"{c.name}.scale", _broadcasting(c, c.scale))
            x = builder.node("Mul", [steps, scale], f"{call.name}.ternary")
        elif c.format == "minifloat" and not c.signed:  # FloatQuant has a sign always
            x = builder.node("Relu", [x], f"{call.name}.positive")
        self._quantize(builder, call, x)

    def _quantize(self, builder: Builder, call: Call, x: str) -> None:
        c = call.constants
        scale = builder.floats(f"{c.name}.scale", _broadcasting(c, c.scale))
        if c.format == "minifloat":
            self._minifloats(builder, call, x, scale)
            return
        if c.format == "binary":
            self._node(builder, call, "BipolarQuant", [x, scale])
            return
        shift = builder.floats(f"{c.name}.zero_point", _broadcasting(c, c.zero_point))
        bits = builder.floats(f"{c.name}.bits", float(c.bits))
        rounding = "ROUND" if c.is_parameter else ROUNDINGS[c.rounding]
        how = {"signed": int(c.signed), "narrow": int(c.narrow), "rounding_mode": rounding}
        self._node(builder, call, "Quant", [x, scale, shift, bits], **how)

    def _minifloats(self, builder: Builder, call: Call, x: str, scale: str) -> None:
        c = call.constants
        assert c.minifloat is not None
        numbers = {
            "exponent_bits": c.exponent_bits,
            "mantissa_bits": c.minifloat.mantissa_bits,
            "exponent_bias": c.minifloat.exponent_bias,
            "largest": c.minifloat.largest,
        }
        inputs = [builder.floats(f"{c.name}.{n}", float(v)) for n, v in numbers.items()]
        self._node(
            builder,
            call,
            "FloatQuant",
            [x, scale, *inputs],
            has_inf=int(c.inf_codes),
            has_nan=int(c.nan_codes),
            has_subnormal=1,
            saturation=int(c.minifloat.saturates),
            rounding_mode="ROUND" if c.is_parameter else ROUNDINGS[c.rounding],
        )

    def _truncate(self, builder: Builder, call: Call, x: str) -> None:
        c = call.constants
        assert c.truncates is not None
        _, scale, zero_point, bits = c.truncates
        inputs = [
            x,
            builder.floats(f"{c.name}.input_scale", scale),
            builder.floats(f"{c.name}.input_zero_point", zero_point),
            builder.floats(f"{c.name}.input_bits", float(bits)),
            builder.floats(f"{c.name}.scale", c.scale),
            builder.floats(f"{c.name}.bits", float(c.bits)),
        ]
        how = {"signed": int(c.signed), "narrow": int(c.narrow)}
        self._node(builder, call, "Trunc", inputs, rounding_mode=ROUNDINGS[c.rounding], **how)

    def _node(
        self, builder: Builder, call: Call, op: str, inputs: list[str], **attributes: Any
    ) -> None:
        builder.node(op, inputs, builder.result(call), self.domain, **attributes)
        builder.finish(call)


def _broadcasting(c: Constants, t: Tensor) -> Tensor:
    """A scale or zero point that broadcasts to the value: with as many axes, or none."""
    t = c.spread(t).to(torch.float32)
    if t.numel() == 1:
        return t.reshape(())
    return t.reshape((1,) * (len(c.shape) - t.dim()) + tuple(t.shape))
