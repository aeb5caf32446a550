"""Contexts in which quantizers let values pass, so that a quantized model computes what the float one does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qframework.proxy import (
    ActQuantProxyFromInjector,
    BiasQuantProxyFromInjector,
    QuantProxy,
    WeightQuantProxyFromInjector,
)


@contextmanager
def with_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def quantizers_off(
    model: nn.Module, weights: bool = True, biases: bool = True, activations: bool = True
) -> Iterator[None]:
    """Let the quantizers of a kind pass values through, and layers return plain tensors.

    Args:
        model: holds quantized layers anywhere.
        weights: those of weights.
        biases: those of biases.
        activations: those of activations.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, QuantProxy):
                if isinstance(module, BiasQuantProxyFromInjector):
                    off = biases or (module.requires_input_scale and (activations or weights))
                elif isinstance(module, WeightQuantProxyFromInjector):
                    off = weights
                else:
                    off = activations and isinstance(module, ActQuantProxyFromInjector)
                if off and not module.disable_quant:
                    stack.enter_context(with_attribute(module, "disable_quant", True))
            elif getattr(module, "return_quant_tensor", False):
                stack.enter_context(with_attribute(module, "return_quant_tensor", False))
        yield


@contextmanager
def with_weights(originals: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Let parameters have other contents for a while; nothing that quantizers have learned follows them."""
    current = {p: p.detach().clone() for p in originals}
    with torch.no_grad():
        try:
            for p, original in originals.items():
                p.copy_(original)
            yield
        finally:
            for p, was in current.items():
                p.copy_(was)
