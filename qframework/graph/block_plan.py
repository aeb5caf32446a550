"""The units that a model is run by, one after the other, and what each one needs of those before."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qframework.graph.layer_view import WEIGHTED
from qframework.proxy import QuantProxy


@dataclass
class Unit:
    """A module that is run as a whole.

    Attributes:
        name: in the model.
        module: itself.
        needs: places of the units before whose results its inputs are made of.
    """

    name: str
    module: nn.Module
    needs: set[int] = field(default_factory=set)


@dataclass
class BlockPlan:
    """Units in the order in which a model calls them.

    Attributes:
        units: the ones that are called.
        at_end: places of those that the model's output is made of.
        unreached: names of units that aren't called.
    """

    units: list[Unit]
    at_end: set[int]
    unreached: list[str]


def block_names(model: nn.Module) -> list[str]:
    """The parts of a model's outermost ``nn.Sequential`` and ``nn.ModuleList`` modules."""
    found = [
        f"{n}.{child}" if n else child
        for n, m in model.named_modules()
        if isinstance(m, (nn.Sequential, nn.ModuleList))
        for child in m._modules
    ]
    return [n for n in found if not any(n.startswith(o + ".") for o in found)]


def unit_names(model: nn.Module) -> list[str]:
    """Blocks, and beside them the outermost modules that hold numbers, quantizers or weighted layers."""
    inside = block_names(model)
    found: list[str] = []

    def descend(name: str, module: nn.Module) -> None:
        for child, part in module._modules.items():
            full = f"{name}.{child}" if name else child
            if part is None:
                continue
            if full in inside:
                found.append(full)
            elif any(b.startswith(full + ".") for b in inside):
                descend(full, part)
            elif isinstance(part, WEIGHTED) or _holds_numbers(part):
                found.append(full)

    descend("", model)
    return found


def _holds_numbers(module: nn.Module) -> bool:
    held = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
    return held or any(isinstance(m, QuantProxy) for m in module.modules())


class Unplannable(Exception):
    """A model that can't be run unit by unit; the message says why."""


@torch.no_grad()
def plan_blocks(
    model: nn.Module, run: Callable[[nn.Module], Any], units: list[str] | None = None
) -> BlockPlan:
    """Run a model once, and see in which order its units are called and which results are used where.

    Args:
        model: in evaluation mode; may be on the ``meta`` device.
        run: calls it with one batch.
        units: names of units; None for :func:`unit_names`.

    Raises:
        Unplannable: a unit is called twice, changes its inputs, or is called within another one.
    """
    names = {model.get_submodule(n): n for n in units or unit_names(model)}
    watch = _Watch(names)
    with watch.on():
        output = run(model)
    return BlockPlan(
        watch.units,
        watch.sources_of(output) | watch.decided,
        [n for m, n in names.items() if m not in watch.places],
    )


class _Watch(TorchDispatchMode):
    """Follows which results of units each tensor is made of."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.names = names
        self.units: list[Unit] = []
        self.places: dict[nn.Module, int] = {}
        self.decided: set[int] = set()
        self._depth = 0
        self._made: dict[int, tuple[weakref.ref[Tensor], set[int]]] = {}
        self._before: list[tuple[Tensor, int]] = []

    @contextmanager
    def on(self) -> Iterator[None]:
        handles = []
        for module in self.names:
            handles.append(module.register_forward_pre_hook(self._enters, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaves, with_kwargs=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enters(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._depth:
            raise Unplannable(f"{self.names[module]} is called within another block")
        if module in self.places:
            raise Unplannable(f"{self.names[module]} is called several times")
        self.places[module] = len(self.units)
        needs = self.sources_of((args, kwargs)) | self.decided
        self.units.append(Unit(self.names[module], module, needs))
        self._before = [(t, t._version) for t in tensors_in((args, kwargs)) if not t.is_inference()]
        self._depth += 1

    def _leaves(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._depth -= 1
        if any(t._version != version for t, version in self._before):
            raise Unplannable(f"{self.names[module]} changes its inputs in place")
        self._before = []
        for t in tensors_in(output):
            self._note(t, {self.places[module]})

    def _note(self, t: Tensor, sources: set[int]) -> None:
        self._made[id(t)] = (weakref.ref(t), sources)

    def sources_of(self, what: Any) -> set[int]:
        """The units whose results tensors are made of."""
        found: set[int] = set()
        for t in tensors_in(what):
            known = self._made.get(id(t))
            if known is not None and known[0]() is t:
                found |= known[1]
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self._depth:
            sources = self.sources_of((args, kwargs or {}))
            if sources:
                if not tensors_in(output):  # a number that the model may decide by
                    self.decided |= sources
                for t in tensors_in(output):
                    self._note(t, sources)
        return output


def tensors_in(what: Any) -> list[Tensor]:
    """All tensors of nested arguments or results."""
    return [t for t in pytree.tree_leaves(what) if isinstance(t, Tensor)]


def map_tensors(function: Callable[[Tensor], Tensor], what: Any) -> Any:
    """Nested arguments or results with other tensors."""
    return pytree.tree_map(lambda t: function(t) if isinstance(t, Tensor) else t, what)
