"""Layers of a class derived from torch's that keep the forward of that class, with a quantized weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qframework.graph.function_kinds import FUNCTIONS
from qframework.graph.module_shells import shell
from qframework.graph.weight_forms import WeightIsQuantized
from qframework.layers.wbiol import QuantWeightBiasInputOutputLayer
from qframework.quant_tensor import dequantize

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Layers of which a derived class may keep its forward.
BASES: tuple[type[nn.Module], ...] = (nn.Embedding, nn.Linear, *_CONVOLUTIONS)


class OwnForward(WeightIsQuantized, QuantWeightBiasInputOutputLayer):
    """Mixin in front of a class derived from a torch layer: its forward reads a quantized weight."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Quantize the first argument, apply the forward of the class, quantize the result."""
        if args and not self.input_quant.is_idle:
            args = (dequantize(self.input_quant(args[0])), *args[1:])
        out = super(QuantWeightBiasInputOutputLayer, self).forward(*args, **kwargs)
        return self._pack(out if self.output_quant.is_idle else self.output_quant(out))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (type(self).__bases__[1],), self.__getstate__()


def with_own_forward(module: nn.Module, keywords: dict[str, Any]) -> nn.Module:
    """A layer of a module's class, that shares its parameters.

    Args:
        module: of a class derived from one of ``BASES``.
        keywords: those of a quantized layer, ``weight_quant`` and so on.
    """
    made: Any = shell(module)
    made.__class__ = _class_of(type(module))
    names = ("weight_quant", "bias_quant", "input_quant", "output_quant")
    given = dict(keywords)
    quantizers = [given.pop(n, None) for n in names]
    made._init_quant(*quantizers, False, given)
    return made  # type: ignore[no-any-return]


def reads_its_weight(module: Any) -> bool:
    """Whether the forward of a derived class computes with the weight itself, and not with something made of it.

    An embedding's does; for others it is tried on numbers.
    """
    if isinstance(module, nn.Embedding):
        return True
    weight = module._parameters.get("weight")
    if weight is None or weight.is_meta:
        return False
    shape: tuple[int, ...] = (2, weight.shape[1])
    if isinstance(module, _CONVOLUTIONS):
        shape = (
            2,
            module.in_channels,
            *(4 * k * d + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)),
        )
    seen = _Seen(weight)
    copied = shell(module).eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(), seen:
            copied(torch.zeros(shape, device=weight.device, dtype=weight.dtype))
    except Exception:  # whatever another class raises for such an input
        return False
    return seen.right and not seen.wrong


class _Seen(TorchFunctionMode):
    """Whether a weight goes into a product, and nowhere else."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.right, self.wrong = weight, False, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments."""
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()]
        if any(g is self.weight for g in given) and getattr(func, "__name__", "") != "__get__":
            if FUNCTIONS.get(func) in ("linear", "conv"):
                self.right = True
            else:
                self.wrong = True
        return func(*args, **kwargs)


def _class_of(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _CLASSES:
        _CLASSES[kind] = type(
            f"Quant{kind.__name__}", (OwnForward, kind), {"__module__": kind.__module__}
        )
    return _CLASSES[kind]


def _restored(kind: type[nn.Module]) -> nn.Module:
    made: nn.Module = object.__new__(_class_of(kind))
    return made
