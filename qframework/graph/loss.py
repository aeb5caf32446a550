"""Penalties on learned bit widths: mean width, weighted by size or by operations.

Added to a task's loss they trade accuracy for bits. Each counts what passed since it was last set to zero, so that
it is read after the forward pass and set to zero after the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.bit_width import BitWidthParameter
from qframework.proxy import (
    ActQuantProxyFromInjector,
    QuantProxy,
    WeightQuantProxyFromInjector,
)
from qframework.quant_tensor import QuantTensor


class BitWidthWeighted:
    """Base: ``sum(bits * weight)`` over the calls of some modules of a model.

    Args:
        model: with learned bit widths (``bit_width_impl_type='parameter'``); other widths aren't counted.

    Raises:
        ValueError: nothing in the model has a learned width that this penalty counts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._hooks = []
        self.zero_accumulated_values()
        for name, module in model.named_modules():
            if self.counts(module):
                self._hooks.append(module.register_forward_hook(self._count_as(name)))
        if not self._hooks:
            raise ValueError(
                f"{type(self).__name__}: nothing in {type(model).__name__} has a learned bit width; give quantizers "
                "bit_width_impl_type='parameter'"
            )

    def counts(self, module: nn.Module) -> bool:
        """For subclasses: whether the module's results are counted."""
        raise NotImplementedError

    def weight(self, module: nn.Module, result: QuantTensor) -> float:
        """For subclasses: what the width of a result is multiplied by."""
        raise NotImplementedError

    def _count_as(self, name: str) -> Any:
        def count(module: nn.Module, inputs: Any, result: Any) -> None:
            if not isinstance(result, QuantTensor):
                return
            weight = self.weight(module, result)
            self._terms.append((name, result.bit_width, weight))  # type: ignore[attr-defined]

        return count

    def retrieve(self, as_average: bool = True) -> Tensor:
        """The penalty, 0-dim, differentiable in the bit widths.

        Args:
            as_average: divide by the sum of the weights: the mean width in bits.

        Raises:
            RuntimeError: nothing has passed since the last time it was set to zero.
        """
        if not self._terms:
            raise RuntimeError(
                f"{type(self).__name__}: no forward pass since the penalty was made or set to zero"
            )
        total = torch.stack([bits * weight for _, bits, weight in self._terms]).sum()
        return total / sum(weight for *_, weight in self._terms) if as_average else total

    def log(self) -> dict[str, float]:
        """The present width in bits of every module that was counted, by name."""
        return {name: float(bits.detach()) for name, bits, _ in self._terms}

    def zero_accumulated_values(self) -> None:
        """Forget what has passed."""
        self._terms: list[tuple[str, Tensor, float]] = []

    def remove_hooks(self) -> None:
        """Leave the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _learns_width(module: nn.Module) -> bool:
    return any(isinstance(m, BitWidthParameter) for m in module.modules())


class WeightBitWidthWeightedBySize(BitWidthWeighted):
    """Bits of weights, times their number: the size of the model. Arguments as in the base."""

    def counts(self, module: nn.Module) -> bool:
        """Weight quantizers of learned width."""
        return isinstance(module, WeightQuantProxyFromInjector) and _learns_width(module)

    def weight(self, module: nn.Module, result: QuantTensor) -> float:
        """The number of weights."""
        return float(result.value.numel())


class ActivationBitWidthWeightedBySize(BitWidthWeighted):
    """Bits of activations, times their number in a sample. Arguments as in the base."""

    def counts(self, module: nn.Module) -> bool:
        """Activation quantizers of learned width."""
        return isinstance(module, ActQuantProxyFromInjector) and _learns_width(module)

    def weight(self, module: nn.Module, result: QuantTensor) -> float:
        """The number of activations of a sample."""
        return float(result.value.numel()) / max(result.value.shape[0], 1)


class QuantLayerOutputBitWidthWeightedByOps(BitWidthWeighted):
    """Bits of a layer's accumulator, times its multiplications and additions for a sample.

    The layers have to return quantized tensors; the width of an accumulator follows from those of input and weight.
    Arguments as in the base.
    """

    def counts(self, module: nn.Module) -> bool:
        """Layers with a weight, and a learned width in one of their quantizers."""
        proxy = getattr(module, "weight_quant", None)
        return isinstance(proxy, QuantProxy) and _learns_width(module)

    def weight(self, module: nn.Module, result: QuantTensor) -> float:
        """Two operations a weight of a channel, for each element of the result."""
        weight: Any = module.weight
        channels = weight.shape[getattr(module, "output_channel_dim", 0)]
        elements = float(result.value.numel()) / max(result.value.shape[0], 1)
        return 2 * float(weight.numel()) / float(channels) * elements
