"""Modules around a layer that do something to its input or its output."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qframework.quant_tensor import dequantize


class ChannelFactor(nn.Module):
    """``x * factor``, a factor for each channel.

    Args:
        factor: ``(channels,)``.
        axis: of the channels in the input; negative ones count from the end.

    Attributes:
        weight: the factors.
    """

    def __init__(self, factor: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.weight = nn.Parameter(factor.detach().clone(), requires_grad=False)

    def extra_repr(self) -> str:
        """Settings."""
        return f"{self.weight.numel()}, axis={self.axis}"

    def forward(self, input: Any) -> Tensor:
        """Scale ``input``."""
        x = dequantize(input)
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return x * self.weight.reshape(shape)  # type: ignore[no-any-return]


class ChannelChoice(nn.Module):
    """The channels of the input that are named, in that order.

    Args:
        channels: integer indices, ``(count,)``; an index may occur more than once.
        axis: of the channels in the input.
    """

    channels: Tensor

    def __init__(self, channels: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("channels", channels)

    def extra_repr(self) -> str:
        """Settings."""
        return f"{self.channels.numel()}, axis={self.axis}"

    def forward(self, input: Any) -> Tensor:
        """Choose from ``input``."""
        return dequantize(input).index_select(self.axis, self.channels)  # type: ignore[no-any-return]


class InputChanged(nn.Module):
    """A layer behind a module that changes its input.

    Attributes:
        change: that module.
        layer: the layer.
    """

    def __init__(self, change: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.change, self.layer = change, layer

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer of the changed input."""
        return self.layer(self.change(input), *args, **kwargs)


class OutputChanged(nn.Module):
    """A module in front of one that changes its output.

    Attributes:
        layer: the module.
        change: what changes its output.
    """

    def __init__(self, layer: nn.Module, change: nn.Module) -> None:
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the change makes of the module's output."""
        return self.change(self.layer(*args, **kwargs))


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another one, wherever it stands."""
    for module in list(model.modules()):
        if module is new or module in new.modules():
            continue
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
