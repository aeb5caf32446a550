"""Keywords for all operands of attention's two matrix products, and what names without a place are told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Prefixes of the operands, by default all quantized.
OPERANDS = ("q_scaled_", "k_transposed_", "v_", "attn_output_weights_")
_WEIGHTS = "attn_output_weights_"
#: What says how long training goes on before a scale is learned or quantization begins, which parts of a layer have in common.
SCHEDULE = ("collect_stats_steps", "quant_delay_steps")
_OF_PRODUCTS = {"input_": OPERANDS, "act_": OPERANDS}
#: For each class of attention, for a prefix that it doesn't take those that may be meant.
OF_FUNCTION: Mapping[str, tuple[str, ...]] = {**_OF_PRODUCTS, "output_": ("sdpa_output_",)}
OF_LAYER: Mapping[str, tuple[str, ...]] = {
    "input_": ("in_proj_input_", "out_proj_input_", *OPERANDS),
    "act_": OPERANDS,
    "output_": ("out_proj_output_",),
    "weight_": ("in_proj_weight_", "out_proj_weight_"),
    "bias_": ("in_proj_bias_", "out_proj_bias_"),
}
OF_ENCODER: Mapping[str, tuple[str, ...]] = {
    "output_": tuple(
        f"{part}_output_"
        for part in (
            "self_attn_out_proj",
            "linear1",
            "linear2",
            "residual1",
            "residual2",
            "norm1",
            "norm2",
        )
    ),
    **{p: (f"self_attn_{p}",) for p in (*OPERANDS, "softmax_input_", "in_proj_", "out_proj_")},
}


def operand_keywords(
    operands: Mapping[str, Any], inputs: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """Keywords for the operands of both products, as attention takes them.

    Args:
        operands: for all of them, without a prefix; ``quant`` is the quantizer. It quantizes the weights, which are 0 to 1, without
            a sign where it has one.
        inputs: for the inputs of linear layers, without a prefix; of these the :data:`SCHEDULE` counts.
        own: attention's own keywords. An operand that is given a quantizer there takes none.
    """
    found: dict[str, Any] = {}
    quantizer = operands.get("quant", _DEFAULT)
    given = dict(operands)
    for name in SCHEDULE if quantizer is not None else ():
        if name in inputs and (quantizer is _DEFAULT or name in quantizer):
            given.setdefault(name, inputs[name])
    for prefix in OPERANDS:
        if f"{prefix}quant" in own:
            continue
        found |= {prefix + name: value for name, value in given.items()}
        if prefix == _WEIGHTS and "signed" not in given and may_be_unsigned(quantizer):
            found[f"{prefix}signed"] = False
    return found


_DEFAULT = object()


def may_be_unsigned(quantizer: Any) -> bool:
    """Whether a quantizer has a sign that it can do without."""
    return isinstance(quantizer, type) and "signed" in quantizer and bool(quantizer.signed)  # type: ignore[operator, attr-defined]
