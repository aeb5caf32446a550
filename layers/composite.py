"""Layers made of other quantized layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from qframework.inject import QuantizerError
from qframework.layers.base import QuantLayer
from qframework.proxy import QuantProxy


class QuantComposite(QuantLayer):
    """Mixin: explains and prints the quantizers of all layers inside, by their path."""

    def _proxies(self) -> dict[str, QuantProxy]:
        return {
            name.removesuffix(".act_quant"): module
            for name, module in self.named_modules(remove_duplicate=False)
            if isinstance(module, QuantProxy)
        }

    def __repr__(self) -> str:
        lines = [
            f"{name.removesuffix('_quant')}: {proxy.summary()}"
            for name, proxy in self._proxies().items()
            if proxy.tensor_quant is not None
        ]
        return "\n  ".join([f"{type(self).__name__}({self.extra_repr()})", *lines])


def build_part(layer: nn.Module, name: str, part: Any, *arguments: Any, **options: Any) -> Any:
    """``part(*arguments, **options)``; an error says which part of which layer was being built."""
    try:
        return part(*arguments, **options)
    except QuantizerError as error:
        raise type(error)(f"{type(layer).__name__}.{name}: {error}") from error
