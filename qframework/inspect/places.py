"""Where the quantized tensors of a model are, and what their layers are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from qframework.inject.errors import did_you_mean
from qframework.proxy import QuantProxy

#: What the model itself is called.
WHOLE = "(the model)"


class LayerNameError(KeyError, ValueError):
    """A layer that isn't there."""

    def __str__(self) -> str:
        return str(self.args[0])


Found = TypeVar("Found")


def named(found: Mapping[str, Found], name: str, missing: str) -> Found:
    """What a name stands for.

    Args:
        found: by name.
        name: that is asked for.
        missing: what is said where there is no such name, with ``{name}`` in it.

    Raises:
        LayerNameError: there is none; the message names the nearest.
    """
    if name not in found:
        raise LayerNameError(f"{missing.format(name=repr(name))}{did_you_mean(name, found)}")
    return found[name]


@dataclass(frozen=True)
class Place:
    """One tensor of a layer that a quantizer is for.

    Attributes:
        layer: name of the layer in the model.
        tensor: ``weight``, ``bias``, ``input``, ``output``, ``act`` and so on.
        proxy: the module that quantizes it.
        owner: the layer.
    """

    layer: str
    tensor: str
    proxy: Any
    owner: nn.Module

    @property
    def name(self) -> str:
        """Layer and tensor, ``"conv1.weight"``."""
        return f"{self.layer}.{self.tensor}"

    @property
    def is_parameter(self) -> bool:
        """Whether it is a weight or a bias."""
        return hasattr(self.proxy, "tracked_parameter_list")

    def before(self, args: tuple[Any, ...]) -> Tensor | None:
        """The values in front of the quantizer, behind its activation function; None for what isn't a tensor."""
        x = args[0] if args else None
        if x is not None and not isinstance(x, Tensor):
            x = getattr(x, "value", None)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return None
        activation = getattr(self.proxy, "activation_impl", None)
        dropped = getattr(self.proxy, "drops_activation", False) and not self.proxy.observer_only
        return x.detach() if activation is None or dropped else activation(x.detach())


def places(model: nn.Module, layers: list[str] | None = None) -> list[Place]:
    """The quantized tensors of a model, in the order of its modules; a shared quantizer once.

    Args:
        model: holds quantized layers anywhere.
        layers: only of these, and what is inside them.

    Raises:
        LayerNameError: a layer that isn't there, or has no quantizer.
        ValueError: the model has no quantizer that is on.
    """
    modules = dict(model.named_modules())
    found = []
    for path, module in modules.items():
        if not isinstance(module, QuantProxy) or not module.is_quant_enabled:
            continue
        parent, _, attribute = path.rpartition(".")
        found.append(
            Place(parent or WHOLE, attribute.removesuffix("_quant"), module, modules[parent])
        )
    if not found:
        raise ValueError(
            f"{type(model).__name__} quantizes nothing: there is no quantizer in it, or all are off (disable_quant). "
            "quantize_model makes a quantized model of a float one"
        )
    if layers is None:
        return found
    for name in layers:
        check_layer(model, name)
        if not any(_within(p.layer, name) for p in found):
            raise LayerNameError(
                f"{name!r} is a {type(modules[name]).__name__} that quantizes nothing"
            )
    return [p for p in found if any(_within(p.layer, n) for n in layers)]


def _within(layer: str, name: str) -> bool:
    return name in ("", WHOLE) or layer == name or layer.startswith(f"{name}.")


def check_layer(model: nn.Module, name: str) -> nn.Module:
    """The layer of a name.

    Raises:
        LayerNameError: there is none.
    """
    modules: dict[str, nn.Module] = {n or WHOLE: m for n, m in model.named_modules()}
    if name in modules:
        return modules[name]
    if name == "":
        return model
    layers = [n for n, m in modules.items() if not isinstance(m, QuantProxy)]
    raise LayerNameError(
        f"{type(model).__name__} has no layer {name!r}{did_you_mean(name, layers)}"
    )
