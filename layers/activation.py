"""Activation functions with a quantized result."""

from __future__ import annotations

from typing import Any

from torch import nn

from qframework.inject import PolicyTypeError
from qframework.layers.base import QuantLayer, route_keywords
from qframework.proxy import ActQuantProxyFromInjector, QuantProxy, build_proxy
from qframework.quantizers.none import NoneActQuant
from qframework.quantizers.scaled_int import (
    Int8ActPerTensorFloat,
    Int8ActPerTensorFloatMinMaxInit,
    Uint8ActPerTensorFloat,
)


def build_act_proxies(
    layer: QuantLayer,
    act_quant: Any,
    input_quant: Any,
    keywords: dict[str, Any],
    provided: dict[str, Any] | None = None,
) -> tuple[Any, Any]:
    """The proxies of the input and of the result of an activation layer.

    Args:
        layer: the owner.
        act_quant: quantizer of the result, as a user gives it.
        input_quant: quantizer of the input, likewise.
        keywords: the layer's extra ones; those without a prefix are for the result.
        provided: names for the result's quantizer.
    """
    routed = route_keywords(layer, keywords, ("input_", "act_"), default="act_")
    kind = ActQuantProxyFromInjector
    first = build_proxy(
        layer, "input_quant", input_quant, NoneActQuant, routed["input_"], "input_", kind
    )
    second = build_proxy(
        layer, "act_quant", act_quant, NoneActQuant, routed["act_"], "", kind, provided
    )
    return first, second


