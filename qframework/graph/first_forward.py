"""What the first forward of a converted model shows that its code didn't tell."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qframework.graph.conversion_report import QuantizationReport
from qframework.graph.function_calls import FunctionCalls, Recorder, innermost_module
from qframework.graph.function_kinds import FUNCTIONS, PRODUCTS, QUANTIZED
from qframework.graph.reading_code import memory_of
from qframework.graph.tracing import call_site
from qframework.layers.wbiol import QuantWeightLayer


class FirstForward:
    """Looks on at the first forward, then takes itself away.

    It finds layers whose float weight is computed with past their quantizer, and functions of modules that couldn't be
    traced, and adds both to the report. Compiled graphs don't hold it.

    Args:
        report: of the conversion.
        unknown: modules whose functions aren't known yet, by name.
    """

    def __init__(self, report: QuantizationReport, unknown: dict[nn.Module, str]) -> None:
        self.report, self.unknown = report, unknown
        self.active: list[TorchFunctionMode] = []

    def attach(self, model: nn.Module) -> None:
        """Wait for the first forward of a model."""
        model.register_forward_pre_hook(self.before)
        model.register_forward_hook(self.after, always_call=True)

    def before(self, model: nn.Module, args: Any) -> None:
        """Begin to look on."""
        if torch.compiler.is_compiling() or self.active:
            return
        weights: dict[int, str] = {}
        for name, layer in model.named_modules():
            # those whose weight is quantized for all who read it needn't be looked at
            if isinstance(layer, QuantWeightLayer) and not hasattr(
                type(layer), "tracked_parameter"
            ):
                parameter = layer._parameters.get("weight")
                if parameter is not None and layer.weight_quant.tensor_quant is not None:
                    weights.setdefault(memory_of(parameter), name)
        weights.pop(0, None)
        found = FunctionCalls()
        names = {m: m for m in self.unknown}
        for mode in (_Weights(weights), Recorder(found, names)):
            mode.__enter__()
            self.active.append(mode)

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """Stop looking on, and report."""
        if not self.active:
            return
        recorder: Any = self.active.pop()
        recorder.__exit__(None, None, None)
        looked: Any = self.active.pop()
        looked.__exit__(None, None, None)
        self._leave(model)
        for module, calls in recorder.found.calls.items():
            for call in calls:
                why = (
                    "functions=True with example_input quantizes it"
                    if call.kind in QUANTIZED
                    else "no quantized form"
                )
                self.report.add_function(self.unknown[module], call.kind, str(call.site), None, why)
        for name, where in looked.passed.items():
            self.report.add_past(name, where)
        if looked.passed:
            text = "; ".join(f"{name} by {where}" for name, where in looked.passed.items())
            warnings.warn(
                "quantize_model: the float weights of these layers are computed with past their quantizers, in "
                f"floats: {text}. Call the layer, or read its weight as self.<name of the layer>.weight in the forward",
                UserWarning,
                stacklevel=2,
            )

    def _leave(self, model: nn.Module) -> None:
        for hooks, own in (
            (model._forward_pre_hooks, self.before),
            (model._forward_hooks, self.after),
        ):
            for key in [k for k, hook in hooks.items() if hook == own]:
                del hooks[key]
                model._forward_hooks_always_called.pop(key, None)


class _Weights(TorchFunctionMode):
    """Notes products with the float weight of a quantized layer, outside of quantized layers."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.passed: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the operands of products."""
        kwargs = kwargs or {}
        if FUNCTIONS.get(func) in PRODUCTS:
            for given in [*args, *kwargs.values()]:
                name = self.weights.get(memory_of(given)) if isinstance(given, Tensor) else None
                if name is not None:
                    reader = innermost_module()
                    if not isinstance(reader, QuantWeightLayer):
                        self.passed.setdefault(name, f"{type(reader).__name__}, {call_site()}")
        return func(*args, **kwargs)
