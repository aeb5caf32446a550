"""A layer that reduces the bits of what it is given."""

from __future__ import annotations

from typing import Any

from qframework.layers.base import QuantLayer, route_keywords
from qframework.proxy import Quantizer, TruncQuantProxyFromInjector, build_proxy
from qframework.quant_tensor import TensorLike
from qframework.quantizers.none import NoneTruncQuant
from qframework.quantizers.trunc import RoundTo8bit


class QuantTruncLayer(QuantLayer):
    """Mixin: a layer that truncates its result."""

    trunc_quant: TruncQuantProxyFromInjector

    def _init_trunc(
        self, trunc_quant: Quantizer, return_quant_tensor: bool, keywords: dict[str, Any]
    ) -> None:
        """The last step of a constructor."""
        self.return_quant_tensor = return_quant_tensor
        # A name such as trunc_scaling_impl_type is the quantizer's own.
        routed = route_keywords(self, keywords, ("trunc_quant_",), default="trunc_quant_")
        overrides = {
            n
            if n.startswith(("trunc_scaling", "trunc_int_scaling"))
            else n.removeprefix("trunc_"): v
            for n, v in routed["trunc_quant_"].items()
        }
        self.trunc_quant = build_proxy(  # type: ignore[assignment]
            self,
            "trunc_quant",
            trunc_quant,
            NoneTruncQuant,
            overrides,
            "",
            TruncQuantProxyFromInjector,
        )


class TruncQuantAccumulator(QuantTruncLayer):
    """Reduces the bits of an accumulator: shift, round, saturate.

    Args:
        trunc_quant: quantizer of the result: a class, another layer's proxy to share, or None.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor.
        **kwargs: names to bind anew in ``trunc_quant`` (with or without the prefix ``trunc_``).

    Raises:
        QuantizerError: the quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
    """

    def __init__(
        self, trunc_quant: Quantizer = RoundTo8bit, return_quant_tensor: bool = True, **kwargs: Any
    ) -> None:
        super().__init__()
        self._init_trunc(trunc_quant, return_quant_tensor, kwargs)

    def forward(self, input: TensorLike) -> Any:
        """Reduce the bits of ``input``.

        Args:
            input: quantized tensor of any shape.

        Raises:
            RuntimeError: ``input`` isn't quantized.
        """
        return self._pack(self.trunc_quant(input))

    def _remedy(self) -> str:
        return "Give trunc_quant=RoundTo8bit, or return_quant_tensor=False."
