"""Layers made of other quantized layers."""

from __future__ import annotations

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
