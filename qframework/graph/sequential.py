"""One call for what the contexts do layer by layer, each layer met once."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from qframework.graph.batches import Batches
from qframework.graph.block_execution import BlockExecution, planned_for_execution
from qframework.graph.block_plan import BlockPlan
from qframework.graph.layer_inputs import Call
from qframework.graph.node_execution import NodeExecution, calls_of_layer, traced_for_execution
from qframework.graph.tracing import Traced

Mode = TypeVar("Mode", bound=Any)


def quantize_in_order(mode: Mode, batches: Any, offload: bool | str | Path = False) -> Mode:
    """Run a layer-by-layer context over all layers.

    A model that torch.fx traces is run node by node, so that each layer is met once with all its inputs. Another one is run block
    by block, its blocks the parts of its ``nn.Sequential`` and ``nn.ModuleList`` modules, or, where that can't be, up to each of its
    layers in turn.

    Args:
        mode: not yet entered.
        batches: see :class:`~qframework.graph.batches.Batches`.
        offload: keep activations between layers on the CPU; a folder, for those between blocks, for memory-mapped files.
    """
    data = Batches(batches)
    model = mode.result
    traced = "" if mode.one_pass else traced_for_execution(model, data)
    plan = planned_for_execution(model, data) if traced and isinstance(traced, str) else ""
    with mode as run:
        if isinstance(traced, Traced):
            execution: Any = NodeExecution(
                model, traced, list(data), offload=bool(offload), **_how(run)
            )
            _run(run, execution)
        elif isinstance(plan, BlockPlan):
            _run(run, BlockExecution(model, plan, list(data), offload=offload, **_how(run)))
        elif run.one_pass:
            if run.num_layers:
                data.run(run.model)
                run.update()
        else:
            for _ in range(run.num_layers):
                data.run(run.model)
                run.update()
    return mode


def _how(mode: Any) -> dict[str, bool]:
    return {
        "with_float": mode.needs_float_inputs,
        "use_quant_activations": mode.use_quant_activations,
    }


def _run(mode: Any, execution: Any) -> None:
    visitor = Visitor(mode, execution.streams)
    execution.originals = mode.weight_orig
    execution.run(visitor, lambda: not visitor.remaining)
    mode.leave_unreached(visitor.remaining)


class Visitor:
    """Changes the layers of a module when it is met, in the order in which it calls them.

    Args:
        mode: entered.
        streams: how the module's calls come, see :class:`~qframework.graph.node_execution.Stream`.

    Attributes:
        remaining: layers that weren't met.
    """

    def __init__(self, mode: Any, streams: Any) -> None:
        self.mode, self.streams = mode, streams
        self.remaining: set[nn.Module] = set(mode.remaining)

    def __call__(self, unit: nn.Module, calls: list[list[Call]]) -> None:
        """Change the layers of a module that is called as told in each stream."""
        inside = [m for m in unit.modules() if m in self.remaining]
        if not calls[0]:
            return
        for layer in inside if len(inside) == 1 else _order(unit, inside, calls[0]):
            own = [
                calls_of_layer(unit, layer, c, s, self.mode.weight_orig)
                for c, s in zip(calls, self.streams, strict=True)
            ]
            if own[0]:
                self.remaining.discard(layer)
                self.mode.update_from(layer, *own)


def _order(unit: nn.Module, layers: list[nn.Module], calls: list[Call]) -> list[nn.Module]:
    """Several layers in the order in which a module calls them; those that no batch reaches aren't there."""
    order: dict[nn.Module, None] = {}
    with torch.no_grad(), ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_pre_hook(lambda m, _: order.setdefault(m))
            stack.callback(handle.remove)
        for call in calls:
            unit(*call.args, **call.kwargs)
            if len(order) == len(layers):
                break
    return list(order)
