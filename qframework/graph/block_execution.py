"""Running a model block by block, all batches through one before the next: what stands between blocks is run again for each.

A block's inputs are had by calling the model with the blocks before in place of whose forward stands what they gave. Results that
no later block needs are forgotten, so there are the activations of one place in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qframework.graph.activation_store import ActivationStore, moved
from qframework.graph.batches import Batches
from qframework.graph.block_plan import (
    BlockPlan,
    Unplannable,
    map_tensors,
    plan_blocks,
    tensors_in,
    unit_names,
)
from qframework.graph.layer_inputs import Call, Reached, call_with
from qframework.graph.layer_view import WEIGHTED
from qframework.graph.node_execution import Stream, Visit
from qframework.layers.base import QuantLayer


class BlockExecution:
    """Runs a planned model.

    Args:
        model: in evaluation mode.
        plan: its units.
        batches: at once in memory.
        with_float: run the float stream beside the quantized one.
        use_quant_activations: whether activations are quantized.
        offload: see :class:`~qframework.graph.activation_store.ActivationStore`.

    Attributes:
        originals: float contents of parameters that were changed, for the float stream.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: BlockPlan,
        batches: list[Any],
        with_float: bool = False,
        use_quant_activations: bool = True,
        offload: bool | str | Path = False,
    ) -> None:
        self.model, self.plan, self.batches = model, plan, batches
        count = len(batches)
        self.streams = [Stream(count, True, use_quant_activations, False)]
        if with_float:
            self.streams.append(Stream(count, False, False, False))
        self.store = ActivationStore(offload)
        self.originals: dict[nn.Parameter, Tensor] = {}
        self._kept: list[list[dict[int, Any]]] = [[{} for _ in batches] for _ in self.streams]

    @torch.no_grad()
    def run(self, visit: Visit, done: Callable[[], bool] = lambda: False) -> None:
        """Run all units.

        Args:
            visit: called before each unit with its module, and its calls in each stream.
            done: asked after each visit; True ends the run.
        """
        for place in range(len(self.plan.units)):
            calls = self.calls(place)
            visit(self.plan.units[place].module, [list(own.values()) for own in calls])
            if done():
                return
            self.compute(place, calls)

    @torch.no_grad()
    def calls(self, place: int) -> list[dict[int, Call]]:
        """For each stream what a unit is called with, by batches that reach it; the units before have been computed."""
        found = []
        for i, stream in enumerate(self.streams):
            with stream.set_up(self.model, {}):
                own = {b: self._call(i, b, place) for b in range(len(self.batches))}
            found.append({b: c for b, c in own.items() if c is not None})
        needed = self._needed(place + 1)
        for held in [h for kept in self._kept for h in kept]:
            for before in held:
                if before not in needed:
                    held[before] = map_tensors(_form, held[before])
        return found

    @torch.no_grad()
    def compute(
        self, place: int, calls: list[dict[int, Call]], streams: tuple[int, ...] = (0, 1)
    ) -> None:
        """Let all batches through a unit.

        Args:
            place: of the unit.
            calls: of :meth:`calls`.
            streams: which ones.
        """
        module = self.plan.units[place].module
        for i, stream in enumerate(self.streams):
            if i in streams:
                with stream.set_up(module, self.originals):
                    for b, call in calls[i].items():
                        output = module(*call.args, **call.kwargs)
                        here = moved(output, _device_of(self.batches[b]))
                        self._kept[i][b][place] = self.store.keep(here)

    @torch.no_grad()
    def outputs(self) -> list[list[Any]]:
        """For each stream the model's outputs, a batch each, when all units are done."""
        found = []
        for i, stream in enumerate(self.streams):
            with stream.set_up(self.model, {}):
                found.append([self._through(i, b, None) for b in range(len(self.batches))])
        return found

    def _needed(self, place: int) -> set[int]:
        """The units whose results a unit needs, or one behind it."""
        needed = set(self.plan.at_end)
        for unit in self.plan.units[place:]:
            needed |= unit.needs
        return needed

    def _call(self, stream: int, batch: int, place: int) -> Call | None:
        """What a unit is called with; None where a batch doesn't reach it."""
        module = self.plan.units[place].module
        found: list[Call] = []

        def see(*args: Any, **kwargs: Any) -> Any:
            found.append(Call(args, kwargs))
            raise Reached

        with _forward(module, see), suppress(Reached):
            self._through(stream, batch, place)
        return found[0] if found else None

    def _through(self, stream: int, batch: int, place: int | None) -> Any:
        """The model, with units that are done standing still."""
        held = self._kept[stream][batch]
        device = _device_of(self.batches[batch])
        before = self.plan.units if place is None else self.plan.units[:place]
        with _standing([u.module for u in before], held, device):
            return call_with(self.model, self.batches[batch])


def _form(t: Tensor) -> Tensor:
    """A tensor of the same shape and dtype without memory, NaN wherever it can be: what uses it is seen to be wrong."""
    empty = t.new_full((), float("nan")) if t.is_floating_point() else t.new_zeros(())
    return empty.expand(t.shape)


def _device_of(batch: Any) -> Any:
    return next((t.device for t in tensors_in(batch)), None)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@contextmanager
def _forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a while; hooks of the module aren't called."""
    own = vars(module)
    before = own.get("forward")
    own["forward"] = function
    try:
        yield
    finally:
        if before is None:
            own.pop("forward", None)
        else:
            own["forward"] = before


@contextmanager
def _standing(modules: list[nn.Module], held: dict[int, Any], device: Any) -> Iterator[None]:
    """Let modules give what is held of them; what the model writes into it isn't kept."""
    before = [(m, vars(m).get("forward")) for m in modules]

    def giving(place: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: map_tensors(_copied, moved(held[place], device))

    try:
        for place, module in enumerate(modules):
            if place in held:
                vars(module)["forward"] = giving(place)
        yield
    finally:
        for module, own in before:
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own


def _copied(t: Tensor) -> Tensor:
    return t if 0 in t.stride() else t.clone()


def planned_for_execution(
    model: nn.Module, batches: Batches, units: list[str] | None = None
) -> BlockPlan | str:
    """The units of a model that is to be run block by block, or why it can't be.

    Args:
        model: in evaluation mode.
        batches: the first one is run.
        units: their names; None for those of :func:`~qframework.graph.block_plan.unit_names`.
    """
    if batches.is_callable:
        return "the model is run by a callable"
    if isinstance(model, (QuantLayer, *WEIGHTED)):
        return "it is one layer"
    names = unit_names(model) if units is None else units
    hooked = [n for n in names if _has_hooks(model.get_submodule(n))]
    if hooked:
        return f"{hooked[0]} has hooks"
    first = next(iter(batches))
    try:
        plan = plan_blocks(model, lambda m: call_with(m, first), names)
    except Unplannable as reason:
        return str(reason)
    return plan if len(plan.units) > 1 else "it has no blocks"
