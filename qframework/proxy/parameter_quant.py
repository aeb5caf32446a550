"""Proxies of weights and biases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.tracked import TrackedParameters
from qframework.functional import forget
from qframework.functional.autograd import apply, distributed_active, transforms_active
from qframework.inject.explanation import Rows
from qframework.proxy.base import QuantProxy
from qframework.proxy.memory import Replay, can_run_again, hooks_active
from qframework.proxy.naming import qualified_name
from qframework.quant_tensor import IntQuantTensor, product_source

_functorch_active = torch._C._are_functorch_transforms_active


def _same(tensor: Tensor) -> Tensor:
    return tensor


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
        shape = getattr(layer, self.parameter_name).shape
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
        self.tracked_module_list.append(layer)
        if self.tensor_quant is None:
            return
        shape = getattr(getattr(self.tensor_quant, "scaling_impl", None), "scaling_shape", ())
        mine = getattr(layer, self.parameter_name)
        if shape and tuple(shape) != ():
            axis = next((i for i, n in enumerate(shape) if n > 1), None)
            if axis is not None and (mine.dim() != len(shape) or mine.shape[axis] != shape[axis]):
                self.tracked_module_list.pop()
                raise ValueError(
                    f"{type(layer).__name__}.{self.attribute}: the quantizer shared from a {type(first).__name__} "
                    f"has {shape[axis]} scales, one a channel; this layer has {mine.shape[axis]} channels. "
                    "Share a per-tensor quantizer, or layers with equally many output channels."
                )
        learned = self.learned_parameters()
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
        if self.tensor_quant is None:
            depends = self._reads_layer
        else:
            depends = self._reads_layer or any(True for _ in self.tensor_quant.parameters())
        if depends:
            self.init_tensor_quant()

    def max_uint_value(self, bit_width: Tensor) -> Tensor:
        """Largest unsigned integer of a width: ``2^b - 1``, narrow ``2^b - 2``."""
        return 2.0**bit_width - (2 if self.is_narrow_range else 1)

    def release(self) -> None:
        """Free what is kept of earlier calls, in eager mode and for compiled graphs."""
        super().release()
        forget(*(p for p in self.tracked_parameter_list if p is not None))

    def _recall_or_compute(self, parameter: Tensor, *scales: Tensor, source: Any) -> Any:
        """The quantized parameter, computed once while it and its quantizer are unchanged.

        In evaluation that is between changes of the weights; in training all calls of one step share a result and its
        graph.
        """
        quantizer: Any = self._modules["tensor_quant"]
        if (
            type(parameter) is not nn.Parameter
            or torch.compiler.is_compiling()
            or _functorch_active()
        ):
            return self._wrap(self._outputs(parameter, *scales), source, parameter)
        known = self._memory.recall(id(parameter), quantizer, self.training, parameter, *scales)
        if known is not None:
            return known
        training = self.training
        if hooks_active():
            # Checkpointing counts what is saved: as nothing is for a result that is kept, nothing may be for a new one.
            with torch.autograd.graph.saved_tensors_hooks(_same, _same):
                return self._compute(quantizer, parameter, scales, source, training)
        return self._compute(quantizer, parameter, scales, source, training)

    def _compute(
        self,
        quantizer: Any,
        parameter: Tensor,
        scales: tuple[Tensor, ...],
        source: Any,
        training: bool,
    ) -> Any:
        memory = self._memory
        grows = torch.is_grad_enabled()
        if grows and not scales and memory.replays and memory.is_repeatable(quantizer, training):
            output = self._replayed(parameter)
        else:
            output = self._outputs(parameter, *scales)
            grows = grows and any(t.requires_grad for t in output)
            if grows and not can_run_again(output):
                if scales or not memory.is_repeatable(quantizer, training):
                    return self._wrap(output, source, parameter)
                memory.replays = True
                output = self._replayed(parameter)
        result = self._wrap(output, source, parameter)
        layers = [(m._parameters, self.parameter_name) for m in self.tracked_module_list]
        inputs = (parameter, *scales)
        self._memory.keep(id(parameter), quantizer, training, layers, result, output[:3], *inputs)
        if grows and distributed_active():
            # Sharded parameters are gathered into place without a trace in their version counters.
            for tensor in output:
                if tensor.requires_grad:
                    tensor.register_hook(self._forget)
        return result

    def _outputs(self, parameter: Tensor, *scales: Tensor) -> tuple[Tensor, ...]:
        """The tensors that the quantizer computes."""
        return self.tensor_quant(parameter, *scales)  # type: ignore[misc, no-any-return]

    def _replayed(self, parameter: Tensor) -> Any:
        """What the quantizer gives, with a graph that can be used again."""
        needed = [p for p in self._all_parameters() if p.requires_grad]
        return apply(Replay, lambda: self._outputs(parameter), *needed)

    def _forget(self, grad: Tensor) -> None:
        self._memory.clear()

    def _all_parameters(self) -> list[Tensor]:
        found = [p for p in self.tracked_parameter_list if p is not None]
        return found if self.tensor_quant is None else [*found, *self.tensor_quant.parameters()]

    def _wrap(self, output: Any, source: Any, parameter: Tensor) -> Any:
        """The quantized tensor for what :meth:`_outputs` gave for a parameter."""
        value, scale, zero_point, bit_width = output
        return IntQuantTensor.unchecked(
            value,
            scale,
            zero_point,
            bit_width,
            bool(self.is_signed),
            self.training,
            source,
            self.is_symmetric,
            self.has_zero,
        )


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
        if self.tensor_quant is None or self.disable_quant:
            return x
        return self._recall_or_compute(x, source=self.source)

    def _values(self, x: Tensor) -> Tensor:
        if self._modules.get("tensor_quant") is None or self.disable_quant:
            return x
        return self._recall_or_compute(x, source=self.source).value  # type: ignore[no-any-return]

    def _current(self) -> Any:
        if self.tensor_quant is None or self.disable_quant:
            return None, None, None
        weight = self.tracked_parameter_list[0]
        if hasattr(self.tensor_quant, "parameters_for"):
            return self.tensor_quant.parameters_for(weight)  # type: ignore[operator]
        return self.tensor_quant(weight)[1:]

    def scale(self) -> Tensor | None:
        """The present scale, that broadcasts to the weight; None when quantization is off."""
        return self._current()[0]  # type: ignore[no-any-return]

    def zero_point(self) -> Tensor | None:
        """The present zero point, in integer steps; None when quantization is off."""
        return self._current()[1]  # type: ignore[no-any-return]

    def bit_width(self) -> Tensor | None:
        """The present bit width, 0-dim; None when quantization is off."""
        return self._current()[2]  # type: ignore[no-any-return]


class BiasQuantProxyFromInjector(ParameterQuantProxyFromInjector):
    """Quantizes a bias, by input scale times weight scale or by a scale of its own."""

    parameter_name = "bias"

    def init_tensor_quant(self) -> None:
        """As the base; a layer without a bias has nothing to build, but its keywords are looked at."""
        if self.tracked_parameter_list[0] is None:
            self._resolver().check_spelling()
            self.tensor_quant = None
            self.is_signed, self.is_narrow_range, self.is_symmetric = None, None, True
            self.has_zero = True
            self.rounding_mode, self.requires_input_scale, self._rows = None, False, Rows()
            self._reads_layer = True  # a bias may be assigned later
            return
        super().init_tensor_quant()

    def _read_settings(self, resolver: Any, built: nn.Module | None) -> None:
        super()._read_settings(resolver, built)
        enabled = built is not None
        self.requires_input_scale = (
            bool(resolver.read("requires_input_scale", False)) if enabled else False
        )

    def forward(
        self, bias: Tensor | None, quant_input: Any = None, quant_weight: Any = None
    ) -> Any:
        """The quantized bias, or ``bias`` itself when quantization is off.

        Args:
            bias: shape ``(C,)``, or None.
            quant_input: the layer's input, which gives the scale where ``requires_input_scale``.
            quant_weight: the layer's quantized weight, likewise.

        Raises:
            RuntimeError: a scale is required and one of the two isn't quantized, or the input has scales of rows.
        """
        if bias is None or self.tensor_quant is None or self.disable_quant:
            return bias
        if not self.requires_input_scale:
            return self._recall_or_compute(bias, source=self.source)
        for tensor, what in ((quant_input, "input"), (quant_weight, "weight")):
            if not isinstance(tensor, IntQuantTensor):
                raise RuntimeError(self._scale_missing(what))
        if not _is_of_channels(quant_input.scale, quant_weight.value.shape):
            raise RuntimeError(self._many_scales(quant_input.scale))
        source = product_source(quant_input, quant_weight)
        return self._by_product(bias, quant_input.scale, quant_weight.scale, source)

    def _by_product(self, bias: Tensor, first: Tensor, second: Tensor, source: Any) -> Any:
        """Quantize by the product of two scales; kept in evaluation, where both stay the same tensors."""
        keeps = not (
            torch.compiler.is_compiling() or torch.is_grad_enabled() or transforms_active()
        )
        inputs = (bias, first, second)
        quantizer: Any = self.tensor_quant
        if keeps:
            known = self._memory.recall(id(bias), quantizer, self.training, *inputs)
            if known is not None:
                return known.replace(source=source) if known.source != source else known
        scale = (first * second).reshape(-1)
        if scale.numel() == 1:
            scale = scale.reshape(())
        elif (
            scale.numel() < bias.numel()
        ):  # scales of positions within the groups of a transposed convolution
            scale = scale.repeat(bias.numel() // scale.numel())
        output = quantizer(bias, scale)
        result = self._wrap(output, source, bias)
        if keeps:
            layers = [(m._parameters, self.parameter_name) for m in self.tracked_module_list]
            made = output[:1]
            self._memory.keep(id(bias), quantizer, self.training, layers, result, made, *inputs)
        return result

    def _scale_missing(self, what: str) -> str:
        layer = self.tracked_module_list[0]
        remedy = {
            "input": "give input_quant=Int8ActPerTensorFloat, or feed the layer a quantized tensor "
            "(return_quant_tensor=True on the layer before)",
            "weight": "give a weight_quant",
        }[what]
        return (
            f"{qualified_name(layer)}: Input scale required. {self.quantizer.__name__} quantizes the bias by input "
            f"scale times weight scale, and the {what} is not quantized; {remedy}, or use a bias quantizer with a "
            "scale of its own, such as Int8BiasPerTensorFloatInternalScaling"
        )

    def _many_scales(self, scale: Tensor) -> str:
        return (
            f"{qualified_name(self.tracked_module_list[0])}: {self.quantizer.__name__} quantizes the bias by input "
            f"scale times weight scale, and the input has {scale.numel()} scales, of shape {tuple(scale.shape)}: no "
            "one of them is that of a channel's sums. Use an input quantizer with one scale, such as "
            "Int8ActPerTensorFloat or Int8DynamicActPerTensorFloat, a bias quantizer with a scale of its own, such as "
            "Int8BiasPerTensorFloatInternalScaling, or bias_quant=None"
        )

    def _current(self) -> Any:
        if self.tensor_quant is None or self.disable_quant:
            return None, None, None
        if self.requires_input_scale:
            raise RuntimeError(self._scale_missing("input"))
        bias = self.tracked_parameter_list[0]
        return self.tensor_quant.parameters_for(bias)  # type: ignore[operator]

    def scale(self) -> Tensor | None:
        """The present scale; None when quantization is off.

        Raises:
            RuntimeError: the scale is that of an input, which isn't here.
        """
        return self._current()[0]  # type: ignore[no-any-return]

    def zero_point(self) -> Tensor | None:
        """The present zero point; None when quantization is off. Raises as :meth:`scale`."""
        return self._current()[1]  # type: ignore[no-any-return]

    def bit_width(self) -> Tensor | None:
        """The present bit width; None when quantization is off."""
        if self.tensor_quant is None or self.disable_quant:
            return None
        return self.tensor_quant.msb_clamp_bit_width_impl()  # type: ignore[operator, no-any-return]


def _is_of_channels(scale: Tensor, weight: tuple[int, ...]) -> bool:
    """Whether an input has one scale, or one for each channel of a depthwise convolution or a product by elements.

    Args:
        scale: of the input.
        weight: shape of the weight.
    """
    if scale.numel() == 1 or len(weight) < 2:
        return True
    axis = len(weight) - 1  # of channels, from the right
    depthwise = axis > 1 and weight[1] == 1
    return depthwise and scale.dim() >= axis and scale.shape[-axis] == scale.numel()
