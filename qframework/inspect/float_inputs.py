"""Layers with a quantized weight whose input is read past every quantizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.inspect.places import Place
from qframework.proxy import QuantProxy

#: Values of an input that are looked at; with fewer, nothing can be said.
_SAMPLE, _FEWEST = 4096, 1024


class FloatInputs:
    """Looks at the first input of layers that quantize their weight and not their input.

    Quantized to a few bits, many values have few different numbers; where more than half of a sample differ, they aren't quantized.

    Args:
        every: the quantized tensors of a model. Where no activation is quantized at all, nothing is looked at.
    """

    def __init__(self, every: list[Place]) -> None:
        self.names: list[str] = []
        self._seen: set[str] = set()
        weights = [p for p in every if p.tensor == "weight" and _takes_plain_input(p.owner)]
        acts = any(not p.is_parameter for p in every)
        self._handles: list[Any] = [
            p.owner.register_forward_pre_hook(self._hook(p.layer)) for p in weights if acts
        ]

    def _hook(self, layer: str) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args else None
            if layer in self._seen or not isinstance(x, Tensor) or not x.is_floating_point():
                return
            flat = x.detach().flatten()
            flat = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE]
            flat = flat[flat != 0]
            if flat.numel() >= _FEWEST:
                self._seen.add(layer)
                if flat.unique().numel() > flat.numel() / 2:
                    self.names.append(layer)

        return hook

    def close(self) -> None:
        """Stop looking."""
        for handle in self._handles:
            handle.remove()


def _takes_plain_input(layer: nn.Module) -> bool:
    proxy = layer._modules.get("input_quant")
    return isinstance(proxy, QuantProxy) and not proxy.is_quant_enabled
