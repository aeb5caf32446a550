"""Tables of what becomes of which layer, and how a layer is made by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from qframework.graph.bias_scales import asked_for, biases_without_scale, left_out, told
from qframework.graph.conversion import CONVERSIONS, arguments_of
from qframework.graph.taken_over import take_over
from qframework.layers import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantHardTanh,
    QuantIdentity,
    QuantLinear,
    QuantLSTM,
    QuantMultiheadAttention,
    QuantReLU,
    QuantRNN,
    QuantSigmoid,
)
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8ActPerTensorFloatMinMaxInit,
    Int8WeightPerTensorFloat,
    Int32Bias,
    Uint8ActPerTensorFloat,
    Uint8ActPerTensorFloatMaxInit,
)

#: From a torch layer to the quantized one and its keywords (functions of the layer are called with it); None to leave it.
LayerMap = Mapping[type[nn.Module], tuple[type[nn.Module], Mapping[str, Any]] | None]

_PAIRS: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.Linear, QuantLinear),
    (nn.Conv1d, QuantConv1d),
    (nn.Conv2d, QuantConv2d),
    (nn.Conv3d, QuantConv3d),
    (nn.ConvTranspose1d, QuantConvTranspose1d),
    (nn.ConvTranspose2d, QuantConvTranspose2d),
    (nn.ConvTranspose3d, QuantConvTranspose3d),
)
_WEIGHT = {"weight_quant": Int8WeightPerTensorFloat, "bias_quant": Int32Bias}
_ATTENTION = {
    "in_proj_input_quant": Int8ActPerTensorFloat,
    "in_proj_weight_quant": Int8WeightPerTensorFloat,
    "in_proj_bias_quant": Int32Bias,
    "attn_output_weights_quant": Uint8ActPerTensorFloat,
    "q_scaled_quant": Int8ActPerTensorFloat,
    "k_transposed_quant": Int8ActPerTensorFloat,
    "v_quant": Int8ActPerTensorFloat,
    "out_proj_input_quant": Int8ActPerTensorFloat,
    "out_proj_weight_quant": Int8WeightPerTensorFloat,
    "out_proj_bias_quant": Int32Bias,
}
_RECURRENT = {
    **_WEIGHT,
    "io_quant": Int8ActPerTensorFloat,
    "gate_acc_quant": Int8ActPerTensorFloat,
}
_LSTM = {
    **_RECURRENT,
    "sigmoid_quant": Uint8ActPerTensorFloat,
    "tanh_quant": Int8ActPerTensorFloat,
    "cell_state_quant": Int8ActPerTensorFloat,
}

_IN_BOTH: LayerMap = {
    nn.AvgPool2d: None,
    nn.MultiheadAttention: (QuantMultiheadAttention, _ATTENTION),
    nn.RNN: (QuantRNN, _RECURRENT),
    nn.LSTM: (QuantLSTM, _LSTM),
}

#: For :func:`layerwise_quantize`.
LAYERWISE_COMPUTE_LAYER_MAP: LayerMap = {
    **_IN_BOTH,
    **{f: (q, {**_WEIGHT, "input_quant": Int8ActPerTensorFloat}) for f, q in _PAIRS},
}
#: For :func:`quantize`.
COMPUTE_LAYER_MAP: LayerMap = {
    **_IN_BOTH,
    **{f: (q, {**_WEIGHT, "return_quant_tensor": True}) for f, q in _PAIRS},
}
QUANT_ACT_MAP: LayerMap = {
    nn.ReLU: (QuantReLU, {"act_quant": Uint8ActPerTensorFloat, "return_quant_tensor": True}),
    nn.ReLU6: (
        QuantReLU,
        {"act_quant": Uint8ActPerTensorFloatMaxInit, "max_val": 6.0, "return_quant_tensor": True},
    ),
    nn.Hardtanh: (
        QuantHardTanh,
        {
            "act_quant": Int8ActPerTensorFloatMinMaxInit,
            "max_val": lambda module: module.max_val,
            "min_val": lambda module: module.min_val,
            "return_quant_tensor": True,
        },
    ),
    nn.Sigmoid: (QuantSigmoid, {"act_quant": Uint8ActPerTensorFloat, "return_quant_tensor": True}),
}
QUANT_IDENTITY_MAP: Mapping[str, tuple[type[nn.Module], Mapping[str, Any]]] = {
    "signed": (QuantIdentity, {"act_quant": Int8ActPerTensorFloat, "return_quant_tensor": True}),
    "unsigned": (QuantIdentity, {"act_quant": Uint8ActPerTensorFloat, "return_quant_tensor": True}),
}
UNSIGNED_ACT_TUPLE: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid)


def quantized_by_map(
    module: nn.Module,
    target: type[nn.Module],
    keywords: Mapping[str, Any],
    name: str = "",
    left: list[str] | None = None,
    **more: Any,
) -> nn.Module:
    """A quantized layer in place of a float one, which shares its parameters.

    Args:
        module: the float one.
        target: its class.
        keywords: for its constructor; functions are called with the float layer.
        name: of the layer.
        left: where it is noted that the layer leaves its biases in floats.
        **more: further keywords.
    """
    conversion = CONVERSIONS.get(type(module))
    special = {} if conversion is None else conversion.special
    arguments = arguments_of(module, target, special) if conversion is not None else {}
    given = {
        k: v(module) if isinstance(v, Callable) and not isinstance(v, type) else v  # type: ignore[arg-type]
        for k, v in keywords.items()
    }
    made = target(**{**arguments, **given, **more})
    missing = biases_without_scale(made, fed=True)
    missing = {n: why for n, why in missing.items() if asked_for(n, given) is None}
    if missing:
        made = target(**left_out({**arguments, **given, **more}, missing))
        if left is not None:
            left.append(f"{name or 'the model'} ({told(missing)})")
    if conversion is None or module._parameters or module._modules:
        take_over(module, made, conversion is not None and conversion.copies)
    return made.train(module.training)


def warn_of_biases(who: str, left: list[str]) -> None:
    """Tell which layers have a quantizer for their biases that can't work with those that they were given."""
    if left:
        warnings.warn(
            f"{who} left biases in floats: {', '.join(left)}. Name a bias quantizer, or None, in the layer map",
            UserWarning,
            stacklevel=4,
        )
