"""Running a model up to one of its layers, to see what the layer is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qframework.graph.torch_transformers import without_fast_path
from qframework.quant_tensor import dequantize

#: Called with a layer and its input, a plain tensor, before the layer computes.
Seen = Callable[[nn.Module, Tensor], None]


@dataclass
class Call:
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Reached(Exception):
    """Ends a forward pass where it isn't needed any further."""


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The input of a layer, by place or by name."""
    if args:
        return args[0]
    return kwargs["input"] if "input" in kwargs else next(iter(kwargs.values()))


def quantized_input(layer: nn.Module, x: Any) -> Tensor:
    """What the layer multiplies its weight with: the input by its own input quantizer, as a plain tensor."""
    proxy: Any = layer._modules.get("input_quant")
    if proxy is not None and not proxy.is_idle:
        x = proxy(x)
    return dequantize(x)  # type: ignore[no-any-return]


@contextmanager
def watching(layers: list[nn.Module], seen: Seen) -> Iterator[None]:
    """Show the inputs of layers, for a while.

    Args:
        layers: which ones.
        seen: called before each call of one of them.
    """

    def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
        seen(layer, quantized_input(layer, first_input(args, kwargs)))

    with ExitStack() as stack:
        stack.enter_context(without_fast_path())  # which would read past the layers
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def call_with(model: Callable[..., Any], batch: Any) -> Any:
    """``model(*batch)`` for a tuple or a list, ``model(**batch)`` for a dict, both for a call, else ``model(batch)``."""
    if isinstance(batch, Call):
        return model(*batch.args, **batch.kwargs)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)
