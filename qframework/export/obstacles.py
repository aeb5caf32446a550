"""What of a model a target can't hold, found without a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qframework.arguments import check_module
from qframework.core.codebook import CodebookQuant
from qframework.core.float_quant import FloatQuant
from qframework.core.stochastic_round import StochasticRoundSte
from qframework.export.errors import Obstacle
from qframework.export.formats import FLOAT8
from qframework.export.reading import role_of
from qframework.export.slots import Slot, in_evaluation, slots_of

#: Targets, with the names that users may know them by.
TARGETS = ("onnx_qcdq", "qonnx", "torch_qcdq", "integer")
_ALIASES = {
    "qcdq": "onnx_qcdq",
    "onnxruntime": "onnx_qcdq",
    "onnx": "onnx_qcdq",
    "torch": "torch_qcdq",
    "pt2e": "torch_qcdq",
    "export_onnx_qcdq": "onnx_qcdq",
    "export_qonnx": "qonnx",
    "export_torch_qcdq": "torch_qcdq",
    "integer_model": "integer",
}
DEFAULT_OPSET = 20
#: Roundings of activations that a target can write.
_ROUNDINGS = {
    "onnx_qcdq": {"round"},
    "qonnx": {"round", "floor", "ceil", "round_to_zero"},
    "torch_qcdq": {"round", "floor", "ceil", "round_to_zero"},
    "integer": {"round", "floor", "ceil", "round_to_zero", "dpu"},
}
#: The same of truncations, which are written by several nodes.
_TRUNCATIONS = {**_ROUNDINGS, "onnx_qcdq": {"round", "floor", "ceil", "round_to_zero"}}


def target_named(name: str) -> str:
    """The target of a name.

    Raises:
        ValueError: there is none.
    """
    target = _ALIASES.get(name, name)
    if target not in TARGETS:
        allowed = ", ".join(map(repr, TARGETS))
        raise ValueError(f"unknown target {name!r}; allowed are {allowed}")
    return target


def check_export(
    model: nn.Module, target: str = "onnx_qcdq", opset_version: int | None = None
) -> list[Obstacle]:
    """What stands in the way of an export, as data; nothing is run or traced.

    Args:
        model: to export.
        target: ``"onnx_qcdq"``, ``"qonnx"``, ``"torch_qcdq"`` or ``"integer"``.
        opset_version: of an ONNX file; 20 where None.

    Returns:
        One entry for each tensor of a layer that the target can't hold; empty where it holds all. What only a run can
        tell, such as scales that vary along two axes, is found by the export itself, before it traces.

    Raises:
        ValueError: an unknown target.
    """
    check_module(model, "check_export")
    target = target_named(target)
    opset = DEFAULT_OPSET if opset_version is None else opset_version
    slots = slots_of(model)
    if not slots:
        reason, remedy = (
            "nothing in this model is quantized",
            "quantize it first, with layers of qframework.layers or qframework.graph.quantize_model",
        )
        return [Obstacle("", "", type(model).__name__, reason, remedy)]
    found = []
    with in_evaluation(model), torch.no_grad():
        for slot in slots:
            for reason, remedy in _of_slot(slot, target, opset):
                name = slot.proxy.quantizer.__name__
                found.append(Obstacle(slot.layer, slot.tensor, name, reason, remedy))
    return found


def _of_slot(slot: Slot, target: str, opset: int) -> list[tuple[str, str]]:
    proxy: Any = slot.proxy
    quantizer: Any = proxy.tensor_quant
    role = role_of(proxy)
    parameter = role in ("weight", "bias")
    if role == "bias" and getattr(slot.owner, "bias", None) is None:
        return []
    if isinstance(quantizer, CodebookQuant):
        return [
            (
                f"a codebook of {len(quantizer.entries)} entries has no scale times integers",
                "give an integer quantizer of as many bits, such as Int8WeightPerChannelFloat with weight_bit_width=4; "
                "torch.export.export takes codebooks as they are",
            )
        ]
    if getattr(quantizer, "observer_only", False):
        return [("its values pass unquantized while it observes", "leave calibration first")]
    collectors = proxy.collectors() if hasattr(proxy, "collectors") else _collectors(quantizer)
    if not all(c.has_statistics for c in collectors):
        return [
            (
                "it has seen no data, its scale is a placeholder",
                "calibrate it first: with qframework.graph.calibration_mode(model): model(batch)",
            )
        ]
    if not parameter and role != "truncation":
        if getattr(proxy, "is_dynamic", False) or _depends_on_input(quantizer):
            return [
                (
                    "its scale is another for each input, and a file holds constants",
                    "give a quantizer with a scale of its own, such as Int8ActPerTensorFloat, and calibrate it",
                )
            ]
    found = []
    if isinstance(quantizer, FloatQuant) or getattr(quantizer, "float_quant", None) is not None:
        found += _of_minifloats(slot, target)
    else:
        found += _of_bits(proxy, role, target, opset)
    if getattr(proxy, "is_groupwise", False):
        found += _of_groups(quantizer, target, opset)
    if not parameter:
        found += _of_rounding(quantizer, role, target)
    return found


def _collectors(quantizer: nn.Module) -> list[Any]:
    return [m for m in quantizer.modules() if hasattr(m, "has_statistics")]


def _depends_on_input(quantizer: Any) -> bool:
    if hasattr(quantizer, "depends_on_input"):
        return bool(quantizer.depends_on_input)
    return bool(getattr(getattr(quantizer, "scaling_impl", None), "depends_on_input", False))


def _of_bits(proxy: Any, role: str, target: str, opset: int) -> list[tuple[str, str]]:
    try:
        bits = float(proxy.bit_width())
    except (RuntimeError, TypeError, AttributeError):
        return []
    if target != "onnx_qcdq" or role == "bias" or bits <= 8:
        return []
    if bits > 16:
        return [
            (
                f"{bits:g} bits, and QuantizeLinear has 16 at most",
                "give 16 bits and opset_version=21, or export to QONNX",
            )
        ]
    if opset < 21:
        return [(f"{bits:g} bits at opset {opset}", "it needs opset_version=21")]
    return []


def _of_groups(quantizer: Any, target: str, opset: int) -> list[tuple[str, str]]:
    if target == "onnx_qcdq" and opset < 21:
        return [(f"scales of groups at opset {opset}", "it needs opset_version=21 (block_size)")]
    return []


def _of_minifloats(slot: Slot, target: str) -> list[tuple[str, str]]:
    if target != "onnx_qcdq":
        return []
    quantizer: Any = slot.proxy.tensor_quant
    if not isinstance(quantizer, FloatQuant):
        return []
    exponent, mantissa, bias = (float(w) for w in quantizer.widths())
    key = (exponent, mantissa, bias, float(quantizer.threshold()))
    if getattr(slot.proxy, "is_groupwise", False):
        return [
            (
                "minifloats in groups have no form in QuantizeLinear that runtimes read",
                "export to QONNX, or give one scale, such as Fp8e4m3OCPWeightPerChannelFloat",
            )
        ]
    if key not in FLOAT8 or not quantizer.signed:
        kind = f"e{exponent:g}m{mantissa:g} up to {key[3]:g}"
        return [
            (
                f"minifloats {kind} are none of ONNX's",
                "give an OCP or FNUZ format of 8 bits, such as Fp8e4m3OCPActPerTensorFloat, or export to QONNX",
            )
        ]
    return []


def _of_rounding(quantizer: Any, role: str, target: str) -> list[tuple[str, str]]:
    rounds = getattr(getattr(quantizer, "int_quant", quantizer), "float_to_int_impl", None)
    if isinstance(rounds, StochasticRoundSte) and not rounds.deterministic_inference:
        return [
            (
                "it rounds by chance in evaluation, too",
                "give deterministic_inference=True, which rounds to nearest there",
            )
        ]
    mode = getattr(rounds, "mode", "round")
    allowed = (_TRUNCATIONS if role == "truncation" else _ROUNDINGS)[target]
    if mode in allowed:
        return []
    others = [t for t in TARGETS if mode in _ROUNDINGS[t]]
    where = f"; {' and '.join(others)} have it" if others else ""
    return [
        (
            f"it rounds by {mode!r}, and the target rounds to nearest alone",
            f"give float_to_int_impl_type='round'{where}",
        )
    ]
