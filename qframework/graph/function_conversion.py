"""The part of a conversion that is about functions: which get a quantized layer, which stay float and why."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx, nn

from qframework.graph.conversion_work import Work
from qframework.graph.function_calls import FunctionCall, FunctionCalls
from qframework.graph.function_kinds import INPUT_ALONE, QUANTIZED
from qframework.graph.function_layers import QuantConcatenation, QuantSum, with_functions
from qframework.graph.tracing import Site
from qframework.layers.attention_keywords import OPERANDS, may_be_unsigned
from qframework.quantizers import Int8ActPerTensorFloat

#: For each quantized layer the tensors that ``act_quant`` and its keywords are for.
_OPERANDS: dict[str, tuple[str, ...]] = {
    "QuantMatMul": ("input_", "other_"),
    "QuantScaledDotProductAttention": OPERANDS,
}
_OWN: dict[str, Any] = {"QuantSum": QuantSum, "QuantConcatenation": QuantConcatenation}
_WEIGHTS = "attn_output_weights_"


class Functions:
    """What becomes of the functions that a model's modules call.

    Args:
        work: the conversion of the modules.
        calls: of all modules.
        wanted: whether functions are quantized at all.
    """

    def __init__(self, work: Work, calls: FunctionCalls, wanted: bool) -> None:
        self.work, self.calls, self.wanted = work, calls, wanted
        self.planned: dict[nn.Module, tuple[dict[str, nn.Module], dict[tuple[str, Site], str]]] = {}

    def plan(self) -> None:
        """Build the layers and report; nothing of a model changes yet."""
        report = self.work.report
        for module, calls in self.calls.calls.items():
            if self.work.done.get(module) is None or module not in self.work.names:
                continue
            if type(self.work.done[module]) is not type(module):
                continue  # another class stands for it
            name = self.work.names[module][0]
            layers: dict[str, nn.Module] = {}
            places: dict[tuple[str, Site], str] = {}
            for call in calls:
                reason = self._reason(module, call)
                made = None
                if not reason:
                    made = self._built(name, module, call)
                    key = f"{call.kind}_{len(layers)}"
                    if call.kind in INPUT_ALONE:
                        reason = "its input; a weight is quantized where it is a layer's"
                    layers[key], places[call.kind, call.site] = made, key
                kind = None if made is None else type(made)
                report.add_function(name, call.kind, str(call.site), kind, reason)
            if layers:
                self.planned[module] = layers, places
        for module, why in self.calls.unknown.items():
            if module in self.work.names and self.wanted:
                name = self.work.names[module][0]
                where = f"{type(module).__name__}.forward"
                reason = f"can't be traced ({why}); give example_input to quantize its functions"
                report.add_function(name, "unknown", where, None, reason)

    def apply(self) -> None:
        """The last step: the modules call the layers."""
        for module, (layers, places) in self.planned.items():
            with_functions(self.work.done[module], layers, places)

    def unknown_names(self) -> dict[nn.Module, str]:
        """Converted modules whose functions aren't known yet, with their names."""
        return {
            self.work.done[m]: self.work.names[m][0]
            for m in self.calls.unknown
            if m in self.work.done
        }

    def _reason(self, module: nn.Module, call: FunctionCall) -> str:
        """Why a call stays float."""
        if call.kind not in QUANTIZED:
            return "no quantized form"
        if isinstance(module, fx.GraphModule):
            return "its code is made of a graph; quantize the module that was traced"
        if not self.wanted:
            return "functions=True quantizes it"
        if self.work.rules.is_kept(module):
            return "as a rule says"
        if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return "its module iterates over its children, and can't hold a layer for it"
        if call.kind == "add" and not call.residual:
            return "no sum of two tensors of one shape"
        said = self.work.rules.act_keywords(module)
        if "act_quant" in said and said["act_quant"] is None:
            return "act_quant=None"
        return ""

    def _built(self, name: str, module: nn.Module, call: FunctionCall) -> nn.Module:
        name_of = QUANTIZED[call.kind]
        layer: Any = _OWN.get(name_of) or getattr(sys.modules["qframework.layers"], name_of)
        given = self._keywords(module, layer.__name__, call)
        try:
            with torch.random.fork_rng(devices=[]):
                made: nn.Module = layer(**call.settings, **given)
        except Exception as error:
            error.args = (
                f"{name or 'the model'}, {call.kind} in {call.site}: {error}",
                *error.args[1:],
            )
            raise
        device = next((p.device for p in module.parameters()), self.work.device)
        return (
            made.to(device).train(module.training)
            if device is not None
            else made.train(module.training)
        )

    def _keywords(self, module: nn.Module, layer: str, call: FunctionCall) -> dict[str, Any]:
        """Those for results of activations, for the operands of a function."""
        said = self.work.rules.act_keywords(module)
        quantizer = said.get("act_quant", Int8ActPerTensorFloat)
        if layer not in _OPERANDS:
            unsigned = layer in _OWN and bool(call.unsigned) and all(call.unsigned)
            if unsigned and may_be_unsigned(quantizer):
                said["act_signed"] = False
            return said
        given: dict[str, Any] = {}
        signs = dict(zip(_OPERANDS[layer], call.unsigned, strict=False))
        for prefix in _OPERANDS[layer]:
            for key, value in said.items():
                if key != "act_quant":
                    given[prefix + key.removeprefix("act_")] = value
            if prefix == _WEIGHTS and "act_quant" not in said:
                continue  # has an unsigned default of its own
            given[f"{prefix}quant"] = quantizer
            if (signs.get(prefix, False) or prefix == _WEIGHTS) and may_be_unsigned(quantizer):
                given[f"{prefix}signed"] = False
        return given
