"""Modules whose own calls of functions are quantized, by a function mode around their forward."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qframework.graph.function_calls import without_place
from qframework.graph.function_kinds import FUNCTIONS, INPUT_ALONE, operands_of
from qframework.graph.tracing import Site, call_site
from qframework.layers import QuantIdentity
from qframework.quant_tensor import dequantize

_CALL = nn.Module._call_impl.__code__
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class QuantSum(QuantIdentity):
    """``input + other``, both quantized by one scale, which is that of all their elements together."""

    def forward(self, input: Tensor, other: Any = None) -> Any:  # type: ignore[override]
        """Add two tensors of one shape, with at least one axis."""
        both = dequantize(super().forward(torch.cat((input, other))))
        first, second = both.split(input.shape[0])
        return first + second


class QuantConcatenation(QuantIdentity):
    """``torch.cat``, the tensors quantized by one scale, which is that of all their elements together."""

    def forward(self, input: Any, dim: int = 0) -> Any:
        """Join tensors along an axis."""
        return dequantize(super().forward(torch.cat(input, dim)))


class QuantizedFunctions(nn.Module):
    """Mixin: functions that the forward calls go through quantized layers, which the module holds.

    Attributes:
        function_layers: by the place in code, names in ``quantized_functions``.
    """

    function_layers: dict[tuple[str, Site], str]
    quantized_functions: nn.ModuleDict

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with its functions quantized; compilers leave it to Python."""
        with _Quantizing(self):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (type(self).__bases__[1],), self.__getstate__()


_FORWARD = QuantizedFunctions.forward.__wrapped__.__code__  # type: ignore[attr-defined]


def with_functions(
    module: Any, layers: dict[str, nn.Module], places: dict[tuple[str, Site], str]
) -> None:
    """Let a module quantize its functions.

    Args:
        module: whose class is derived from its own.
        layers: what stands for the functions, by name.
        places: which of them is for a kind of function at a place in code.
    """
    module.__class__ = _class_of(type(module))
    module.function_layers = places
    module.quantized_functions = nn.ModuleDict(layers)


def _class_of(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _CLASSES:
        _CLASSES[kind] = type(
            kind.__name__, (QuantizedFunctions, kind), {"__module__": kind.__module__}
        )
    return _CLASSES[kind]


def _restored(kind: type[nn.Module]) -> nn.Module:
    made: nn.Module = object.__new__(_class_of(kind))
    return made


class _Quantizing(TorchFunctionMode):
    """Sends the calls of one module to its layers, and leaves those of others alone."""

    def __init__(self, owner: QuantizedFunctions) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the layer for this place in code, or the function where there is none."""
        kwargs = kwargs or {}
        kind = FUNCTIONS.get(func)
        if kind is None or _innermost() is not self.owner:
            return func(*args, **kwargs)
        site = call_site()
        kind = without_place(kind, site)
        name = self.owner.function_layers.get((kind, site))
        operands = operands_of(kind, args, kwargs)
        if name is None or not all(
            isinstance(o, Tensor) and o.is_floating_point() for o in operands
        ):
            return func(*args, **kwargs)
        if kind == "add" and (len(args) + len(kwargs) > 2 or not _addends(*operands)):
            return func(*args, **kwargs)
        if not any(o.numel() for o in operands):  # an empty cache
            return func(*args, **kwargs)
        layer = self.owner.quantized_functions[name]
        if kind in INPUT_ALONE:
            return func(
                layer(operands[0]), *args[1:], **{k: v for k, v in kwargs.items() if k != "input"}
            )
        if kind == "cat":
            dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            return layer(operands, dim)
        if kind == "scaled_dot_product_attention":
            return layer(*args, **kwargs)
        return layer(*operands)


def _addends(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.dim() > 0


def _innermost() -> Any:
    """The module whose forward is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL or frame.f_code is _FORWARD:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None
