"""Layers with a weight, a bias, an input and an output to quantize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qframework.kernels.recomputation import forget_origin, knows_origin
from qframework.layers.base import QuantLayer, grad_enabled, heed, may_write, route_keywords
from qframework.layers.batch_norm import mul_add_from_bn
from qframework.proxy import (
    ActQuantProxyFromInjector,
    BiasQuantProxyFromInjector,
    ParameterQuantProxyFromInjector,
    Quantizer,
    WeightQuantProxyFromInjector,
    build_proxy,
    sharing,
)
from qframework.proxy.naming import qualified_name
from qframework.quant_tensor import QuantTensor, TensorLike, dequantize
from qframework.quantizers.none import NoneActQuant, NoneBiasQuant, NoneWeightQuant
from qframework.quantizers.scaled_int import Int8WeightPerTensorFloat


class QuantWeightLayer(QuantLayer):
    """Mixin: a layer with a weight to quantize."""

    weight_quant: WeightQuantProxyFromInjector
    weight: Any

    def __setattr__(self, name: str, value: Any) -> None:
        parameters = self.__dict__.get("_parameters", {})
        before = parameters.get(name)
        if before is not None and hasattr(value, "device_mesh"):  # an engine shards the parameter
            parameters[name] = value
            return
        super().__setattr__(name, value)
        if name in ("weight", "bias") and isinstance(value, nn.Parameter):
            if hasattr(before, "device_mesh"):  # it is put together for a forward pass
                return
            proxy = self._modules.get(f"{name}_quant")
            if isinstance(proxy, ParameterQuantProxyFromInjector):
                proxy.reinitialize()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's.

        Raises:
            RuntimeError: a part of a parameter (a ``DTensor``), as styles of tensor parallelism register.
        """
        if hasattr(param, "device_mesh"):
            raise RuntimeError(
                f"{qualified_name(self)}: tensor parallelism (ColwiseParallel, RowwiseParallel, distribute_module) isn't supported "
                "by quantized layers, since it knows of no scales. Shard them by torch.distributed.fsdp.fully_shard, or leave this "
                "layer out of the plan of parallelize_module. The layer is as it was"
            )
        super().register_parameter(name, param)

    def _float_weight(self) -> Any:
        weight = self._parameters.get("weight")
        # computed, by a parametrization or by pruning
        return self.weight if weight is None else weight

    def quant_weight(self, quant_input: TensorLike | None = None) -> Any:
        """The quantized weight, as an ``IntQuantTensor``; the float weight when weights aren't quantized.

        Args:
            quant_input: the quantized input, where the weights depend on its width (accumulator-aware ones).

        Raises:
            RuntimeError: they do, and it isn't given.
        """
        # Looked at directly, since a module's attributes take long.
        weight_quant: Any = self._modules["weight_quant"]
        weight = self._float_weight()
        if weight_quant.requires_quant_input:
            return weight_quant(weight, quant_input)
        return weight_quant(weight)


