"""The layers of this library for the networks of :mod:`benchmarks.rows`."""

from __future__ import annotations

from typing import Any

from torch import nn

import qframework
from qframework import quantizers as q
from qframework.layers import (
    QuantConv2d,
    QuantEltwiseAdd,
    QuantLinear,
    QuantReLU,
    QuantTransformerEncoderLayer,
)

#: Quantizers of weights and inputs, and further keywords.
LINEAR: dict[str, dict[str, Any]] = {
    "int8": {
        "weight_quant": q.Int8WeightPerChannelFloat,
        "input_quant": q.Int8ActPerTensorFloat,
    },
    "per_tensor": {
        "weight_quant": q.Int8WeightPerTensorFloat,
        "input_quant": q.Int8ActPerTensorFloat,
    },
    "per_group": {
        "weight_quant": q.Int8WeightPerGroupFloat,
        "input_quant": q.Int8DynamicActPerGroupFloat,
    },
    "weights4": {"weight_quant": q.Int8WeightPerChannelFloat, "weight_bit_width": 4},
    "fp8": {
        "weight_quant": q.Fp8e4m3OCPWeightPerTensorFloat,
        "input_quant": q.Fp8e4m3OCPActPerTensorFloat,
    },
    "mxfp8": {"weight_quant": q.MXFloat8e4m3Weight, "input_quant": q.MXFloat8e4m3Act},
    "nvfp4": {"weight_quant": q.NVFloat4Weight, "input_quant": q.NVFloat4Act},
    "fp4": {
        "weight_quant": q.Fp4e2m1OCPWeightPerChannelFloat,
        "input_quant": q.Fp8e4m3OCPActPerTensorFloat,
    },
    "shifted": {
        "weight_quant": q.ShiftedUint8WeightPerTensorFloat,
        "input_quant": q.ShiftedUint8ActPerTensorFloat,
    },
    "dynamic": {
        "weight_quant": q.Int8WeightPerChannelFloat,
        "input_quant": q.Int8DynamicActPerTensorFloat,
    },
    "dynamic_row": {
        "weight_quant": q.Int8WeightPerChannelFloat,
        "input_quant": q.Int8DynamicActPerRowFloat,
    },
    "power_of_two": {
        "weight_quant": q.Int8WeightPerTensorFixedPoint,
        "input_quant": q.Int8ActPerTensorFixedPoint,
    },
    "nf4": {"weight_quant": q.NF4WeightPerGroupFloat},
    "ternary": {"weight_quant": q.SignedTernaryWeightPerTensorConst, "weight_scaling_init": 0.05},
    "binary": {"weight_quant": q.SignedBinaryWeightPerTensorConst, "weight_scaling_init": 0.05},
}
LINEAR["bfloat16"] = LINEAR["int8"]
_STEPS = {"collect_stats_steps": 2}
CONV: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "depthwise": (
        {"weight_quant": q.Int8WeightPerChannelFloat, "weight_bit_width": 4},
        {"bit_width": 4, **_STEPS},
    ),
    "small": (
        {"weight_quant": q.Int8WeightPerTensorFloat, "return_quant_tensor": True},
        {"return_quant_tensor": True, **_STEPS},
    ),
    "fp8": (
        {"weight_quant": q.Fp8e4m3OCPWeightPerTensorFloat},
        {"act_quant": q.Fp8e4m3OCPActPerTensorFloat, **_STEPS},
    ),
    "mxfp8": (
        {"weight_quant": q.MXFloat8e4m3Weight},
        {"act_quant": q.MXFloat8e4m3Act, "group_dim": 1},  # channels of images
    ),
    "shifted": (
        {"weight_quant": q.ShiftedUint8WeightPerTensorFloat},
        {"act_quant": q.ShiftedUint8ActPerTensorFloat, **_STEPS},
    ),
    "dynamic": (
        {"weight_quant": q.Int8WeightPerChannelFloat},
        {"act_quant": q.Int8DynamicActPerTensorFloat},
    ),
}


class QuantKit:
    """Layers of this library."""

    def __init__(self) -> None:
        self._stem = True

    def conv(self, i: int, o: int, size: int, kind: str, **how: Any) -> nn.Module:
        """A convolution without bias."""
        keywords = dict(CONV[kind][0])
        if kind == "small" and self._stem:  # images are floats
            self._stem = False
            keywords |= {"input_quant": q.Int8ActPerTensorFloat, "input_collect_stats_steps": 2}
        return QuantConv2d(i, o, size, bias=False, **keywords, **how)

    def relu(self, kind: str) -> nn.Module:
        """A quantized ReLU."""
        return QuantReLU(**CONV[kind][1])

    def linear(self, i: int, o: int, kind: str) -> nn.Module:
        """A linear layer."""
        if kind == "small":
            return QuantLinear(i, o, return_quant_tensor=True)
        keywords = dict(LINEAR[kind])
        act = keywords.get("input_quant")
        if act is not None and "Dynamic" not in act.__name__ and kind not in ("mxfp8", "nvfp4"):
            keywords["input_collect_stats_steps"] = 2
        return QuantLinear(i, o, **keywords)

    def encoder(self) -> nn.Module:
        """A transformer encoder layer."""
        inner = ("q_scaled", "k_transposed", "v", "attn_output_weights")
        steps: dict[str, Any] = {f"self_attn_{name}_collect_stats_steps": 2 for name in inner}
        return QuantTransformerEncoderLayer(
            256, 4, 1024, dropout=0.0, batch_first=True, input_collect_stats_steps=2, **steps
        )

    def add(self, kind: str) -> nn.Module:
        """A sum of quantized operands."""
        return QuantEltwiseAdd(
            input_quant=q.Int8ActPerTensorFloat,
            input_collect_stats_steps=2,
            output_quant=None,
            return_quant_tensor=True,
        )


def freeze(model: nn.Module) -> None:
    """Freeze a model that is in evaluation."""
    qframework.freeze(model)
