"""The proxy of an activation."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.notice import LeftOut
from qframework.functional import floating
from qframework.kernels import Static, static
from qframework.proxy.base import QuantProxy, has_hooks
from qframework.proxy.codes import know_codes
from qframework.proxy.naming import LeftOutNotice, qualified_name
from qframework.proxy.resolution import Resolution
from qframework.quant_tensor import IntQuantTensor, QuantTensor

_is_compiling = torch.compiler.is_compiling
_tracing = torch._C._get_tracing_state


class ActQuantProxyFromInjector(QuantProxy):
    """Quantizes activations; state-dict entries below ``act_quant.tensor_quant``.

    An activation function in front of the quantizer belongs to the proxy (``act_impl``); it is left out while the
    quantizer itself does its work (``drop_act_when_quantized``, the clipping of a hard tanh).
    """

    activation_impl: nn.Module | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._eval_checked = False
        super().__init__(*args, **kwargs)

    def _read_settings(self, resolution: Resolution, built: nn.Module | None) -> None:
        super()._read_settings(resolution, built)
        notice = LeftOutNotice(self.tracked_module_list, self.attribute)
        for module in () if built is None else built.modules():
            if isinstance(module, LeftOut):
                module.notice = notice
        self.activation_impl = resolution.read("act_impl", None)
        self.is_passthrough_act = bool(resolution.read("passthrough_act", False))
        self.drops_activation = bool(resolution.read("drop_act_when_quantized", False))
        # Meant for whole networks, it may be given to a quantizer that has nothing to collect.
        self.collect_stats_steps = resolution.read("collect_stats_steps", None)
        self._eval_checked = False

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

        Raises:
            TypeError: no tensor, or one of complex numbers.
        """
        if self._modules.get("tensor_quant") is None or self.disable_quant:
            return x if self.activation_impl is None else self.activation_impl(x)
        if isinstance(x, QuantTensor):
            x = x.value
        elif not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            x = self._as_floats(x)
        if not (self._eval_checked or self.training or _is_compiling() or _tracing() is not None):
            self._check_statistics()
        if self._memory.frozen:
            kept: Static | None = self._memory.recall(self._modules.get("tensor_quant"))
            if kept is not None:
                return self._wrap(kept(x), x)
        return self._wrap(self._planned().run(x), x)

    def _as_floats(self, x: Any) -> Tensor:
        """Integers as floats."""
        if isinstance(x, Tensor) and not x.is_complex():
            return floating(x)
        got = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TypeError(
            f"{qualified_name(self.tracked_module_list[0])}: what {self.attribute} quantizes must be a tensor of real numbers; "
            f"got {got}"
        )

    def _activation(self) -> nn.Module | None:
        parts = self._modules  # looked at directly, since a module's attributes take long
        if self.drops_activation and not self.observer_only:
            return None
        return parts.get("activation_impl")

    def freeze(self) -> None:
        """Compute the scale once, where it doesn't depend on the input."""
        found = self.static(self._probe())
        if found is not None:
            name = "activation_impl"  # an absent one is no module
            place: Any = self._modules if name in self._modules else vars(self)
            self._memory.keep(self.tensor_quant, (), found, [(place, name)])  # type: ignore[arg-type]

    def static(self, like: Tensor) -> Static | None:
        """The quantizer with its present scale, for several calls; None where each call has to go through the proxy.

        Args:
            like: a tensor on the device of the activations.
        """
        if not self.is_quant_enabled or has_hooks(self):
            return None
        kept: Static | None = self._memory.recall(self.tensor_quant)
        return static(self._planned(), like) if kept is None else kept

    def _wrap(self, output: tuple[Any, ...], x: Tensor) -> Any:
        """The quantized tensor for what the quantizer gave for ``x``."""
        if self._is_own:
            output = self._integers(output, x)
        if output[1].dim() and output[0].shape != x.shape:
            self._check_shape(output[0], output[1], x)
        how = (bool(self.is_signed), self.training, self.source, self.is_symmetric, self.has_zero)
        made = IntQuantTensor.of_output(output, *how)
        if output[0].dtype is torch.float32:  # as nearly always
            return made
        return know_codes(made, self.tensor_quant, x, output, activation=self._activation())

    def _check_shape(self, value: Tensor, scale: Tensor, x: Tensor) -> None:
        """Refuse an input that scales of several channels were spread over."""
        activation = self._modules.get("activation_impl")
        expected = x if activation is None else activation(x)
        if value.shape != expected.shape:
            raise ValueError(
                f"{qualified_name(self.tracked_module_list[0])}.{self.attribute}: an input of shape {tuple(x.shape)} doesn't have the "
                f"channels of the scales, whose shape is {tuple(scale.shape)}"
            )

    def collectors(self) -> list[Any]:
        """The modules that collect statistics."""
        return (
            []
            if self.tensor_quant is None
            else [m for m in self.tensor_quant.modules() if hasattr(m, "has_statistics")]
        )

    def _tell_left_out(self) -> None:
        if self.tensor_quant is None:
            return
        for module in self.tensor_quant.modules():
            if isinstance(module, LeftOut):
                module.tell_left_out()

    def train(self, mode: bool = True) -> ActQuantProxyFromInjector:
        """Set the mode; at its end, what compiled steps left out of the statistics is told."""
        super().train(mode)
        if not mode:
            self._tell_left_out()
        return self

    def _check_statistics(self) -> None:
        self._tell_left_out()
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

    def _probe(self) -> Tensor:
        """A tensor on the device of the quantizer."""
        assert self.tensor_quant is not None
        return torch.zeros(1, device=next((t.device for t in _tensors(self.tensor_quant)), None))

    def _current(self) -> Any:
        if self.tensor_quant is None or self.disable_quant:
            return None, None, None
        training, quantizer = self.training, self.tensor_quant
        quantizer.eval()
        try:
            probe = self._probe()
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