class QuantWeightBiasInputOutputLayer(QuantWeightLayer):
    """Mixin in front of a torch layer: quantize input, weight and bias, compute, quantize the output.

    The arithmetic on scales and widths is that of the torch function on quantized tensors; it is left out where the
    result is a plain tensor anyway.
    """

    bias_quant: BiasQuantProxyFromInjector
    input_quant: ActQuantProxyFromInjector
    output_quant: ActQuantProxyFromInjector
    bias: Any
    output_channel_dim = 0

    def __init__(
        self,
        weight_quant: Quantizer = Int8WeightPerTensorFloat,
        bias_quant: Quantizer = None,
        input_quant: Quantizer = None,
        output_quant: Quantizer = None,
        return_quant_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        """For layers of one's own: call it when ``weight`` and ``bias`` are there, and define :meth:`inner_forward_impl`.

        Args:
            weight_quant: quantizer of the weight: a class, another layer's proxy to share, or None.
            bias_quant: quantizer of the bias: a class, a proxy to share, or None.
            input_quant: quantizer of the input: a class, a proxy to share, or None.
            output_quant: quantizer of the output: a class, a proxy to share, or None.
            return_quant_tensor: return a quantized tensor rather than a tensor.
            **kwargs: names to bind anew in a quantizer, prefixed ``weight_``, ``bias_``, ``input_``, ``output_``.

        Raises:
            QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
            RuntimeError: the layer has no weight yet.
        """
        if not isinstance(self.__dict__.get("_parameters"), dict) or not hasattr(self, "weight"):
            raise RuntimeError(
                f"{type(self).__name__}: build the float layer first, which gives weight and bias: "
                "nn.Linear.__init__(self, ...), then QuantWeightBiasInputOutputLayer.__init__(self, ...)"
            )
        quantizers = weight_quant, bias_quant, input_quant, output_quant
        self._init_quant(*quantizers, return_quant_tensor, kwargs)

    def _init_quant(
        self,
        weight_quant: Quantizer,
        bias_quant: Quantizer,
        input_quant: Quantizer,
        output_quant: Quantizer,
        return_quant_tensor: bool,
        keywords: Mapping[str, object],
    ) -> None:
        """The last step of a layer's constructor; see the layers for the arguments."""
        self.return_quant_tensor = return_quant_tensor
        routed = route_keywords(self, keywords, ("weight_", "bias_", "input_", "output_"))
        with sharing((weight_quant, bias_quant, input_quant, output_quant)):
            for name, quantizer, none, kind in (
                ("weight", weight_quant, NoneWeightQuant, WeightQuantProxyFromInjector),
                ("bias", bias_quant, NoneBiasQuant, BiasQuantProxyFromInjector),
                ("input", input_quant, NoneActQuant, ActQuantProxyFromInjector),
                ("output", output_quant, NoneActQuant, ActQuantProxyFromInjector),
            ):
                prefix = f"{name}_"
                provided: dict[str, Any] = {}
                if kind is ActQuantProxyFromInjector:
                    like = self.weight
                    if like is not None:
                        provided = {"device": like.device, "dtype": like.dtype}
                proxy = build_proxy(
                    self, f"{name}_quant", quantizer, none, routed[prefix], prefix, kind, provided
                )
                self.add_module(f"{name}_quant", proxy)

    def _compute(
        self, x: TensorLike, weight: TensorLike, bias: TensorLike | None, *how: object
    ) -> Any:
        """The torch function of the layer, on plain or quantized tensors; ``how`` is what forward was given besides."""
        return self.inner_forward_impl(x, weight, bias, *how)

    def inner_forward_impl(
        self, x: TensorLike, quant_weight: TensorLike, quant_bias: TensorLike | None, *how: object
    ) -> Any:
        """For layers of one's own: what the layer computes.

        Args:
            x: the input, quantized where a quantized result is wanted.
            quant_weight: the weight, in the same form.
            quant_bias: the bias, or None.
            *how: what ``forward`` was given besides.
        """
        raise TypeError(
            f"{type(self).__name__}: define inner_forward_impl(self, x, quant_weight, quant_bias), what the layer computes"
        )

    def quant_bias(self) -> Any:
        """The quantized bias, None without one; one that takes the scale of the input, by that of the last input.

        Raises:
            RuntimeError: its scale comes from the input, and there was none yet.
        """
        proxy = self.bias_quant
        if self.bias is None or proxy.is_idle or not proxy.requires_input_scale:
            return proxy(self.bias)
        weight_quant: Any = self.weight_quant
        if weight_quant.requires_quant_input:
            raise RuntimeError(
                f"{qualified_name(self)}.quant_bias: the weights depend on the input's width; read bias and weight in a hook"
            )
        return proxy.by_last_input(self.bias, self.quant_weight())

    @torch.no_grad()
    def merge_bn_in(self, bn: nn.Module) -> None:
        """Fold a batch norm that follows the layer into its weight and bias; in evaluation mode nothing changes.

            weight * gamma / sqrt(var + eps),   (bias - mean) * gamma / sqrt(var + eps) + beta

        A missing bias is created. The quantizers of weight and bias start anew from the folded parameters.

        Args:
            bn: ``BatchNorm1d``, ``2d`` or ``3d`` over the layer's output channels, with running statistics.

        Raises:
            ValueError: no running statistics, or another number of channels.
        """
        mean, var = getattr(bn, "running_mean", None), getattr(bn, "running_var", None)
        channels = self._output_channels()
        if mean is None or var is None or mean.shape != (channels,):
            got = "none" if mean is None or var is None else f"{mean.numel()} channels"
            raise ValueError(
                f"{qualified_name(self)}.merge_bn_in: needs a batch norm with running statistics of {channels} "
                f"channels, got {type(bn).__name__} with {got}"
            )
        norm: Any = bn
        factor, shift = mul_add_from_bn(mean, var, norm.eps, norm.weight, norm.bias)
        self.weight.mul_(self._beside_weight(factor))
        if self.bias is None:
            self.bias = nn.Parameter(shift.to(self.weight.dtype))
        else:
            self.bias.mul_(factor).add_(shift)
        for proxy in (self.weight_quant, self.bias_quant):
            if proxy.tensor_quant is not None:
                proxy.init_tensor_quant()

    def _output_channels(self) -> int:
        return int(self.weight.shape[self.output_channel_dim])

    def _beside_weight(self, channels: torch.Tensor) -> torch.Tensor:
        """A number for each output channel in a shape that broadcasts to the weight."""
        shape = [1] * self.weight.dim()
        shape[self.output_channel_dim] = channels.numel()
        return channels.reshape(shape)

    def forward(self, input: TensorLike, *how: object) -> Any:
        """Apply the layer.

        Args:
            input: float or quantized tensor, in the shape that the torch layer takes.
            *how: what the torch layer takes besides.

        Returns:
            A tensor, or with ``return_quant_tensor`` a quantized tensor.

        Raises:
            RuntimeError: a bias quantizer needs the scale of an input that isn't quantized, or a quantized
                result is asked for that can't be had.
        """
        parts: Any = self._modules  # looked at directly, since a module's attributes take long
        input_quant, output_quant = parts["input_quant"], parts["output_quant"]
        quant_input = input if input_quant.is_idle else input_quant(input)
        quant_weight = self.quant_weight(quant_input)
        if grad_enabled():
            self._heed(quant_input, quant_weight)
        as_quant = self.return_quant_tensor and not output_quant.is_quant_enabled
        if as_quant and not (
            isinstance(quant_input, QuantTensor) and isinstance(quant_weight, QuantTensor)
        ):
            raise RuntimeError(self._not_configured(quant_input, quant_weight))
        quant_bias, bias_quant = self._parameters.get("bias"), parts["bias_quant"]
        if quant_bias is None and "bias" not in self._parameters:  # it is computed
            quant_bias = self.bias
        if quant_bias is not None and not bias_quant.is_idle:
            quant_bias = bias_quant(quant_bias, quant_input, quant_weight)
        if as_quant:
            out = self._compute(quant_input, quant_weight, quant_bias, *how)
        else:
            out = self._compute(
                dequantize(quant_input), dequantize(quant_weight), dequantize(quant_bias), *how
            )
        if output_quant.is_idle:
            return self._pack(out)
        return self._pack(output_quant(out), output_quant)

    def _heed(self, quant_input: object, quant_weight: object) -> None:
        """Both operands are saved where hooks or methods of a user's own may have written to them."""
        parts: Any = self._modules
        heed(quant_input, parts["input_quant"], self)
        if knows_origin(quant_weight):
            own = getattr(self.quant_weight, "__func__", None)
            if own is not QuantWeightLayer.quant_weight or may_write(parts["weight_quant"]):
                forget_origin(quant_weight)

    def _not_configured(self, quant_input: object, quant_weight: object) -> str:
        lacking = [
            what
            for what, t in (("input", quant_input), ("weight", quant_weight))
            if not isinstance(t, QuantTensor)
        ]
        return (
            f"{qualified_name(self)}: QuantLayer is not correctly configured. return_quant_tensor=True needs a "
            f"quantized {' and a quantized '.join(lacking)}, or an output_quant. {self._remedy()}"
        )

    def _remedy(self) -> str:
        return (
            "Give input_quant=Int8ActPerTensorFloat or feed a quantized tensor (return_quant_tensor=True on the "
            "layer before), or give output_quant=Int8ActPerTensorFloat, or return_quant_tensor=False. A zero "
            "point on input or weight makes the plain product unquantized."
        )


QuantWBIOL = QuantWeightBiasInputOutputLayer
