"""Operations on several tensors that share a quantizer, so that their integers are on one grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qframework.inject import UnknownNameError
from qframework.layers.base import QuantLayer, route_keywords
from qframework.proxy import ActQuantProxyFromInjector, Quantizer, build_proxy, sharing
from qframework.proxy.naming import qualified_name
from qframework.quant_tensor import QuantTensor, TensorLike, dequantize
from qframework.quantizers.none import NoneActQuant
from qframework.quantizers.scaled_int import Int8ActPerTensorFloat


class _QuantOperation(QuantLayer):
    """Base: quantize the operands, operate, quantize the result."""

    input_quant: ActQuantProxyFromInjector
    output_quant: ActQuantProxyFromInjector

    def _init_operands(
        self, quantizers: dict[str, Any], return_quant_tensor: bool, keywords: dict[str, Any]
    ) -> None:
        """The last step of a constructor: a proxy ``{name}_quant`` for each quantizer."""
        self.return_quant_tensor = return_quant_tensor
        routed = route_keywords(self, keywords, [f"{n}_" for n in quantizers])
        with sharing(quantizers.values()):
            for name, quantizer in quantizers.items():
                proxy = build_proxy(
                    self,
                    f"{name}_quant",
                    quantizer,
                    NoneActQuant,
                    routed[f"{name}_"],
                    f"{name}_",
                    ActQuantProxyFromInjector,
                )
                self.add_module(f"{name}_quant", proxy)

    def _finish(self, operation: Any, operands: Sequence[Any]) -> Any:
        """Operate on quantized tensors where they are asked for and nothing quantizes the result, else on values."""
        if self.output_quant.is_idle and self.return_quant_tensor:
            return self._pack(operation(*operands))
        return self._pack(self.output_quant(operation(*(dequantize(o) for o in operands))))

    def _remedy(self) -> str:
        return "Give input_quant and output_quant (Int8ActPerTensorFloat), or return_quant_tensor=False."


class _QuantEltwise(_QuantOperation):
    """One quantizer for all operands.

    Args:
        input_quant: quantizer of the operands: a class, another layer's proxy to share, or None.
        output_quant: quantizer of the result: a class, a proxy to share, or None.
        tie_input_output_quant: the operands take the very quantizer of the result.
        return_quant_tensor: return a quantized tensor rather than a tensor.
        **kwargs: names to bind anew in a quantizer, prefixed ``input_``, ``output_``.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
    """

    def __init__(
        self,
        input_quant: Quantizer = Int8ActPerTensorFloat,
        output_quant: Quantizer = Int8ActPerTensorFloat,
        tie_input_output_quant: bool = False,
        return_quant_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not tie_input_output_quant:
            quantizers = {"input": input_quant, "output": output_quant}
            self._init_operands(quantizers, return_quant_tensor, kwargs)
            return
        lost = next((k for k in kwargs if k.startswith("input_")), None)
        if lost is not None:
            raise UnknownNameError(
                f"{type(self).__name__}: {lost} has no effect, the operands have the quantizer of the result; give "
                f"output_{lost.removeprefix('input_')}"
            )
        self._init_operands({"output": output_quant}, return_quant_tensor, kwargs)
        self.input_quant = self.output_quant


class QuantEltwiseAdd(_QuantEltwise):
    """``input + other``; arguments of the constructor as for :class:`QuantCat`."""

    def forward(self, input: TensorLike, other: Any) -> Any:
        """Add two tensors, float or quantized, of shapes that broadcast.

        Raises:
            RuntimeError: a quantized result without quantizers, of tensors on different grids.
        """
        return self._finish(torch.add, (self.input_quant(input), self.input_quant(other)))


class QuantEltwiseMul(_QuantEltwise):
    """``input * other``; arguments of the constructor as for :class:`QuantCat`."""

    def forward(self, input: TensorLike, other: Any) -> Any:
        """Multiply two tensors, float or quantized, of shapes that broadcast."""
        return self._finish(torch.mul, (self.input_quant(input), self.input_quant(other)))


class QuantCat(_QuantEltwise):
    """Concatenation of tensors on one grid.

    Args:
        input_quant: quantizer of the operands: a class, another layer's proxy to share, or None.
        output_quant: quantizer of the result: a class, a proxy to share, or None.
        tie_input_output_quant: the operands take the very quantizer of the result.
        return_quant_tensor: return a quantized tensor rather than a tensor.
        **kwargs: names to bind anew in a quantizer, prefixed ``input_``, ``output_``.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
    """

    def forward(self, tensor_list: Sequence[Any], dim: int = 1) -> Any:
        """Join tensors, float or quantized, along ``dim``.

        Raises:
            TypeError: one tensor instead of several.
            RuntimeError: a quantized result without quantizers, of tensors on different grids.
        """
        if isinstance(tensor_list, (torch.Tensor, QuantTensor)):
            raise TypeError(
                f"{qualified_name(self)}: needs a list of tensors to join, got one {type(tensor_list).__name__} of "
                f"shape {tuple(tensor_list.shape)}"
            )
        operands = [self.input_quant(t) for t in tensor_list]
        # dynamo sees quantized tensors in lists, but not in tuples
        return self._finish(lambda *t: torch.cat(list(t), dim), operands)


class QuantMatMul(_QuantOperation):
    """``torch.matmul(input, other)`` with a quantizer for each operand.

    Args:
        input_quant: quantizer of the first operand: a class, another layer's proxy to share, or None.
        other_quant: quantizer of the second: a class, a proxy to share, or None.
        output_quant: quantizer of the result: a class, a proxy to share, or None.
        return_quant_tensor: return a quantized tensor rather than a tensor.
        **kwargs: names to bind anew in a quantizer, prefixed ``input_``, ``other_``, ``output_``.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
    """

    other_quant: ActQuantProxyFromInjector

    def __init__(
        self,
        input_quant: Quantizer = Int8ActPerTensorFloat,
        other_quant: Quantizer = Int8ActPerTensorFloat,
        output_quant: Quantizer = None,
        return_quant_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        quantizers = {"input": input_quant, "other": other_quant, "output": output_quant}
        self._init_operands(quantizers, return_quant_tensor, kwargs)

    def forward(self, input: TensorLike, other: Any) -> Any:
        """Multiply two matrices, or batches of them, float or quantized."""
        return self._finish(torch.matmul, (self.input_quant(input), self.other_quant(other)))
