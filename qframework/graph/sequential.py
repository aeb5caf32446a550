"""One call for what the contexts do layer by layer, each layer met once."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn

from qframework.graph.batches import Batches
from qframework.graph.node_execution import NodeExecution, calls_of_layer, traced_for_execution
from qframework.graph.tracing import Traced

Mode = TypeVar("Mode", bound=Any)


def quantize_in_order(mode: Mode, batches: Any, offload: bool = False) -> Mode:
    """Run a layer-by-layer context over all layers.

    A model that torch.fx traces is run node by node, so that each layer is met once with all its inputs; another one is run
    up to each of its layers in turn.

    Args:
        mode: not yet entered.
        batches: see :class:`~qframework.graph.batches.Batches`.
        offload: keep activations between layers on the CPU.
    """
    data = Batches(batches)
    model = mode.result
    traced = "" if mode.one_pass else traced_for_execution(model, data)
    with mode as run:
        if isinstance(traced, Traced):
            _node_by_node(run, model, traced, data, offload)
        elif run.one_pass:
            if run.num_layers:
                data.run(run.model)
                run.update()
        else:
            for _ in range(run.num_layers):
                data.run(run.model)
                run.update()
    return mode


def _node_by_node(
    mode: Any, model: nn.Module, traced: Traced, data: Batches, offload: bool
) -> None:
    execution = NodeExecution(
        model,
        traced,
        list(data),
        with_float=mode.needs_float_inputs,
        use_quant_activations=mode.use_quant_activations,
        offload=offload,
    )
    remaining = set(mode.remaining)

    def visit(unit: nn.Module, calls: Any) -> None:
        inside = [m for m in unit.modules() if m in remaining]
        while inside:
            layer = inside[0] if len(inside) == 1 else _first_called(unit, inside, calls[0][0])
            if layer is None:
                return
            inside.remove(layer)
            remaining.discard(layer)
            own = [
                calls_of_layer(unit, layer, c, s, execution.originals)
                for c, s in zip(calls, execution.streams, strict=True)
            ]
            mode.update_from(layer, *own)
            execution.originals = mode.weight_orig

    execution.run(visit, lambda: not remaining)
    mode.leave_unreached(remaining)


def _first_called(unit: nn.Module, layers: list[nn.Module], call: Any) -> nn.Module | None:
    """Which of several layers a module calls first."""
    order: list[nn.Module] = []
    with torch.no_grad(), ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_pre_hook(lambda m, _: order.append(m))
            stack.callback(handle.remove)
        unit(*call.args, **call.kwargs)
    return order[0] if order else None