class QuantNonLinearActLayer(QuantLayer):
    """Base: an activation function, and the quantizers of its input and its result.

    Subclasses set ``act_impl`` (a module class, its arguments resolved by name in the quantizer),
    ``passthrough_act`` (it keeps a quantized input on its grid) and ``drop_act_when_quantized`` (the
    quantizer does all that the function does).
    """

    act_impl: type[nn.Module] | None = None
    passthrough_act = False
    drop_act_when_quantized = False
    act_quant: ActQuantProxyFromInjector
    input_quant: ActQuantProxyFromInjector

    def __init__(
        self,
        act_quant: Any = None,
        input_quant: Any = None,
        return_quant_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.return_quant_tensor = return_quant_tensor
        provided = {
            "act_impl": self.act_impl,
            "passthrough_act": self.passthrough_act,
            "drop_act_when_quantized": self.drop_act_when_quantized,
        }
        self.input_quant, self.act_quant = build_act_proxies(
            self, act_quant, input_quant, kwargs, provided
        )
        self.own_activation = self._beside_shared(act_quant)

    def _beside_shared(self, act_quant: Any) -> nn.Module | None:
        """The function to apply here, because a shared quantizer comes with that of its first layer."""
        own = self.act_impl
        if not isinstance(act_quant, QuantProxy) or type(self.act_quant.activation_impl) is own:
            return None
        theirs = self.act_quant.activation_impl
        if theirs is not None and not self.act_quant.is_passthrough_act:
            raise PolicyTypeError(
                f"{type(self).__name__}.act_quant: the quantizer to share applies {type(theirs).__name__} first; "
                f"share it among layers of one kind, or share a QuantIdentity's"
            )
        return None if own is None or self.drop_act_when_quantized else own()

    def forward(self, input: Any) -> Any:
        """Apply and quantize.

        Args:
            input: float or quantized tensor of any shape.

        Returns:
            A tensor, or with ``return_quant_tensor`` a quantized tensor.

        Raises:
            RuntimeError: a quantized result is asked for and the quantizer is off.
        """
        parts: Any = self._modules  # looked at directly, since a module's attributes take long
        input_quant = parts["input_quant"]
        if not input_quant.is_idle:
            input = input_quant(input)
        if self.own_activation is not None:
            input = self.own_activation(input)
        return self._pack(parts["act_quant"](input))

    def _remedy(self) -> str:
        return "Give act_quant=Int8ActPerTensorFloat, or return_quant_tensor=False."


class QuantIdentity(QuantNonLinearActLayer):
    """Quantizes its input.

    Args:
        act_quant: quantizer of the result: a class, another layer's proxy to share, or None.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor.
        **kwargs: names to bind anew in ``act_quant`` (with or without the prefix ``act_``).

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or
            ValueError too.
    """

    passthrough_act = True

    def __init__(
        self,
        act_quant: Any = Int8ActPerTensorFloat,
        return_quant_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(act_quant, None, return_quant_tensor, **kwargs)


class QuantReLU(QuantNonLinearActLayer):
    """``max(x, 0)``, quantized.

    Args:
        act_quant: quantizer of the result: a class, another layer's proxy to share, or None.
        input_quant: quantizer of the input, likewise.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor.
        **kwargs: names to bind anew in ``act_quant`` (with or without the prefix ``act_``), or in
            ``input_quant`` (prefix ``input_``).

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or
            ValueError too.
    """

    act_impl = nn.ReLU
    passthrough_act = True

    def __init__(
        self,
        act_quant: Any = Uint8ActPerTensorFloat,
        input_quant: Any = None,
        return_quant_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(act_quant, input_quant, return_quant_tensor, **kwargs)


class QuantHardTanh(QuantNonLinearActLayer):
    """``clamp(x, min_val, max_val)``, quantized; the quantizer's own range does the clipping.

    ``min_val`` and ``max_val`` are required by the default quantizer.

    Args:
        act_quant: quantizer of the result: a class, another layer's proxy to share, or None.
        input_quant: quantizer of the input, likewise.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor.
        **kwargs: names to bind anew in ``act_quant`` (with or without the prefix ``act_``), or in
            ``input_quant`` (prefix ``input_``).

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or
            ValueError too.
    """

    act_impl = nn.Hardtanh
    passthrough_act = True
    drop_act_when_quantized = True

    def __init__(
        self,
        act_quant: Any = Int8ActPerTensorFloatMinMaxInit,
        input_quant: Any = None,
        return_quant_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(act_quant, input_quant, return_quant_tensor, **kwargs)


class QuantSigmoid(QuantNonLinearActLayer):
    """``1 / (1 + exp(-x))``, quantized.

    Args:
        act_quant: quantizer of the result: a class, another layer's proxy to share, or None.
        input_quant: quantizer of the input, likewise.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor.
        **kwargs: names to bind anew in ``act_quant`` (with or without the prefix ``act_``), or in
            ``input_quant`` (prefix ``input_``).

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or
            ValueError too.
    """

    act_impl = nn.Sigmoid

    def __init__(
        self,
        act_quant: Any = Uint8ActPerTensorFloat,
        input_quant: Any = None,
        return_quant_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(act_quant, input_quant, return_quant_tensor, **kwargs)


class QuantTanh(QuantNonLinearActLayer):
    """``tanh(x)``, quantized.

    Args:
        act_quant: quantizer of the result: a class, another layer's proxy to share, or None.
        input_quant: quantizer of the input, likewise.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor.
        **kwargs: names to bind anew in ``act_quant`` (with or without the prefix ``act_``), or in
            ``input_quant`` (prefix ``input_``).

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or
            ValueError too.
    """

    act_impl = nn.Tanh

    def __init__(
        self,
        act_quant: Any = Int8ActPerTensorFloat,
        input_quant: Any = None,
        return_quant_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(act_quant, input_quant, return_quant_tensor, **kwargs)


class QuantHardSwish(QuantNonLinearActLayer):
    """``x * clamp(x + 3, 0, 6) / 6``, quantized.

    Args:
        act_quant: quantizer of the result: a class, another layer's proxy to share, or None.
        input_quant: quantizer of the input, likewise.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor.
        **kwargs: names to bind anew in ``act_quant`` (with or without the prefix ``act_``), or in
            ``input_quant`` (prefix ``input_``).

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or
            ValueError too.
    """

    act_impl = nn.Hardswish

    def __init__(
        self,
        act_quant: Any = Uint8ActPerTensorFloat,
        input_quant: Any = None,
        return_quant_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(act_quant, input_quant, return_quant_tensor, **kwargs)
