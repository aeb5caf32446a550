"""The proxy of an activation."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.quant import RescalingIntQuant
from qframework.proxy.base import QuantProxy, plain
from qframework.proxy.memory import is_watched
from qframework.proxy.naming import qualified_name
from qframework.quant_tensor import IntQuantTensor, QuantTensor


class ActQuantProxyFromInjector(QuantProxy):
    """Quantizes activations; state-dict entries below ``act_quant.tensor_quant``.

    An activation function in front of the quantizer belongs to the proxy (``act_impl``); it is left out while the
    quantizer itself does its work (``drop_act_when_quantized``, the clipping of a hard tanh).
    """

    activation_impl: nn.Module | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._eval_checked = False
        super().__init__(*args, **kwargs)

    def _read_settings(self, resolver: Any, built: nn.Module | None) -> None:
        super()._read_settings(resolver, built)
        act_impl = resolver.read("act_impl", None)
        self.activation_impl = act_impl
        self.is_passthrough_act = bool(resolver.read("passthrough_act", False))
        self.drops_activation = bool(resolver.read("drop_act_when_quantized", False))
        # Meant for whole networks, it may be given to a quantizer that has nothing to collect.
        self.collect_stats_steps = resolver.read("collect_stats_steps", None)
        self._eval_checked = False
        whole = isinstance(built, RescalingIntQuant)
        self._keeps_scales = whole
        self._rectifies = whole and type(act_impl) is nn.ReLU

    @property
    def fused_activation_quant_proxy(self) -> ActQuantProxyFromInjector:
        """The proxy itself, which holds ``activation_impl`` and ``tensor_quant``."""
        return self

    @property
    def observer_only(self) -> bool:
        """Whether values pass unquantized while statistics are collected."""
        return bool(getattr(self.tensor_quant, "observer_only", False))

    @observer_only.setter
    def observer_only(self, value: bool) -> None:
        if self.tensor_quant is not None:
            self.tensor_quant.observer_only = value  # type: ignore[assignment]

    def forward(self, x: Any) -> Any:
        """The quantized activation.

        Args:
            x: float or quantized tensor of any shape; a quantized one is quantized again.

        Returns:
            :class:`~qframework.quant_tensor.IntQuantTensor`. With quantization off, the activation function of
            ``x``, which keeps a quantized ``x`` quantized where the function does.
        """
        if self._modules.get("tensor_quant") is None or self.disable_quant:
            return x if self.activation_impl is None else self.activation_impl(x)
        if isinstance(x, QuantTensor):
            x = x.value
        return self._wrap(self._output(x), x)

    def _values(self, x: Any) -> Any:
        if self._modules.get("tensor_quant") is None or self.disable_quant:
            return plain(x if self.activation_impl is None else self.activation_impl(x))
        return self._output(x.value if isinstance(x, QuantTensor) else x)[0]

    def _output(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the quantizer gives for ``x``: values, scale, zero point and bit width."""
        parts = self._modules  # looked at directly, since a module's attributes take long
        quantizer: Any = parts["tensor_quant"]
        eager = not torch.compiler.is_compiling()
        activation, rectify = parts.get("activation_impl"), False
        if activation is not None and (not self.drops_activation or self.observer_only):
            rectify = self._rectifies and not is_watched(activation)
            rectify = rectify and (eager or not torch.compiler.is_exporting())
            x = x if rectify else activation(x)
        training = self.training
        if not (self._eval_checked or training) and eager:
            self._check_statistics()
        if self._keeps_scales and eager and not (training or torch.is_grad_enabled()):
            kept = self._kept_scales(quantizer, x)
            if kept is not None:
                scale, zero_point, bit_width, step = kept
                return step(x, rectify), scale, zero_point, bit_width
        return quantizer(x, True) if rectify else quantizer(x)  # type: ignore[no-any-return]

    def _wrap(self, output: Any, x: Tensor) -> Any:
        """The quantized tensor for what the quantizer gave for ``x``."""
        value, scale, zero_point, bit_width = output
        return IntQuantTensor.unchecked(
            value,
            scale,
            zero_point,
            bit_width,
            bool(self.is_signed),
            self.training,
            self.source,
            self.is_symmetric,
            self.has_zero,
        )

    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, zero point and bit width for ``x`` alone; in evaluation they are kept while nothing changes."""
        quantizer: Any = self.tensor_quant
        eager = not torch.compiler.is_compiling()
        if self._keeps_scales and eager and not (self.training or torch.is_grad_enabled()):
            kept = self._kept_scales(quantizer, x)
            if kept is not None:
                return kept[:3]  # type: ignore[no-any-return]
        return quantizer.parameters_for(x)  # type: ignore[no-any-return]

    def _kept_scales(self, quantizer: Any, x: Tensor) -> Any:
        """Scale, zero point, bit width and the step that they make, kept while what they are made of is unchanged.

        None where they depend on the input, or hooks on the quantizer have to see each call.
        """
        known = self._memory.recall(0, quantizer, False)
        if known is None and not (is_watched(quantizer) or quantizer.looks_at_input):
            found = quantizer.parameters_for(x)
            known = *found, quantizer.step(*found)
            self._memory.keep(0, quantizer, False, (), known, found)
        return known

    def collectors(self) -> list[Any]:
        """The modules that collect statistics."""
        return (
            []
            if self.tensor_quant is None
            else [m for m in self.tensor_quant.modules() if hasattr(m, "has_statistics")]
        )

    def _check_statistics(self) -> None:
        if all(c.has_statistics for c in self.collectors()):
            self._eval_checked = True
            return
        if getattr(self, "_warned", False):
            return
        self._warned = True
        layer = self.tracked_module_list[0]
        warnings.warn(
            f"{qualified_name(layer)}.{self.attribute} is in evaluation mode and has seen no data: its scale is "
            "a placeholder. Run some batches in training mode or under qframework.graph.calibration_mode, or load "
            "a state dict",
            UserWarning,
            stacklevel=3,
        )

    def _current(self) -> Any:
        if self.tensor_quant is None or self.disable_quant:
            return None, None, None
        training, quantizer = self.training, self.tensor_quant
        quantizer.eval()
        try:
            probe = torch.zeros(1, device=next((t.device for t in _tensors(quantizer)), None))
            if hasattr(quantizer, "parameters_for"):
                return quantizer.parameters_for(probe)  # type: ignore[operator]
            return quantizer(probe)[1:]
        finally:
            quantizer.train(training)

    def scale(self) -> Tensor | None:
        """The present scale, None when quantization is off. No statistic is changed by asking."""
        return self._current()[0]  # type: ignore[no-any-return]

    def zero_point(self) -> Tensor | None:
        """The present zero point, in integer steps; None when quantization is off."""
        return self._current()[1]  # type: ignore[no-any-return]

    def bit_width(self) -> Tensor | None:
        """The present bit width, 0-dim; None when quantization is off."""
        return self._current()[2]  # type: ignore[no-any-return]


def _tensors(module: nn.Module) -> Any:
    yield from module.parameters()
    yield from module.buffers()
