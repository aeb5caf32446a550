"""Activation functions with a quantized result."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar, Final, Unpack

from torch import nn

from qframework.inject import PolicyTypeError
from qframework.layers.base import QuantLayer, route_keywords
from qframework.layers.keywords import ActLayerKeywords
from qframework.proxy import ActQuantProxyFromInjector, Quantizer, QuantProxy, build_proxy, sharing
from qframework.quant_tensor import TensorLike
from qframework.quantizers.none import NoneActQuant
from qframework.quantizers.scaled_int import (
    Int8ActPerTensorFloat,
    Int8ActPerTensorFloatMinMaxInit,
    Uint8ActPerTensorFloat,
)


class Default(Enum):
    """Stands for the quantizer that a layer class names as its default."""

    OF_THE_LAYER = "default_act_quant"

    def __repr__(self) -> str:
        return "<default_act_quant of the layer>"


DEFAULT: Final = Default.OF_THE_LAYER


def build_act_proxies(
    layer: QuantLayer,
    act_quant: Quantizer,
    input_quant: Quantizer,
    keywords: Mapping[str, object],
    provided: dict[str, Any] | None = None,
) -> tuple[Any, Any]:
    """The proxies of the input and of the result of an activation layer.

    Args:
        layer: the owner.
        act_quant: quantizer of the result, as a user gives it.
        input_quant: quantizer of the input, as a user gives it.
        keywords: the layer's extra ones; those without a prefix are for the result.
        provided: names for the result's quantizer.
    """
    routed = route_keywords(layer, keywords, ("input_", "act_"), default="act_")
    kind = ActQuantProxyFromInjector
    with sharing((act_quant, input_quant)):
        first = build_proxy(
            layer, "input_quant", input_quant, NoneActQuant, routed["input_"], "input_", kind
        )
        second = build_proxy(
            layer, "act_quant", act_quant, NoneActQuant, routed["act_"], "", kind, provided
        )
    return first, second


class QuantActLayer(QuantLayer):
    """What layers with a quantized result and nothing else to quantize but their input have in common.

    Attributes:
        default_act_quant: quantizer of the result where none is given; a class sets it.
    """

    default_act_quant: ClassVar[Quantizer] = Int8ActPerTensorFloat
    act_quant: ActQuantProxyFromInjector
    input_quant: ActQuantProxyFromInjector

    def __init__(
        self,
        act_quant: Quantizer | Default = DEFAULT,
        input_quant: Quantizer = None,
        return_quant_tensor: bool = False,
        **kwargs: Unpack[ActLayerKeywords],
    ) -> None:
        """Build the quantizers; settings of a function, where it has some, come first, as in torch.

        Args:
            act_quant: quantizer of the result: a class, another layer's proxy to share, or None; ``default_act_quant`` where
                it isn't given.
            input_quant: quantizer of the input: a class, another layer's proxy to share, or None.
            return_quant_tensor: return a quantized tensor rather than a tensor.
            **kwargs: names to bind anew in ``act_quant`` (with or without the prefix ``act_``), or in ``input_quant`` (prefix
                ``input_``).

        Raises:
            QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
        """
        super().__init__()
        self._init_act(act_quant, input_quant, return_quant_tensor, kwargs)

    def _init_act(
        self,
        act_quant: Quantizer | Default,
        input_quant: Quantizer,
        return_quant_tensor: bool,
        keywords: Mapping[str, object],
    ) -> None:
        """The last step of a constructor."""
        self.return_quant_tensor = return_quant_tensor
        wanted = self.default_act_quant if isinstance(act_quant, Default) else act_quant
        self.input_quant, self.act_quant = build_act_proxies(
            self, wanted, input_quant, keywords, self._provided()
        )

    def _provided(self) -> dict[str, Any]:
        """For subclasses: names for the quantizer of the result."""
        return {}

    def _remedy(self) -> str:
        return "Give act_quant=Int8ActPerTensorFloat, or return_quant_tensor=False."


class QuantNonLinearActLayer(QuantActLayer):
    """Base: an activation function, and the quantizers of its input and its result.

    A layer of one's own sets the attributes, or gives them to the constructor.

    Attributes:
        act_impl: a module class, its arguments resolved by name in the quantizer; None for the identity.
        passthrough_act: whether it keeps a quantized input on its grid.
        drop_act_when_quantized: whether the quantizer does all that the function does.
        default_act_quant: quantizer of the result where none is given.
    """

    act_impl: type[nn.Module] | None = None
    passthrough_act = False
    drop_act_when_quantized = False

    def __init__(
        self,
        act_quant: Quantizer | Default = DEFAULT,
        input_quant: Quantizer = None,
        return_quant_tensor: bool = False,
        *,
        act_impl: type[nn.Module] | Default | None = DEFAULT,
        passthrough_act: bool | None = None,
        **kwargs: Unpack[ActLayerKeywords],
    ) -> None:
        """Build the quantizers; settings of a function, where it has some, come first, as in torch.

        Args:
            act_quant: quantizer of the result: a class, another layer's proxy to share, or None; ``default_act_quant`` where
                it isn't given.
            input_quant: quantizer of the input: a class, another layer's proxy to share, or None.
            return_quant_tensor: return a quantized tensor rather than a tensor.
            act_impl: the function, where the class doesn't set it.
            passthrough_act: whether it keeps a quantized input on its grid, where the class doesn't set it.
            **kwargs: names to bind anew in ``act_quant`` (with or without the prefix ``act_``), or in ``input_quant`` (prefix
                ``input_``).

        Raises:
            TypeError: a function that isn't a module class.
            QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
        """
        if not isinstance(act_impl, Default):
            if act_impl is not None and not (
                isinstance(act_impl, type) and issubclass(act_impl, nn.Module)
            ):
                raise TypeError(
                    f"{type(self).__name__}: act_impl={act_impl!r} must be a module class, such as torch.nn.SiLU, or None"
                )
            self.act_impl = act_impl
        if passthrough_act is not None:
            self.passthrough_act = passthrough_act
        super().__init__(act_quant, input_quant, return_quant_tensor, **kwargs)

    def _init_act(
        self,
        act_quant: Quantizer | Default,
        input_quant: Quantizer,
        return_quant_tensor: bool,
        keywords: Mapping[str, object],
    ) -> None:
        super()._init_act(act_quant, input_quant, return_quant_tensor, keywords)
        self.own_activation = self._beside_shared(act_quant)

    def _provided(self) -> dict[str, Any]:
        return {
            "act_impl": self.act_impl,
            "passthrough_act": self.passthrough_act,
            "drop_act_when_quantized": self.drop_act_when_quantized,
        }

    def _beside_shared(self, act_quant: Quantizer | Default) -> nn.Module | None:
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

    def forward(self, input: TensorLike) -> Any:
        """Apply and quantize.

        Args:
            input: float or quantized tensor of any shape.

        Returns:
            A tensor of that shape, or with ``return_quant_tensor`` a quantized tensor.

        Raises:
            RuntimeError: a quantized result is asked for and the quantizer is off.
        """
        parts: Any = self._modules  # looked at directly, since a module's attributes take long
        input_quant = parts["input_quant"]
        if not input_quant.is_idle:
            input = input_quant(input)
        if self.own_activation is not None:
            input = self.own_activation(input)
        act_quant = parts["act_quant"]
        return self._pack(act_quant(input), act_quant)


class QuantIdentity(QuantNonLinearActLayer):
    """Quantizes its input."""

    passthrough_act = True

    def __init__(
        self,
        act_quant: Quantizer | Default = DEFAULT,
        return_quant_tensor: bool = False,
        **kwargs: Unpack[ActLayerKeywords],
    ) -> None:
        """Build the quantizer.

        Args:
            act_quant: quantizer of the result: a class, another layer's proxy to share, or None; Int8ActPerTensorFloat where
                it isn't given.
            return_quant_tensor: return a quantized tensor rather than a tensor.
            **kwargs: names to bind anew in ``act_quant`` (with or without the prefix ``act_``).

        Raises:
            QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
        """
        super().__init__(act_quant, None, return_quant_tensor, **kwargs)


class QuantReLU(QuantNonLinearActLayer):
    """``max(x, 0)``, quantized."""

    act_impl = nn.ReLU
    passthrough_act = True
    default_act_quant = Uint8ActPerTensorFloat


class QuantHardTanh(QuantNonLinearActLayer):
    """``clamp(x, min_val, max_val)``, quantized; the quantizer's own range does the clipping.

    ``min_val`` and ``max_val`` are keywords that the default quantizer requires.
    """

    act_impl = nn.Hardtanh
    passthrough_act = True
    drop_act_when_quantized = True
    default_act_quant = Int8ActPerTensorFloatMinMaxInit


class QuantSigmoid(QuantNonLinearActLayer):
    """``1 / (1 + exp(-x))``, quantized."""

    act_impl = nn.Sigmoid
    default_act_quant = Uint8ActPerTensorFloat


class QuantTanh(QuantNonLinearActLayer):
    """``tanh(x)``, quantized."""

    act_impl = nn.Tanh


class QuantHardSwish(QuantNonLinearActLayer):
    """``x * clamp(x + 3, 0, 6) / 6``, which reaches -3/8, quantized with a sign."""

    act_impl = nn.Hardswish
