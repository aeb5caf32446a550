"""Proxies of parameters, of weights first of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.following import FollowsParameters, follow
from qframework.core.tracked import TrackedParameters
from qframework.proxy.base import QuantProxy
from qframework.proxy.codes import know_codes
from qframework.proxy.freezing import Place
from qframework.proxy.kept import is_kept, keep
from qframework.proxy.naming import qualified_name
from qframework.quant_tensor import IntQuantTensor

_is_compiling = torch.compiler.is_compiling
_in_transform = torch._C._are_functorch_transforms_active


class ParameterQuantProxyFromInjector(QuantProxy):
    """Quantizes a parameter of one or several layers."""

    parameter_name = "weight"

    @property
    def tracked_parameter_list(self) -> TrackedParameters:
        """The parameters of all layers that share this quantizer, live."""
        return TrackedParameters(self.tracked_module_list, self.parameter_name)

    def provided_names(self) -> dict[str, Any]:
        """What the layer provides: modules, parameters, shapes, dtype and device."""
        names = super().provided_names()
        parameters = self.tracked_parameter_list
        first = parameters[0]
        layer = self.tracked_module_list[0]
        names["tracked_parameter_list"] = parameters
        if first is not None:
            names.update(dtype=first.dtype, device=first.device)
            names.update(out_channels=self._out_channels(), weight_shape=tuple(first.shape))
            names["weight_ndims"] = first.dim()
        names["output_channel_dim"] = getattr(layer, "output_channel_dim", 0)
        return names

    def _out_channels(self) -> int:
        layer = self.tracked_module_list[0]
        shape = self.tracked_parameter_list[0].shape
        axis = getattr(layer, "output_channel_dim", 0)
        return int(shape[axis if axis < len(shape) else 0])

    def add_tracked_module(self, layer: nn.Module) -> None:
        """Let one more layer use this quantizer; statistics are then taken over the parameters of all.

        What was learned stays; a scale that only ever was initialised is initialised anew from all layers.

        Raises:
            ValueError: scales per channel, and another number of channels.
        """
        if any(layer is m for m in self.tracked_module_list):
            return
        first = self.tracked_module_list[0]
        if self.tensor_quant is None:
            self.tracked_module_list.append(layer)
            return
        shape = self._scale_shape()
        mine = getattr(layer, self.parameter_name)
        if shape:
            axis = next((i for i, n in enumerate(shape) if n > 1), None)
            if axis is not None and (mine.dim() != len(shape) or mine.shape[axis] != shape[axis]):
                raise ValueError(
                    f"{type(layer).__name__}.{self.attribute}: the quantizer shared from a {type(first).__name__} "
                    f"has {shape[axis]} scales, one a channel; this layer has {mine.shape[axis]} channels. "
                    "Share a per-tensor quantizer, or layers with equally many output channels."
                )
        learned = self.learned_parameters()
        self.tracked_module_list.append(layer)
        try:
            self.init_tensor_quant()
        except Exception:
            self.tracked_module_list.pop()
            raise
        self.restore_parameters(learned)

    def reinitialize(self) -> None:
        """The parameters were replaced, or loaded without this proxy's own state: start from them.

        Where neither a learned number nor a user's function depends on them, there is nothing to do.
        """
        depends = self._reads_layer or is_kept(self)
        if self.tensor_quant is not None and not depends:
            depends = any(True for _ in self.tensor_quant.parameters())
        if depends:
            self.init_tensor_quant()

    def max_uint_value(self, bit_width: Tensor) -> Tensor:
        """Largest unsigned integer of a width: ``2^b - 1``, narrow ``2^b - 2``."""
        return 2.0**bit_width - (2 if self.is_narrow_range else 1)

    def freeze(self) -> None:
        """Quantize the parameters of all layers once."""
        for parameter in self.tracked_parameter_list:
            if isinstance(parameter, nn.Parameter):
                result = self._quantized(parameter, source=self.source)
                self._memory.keep(self.tensor_quant, (parameter,), result, self._partners())  # type: ignore[arg-type]

    def _partners(self) -> list[Place]:
        """Where the parameters are that statistics are taken from, if several layers share the quantizer."""
        found: list[Place] = []
        layers = self.tracked_module_list
        for layer in layers if len(layers) > 1 else ():
            if self.parameter_name in layer._parameters:
                found.append((layer._parameters, self.parameter_name))  # type: ignore[arg-type]
                continue
            for module in layer.modules():  # it is computed, from what isn't known
                for held in (module._parameters, module._buffers):
                    found += [(held, name) for name in held]  # type: ignore[misc]
        return found

    def _quantized(self, parameter: Tensor, *scales: Tensor, source: object) -> Any:
        try:
            output = self._planned().run(parameter, *scales)
        except RuntimeError as error:
            self._resize(parameter, error)
            output = self._planned().run(parameter, *scales)
        return self._wrap(output, source, parameter)

    def _scale_shape(self) -> tuple[int, ...]:
        scaling = getattr(self.tensor_quant, "scaling_impl", None)
        return tuple(getattr(scaling, "scaling_shape", None) or ())

    def _resize(self, parameter: Tensor, error: RuntimeError) -> None:
        """Build the quantizer for a parameter of another shape, where that is why it failed and nothing is lost by it."""
        shape, now = self._scale_shape(), parameter.shape
        fits = len(shape) != len(now) or all(n in (1, m) for n, m in zip(shape, now, strict=True))
        if fits or _is_compiling():
            raise error
        learned, layers = list(self.learned_parameters()), self.tracked_module_list
        if learned or len(layers) > 1 or getattr(layers[0], self.parameter_name) is not parameter:
            what = f"holds {learned[0]}" if learned else "serves several layers"
            raise RuntimeError(
                f"{qualified_name(layers[0])}.{self.attribute}: {self.parameter_name} was given the shape {tuple(now)}, "
                f"and the quantizer has scales of shape {shape} and {what}. Assign layer.{self.parameter_name} = "
                "torch.nn.Parameter(...) in every layer that it serves, so that it starts anew, or keep the number of "
                "channels"
            ) from error
        self.init_tensor_quant()

    def _wrap(self, output: tuple[Any, ...], source: object, parameter: Tensor) -> Any:
        """The quantized tensor for what the quantizer gave for a parameter."""
        if self._is_own:
            output = self._integers(output, parameter)
        how = (bool(self.is_signed), self.training, source, self.is_symmetric, self.has_zero)
        made = IntQuantTensor.of_output(output, *how)
        if output[0].dtype is torch.float32:  # as nearly always
            return made
        return know_codes(made, self.tensor_quant, parameter, output)


class WeightQuantProxyFromInjector(ParameterQuantProxyFromInjector):
    """Quantizes a weight; state-dict entries below ``weight_quant.tensor_quant``."""

    requires_quant_input = False

    def forward(self, x: Tensor) -> Any:
        """The quantized weight, or ``x`` itself when quantization is off.

        Args:
            x: the weight, of any shape; gradients flow to it.

        Returns:
            :class:`~qframework.quant_tensor.IntQuantTensor`, or ``x``.
        """
        quantizer = self._modules.get("tensor_quant")
        if quantizer is None or self.disable_quant:
            return x
        if self._memory.frozen:
            found = self._memory.recall(quantizer, x)
            if found is not None:
                return found
        return self._quantized(x, source=self.source)

    @torch.no_grad()
    def fix_scale(self) -> None:
        """Let scale and zero point stay at their present values, whatever becomes of the weight.

        A statistic of the weight is replaced by the number that it gives now, which a state dict then holds
        (``tensor_quant.scaling_impl.kept``, ``tensor_quant.zero_point_impl.kept``; a layer that was just built takes
        such a state dict too). A learned number no longer follows the weight.
        """
        if self.tensor_quant is None:
            return
        self.release()
        scale, zero_point, _ = self._current_unless_disabled()
        self.stop_following()
        numbers = {"scaling_impl": scale, "zero_point_impl": zero_point}
        parts = {slot: getattr(self.tensor_quant, slot, None) for slot in numbers}
        depending = [s for s, p in parts.items() if getattr(p, "depends_on_input", p is not None)]
        keep(self, {slot: numbers[slot] for slot in depending})

    def stop_following(self) -> None:
        """Let learned numbers that start from the weight stay as they are when it changes."""
        if self.tensor_quant is not None:
            for part in self.tensor_quant.modules():
                if isinstance(part, FollowsParameters):
                    follow(part)
                    part.follows = False

    def _current_unless_disabled(self) -> Any:
        before, self.disable_quant = self.disable_quant, False
        try:
            return self._current()
        finally:
            self.disable_quant = before

    def _current(self) -> Any:
        if self.tensor_quant is None or self.disable_quant:
            return None, None, None
        weight = self.tracked_parameter_list[0]
        try:
            return self._parameters_for(weight)
        except RuntimeError as error:
            self._resize(weight, error)
            return self._parameters_for(weight)

    def _parameters_for(self, weight: Tensor) -> Any:
        quantizer: Any = self.tensor_quant
        if hasattr(quantizer, "parameters_for"):
            return quantizer.parameters_for(weight)
        output = quantizer(weight)
        if self._is_own and len(output) == 4:
            output = self._integers(output, weight)
        return output[1:]

    def scale(self) -> Tensor | None:
        """The present scale, that broadcasts to the weight; None when quantization is off."""
        return self._current()[0]  # type: ignore[no-any-return]

    def zero_point(self) -> Tensor | None:
        """The present zero point, in integer steps; None when quantization is off."""
        return self._current()[1]  # type: ignore[no-any-return]

    def bit_width(self) -> Tensor | None:
        """The present bit width, 0-dim; None when quantization is off."""
        return self._current()[2]  # type: ignore[no-any-return]
