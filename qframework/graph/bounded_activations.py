"""Activations that are linear up to a bound, and how near to it a sample comes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qframework.graph.evaluating import evaluating
from qframework.graph.layer_inputs import Call
from qframework.graph.node_execution import NodeExecution
from qframework.graph.tracing import Traced

RELU6_TOP = 6.0
RELU6_FUNCTIONS: frozenset[Any] = frozenset({F.relu6})


def is_relu6(module: nn.Module) -> bool:
    """Whether a module is a ReLU that is bounded by 6."""
    if isinstance(module, nn.Hardtanh):  # nn.ReLU6 is one
        return module.min_val == 0.0 and module.max_val == RELU6_TOP
    return False


@torch.no_grad()
def largest_inputs(
    model: nn.Module, traced: Traced, example_input: tuple[Any, ...]
) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """For each call of a ReLU6 the largest inputs on a sample along the second axis and along the last one: of its channels.

    Args:
        model: run in evaluation mode, as it is otherwise.
        traced: its graph.
        example_input: arguments of the model.
    """
    wanted = {
        n
        for n in traced.graph.nodes
        if n.target in RELU6_FUNCTIONS or ((m := traced.called(n)) is not None and is_relu6(m))
    }
    found: dict[fx.Node, tuple[Tensor, Tensor]] = {}
    if not wanted or not example_input:
        return found
    with evaluating(model):
        execution = NodeExecution(model, traced, [Call(example_input, {})])
        execution.look = lambda node, given: _note(found, node, given) if node in wanted else None
        execution.run(lambda module, calls: None)
    return found


def _note(found: dict[fx.Node, tuple[Tensor, Tensor]], node: fx.Node, given: Call) -> None:
    x = given.args[0] if given.args else next(iter(given.kwargs.values()))
    if isinstance(x, Tensor) and x.dim() >= 2:
        second, last = (x.movedim(axis, 0).flatten(1).amax(dim=1) for axis in (1, -1))
        found[node] = (second, last)
