"""The slots of a model that hold quantizers, and what is put into them for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from qframework.proxy import QuantProxy
from qframework.quant_tensor import dequantize


class Slot(NamedTuple):
    """A place of a module that holds a proxy.

    Attributes:
        name: qualified, ``"conv1.weight_quant"``.
        owner: the module.
        attribute: its name there.
        proxy: what it holds.
    """

    name: str
    owner: nn.Module
    attribute: str
    proxy: QuantProxy

    @property
    def layer(self) -> str:
        """Qualified name of the module."""
        return self.name.rpartition(".")[0]

    @property
    def tensor(self) -> str:
        """The tensor of the module that is quantized: ``"weight"``, ``"act"``, ..."""
        return self.attribute.removesuffix("_quant")


def slots_of(model: nn.Module) -> list[Slot]:
    """All slots whose proxies quantize, in the order of the modules."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, QuantProxy):
            continue
        for attribute, held in module._modules.items():
            if isinstance(held, QuantProxy) and held.is_quant_enabled:
                found.append(
                    Slot(f"{path}.{attribute}" if path else attribute, module, attribute, held)
                )
    return found


class InSlot(nn.Module):
    """Stands in a slot: answers to what a layer asks of a proxy, and says that each call has to see it.

    Args:
        slot: the place.
    """

    is_idle = False
    is_quant_enabled = True

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.__dict__["_slot"] = (slot,)  # in a tuple: the proxy is no part of the module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_slot"][0].proxy, name)

    @property
    def slot(self) -> Slot:
        """The place."""
        return self.__dict__["_slot"][0]  # type: ignore[no-any-return]

    def static(self, like: object) -> None:
        """None: recurrent cells then call the module at each step."""


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards all modes, and what proxies remember of their calls, are as before.

    Args:
        model: with all its modules; no ``train()`` is called, so that nothing that is frozen is thawed.
    """
    modules = list(model.modules())
    modes = [m.training for m in modules]
    remembered = [
        (m, {n: m.__dict__.get(n, _ABSENT) for n in _REMEMBERED})
        for m in modules
        if isinstance(m, QuantProxy)
    ]
    try:
        for m in modules:
            m.training = False
        yield
    finally:
        for m, mode in zip(modules, modes, strict=True):
            m.training = mode
        for proxy, values in remembered:
            for name, value in values.items():
                if value is _ABSENT:
                    proxy.__dict__.pop(name, None)
                else:
                    proxy.__dict__[name] = value


_ABSENT = object()
#: What a call writes to a proxy in evaluation.
_REMEMBERED = ("_input_scale", "_eval_checked", "_warned", "_looks_at_own")


@contextmanager
def replaced(slots: list[Slot], make: Callable[[Slot], nn.Module]) -> Iterator[None]:
    """Other modules in the slots; afterwards the proxies are back.

    Args:
        slots: the places; not the proxies, of which one may be in several.
        make: gives the module for a slot.
    """
    try:
        for slot in slots:
            slot.owner._modules[slot.attribute] = make(slot)
        yield
    finally:
        for slot in slots:
            slot.owner._modules[slot.attribute] = slot.proxy


@contextmanager
def plain_outputs(model: nn.Module) -> Iterator[None]:
    """A model whose quantized outputs are tensors of their values; its arguments keep their names."""
    own = vars(model).get("forward", _ABSENT)
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return dequantize(inner(*args, **kwargs))

    forward.__wrapped__ = inner  # type: ignore[attr-defined]
    try:
        object.__setattr__(model, "forward", forward)
        yield
    finally:
        if own is _ABSENT:
            vars(model).pop("forward", None)
        else:
            object.__setattr__(model, "forward", own)
